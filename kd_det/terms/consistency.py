"""Consistency of class scores: the term that moves both sides."""

from torch import Tensor

from kd_det.losses import consistency
from kd_det.registry import TERMS
from kd_det.terms.anchor_classes import AnchorClassesTerm


@TERMS.register()
class Consistency(AnchorClassesTerm):
    """
    OKDCR's consistency (Zhang, Gong, Liu, 2021): the distance between the class scores of two
    heads, of one network (intra-model, on two views of each image) or of two (inter-model). See
    `kd_det.losses.consistency` for formula, normaliser and dtype.

    It is mutual: gradients go to both sides, so one term stands for a pair. A source whose maps are
    constants (a `Teacher`) is not moved.

    Published with the factor lambda = 1 (CIFAR-10) or 100 (CIFAR-100, ImageNet) of eq. 2, which is
    the ``weight`` here, for softmaxes of classifiers. *Reconstruction*: the distance itself, whose
    equation was not to be had, and all of its form for dense detectors.

    Args:
        tap: class logits.
        mode: ``"sigmoid"`` of every anchor and class, or ``"softmax"`` over an anchor's classes
            (published).
        num_classes: classes per anchor where the tap does not tell, as in `PI`.
        normalizer: ``"cells"`` (as published, where a sample is an image) or ``"positives"``, see
            `kd_det.terms.normalizer`.
        levelwise: source_tap, levels, level_weights, connector, region, and source, weight,
            schedule: see `LevelwiseTerm`.

    Raises:
        ValueError: if a value is unknown; when wired, if ``num_classes`` is not what the tap says,
            the channels are no multiple of it, or a softmax would be over one class; in a step, if
            the student keeps no positives.
    """

    moves_target = True
    saves_target = False  # only its probabilities

    def compare(
        self,
        student: Tensor,
        target: Tensor,
        region: Tensor | None,
        normalizer: float | None = None,
        classes: int = 0,
    ) -> Tensor:
        """
        Consistency of one level, see `LevelwiseTerm.compare`.

        Args:
            student: see there.
            target: see there, but with gradients.
            region: see there.
            normalizer: see `kd_det.losses.consistency`.
            classes: likewise.
        """
        return consistency(
            student, target, mode=self.mode, classes=classes, region=region, normalizer=normalizer
        )
