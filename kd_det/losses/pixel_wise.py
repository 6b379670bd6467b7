"""Divergences of class logits, cell by cell."""

from torch import Tensor

from kd_det.losses.class_scores import by_anchor, check_mode
from kd_det.losses.predictions import bernoulli_kl, softmax_kl
from kd_det.losses.reduce import mean_over_images, sum_over_cells


def pixel_wise_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    mode: str = "softmax",
    tau: float = 1.0,
    classes: int = 0,
    cross_entropy: bool = False,
    region: Tensor | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """
    Knowledge distillation (Hinton et al., 2015) of every cell: PI in the comparison of CWD's paper,
    the pixel-wise term of SKD (Liu et al., CVPR 2019).

        softmax:  d_i = tau^2 sum_a KL( softmax_k(t_iak / tau) || softmax_k(s_iak / tau) )
        sigmoid:  d_i = tau^2 sum_c KL( Bernoulli(sigmoid(t_ic / tau)) || ... of s )
        1/N sum_n mean_i d_ni,   or sum_{n,i} d_ni / normalizer

    Softmax takes classes for exclusive, as they are in segmentation; a RetinaNet's are not: each
    anchor and class is a yes or no of its own, which is what sigmoid compares. The gradient for
    one logit of a cell is ``tau * (q - p)``.

    Args:
        student: ``(N, C, H, W)`` logits. Receives the gradient.
        teacher: logits of the same shape, a constant.
        mode: ``"softmax"`` or ``"sigmoid"``.
        tau: temperature.
        classes: softmax only: channels are C / classes anchors of that many classes each, anchor
            by anchor, and every anchor has its softmax; 0 takes all C for one.
        cross_entropy: leave the teacher's entropy in, as some published code does: the same
            gradient, and a value that does not fall to 0.
        region: ``(N, 1, H, W)`` weights >= 0 of the cells; an image without one adds exactly 0.
        normalizer: what the sum is divided by, the number of positive anchors say; ``None`` takes
            the mean over the cells of an image and over images.

    Returns:
        float32 (float64 for float64 input) scalar in nats. Rounding can leave -1e-7 per logit.

    Raises:
        ValueError: if the mode is unknown, or C is no multiple of ``classes``.
    """
    check_mode(mode)
    if mode == "sigmoid":
        each = bernoulli_kl(student, teacher, tau=tau, cross_entropy=cross_entropy)
    else:
        s, t = by_anchor(student, classes), by_anchor(teacher, classes)
        each = softmax_kl(s, t, tau=tau, dim=2, cross_entropy=cross_entropy)  # (N, A, H, W)
    cells = each.sum(1, keepdim=True)  # (N, 1, H, W)
    if normalizer is None:
        return mean_over_images(cells, region)
    return sum_over_cells(cells, region) / normalizer
