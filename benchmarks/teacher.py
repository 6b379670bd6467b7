"""
The teacher's forward: as stock Detectron2 builds and runs it, and with each of our means added.

R50-FPN RetinaNet with random weights (normalisation statistics too), in eval mode under no_grad.
Ratios are to the stock model run to the same depth.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.command import Options, main
from benchmarks.memory import measure_memory
from benchmarks.models import build_random, make_batch, read_config
from benchmarks.report import Report, Table, has_bfloat16
from benchmarks.turns import ratios, spread, take_turns
from kd_det import Teacher
from kd_det.context import Context, with_images_on
from kd_det.taps import Maps

HEAD = ("features", "cls_logits", "box_deltas")
LOGITS, FEATURES = HEAD[:2], HEAD[:1]
BASE, WHOLE = "stock, to the same depth", "stock, all of it: decoding and NMS too"
OFF = {"fold_batch_norm": False, "channels_last": False}


class Means(NamedTuple):
    """
    Attributes:
        arguments: of `Teacher`.
        targets_saved: whether a term would keep the maps: where none does, as with CWD, the forward
            is in inference mode.
    """

    arguments: dict[str, Any]
    targets_saved: bool = False


# Each "+" adds one means to those above it.
MEANS = {
    "kd_det, all means off": Means(OFF, targets_saved=True),
    "+ BatchNorm folded": Means({"channels_last": False}, targets_saved=True),
    "+ channels_last": Means({}, targets_saved=True),
    "+ inference mode (the default)": Means({}),
    "+ bfloat16": Means({"precision": "bfloat16"}),
    "the default, images of half the size": Means({"scale": 0.5}),
    "the default, compiled": Means({"compile": True}),
}
FEW = ("+ inference mode (the default)", "+ bfloat16")


class Size(NamedTuple):
    """What is measured: a batch, and tables of taps with the means that each lists."""

    config: str = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    batch: int = 2
    image: tuple[int, int] = (480, 640)
    overrides: tuple[Any, ...] = ()
    tables: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "features and class logits": (LOGITS, tuple(MEANS)),
        "features, class logits and box deltas": (HEAD, FEW),
        "features only": (FEATURES, FEW),
    }


SIZES = {
    "full": Size(),
    "short": Size(image=(240, 320), tables={"features and class logits": (LOGITS, FEW)}),
}


def run(options: Options, size: Size | None = None) -> Report:
    """Measure every means."""
    size = size or SIZES["short" if options.short else "full"]
    device = options.device
    model = build_random(read_config(size.config, device, *size.overrides)).eval()
    inputs = with_images_on(device, make_batch(size.batch, *size.image, classes=2))
    report = Report()
    for title, (taps, means) in size.tables.items():
        skipped = [] if has_bfloat16(device) else [n for n in means if "bfloat16" in n]
        if skipped:
            report.notes.append(f"Left out, for want of instructions: {', '.join(skipped)}.")
        teachers = {n: _teacher(model, MEANS[n], taps, inputs) for n in means if n not in skipped}
        shown = f"{title}, {size.batch} images of {size.image[0]}x{size.image[1]}"
        _measure(shown, model, teachers, inputs, taps, options, report)
    return report


def _measure(
    title: str,
    model: nn.Module,
    teachers: dict[str, Callable[[], Mapping[str, Maps]]],
    inputs: list[dict[str, Any]],
    taps: tuple[str, ...],
    options: Options,
    report: Report,
) -> None:
    variants: dict[str, Callable[[], Any]] = {
        BASE: lambda: stock(model, inputs, head="cls_logits" in taps),
        WHOLE: lambda: _whole(model, inputs),
        **teachers,
    }
    samples = take_turns(variants, options.repeats, options.device)
    memory = {name: measure_memory(work, options.device) for name, work in variants.items()}
    rows = [
        [
            name,
            spread(samples[name]).text(0, 1e3),
            spread(ratios(samples, name, BASE)).text(),
            f"{memory[name].peak / 2**20:.0f}",
        ]
        for name in variants
    ]
    headers = ["teacher's forward", "ms", "ratio to the first", "peak MiB"]
    report.tables.append(Table(title, headers, rows))
    report.samples[title] = {
        "seconds": samples,
        "memory": {name: found._asdict() for name, found in memory.items()},
    }
    _accuracy(title, variants[BASE](), teachers, taps, report)


def _accuracy(
    title: str,
    expected: Mapping[str, Maps],
    teachers: dict[str, Callable[[], Mapping[str, Maps]]],
    taps: tuple[str, ...],
    report: Report,
) -> None:
    """How far the maps of each teacher are from those of the stock model, level by level."""
    for tap in taps:
        names = list(expected[tap])
        rows, samples = [], {}
        for name, teacher in teachers.items():
            maps = teacher()[tap]
            if maps[names[0]].shape != expected[tap][names[0]].shape:
                continue  # of smaller images
            pairs = {level: (maps[level], expected[tap][level]) for level in names}
            plain = {level: _distance(a, b) for level, (a, b) in pairs.items()}
            # What channel-wise losses see: a constant per channel is nothing to them, and with
            # random weights the logits are little else.
            centred = {level: _distance(_centre(a), _centre(b)) for level, (a, b) in pairs.items()}
            samples[name] = {"plain": plain, "centred": centred}
            rows.append([name, *(f"{100 * x:.2g}" for x in plain.values())])
            rows[-1].append(f"{100 * max(centred.values()):.2g}")
        headers = ["relative L2 distance, %", *names, "largest, channel means removed"]
        report.tables.append(Table(f"{title}: {tap} against the stock model's", headers, rows))
        report.samples[f"{title}: {tap}"] = samples


def _distance(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def _centre(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(dim=(2, 3), keepdim=True)


@torch.no_grad()
def stock(model: Any, inputs: list[dict[str, Any]], *, head: bool) -> dict[str, Maps]:
    """What a teacher's forward costs who just calls the parts of the detector."""
    maps = model.backbone(model.preprocess_image(inputs).tensor)
    features = {level: maps[level] for level in model.head_in_features}
    if not head:
        return {"features": features}
    logits, deltas = model.head(list(features.values()))
    return {
        "features": features,
        "cls_logits": dict(zip(features, logits, strict=True)),
        "box_deltas": dict(zip(features, deltas, strict=True)),
    }


@torch.no_grad()
def _whole(model: nn.Module, inputs: list[dict[str, Any]]) -> object:
    return model(inputs)


def _teacher(
    model: nn.Module, means: Means, taps: tuple[str, ...], inputs: list[dict[str, Any]]
) -> Callable[[], Mapping[str, Maps]]:
    """Ready to run on a batch, as in a Distiller's step."""
    source = Teacher(model=model, **means.arguments).to(next(model.parameters()).device)
    source.targets_saved = means.targets_saved
    source.shapes(taps)
    source.prepare(taps)
    context = Context(inputs, "BGR", model)
    return lambda: source(context, taps).maps


if __name__ == "__main__":
    main("teacher", run, __doc__)
