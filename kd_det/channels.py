"""
Which channels of two maps mean the same, where channels have a meaning: class logits across class
sets and across anchors per cell.

Channels of a dense head are anchors x classes, anchor by anchor: channel a * K + k is class k of
anchor a. What both sides have is brought to the student's order of classes, and to one anchor per
cell where their numbers of anchors differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_det.classes import listed, match_names
from kd_det.detectors import TapShape
from kd_det.pairing import unit_ratio

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: x.amax(1, keepdim=True),
    "logsumexp": lambda x: x.float().logsumexp(1, keepdim=True),
}
"""
How the A logits of a class in a cell, ``(N, A, K, H, W)``, become one.

``max``: a detector finds a class in a cell if any anchor does, so the best anchor speaks for the
cell; and what comes out is still a logit, ``sigmoid(max_a z_a) = max_a sigmoid(z_a)``, so that a
detector with one anchor per cell is compared on its own scale. The gradient goes to the best
anchor, evenly where several are equal. ``logsumexp`` (in float32) is smooth and reaches every
anchor by its softmax, but lies up to log A above the best one: all of it where no anchor sees
anything, which a loss that minds constants would take for a response.
"""


class CommonChannels(nn.Module):
    """
    From ``(N, A * K, H, W)`` to the channels that both sides have: ``(N, A * K', H, W)``, or
    ``(N, K', H, W)`` with one anchor per cell. It has nothing to train; gradients go to what is
    kept.

    Args:
        anchors: A.
        classes: positions of the classes that are kept, in their new order; empty keeps all.
        reduction: how anchors become one, of `REDUCTIONS`; empty keeps them.
    """

    index: Tensor

    def __init__(self, anchors: int, classes: Sequence[int] = (), reduction: str = "") -> None:
        super().__init__()
        self.anchors = anchors
        self.reduction = reduction
        index = torch.tensor(list(classes), dtype=torch.long)
        self.register_buffer("index", index, persistent=False)  # moves, and is in no state_dict

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x.unflatten(1, (self.anchors, -1))  # (N, A, K, H, W)
        if self.reduction:
            x = REDUCTIONS[self.reduction](x)  # (N, 1, K, H, W)
        if len(self.index):
            x = x.index_select(2, self.index)  # (N, A or 1, K', H, W)
        return x.flatten(1, 2)


@dataclass(frozen=True)
class Common:
    """
    How two maps come to channels that mean the same.

    Attributes:
        student: module for the student's map; ``nn.Identity`` where it stays as it is.
        target: module for the target's map.
        channels: what both have then.
        anchors: of how many anchors per cell those are; 0 where that is unknown.
        name: the short form for a plan; ``"-"`` where nothing is done.
        note: the long form, a sentence with every class; may be empty.
    """

    student: nn.Module
    target: nn.Module
    channels: int
    anchors: int = 0
    name: str = "-"
    note: str = ""

    @property
    def per_anchor(self) -> int:
        """Channels of one anchor: classes, or coordinates; 0 where that is unknown."""
        return self.channels // self.anchors if self.anchors else 0


def common_channels(student: TapShape, target: TapShape, reduction: str = "max") -> Common:
    """
    Bring two taps with a meaning (logits, deltas) together.

    Where both sides have the same anchors and the same classes, nothing is done. Classes are
    matched by name; where the names of one side are not known, equally many are taken to be the
    same in the same order.

    Args:
        student: a level of the student.
        target: a level of the target.
        reduction: of `REDUCTIONS`, for class logits with other numbers of anchors per cell.

    Raises:
        ValueError: if the channels cannot be brought together; it says why and what to do.
    """
    if student.kind != target.kind:
        _check_kinds(student, target)
    elif student.kind != "logits":
        _check_same(student, target)
    else:
        return _common_logits(student, target, reduction)
    anchors = student.anchors or target.anchors
    return Common(nn.Identity(), nn.Identity(), target.channels, anchors)


def _common_logits(student: TapShape, target: TapShape, reduction: str) -> Common:
    if not (student.anchors and target.anchors):
        if student.channels != target.channels:
            raise ValueError(_unknown(student, target))
        note = f"not known by name: the {student.channels} channels of both in the same order"
        anchors = student.anchors or target.anchors
        return Common(nn.Identity(), nn.Identity(), target.channels, anchors, note=note)
    mine, theirs, note = common_classes(student, target)
    names, notes, anchors = [], [], student.anchors
    if student.anchors != target.anchors:
        names.append(reduction)
        notes.append(f"{anchors} and {target.anchors} anchors per cell become 1 ({reduction})")
        anchors = 1
    if mine or theirs:
        names.append("by name")
    return Common(
        _module(student, mine, anchors, reduction),
        _module(target, theirs, anchors, reduction),
        anchors * (len(mine) or student.per_anchor),
        anchors,
        ", ".join(names) or "-",
        "; ".join(notes + [note] * bool(note)),
    )


def _module(shape: TapShape, classes: Sequence[int], anchors: int, reduction: str) -> nn.Module:
    if shape.anchors == anchors and not classes:
        return nn.Identity()
    return CommonChannels(shape.anchors, classes, "" if shape.anchors == anchors else reduction)


def common_classes(student: TapShape, target: TapShape) -> tuple[list[int], list[int], str]:
    """
    The classes that both sides have, by name.

    Args:
        student: with the names of its classes, and as many channels per anchor.
        target: likewise.

    Returns:
        Their positions in the student and in the target, in the student's order, each empty where
        all classes stay as they are; and a sentence, which may be empty.

    Raises:
        ValueError: if there are none, or the names are not known and the numbers differ.
    """
    if not (student.names and target.names):
        if student.per_anchor != target.per_anchor:
            raise ValueError(_unknown(student, target))
        count = student.per_anchor
        return [], [], f"not known by name: the {count} classes of both in the same order"
    if student.names == target.names:
        return [], [], ""
    positions = match_names(student.names, target.names)
    mine = [i for i, j in enumerate(positions) if j >= 0]
    if not mine:
        raise ValueError(
            f"{_channels(student, target)}, and they have no class in common: the student's are "
            f"{listed(student.names)}, the target's {listed(target.names)}. Where only the names "
            "differ, give the source's CLASSES in the student's words; else distil features "
            "(TAP: features)"
        )
    theirs = [positions[i] for i in mine]
    pairs = ", ".join(f"{student.names[i]} {i}-{j}" for i, j in zip(mine, theirs, strict=True))
    note = f"{len(mine)} classes by name, as student-target: {pairs}"
    for whose, shape, kept in (("student", student, mine), ("target", target, theirs)):
        if out := [name for i, name in enumerate(shape.names) if i not in kept]:
            note += f"; of the {whose}'s left out: {listed(out)}"
    return _unless_all(mine, student), _unless_all(theirs, target), note


def _unless_all(kept: list[int], shape: TapShape) -> list[int]:
    return [] if kept == list(range(shape.per_anchor)) else kept


def _check_kinds(student: TapShape, target: TapShape) -> None:
    if "feature" in (student.kind, target.kind) and student.channels == target.channels:
        return  # the module path of a predictor, say: taken at the user's word
    raise ValueError(
        f"{_meaning(student, target)}, which no connector can translate: take TAP and SOURCE_TAP "
        "of one kind, or distil features (TAP: features)"
    )


def _check_same(student: TapShape, target: TapShape) -> None:
    known = student.names and target.names
    if student.channels == target.channels and (not known or student.names == target.names):
        if set(unit_ratio(student, target)) == {1.0}:
            return
        raise ValueError(
            f"deltas are in other units: the student's box transform has the weights "
            f"{_numbers(student.units)}, the target's {_numbers(target.units)}. Teacher and "
            "student need the same ones here (BBOX_REG_WEIGHTS), or distil class logits or "
            "features (TAP: features)"
        )
    raise ValueError(
        f"{_meaning(student, target)}. They are relative to anchors, so no connector can translate "
        "them: teacher and student need the same anchors per cell and the same box transform here, "
        "or distil class logits or features (TAP: features)"
    )


def _numbers(units: Sequence[float]) -> str:
    return ", ".join(f"{x:g}" for x in units)


def _unknown(student: TapShape, target: TapShape) -> str:
    sides = (("the student", student), ("the target", target))
    unnamed = " and ".join(who for who, shape in sides if not shape.names)
    return (
        f"{_meaning(student, target)}, which no connector can translate. Classes are matched by "
        f"name, but what those of {unnamed} are called is not known: register the dataset of each, "
        "or name them (a source's by its CLASSES, the student's by Distiller(classes=...)), or "
        "distil features (TAP: features). Without names, teacher and student need the same classes "
        "here"
    )


def _channels(student: TapShape, target: TapShape) -> str:
    return f"the student has {student.channels} channels and the target {target.channels}"


def _meaning(student: TapShape, target: TapShape) -> str:
    return f"{_channels(student, target)}: {_parts(student)} and {_parts(target)}"


def _parts(shape: TapShape) -> str:
    if shape.kind == "feature":
        return f"{shape.channels} features"
    if not shape.anchors:
        return f"{shape.channels} {shape.kind}"
    what = "classes" if shape.kind == "logits" else "coordinates"
    named = f" ({listed(shape.names)})" if shape.names else ""
    return f"{shape.anchors} anchor(s) per cell x {shape.per_anchor} {what}{named}"
