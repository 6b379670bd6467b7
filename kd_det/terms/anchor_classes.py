"""Terms that compare the class scores of anchors, cell by cell."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kd_det.channels import Common
from kd_det.context import Context
from kd_det.losses import MODES
from kd_det.pairing import Pair
from kd_det.sources import Source
from kd_det.taps import Maps
from kd_det.terms.levelwise import LevelwiseTerm
from kd_det.terms.normalizer import check_normalizer, divisor


class AnchorClassesTerm(LevelwiseTerm):
    """
    A loss of class logits that knows how many classes an anchor has, where that matters, and what
    it is divided by. A subclass implements `compare`.

    Args:
        tap: class logits.
        mode: of `kd_det.losses.MODES`.
        num_classes: classes per anchor where the tap does not tell, see `classes_per_anchor`.
        normalizer: of `kd_det.terms.normalizer.NORMALIZERS`.
        levelwise: see `LevelwiseTerm`.

    Raises:
        ValueError: if a value is unknown or negative; when wired, those of `classes_per_anchor`; in
            a step, if the learner keeps no positives.
    """

    def __init__(
        self,
        *,
        tap: str = "cls_logits",
        mode: str = "sigmoid",
        num_classes: int = 0,
        normalizer: str = "cells",
        **levelwise: Any,
    ) -> None:
        super().__init__(tap=tap, **levelwise)
        name = type(self).__name__
        if mode not in MODES:
            raise ValueError(f"{name}'s mode is one of {', '.join(MODES)}, but got '{mode}'.")
        if num_classes < 0:
            raise ValueError(f"{name} needs num_classes >= 0, but got {num_classes}.")
        check_normalizer(name, normalizer)
        self.mode = mode
        self.num_classes = num_classes
        self.normalizer = normalizer
        self.classes: dict[str, int] = {}

    def needs_classes(self) -> bool:
        """Whether the loss depends on which channels are of one anchor."""
        return True

    def connect(self, pair: Pair) -> Common:  # noqa: D102  # as in the base
        common = super().connect(pair)
        if self.needs_classes():
            where = f"level {pair.student.level} of tap '{self.tap}'"
            classes = classes_per_anchor(common, self.num_classes, self.mode, where)
            self.classes[pair.student.level] = classes
        return common

    def forward(  # noqa: D102  # as in the base
        self,
        student: Mapping[str, Maps],
        target: Mapping[str, Maps],
        context: Context,
        source: Source,
    ) -> dict[str, Tensor]:
        number = divisor(self.normalizer, context)
        return {
            level: self.compare(s, t, region, number, self.classes.get(level, 0))
            for level, s, t, region in self.aligned(student, target, context)
        }

    def compare(
        self,
        student: Tensor,
        target: Tensor,
        region: Tensor | None,
        normalizer: float | None = None,
        classes: int = 0,
    ) -> Tensor:
        """
        The value of one level, see `LevelwiseTerm.compare`.

        Args:
            student: see there.
            target: see there; with gradients where the term moves its target.
            region: see there.
            normalizer: what the sum over cells is divided by; ``None`` for their mean.
            classes: of one anchor; 0 where the term does not need it.
        """
        raise NotImplementedError


def classes_per_anchor(common: Common, num_classes: int, mode: str, where: str) -> int:
    """
    Classes of one anchor in the channels that both sides have.

    Args:
        common: those channels.
        num_classes: what the user says, for taps that do not tell; 0 takes all channels for classes
            of one anchor there.
        mode: of `kd_det.losses.MODES`.
        where: level and tap, for errors.

    Raises:
        ValueError: if ``num_classes`` is not what the tap says, the channels are no multiple of it,
            or a softmax would be over one class.
    """
    known = common.per_anchor
    if known and num_classes and known != num_classes:
        raise ValueError(
            f"{where} has {known} classes per anchor in common, and NUM_CLASSES says "
            f"{num_classes}: leave it at 0, it is for taps that do not tell"
        )
    classes = known or num_classes or common.channels
    if common.channels % classes:
        raise ValueError(
            f"{where} has {common.channels} channels, which are no whole number of anchors with "
            f"{classes} classes each: set NUM_CLASSES to the number of classes"
        )
    if classes == 1 and mode == "softmax":
        raise ValueError(
            f"{where} has one class per anchor, whose softmax is 1 whatever the logits are: set "
            'MODE: "sigmoid"'
        )
    return classes
