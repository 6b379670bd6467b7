"""PI: pixel-wise distillation of class logits."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kd_det.channels import Common
from kd_det.context import Context
from kd_det.losses import pixel_wise_kl, temperature
from kd_det.pairing import Pair
from kd_det.registry import TERMS
from kd_det.sources import Source
from kd_det.taps import Maps
from kd_det.terms.anchor_classes import check_class_fields, classes_per_anchor
from kd_det.terms.levelwise import LevelwiseTerm
from kd_det.terms.normalizer import check_normalizer, divisor


@TERMS.register()
class PI(LevelwiseTerm):
    """
    Pixel-wise distillation of class logits: Hinton's KD at every cell (the PI of CWD's comparison,
    from SKD, Liu et al., CVPR 2019, https://arxiv.org/abs/1903.04197); see
    `kd_det.losses.pixel_wise_kl` for formula, normaliser and dtype.

    Published for segmentation, where classes exclude each other. The class scores of a dense
    detector are sigmoids, so a softmax over them is a mismatch: ``mode="sigmoid"`` compares each
    anchor and class as the yes or no that it is.

    Args:
        tap: class logits.
        mode: ``"softmax"`` over classes (published) or ``"sigmoid"``.
        tau: temperature; 1 in SKD's code, 8 in LD's RetinaNet config (softmax).
        num_classes: softmax only: classes per anchor where the tap does not tell (a module path);
            0 takes all channels for classes of one anchor there. Presets know theirs: of other
            class sets the common classes, of other anchors per cell one, see
            `kd_det.channels.common_channels`.
        cross_entropy: whether the value keeps the teacher's entropy, as in SKD's code.
        normalizer: ``"cells"`` (published) or ``"positives"``, see `kd_det.terms.normalizer`.
        levelwise: source_tap, levels, level_weights, connector, region, and source, weight,
            schedule: see `LevelwiseTerm`.

    Raises:
        ValueError: if ``tau`` is not a positive finite number, or a value is unknown; when wired,
            if ``num_classes`` is not what the tap says, the channels are no multiple of it, or a
            softmax would be over one class; in a step, if the student keeps no positives.
    """

    saves_target = False  # only its probabilities

    def __init__(
        self,
        *,
        tap: str = "cls_logits",
        mode: str = "softmax",
        tau: float = 1.0,
        num_classes: int = 0,
        cross_entropy: bool = False,
        normalizer: str = "cells",
        **levelwise: Any,
    ) -> None:
        super().__init__(tap=tap, **levelwise)
        check_class_fields("PI", mode, num_classes)
        check_normalizer("PI", normalizer)
        self.mode = mode
        self.tau = temperature("PI", tau)
        self.num_classes = num_classes
        self.cross_entropy = cross_entropy
        self.normalizer = normalizer
        self.classes: dict[str, int] = {}

    def connect(self, pair: Pair) -> Common:  # noqa: D102  # as in the base
        common = super().connect(pair)
        if self.mode == "softmax":
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
        Pixel-wise KL of one level, see `LevelwiseTerm.compare`.

        Args:
            student: see there.
            target: see there.
            region: see there.
            normalizer: see `kd_det.losses.pixel_wise_kl`.
            classes: likewise.
        """
        return pixel_wise_kl(
            student,
            target,
            mode=self.mode,
            tau=self.tau,
            classes=classes,
            cross_entropy=self.cross_entropy,
            region=region,
            normalizer=normalizer,
        )
