"""PI: pixel-wise distillation of class logits."""

from typing import Any

from torch import Tensor

from kd_det.losses import pixel_wise_kl, temperature
from kd_det.registry import TERMS
from kd_det.terms.anchor_classes import AnchorClassesTerm


@TERMS.register()
class PI(AnchorClassesTerm):
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
        mode: str = "softmax",
        tau: float = 1.0,
        cross_entropy: bool = False,
        **anchor_classes: Any,
    ) -> None:
        super().__init__(mode=mode, **anchor_classes)
        self.tau = temperature("PI", tau)
        self.cross_entropy = cross_entropy

    def needs_classes(self) -> bool:  # noqa: D102  # as in the base
        return self.mode == "softmax"

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
