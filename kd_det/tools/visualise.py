"""``python -m kd_det visualise``: what student and teacher see of an image, side by side."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from detectron2.config import CfgNode
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from kd_det.build import build_items, network_config, project_defaults
from kd_det.classes import dataset_classes
from kd_det.config import student_config
from kd_det.detectors import TapShape, describe, probe
from kd_det.registry import SOURCES, did_you_mean
from kd_det.sources import STUDENT, Peer, ScriptedTeacher
from kd_det.sources.model_config import default_test_mapper
from kd_det.taps import ROWS, Recorder
from kd_det.tools.options import (
    add_command,
    add_run_arguments,
    made_folder,
    read_pixels,
    run_config,
    trained_network,
)


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "visualise",
        "draw feature maps and detections of student and teacher side by side",
        takes="a training's folder, or a config and a checkpoint; and images. Every detector gets "
        "them resized and normalised as in its own evaluation.",
        gives="a PNG. A row for the student and one for each source of the config: detections on "
        "the image, and the map at each level (mean over the channels of the absolute value, from "
        "its smallest cell, dark, to its largest). Without distillation: the student alone.",
        example="--run output/distilled --images a.jpg b.jpg --output maps.png",
    )
    parser.add_argument(
        "--images", required=True, nargs="+", metavar="FILE", help="what to look at"
    )
    parser.add_argument("--output", required=True, metavar="PNG", help="the picture")
    parser.add_argument(
        "--tap",
        default="features",
        help="what to draw, of all of them; python -m kd_det taps lists what there is (default: "
        "features)",
    )
    parser.add_argument(
        "--levels", nargs="+", default=[], metavar="LEVEL", help="of the student (default: all)"
    )
    parser.add_argument(
        "--score", type=float, default=0.5, help="least score of a detection (default: 0.5)"
    )
    add_run_arguments(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class View:
    """
    One row of the picture.

    Attributes:
        name: what stands beside it.
        model: a trained detector in eval mode.
        mapper: from ``{"file_name": ...}`` to the model's input.
        classes: what its classes are called; empty where that is unknown.
        shapes: of the tap, level by level.
    """

    name: str
    model: nn.Module
    mapper: Callable[[dict[str, Any]], Any]
    classes: Sequence[str]
    shapes: list[TapShape]


def run(args: argparse.Namespace) -> None:
    """Load, draw, write."""
    made_folder(Path(args.output).parent)
    if Path(args.output).is_dir():
        raise ValueError(f"--output {args.output} is a folder: name a file in it, maps.png say.")
    found = views(run_config(args), args.tap)
    draw(found, args.images, args.tap, _levels(found[0], args.levels), args.score, args.output)
    print(f"{args.output}: {', '.join(view.name for view in found)}")


def views(cfg: CfgNode, tap: str) -> list[View]:
    """
    The student and the sources of a config.

    Args:
        cfg: its ``MODEL.WEIGHTS`` are the trained student's.
        tap: is measured of each.

    Raises:
        ValueError: if a source is no detector, the tap gives no maps, or weights are missing.
        KeyError: if a detector has no such tap.
    """
    datasets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    plain = student_config(cfg)
    mapper = default_test_mapper(plain, cfg.INPUT.FORMAT)
    classes = next(filter(None, map(dataset_classes, datasets)), ())
    found = [_view(STUDENT, trained_network(cfg, STUDENT), mapper, classes, tap)]
    nodes = cfg.KD.SOURCES if cfg.KD.ENABLED else {}
    offered = {"defaults": project_defaults(cfg), "student_config": plain.dump()}
    sources = build_items(nodes, SOURCES, "KD.SOURCES", **offered)
    for name, source in sources.items():
        if isinstance(source, Peer):
            own = network_config(cfg, name)
            mapper = default_test_mapper(own, own.INPUT.FORMAT)
            found.append(_view(name, trained_network(cfg, name), mapper, classes, tap))
            continue
        if isinstance(source, ScriptedTeacher) or not hasattr(source, "detector"):
            raise ValueError(
                f"KD.SOURCES.{name.upper()} is a {type(source).__name__}, which is no detector "
                "that looks at an image by itself: leave it out with "
                f"KD.SOURCES.{name.upper()}.ENABLED False."
            )
        source.to(cfg.MODEL.DEVICE)
        found.append(
            _view(name, source.detector(), source.test_mapper(), source.class_names or (), tap)
        )
    return found


def _view(name: str, model: nn.Module, mapper: Any, classes: Sequence[str], tap: str) -> View:
    resolved = describe(model).tap(tap)
    if resolved.kind in ROWS:
        raise ValueError(
            f"--tap {tap} gives rows, one per region of interest: take one that gives maps."
        )
    return View(name, model, mapper, classes, probe(model, [resolved])[tap])


def _levels(student: View, asked: list[str]) -> list[TapShape]:
    known = {shape.level: shape for shape in student.shapes}
    for level in asked:
        if level not in known:
            raise ValueError(
                f"--levels: the student has no level '{level}'.{did_you_mean(level, known)} Its "
                f"levels are {', '.join(known)}."
            )
    return [known[level] for level in asked] or student.shapes


def look(view: View, file: str, tap: str) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """
    What a detector predicts and what its maps are.

    Args:
        view: the detector.
        file: an image.
        tap: name of the tap.

    Returns:
        The prediction in the image's own pixels, and by stride ``(H, W)`` pictures of the maps,
        without the padding: mean over the channels of the absolute value.

    """
    inputs = view.mapper({"file_name": file})
    detector, resolved = describe(view.model), describe(view.model).tap(tap)
    dtype = next(view.model.parameters()).dtype
    with torch.no_grad():
        with Recorder(view.model, [resolved]) as recorder:
            detector.run_batch([inputs], [resolved], partial(Tensor.to, dtype=dtype))
        # Taken before the prediction, which changes logits in place.
        maps = recorder.maps(resolved)
        height, width = inputs["image"].shape[-2:]
        pictures = {}
        for shape in view.shapes:
            x = maps[shape.level][0]  # (C, H, W)
            inside = x[:, : -(-height // shape.stride), : -(-width // shape.stride)]
            pictures[shape.stride] = inside.float().abs().mean(0).cpu().numpy()
        return view.model([inputs])[0], pictures


def draw(
    found: Sequence[View],
    files: Sequence[str],
    tap: str,
    levels: Sequence[TapShape],
    least: float,
    output: str,
) -> None:
    """
    Draw the rows of every image, one below the other.

    Args:
        found: the student first.
        files: images.
        tap: name of the tap.
        levels: of the student; another detector shows its level of the same stride.
        least: score of a detection that is shown.
        output: the PNG.

    Raises:
        FileNotFoundError: if there is no such image.
        ValueError: if a file is no image.
    """
    rows, columns = len(files) * len(found), 1 + len(levels)
    images = [read_pixels(file, "RGB") for file in files]
    shape = images[0].shape
    size = (2.6 * columns, 2.6 * rows * shape[0] / shape[1] + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for i, (file, pixels) in enumerate(zip(files, images, strict=True)):
        h, w = pixels.shape[:2]
        for view, line in zip(found, axes[i * len(found) :], strict=False):
            prediction, pictures = look(view, file, tap)
            line[0].imshow(pixels)
            _draw_prediction(line[0], prediction, view.classes, least)
            line[0].set_ylabel(view.name)
            for ax, level in zip(line[1:], levels, strict=True):
                if level.stride in pictures:
                    ax.imshow(pictures[level.stride], extent=(0, w, h, 0), interpolation="nearest")
            for ax in line:
                ax.set_xticks([])
                ax.set_yticks([])
    axes[0][0].set_title(f"detections of {least:g} and above", fontsize=9)
    for ax, level in zip(axes[0][1:], levels, strict=True):
        ax.set_title(f"{tap} {level.level}, 1/{level.stride}", fontsize=9)
    figure.tight_layout()
    figure.savefig(output, dpi=90, format="png")
    plt.close(figure)


def _draw_prediction(
    ax: Axes, prediction: dict[str, Any], classes: Sequence[str], least: float
) -> None:
    if "instances" not in prediction:
        if "sem_seg" in prediction:
            pixels = prediction["sem_seg"].argmax(0).cpu().numpy()
            shown = np.ma.masked_equal(pixels % 10, 0)
            ax.imshow(shown, cmap="tab10", vmin=0, vmax=9, alpha=0.6, interpolation="nearest")
        return
    instances = prediction["instances"].to("cpu")
    kept = instances[instances.scores >= least]
    boxes, labels = kept.pred_boxes.tensor.tolist(), kept.pred_classes.tolist()
    for (x0, y0, x1, y1), label, score in zip(boxes, labels, kept.scores.tolist(), strict=True):
        color = f"C{label % 10}"
        ax.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=2)
        )
        name = classes[label] if label < len(classes) else f"class {label}"
        style: dict[str, Any] = {"color": "white", "fontsize": 6, "clip_on": True}
        style["bbox"] = {"facecolor": color, "edgecolor": "none", "pad": 1}
        ax.text(x0, y0, f"{name} {score:.2f}", **style)
