"""
What each method's term costs beside CWD on the features, forward and backward, with the sizes of
configs/COCO-Detection/retinanet_R_50_FPN_1x_<method>_R_101.yaml.

The maps are random and there already, and their gradients are the last thing that is computed: the
student's and the teacher's own forward and backward are not in it (docs/teacher.md says what the
teacher costs by the depth of its taps).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from benchmarks.command import Options, main
from benchmarks.memory import measure_memory
from benchmarks.methods import METHODS
from benchmarks.models import make_batch, read_config
from benchmarks.report import Report, Table
from benchmarks.turns import ratios, spread, take_turns
from kd_det.build import build_items
from kd_det.config import student_config
from kd_det.context import Context
from kd_det.detectors import TapShape, describe, probe
from kd_det.registry import TERMS
from kd_det.sources import Source
from kd_det.taps import Maps
from kd_det.terms import Term

TAPS = ("features", "cls_logits", "box_deltas")
BASE = "cwd"


class Size(NamedTuple):
    """Number, height and width of the images."""

    images: int
    height: int
    width: int


SIZES = {"short": Size(2, 240, 320), "full": Size(2, 800, 1344)}


def run(options: Options, size: Size | None = None) -> Report:
    """Measure every method."""
    size = size or SIZES["short" if options.short else "full"]
    file = "COCO-Detection/retinanet_R_50_FPN_1x_{}.yaml"
    cfg = student_config(read_config(file.format(METHODS[BASE]), options.device))
    detector = build_model(cfg)  # its anchors and its box coding; nothing is run
    detector.loss_normalizer = 100.0  # what Detectron2's starts from, with the first step
    taps = [describe(detector).tap(tap) for tap in TAPS]
    shapes = probe(detector, taps)
    students, targets = (_maps(shapes, size, options.device) for _ in range(2))
    for x in (x for maps in students.values() for x in maps.values()):
        x.requires_grad_()
    inputs = make_batch(*size, classes=80)
    terms, work = {}, {}
    for method, name in METHODS.items():
        found = build_items(
            read_config(file.format(name), options.device).KD.TERMS, TERMS, "KD.TERMS"
        )
        (terms[method],) = found.values()
        terms[method].wire(shapes, shapes)
        terms[method].to(options.device)
        work[method] = _Work(terms[method], detector, inputs, students, targets)

    def clear() -> None:
        for each in work.values():
            each.clear()

    samples = take_turns(work, options.repeats, options.device, before=clear)
    rows, peaks = [], {}
    for method, term in terms.items():
        clear()
        peaks[method] = measure_memory(work[method], options.device).peak
        row = [f"`{method}`", spread(samples[method]).text(0, 1e3)]
        row += [spread(ratios(samples, method, BASE)).text(), f"{peaks[method] / 2**20:,.0f}"]
        read = [tap for tap in TAPS if tap in term.source_taps()]
        trained = sum(p.numel() for p in term.parameters())
        rows.append([*row, ", ".join(read), f"{trained:,}"])
    headers = ["method", "ms", "times CWD", "peak MiB", "reads of the teacher", "trains parameters"]
    title = f"{size.images} images of {size.height}x{size.width}, forward and backward of the term"
    copy = sum(x.numel() * x.element_size() for x in targets["features"].values()) / 2**20
    note = (
        "Peak: most memory at once, gradients included; the features of all levels are "
        f"{copy:,.0f} MiB."
    )
    return Report([Table(title, headers, rows)], {"seconds": samples, "peak_bytes": peaks}, [note])


class _Work:
    """A term's forward and backward, as a call."""

    def __init__(
        self,
        term: Term,
        student: nn.Module,
        inputs: list[dict[str, object]],
        students: Mapping[str, Maps],
        targets: Mapping[str, Maps],
    ) -> None:
        self.term, self.student, self.inputs = term, student, inputs
        self.students, self.targets = dict(students), targets
        self.source = Source()

    def __call__(self) -> None:
        # A new one for every step: what regions and terms share in it is made anew.
        context = Context(self.inputs, "BGR", self.student, self.students)
        values = self.term(self.students, self.targets, context, self.source)
        torch.stack(list(values.values())).sum().backward()

    def clear(self) -> None:
        for x in (x for maps in self.students.values() for x in maps.values()):
            x.grad = None
        self.term.zero_grad()


def _maps(
    shapes: Mapping[str, list[TapShape]], size: Size, device: torch.device
) -> dict[str, Maps]:
    return {
        tap: {shape.level: _map(shape, size, device) for shape in levels}
        for tap, levels in shapes.items()
    }


def _map(shape: TapShape, size: Size, device: torch.device) -> Tensor:
    h, w = (math.ceil(side / shape.stride) for side in size[1:])
    return torch.randn(size.images, shape.channels, h, w, device=device)


if __name__ == "__main__":
    main("method_cost", run, __doc__)
