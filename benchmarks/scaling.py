"""
How the cost of CWD grows: time and memory of the loss against image size, batch, channels and
levels, and of the step against the number of terms that share one tap.

The exponent is the slope of log(cost) over log(N C H W summed over levels), by least squares over
the sizes, with a 95 % interval (Student's t). 1 is linear; below, overhead that does not grow is
still seen.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.command import Options, main
from benchmarks.loss import grids, ours
from benchmarks.memory import measure_memory
from benchmarks.models import build_random, make_batch, read_config
from benchmarks.report import Report, Table
from benchmarks.step import QUICKSTART, Learner
from benchmarks.turns import ratios, spread, take_turns
from kd_det import Distiller, Teacher, terms


class Point(NamedTuple):
    """One size of the loss."""

    image: int = 512
    batch: int = 2
    channels: int = 256
    levels: int = 5

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Of all levels."""
        sizes = grids((self.image, self.image))[: self.levels]
        return [(self.batch, self.channels, h, w) for h, w in sizes]

    @property
    def elements(self) -> int:
        """Of all levels."""
        return sum(math.prod(shape) for shape in self.shapes)


BASES = {"full": Point(image=1024), "short": Point()}
SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "full": {
        "image": (512, 768, 1024, 1536, 2048),
        "batch": (1, 2, 4, 8, 16),
        "channels": (64, 128, 256, 512, 1024),
        "levels": (1, 2, 3, 4, 5),
    },
    "short": {
        "image": (256, 384, 512, 768),
        "batch": (1, 2, 4, 8),
        "channels": (64, 128, 256, 512),
        "levels": (1, 3, 5),
    },
}
NUM_TERMS = {"full": (1, 2, 4, 8), "short": (1, 2, 4)}


def run(
    options: Options,
    sweeps: dict[str, tuple[int, ...]] | None = None,
    num_terms: Sequence[int] | None = None,
    base: Point | None = None,
) -> Report:
    """Measure every sweep."""
    kind = "short" if options.short else "full"
    report, base = Report(), base or BASES[kind]
    points: dict[str, list[dict[str, Any]]] = {}
    for axis, values in (sweeps or SWEEPS[kind]).items():
        points[axis] = _sweep([base._replace(**{axis: v}) for v in values], options)
        for point, value in zip(points[axis], values, strict=True):
            point["value"] = value
    grown = [p for axis, found in points.items() if axis != "levels" for p in found]
    rows = [_growth_row(axis, found) for axis, found in points.items()]
    rows.append(_growth_row("image, batch and channels together", grown))
    headers = ["varied", "values", "elements", "ms", "exponent of time", "exponent of memory"]
    title = f"CWD forward and backward around {base.image}x{base.image}, batch {base.batch}, "
    title += f"{base.channels} channels, {base.levels} levels"
    report.tables.append(Table(title, headers, rows))
    report.samples["loss"] = points
    report.notes.append(
        "The finest level has three quarters of all elements: the row of the levels says what a "
        "level costs beside its elements, and is no part of the last one."
    )
    _terms(report, options, num_terms or NUM_TERMS[kind])
    return report


def _sweep(points: list[Point], options: Options) -> list[dict[str, Any]]:
    """Seconds and bytes of every point, which take turns."""
    device = options.device

    def make(point: Point) -> tuple[list[Tensor], list[Tensor]]:
        students = [torch.randn(s, device=device).requires_grad_() for s in point.shapes]
        return students, [torch.randn(s, device=device) for s in point.shapes]

    maps = [make(point) for point in points]

    def clear() -> None:
        for students, _ in maps:
            for s in students:
                s.grad = None

    def work_on(students: list[Tensor], teachers: list[Tensor]) -> Callable[[], object]:
        return lambda: ours(students, teachers).backward()

    work = {str(i): work_on(*pair) for i, pair in enumerate(maps)}
    samples = take_turns(work, options.repeats, device, before=clear, warmup=2)
    found = []
    for i, point in enumerate(points):
        clear()
        peak = measure_memory(work[str(i)], device).peak
        seconds = samples[str(i)]
        found.append(
            {"size": point._asdict(), "elements": point.elements, "seconds": seconds, "peak": peak}
        )
    return found


def _growth_row(axis: str, points: list[dict[str, Any]]) -> list[str]:
    elements = [p["elements"] for p in points]
    medians = [spread(p["seconds"]).median for p in points]
    values = " ".join(str(p["value"]) for p in points) if " " not in axis else ""
    return [
        axis,
        values,
        f"{min(elements):.1e} to {max(elements):.1e}",
        f"{1e3 * min(medians):.1f} to {1e3 * max(medians):.1f}",
        _exponent_text(elements, medians),
        _exponent_text(elements, [p["peak"] for p in points]),
    ]


def _exponent_text(elements: Sequence[float], costs: Sequence[float]) -> str:
    slope, half = exponent(elements, costs)
    return f"{slope:.2f} ± {half:.2f}" if math.isfinite(half) else f"{slope:.2f}"


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """
    Slope of log(cost) over log(size), and half of its 95 % interval: infinite for two points.

    Raises:
        ValueError: for fewer than two sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"An exponent needs two sizes at least, but got {sorted(set(sizes))}.")
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(costs, float))
    x = x - x.mean()
    slope = float((x * y).sum() / (x * x).sum())
    free = len(x) - 2
    if free == 0:
        return slope, math.inf
    residual = y - y.mean() - slope * x
    error = math.sqrt(float((residual**2).sum()) / free / float((x * x).sum()))
    return slope, student_t(free) * error


def student_t(free: int) -> float:
    """Its 97.5 % quantile; from 10 degrees of freedom on, the one of 10 (a wider interval)."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[min(free, len(table)) - 1]


def _terms(report: Report, options: Options, counts: Sequence[int]) -> None:
    """A distilled step of the quickstart's models with several terms on one tap."""
    learners = {f"{count}": with_terms(count, options.device) for count in counts}
    steps = {name: learner.step for name, learner in learners.items()}
    samples = take_turns(steps, options.repeats, options.device, warmup=2)
    rows = []
    found: dict[str, dict[str, Any]] = {}
    first = str(counts[0])
    for name, learner in learners.items():
        learner.optimizer.zero_grad()
        with CountCalls(learner.model) as calls:
            peak = measure_memory(learner.step, options.device).peak
        found[name] = {"seconds": samples[name], "peak": peak, **calls.counts}
        row = [name, spread(samples[name]).text(1, 1e3)]
        row += [spread(ratios(samples, name, first)).text(), f"{peak / found[first]['peak']:.2f}"]
        rows.append([*row, str(calls.counts["hooks"]), str(calls.counts["teacher_forwards"])])
    headers = ["terms on one tap", "ms", "time / first's", "peak / first's"]
    headers += ["hooks in the student", "teacher's forwards"]
    report.tables.append(Table("Distilled step, quickstart's models", headers, rows))
    report.samples["terms"] = found


def with_terms(count: int, device: torch.device) -> Learner:
    """The quickstart's student with ``count`` CWD terms on its features."""
    cfg = read_config(QUICKSTART.config, device, "KD.ENABLED", False, "SOLVER.BASE_LR", 1e-7)
    teacher = build_random(read_config(QUICKSTART.teacher, device), seed=1)
    distiller = Distiller(
        student=build_random(cfg),
        sources={"teacher": Teacher(model=teacher)},
        terms={f"fpn{i}": terms.CWD(tap="features") for i in range(count)},
    ).to(device)
    inputs = make_batch(*QUICKSTART.images, cfg.MODEL.RETINANET.NUM_CLASSES)
    return Learner(distiller, QUICKSTART.optimizer(cfg, distiller), inputs)


class CountCalls:
    """Counts, in one step, the hooks that tap the student and the teacher's forwards."""

    def __init__(self, distiller: Any) -> None:
        self._student, self._source = distiller.student, distiller.wiring.sources["teacher"]
        self.counts = {"hooks": 0, "teacher_forwards": 0}

    def __enter__(self) -> "CountCalls":
        first = next(m for m in self._student.backbone.modules() if not list(m.children()))

        def look(*_: object) -> None:  # in the midst of the student's forward
            hooks = sum(len(m._forward_hooks) for m in self._student.modules())
            self.counts["hooks"] = hooks - 1  # this one

        def count(*_: object) -> None:
            self.counts["teacher_forwards"] += 1

        backbone = self._source.hidden.held.backbone
        self._handles = [first.register_forward_hook(look), backbone.register_forward_hook(count)]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


if __name__ == "__main__":
    main("scaling", run, __doc__)
