"""
CWD, forward and backward, on all FPN levels: the forms in which others compute it, and ours.

The forms are restatements of one formula (kd_det.losses.channel_wise_kl); that they agree is
checked before they are timed. The floor reads both maps and writes one, which is the least that a
loss with a gradient can do.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.command import Options, main
from benchmarks.memory import measure_memory
from benchmarks.report import Report, Table, has_bfloat16
from benchmarks.turns import ratios, spread, take_turns
from kd_det.losses import channel_wise_kl_levels

Form = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""From the student's and the teacher's maps of all levels to a scalar."""

STRIDES = (8, 16, 32, 64, 128)
BASE, OURS, FLOOR = "three tensors (mmrazor's form)", "kd_det", "floor: two reads, one write"
COMPILED = "log_softmax + kl_div, torch.compile"
TAU = 1.0
NOTE = (
    "Medians and quartiles; times faster than the first row, per repetition. Saved for the "
    "backward, and peak of forward and backward beside the gradient itself: in copies of the map "
    "(all levels), beyond the two maps, which a form may keep alive."
)


class Case(NamedTuple):
    """Maps of an FPN with ``channels`` on every level."""

    what: str
    channels: int
    batch: int
    image: tuple[int, int] = (800, 1344)
    dtype: torch.dtype = torch.float32


FEATURES, LOGITS = Case("FPN features", 256, 2), Case("class logits", 720, 2)
CASES = {
    "short": (FEATURES, LOGITS),
    "full": (FEATURES, LOGITS, FEATURES._replace(batch=16), LOGITS._replace(batch=16)),
}


def three_tensors(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """sum p (log p) - p (log q), from p, log p and log q as three maps of their own."""
    return _over_levels(_three_tensors, students, teachers)


def _three_tensors(student: Tensor, teacher: Tensor) -> Tensor:
    n, c, h, w = student.shape
    s, t = student.reshape(n * c, h * w), teacher.reshape(n * c, h * w)
    p = torch.softmax(t / TAU, dim=1)
    log_p = torch.log_softmax(t / TAU, dim=1)
    log_q = torch.log_softmax(s / TAU, dim=1)
    return (p * log_p - p * log_q).sum() * (TAU**2 / (n * c))


def kl_div(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """PyTorch's own divergence of two log-softmaxes."""
    return _over_levels(_kl_div, students, teachers)


def _kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    n, c, h, w = student.shape
    s, t = student.reshape(n * c, h * w), teacher.reshape(n * c, h * w)
    log_q, log_p = torch.log_softmax(s / TAU, dim=1), torch.log_softmax(t / TAU, dim=1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * (TAU**2 / (n * c))


def ours(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """kd_det's."""
    return channel_wise_kl_levels(students, teachers, tau=TAU).sum()


def ours_padded(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """kd_det's, the last eighth of the width left out as padding: another value than the others."""
    regions = [torch.ones_like(x[:, :1], dtype=torch.float32) for x in students]
    for region in regions:
        region[..., -max(region.shape[-1] // 8, 1) :] = 0
    return channel_wise_kl_levels(students, teachers, tau=TAU, regions=regions).sum()


def _over_levels(
    level: Callable[..., Tensor], students: Sequence[Tensor], teachers: Sequence[Tensor]
) -> Tensor:
    return torch.stack([level(s, t) for s, t in zip(students, teachers, strict=True)]).sum()


def grids(image: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width of every level."""
    return [(math.ceil(image[0] / s), math.ceil(image[1] / s)) for s in STRIDES]


def make_maps(case: Case, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The student's maps, leaves that want a gradient, and the teacher's."""
    students, teachers = [], []
    for h, w in grids(case.image):
        shape = (case.batch, case.channels, h, w)
        students.append(torch.randn(shape, device=device).to(case.dtype).requires_grad_())
        teachers.append(torch.randn(shape, device=device).to(case.dtype))
    return students, teachers


def run(options: Options, cases: Sequence[Case] | None = None, compiled: bool = True) -> Report:
    """Measure every case; what does not fit into memory is left out with a note."""
    report = Report()
    cases = list(CASES["short" if options.short else "full"] if cases is None else cases)
    if options.device.type == "cuda" and has_bfloat16(options.device):
        cases += [case._replace(dtype=torch.bfloat16) for case in cases]
    for case in cases:
        title = f"{case.what}, {case.channels} channels, {case.image[0]}x{case.image[1]}, batch "
        title += f"{case.batch}, {str(case.dtype).removeprefix('torch.')}"
        size = sum(case.batch * case.channels * h * w for h, w in grids(case.image))
        needed, free = 12 * size * case.dtype.itemsize, _free_memory(options.device)
        if needed > free:
            report.notes.append(
                f"{title}: left out, needs about {needed / 2**30:.1f} GiB of memory, and "
                f"{free / 2**30:.1f} GiB are free."
            )
            continue
        _measure(case, title, options, report, compiled)
    report.notes.append(NOTE)
    return report


def _measure(case: Case, title: str, options: Options, report: Report, compiled: bool) -> None:
    device = options.device
    students, teachers = make_maps(case, device)
    forms: dict[str, Form] = {BASE: three_tensors, "log_softmax + kl_div": kl_div}
    if compiled:
        form, reason = _compiled(students, teachers)
        if form is not None:
            forms[COMPILED] = form
        else:
            report.notes.append(f"{title}: the compiled form is left out, {reason}")
    forms[OURS] = ours
    check_agreement(forms, students, teachers)
    forms[f"{OURS}, padding left out"] = ours_padded

    def clear() -> None:
        for s in students:
            s.grad = None

    variants = {name: _forward_backward(form, students, teachers) for name, form in forms.items()}
    written = [torch.empty_like(t) for t in teachers]
    variants[FLOOR] = _floor(students, teachers, written)
    samples = take_turns(variants, options.repeats, device, before=clear)

    copy = sum(t.numel() * t.element_size() for t in teachers)
    rows, memory = [], {}
    for name in variants:
        faster = spread(ratios(samples, BASE, name))
        of_floor = spread(ratios(samples, FLOOR, name))
        row = [name, spread(samples[name]).text(1, 1e3), faster.text(), of_floor.text(0, 100)]
        if name in forms:
            clear()
            forward = functools.partial(forms[name], students, teachers)
            saved = measure_memory(forward, device).held
            peak = measure_memory(variants[name], device).peak
            memory[name] = {"saved_bytes": saved, "peak_bytes": peak, "copy_bytes": copy}
            # The gradient itself is one copy, whoever computes it.
            row += [f"{saved / copy:.2f}", f"{peak / copy - 1:.2f}"]
        rows.append(row + [""] * (6 - len(row)))
    headers = ["form", "ms", "times faster", "% of the floor's speed", "saved", "extra peak"]
    report.tables.append(Table(title, headers, rows))
    report.samples[title] = {"seconds": samples, "memory": memory}
    if COMPILED in samples:
        gain = spread(ratios(samples, COMPILED, OURS)).text()
        report.notes.append(f"{title}: times faster than the compiled form: {gain}.")


def check_agreement(
    forms: dict[str, Form], students: Sequence[Tensor], teachers: Sequence[Tensor]
) -> None:
    """
    Hold all forms to one value and one gradient.

    Raises:
        RuntimeError: if one differs: a comparison of their seconds would mean nothing.
    """
    # Of a bfloat16 map, the forms round every intermediate map.
    tolerance = 1e-4 if students[0].dtype == torch.float32 else 5e-2
    expected: tuple[float, Tensor] | None = None
    for name, form in forms.items():
        value = form(students, teachers)
        grad = torch.autograd.grad(value, students[0])[0].double()
        found = float(value.detach())
        if expected is None:
            expected = found, grad
        off = abs(found - expected[0]) / abs(expected[0])
        gap = float((grad - expected[1]).norm() / expected[1].norm())
        if not (off <= tolerance and gap <= tolerance):  # NaN is no agreement
            raise RuntimeError(
                f"'{name}' gives {found:.6g} where '{next(iter(forms))}' gives {expected[0]:.6g} "
                f"(relative difference {off:.1e}, of the gradient {gap:.1e}): they do not compute "
                "the same loss."
            )


def _forward_backward(
    form: Form, students: Sequence[Tensor], teachers: Sequence[Tensor]
) -> Callable[[], object]:
    return lambda: form(students, teachers).backward()


def _floor(
    students: Sequence[Tensor], teachers: Sequence[Tensor], written: Sequence[Tensor]
) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            for s, t, out in zip(students, teachers, written, strict=True):
                torch.add(s, t, out=out)

    return run


def _compiled(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[Form | None, str]:
    """The compiled form, compiled for these shapes; or ``None`` and why there is none."""
    try:
        torch.compiler.reset()
        form = torch.compile(kl_div, dynamic=False)
        form(students, teachers).backward()
    except Exception as e:  # no compiler, an unsupported Python, ...: as many types as reasons
        return None, f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
    return form, ""


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024  # in kB
    return 1 << 62  # unknown: the user sees


if __name__ == "__main__":
    main("loss", run, __doc__)
