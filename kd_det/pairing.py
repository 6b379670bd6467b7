"""Which level of the student is compared with which level of the target, and on which grid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.detectors import TapShape
from kd_det.registry import did_you_mean


@dataclass(frozen=True)
class Pair:
    """One level of the student and the level of the target that it is compared with."""

    student: TapShape
    target: TapShape


def pair_levels(
    student: Sequence[TapShape], target: Sequence[TapShape], levels: Sequence[str] = ()
) -> list[Pair]:
    """
    Pair levels by stride.

    By default a pair must also have one origin: the P6 of a RetinaNet is a convolution, that of a
    Mask R-CNN a max-pool, so across architectures only the pyramid proper (P3 to P5) is paired.
    Naming levels overrides that. Two taps with one level each are a pair whatever their strides.

    Args:
        student: the student's levels.
        target: the target's levels.
        levels: names of the student's levels to use, which gives the order of the pairs; empty for
            all that have a partner.

    Raises:
        ValueError: if a name is unknown or has no partner, or if nothing can be paired.
    """
    known = {s.level: s for s in student}
    for name in levels:
        if name not in known:
            raise ValueError(
                f"there is no level '{name}'.{did_you_mean(name, known)} The student's levels are "
                f"{', '.join(known)}"
            )
    if len(student) == len(target) == 1:
        return [Pair(student[0], target[0])]
    pairs = []
    for s in [known[name] for name in dict.fromkeys(levels)] or student:
        same = [t for t in target if t.stride == s.stride and (levels or t.origin == s.origin)]
        # Maps of one stride under several names (a raw list of outputs): take the same name first.
        same.sort(key=lambda t: t.level != s.level)
        if same:
            pairs.append(Pair(s, same[0]))
        elif levels:
            raise ValueError(
                f"the student's level {s.level} (stride {s.stride}) has no partner: the target's "
                f"levels are {_list(target)}. Leave it out of LEVELS"
            )
    if not pairs:
        raise ValueError(
            f"no level of the student ({_list(student)}) has the stride of a level of the target "
            f"({_list(target)}): choose another TAP or SOURCE_TAP, or one level on each side"
        )
    return pairs


def on_one_grid(student: Tensor, target: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """
    Bring both maps to one ``H x W``.

    At one stride cell (i, j) covers the same pixels on both sides, and two detectors that pad
    differently only differ in how far their grids reach: both are cropped to the common part.
    At different strides the student is first resized by their ratio, bilinearly; resizing to the
    target's H x W would stretch it where the two detectors pad differently.

    Args:
        student: ``(N, C, H, W)`` of the student.
        target: ``(N, C', H', W')`` of the target.
        pair: what their levels are.
    """
    if pair.student.stride != pair.target.stride:
        ratio = pair.student.stride / pair.target.stride
        size = [math.ceil(side * ratio) for side in student.shape[-2:]]
        student = F.interpolate(student, size=size, mode="bilinear", align_corners=False)
    h = min(student.shape[-2], target.shape[-2])
    w = min(student.shape[-1], target.shape[-1])
    return student[..., :h, :w], target[..., :h, :w]


def unit_ratio(student: TapShape, target: TapShape) -> tuple[float, ...]:
    """
    Factors on the target's (dx, dy, dw, dh) that bring them into the student's units: two detectors
    that mean one box write other numbers when their box transforms have other weights.
    """
    if not (student.units and target.units):
        return (1.0, 1.0, 1.0, 1.0)
    return tuple(s / t for s, t in zip(student.units, target.units, strict=True))


def in_units(deltas: Tensor, ratio: Sequence[float]) -> Tensor:
    """``(N, A * 4, H, W)`` deltas times the factors of `unit_ratio`, in float32 at least."""
    if set(ratio) == {1.0}:
        return deltas
    wide = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
    return wide * wide.new_tensor(ratio).repeat(deltas.shape[1] // len(ratio))[:, None, None]


def _list(shapes: Sequence[TapShape]) -> str:
    return ", ".join(f"{s.level} (stride {s.stride})" for s in shapes)
