"""``python -m kd_det export``: the trained student as files that need nothing of kd_det."""

import argparse
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from kd_det._compat import tracing_adapter
from kd_det.build import network_config
from kd_det.tools.options import (
    add_command,
    add_run_arguments,
    made_folder,
    read_pixels,
    run_config,
    trained_network,
)

FORMATS = {"torchscript": ".ts", "onnx": ".onnx"}
"""What a student can be traced to, and how the file's name ends."""

_OPSET = 16
_NEAR = 1e-3  # relative and absolute: of scores, and of boxes in pixels


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "export",
        "write a trained student as plain Detectron2 files, TorchScript or ONNX",
        takes="a training's folder, or a config and a checkpoint.",
        gives="model.pth (the student's weights alone) and student.yaml, which stock Detectron2 "
        "evaluates; with --format also model.ts or model.onnx, traced by Detectron2's own "
        "TracingAdapter: image (3, H, W) in, in the config's channel order, values 0 to 255, of "
        "the traced size; boxes, classes, scores and image size out. It is run once more and "
        "compared with the student.",
        example="--run output/distilled --output output/student --format torchscript",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the files")
    parser.add_argument(
        "--peer",
        default="",
        metavar="NAME",
        help="which network, of a run that has trained several: a peer's name, or student; the "
        "files are then NAME.pth, NAME.yaml... (default: KD.EXPORT_PEER of the run)",
    )
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        help="also trace the student, on MODEL.DEVICE; onnx needs the package onnx",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="trace with this image, resized as in an evaluation (default: with noise)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="trace at this size in pixels (default: INPUT.MIN_SIZE_TEST, 4 : 3)",
    )
    add_run_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export, and say what was written and how to use it."""
    if args.format == "onnx" and importlib.util.find_spec("onnx") is None:
        raise ValueError(
            "--format onnx needs the package onnx, which this Python does not have: pip install "
            "onnx, or take --format torchscript, which needs nothing."
        )
    cfg = run_config(args)
    model, plain = trained_network(cfg, args.peer), network_config(cfg, args.peer)
    name = args.peer.lower()
    folder = made_folder(Path(args.output))
    weights = folder / f"{name or 'model'}.pth"
    config = folder / f"{name or 'student'}.yaml"
    write_plain(plain, model, weights, config)
    print(
        f"{weights}: {sum(p.numel() for p in model.parameters()):,} parameters, without kd_det: "
        f"--config-file {config} --eval-only in Detectron2's train_net.py"
    )
    if args.format:
        image = sample_image(plain, args.image, args.size)
        print(trace(model, image, args.format, weights.with_suffix(FORMATS[args.format])))


def write_plain(plain: CfgNode, model: nn.Module, weights: Path, config: Path) -> None:
    """
    Write weights, and the config that names them as they are reached from here.

    Args:
        plain: config of the model; is changed.
        model: of which all is written.
        weights: the file of its weights.
        config: the file of its config.
    """
    plain.MODEL.WEIGHTS = str(weights)
    plain.OUTPUT_DIR = "./output"  # not the folder of the training
    state = {name: x.cpu() for name, x in model.state_dict().items()}
    torch.save({"model": state}, f"{weights}.tmp")
    os.replace(f"{weights}.tmp", weights)
    config.write_text(plain.dump())


def sample_image(cfg: CfgNode, file: str | None, size: list[int] | None) -> Tensor:
    """
    What the student is traced with: ``(3, H, W)``, 0 to 255, in the config's channel order.

    Args:
        cfg: of the run.
        file: an image; ``None`` for noise.
        size: height and width in pixels; ``None`` takes those of an evaluation.

    Raises:
        FileNotFoundError: if there is no such image.
        ValueError: if a size is not positive, or the file is no image.
    """
    if size is not None and min(size) < 1:
        raise ValueError(f"--size is a height and a width in pixels, but got {size[0]} {size[1]}.")
    if file is None:
        short = cfg.INPUT.MIN_SIZE_TEST or 800  # 0: as large as the image is
        h, w = size or (short, min(round(short * 4 / 3), cfg.INPUT.MAX_SIZE_TEST))
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
    pixels = read_pixels(file, cfg.INPUT.FORMAT)
    if size is not None:
        resize = transforms.ResizeTransform(*pixels.shape[:2], *size)
    else:
        short = cfg.INPUT.MIN_SIZE_TEST
        shortest = transforms.ResizeShortestEdge([short, short], cfg.INPUT.MAX_SIZE_TEST)
        resize = shortest.get_transform(pixels)
    return torch.as_tensor(resize.apply_image(pixels).transpose(2, 0, 1).copy())  # (3, H, W)


def trace(model: nn.Module, image: Tensor, form: str, file: Path) -> str:
    """
    Trace a detector and write it.

    Args:
        model: in eval mode; it is traced where it is.
        image: of `sample_image`.
        form: one of `FORMATS`. What the file gives for the mirrored image is compared with what the
            model gives; that of ONNX, where onnxruntime is installed.
        file: to write.

    Returns:
        A sentence on what was written.

    Raises:
        ValueError: if the model cannot be traced, or the traced one gives something else.
    """
    image = image.to(next(model.parameters()).device)
    # The exporter brings back the mode that it finds, in all of the adapter.
    adapter = tracing_adapter()(model, [{"image": image}], _inference(model)).eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Of every check of a shape in Detectron2; what comes out is checked below.
            warnings.simplefilter("ignore")
            if form == "onnx":
                # PyTorch's newer exporter cannot follow a detector's data-dependent shapes.
                torch.onnx.export(adapter, (image,), str(file), opset_version=_OPSET, dynamo=False)
            else:
                torch.jit.save(torch.jit.trace(adapter, (image,), check_trace=False), str(file))
    except Exception as e:  # anything that the model's own code, PyTorch or a stub raises
        raise ValueError(
            f"This {type(model).__name__} cannot be traced ({type(e).__name__}: "
            f"{' '.join(str(e).split())[:300]}). Its weights and config are written; "
            "without --format there is nothing to trace."
        ) from e
    height, width = image.shape[1:]
    said = f"{file}: {type(model).__name__} traced on {image.device} at {height} x {width}"
    traced = _runner(file, form)
    if traced is None:
        return f"{said}; not compared with the student, which needs the package onnxruntime"
    mirrored = image.flip(2)
    return compared(said, adapter(mirrored), traced(mirrored))


def compared(said: str, expected: Sequence[Tensor], found: Sequence[Tensor]) -> str:
    """
    A sentence that two outputs are the same.

    Args:
        said: its beginning.
        expected: of the student.
        found: of the traced student.

    Raises:
        ValueError: if they are not.
    """
    alike = [x.shape == y.shape for x, y in zip(expected, found, strict=True)]
    if not all(alike) or not all(map(_near, expected, found)):
        raise ValueError(
            f"{said}, but for the mirrored image it gives {_shapes(found)} where the student gives "
            f"{_shapes(expected)}, or other values: do not use it."
        )
    return f"{said}; for the mirrored image it gives what the student gives: {_shapes(found)}"


def _runner(file: Path, form: str) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
    """Runs the written file; ``None`` where nothing is installed that could."""
    if form == "torchscript":
        return torch.jit.load(str(file))
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def outputs(image: Tensor) -> tuple[Tensor, ...]:
        found = session.run(None, {given.name: image.cpu().numpy()})
        return tuple(torch.as_tensor(x).to(image.device) for x in found)

    return outputs


def _inference(model: nn.Module) -> Callable[..., Any] | None:
    """An R-CNN without its pasting of masks, which cannot be traced; as Detectron2's own tool."""
    if getattr(type(model), "inference", None) is not GeneralizedRCNN.inference:
        return None  # a PanopticFPN's gives something else

    def inference(model: Any, inputs: Any) -> Any:
        return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]

    return inference


def _near(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x.float(), y.float(), rtol=_NEAR, atol=_NEAR)


def _shapes(outputs: Sequence[Tensor]) -> str:
    return ", ".join(" x ".join(map(str, x.shape)) or "a number" for x in outputs)
