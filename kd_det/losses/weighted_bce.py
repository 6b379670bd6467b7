"""Sigmoid class logits, weighted by how far the two sides are apart."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.losses.reduce import mean_over_images, sum_over_cells, wide


def weighted_bce(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    region: Tensor | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """
    Binary cross-entropy of every anchor and class towards the teacher's score, times the gap: the
    class term of CrossKD (Wang et al., CVPR 2024) and BCKD (Yang et al., ICCV 2023).

        p = sigmoid(t), q = sigmoid(s)
        sum_{n,c,i} |q - p|^beta * ( -p log q - (1 - p) log(1 - q) ) / normalizer

    The weight makes the many anchors on which both sides say background count nothing. As in
    published code, the gradient flows through the weight too. The value is 0 where q = p, though
    the cross-entropy is not.

    Args:
        student: ``(N, C, H, W)`` logits. Receives the gradient.
        teacher: of the same shape, a constant.
        beta: power of the weight, 0 (plain cross-entropy) or >= 1.
        region: ``(N, 1, H, W)`` weights >= 0 of the cells.
        normalizer: what the sum is divided by, the number of positive anchors say; ``None`` takes
            the mean over the cells of an image and over images.

    Returns:
        float32 (float64 for float64 input) scalar.

    Raises:
        ValueError: if ``beta`` is between 0 and 1 (the slope at q = p would be infinite), negative
            or not finite.
    """
    if not (beta == 0 or 1 <= beta < float("inf")):
        raise ValueError(f"beta is 0 or a finite number >= 1, but got {beta}.")
    s = wide(student)
    with torch.no_grad():
        p = torch.sigmoid(wide(teacher))
    loss = F.binary_cross_entropy_with_logits(s, p, reduction="none")
    if beta:
        loss = loss * (torch.sigmoid(s) - p).abs().pow(beta)
    per_cell = loss.sum(1, keepdim=True)  # (N, 1, H, W)
    if normalizer is None:
        return mean_over_images(per_cell, region)
    return sum_over_cells(per_cell, region) / normalizer
