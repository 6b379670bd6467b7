"""PKD: squared distance of channels that are brought to one mean and scale."""

import torch
from torch import Tensor

from kd_det.losses.reduce import wide

_SMALLEST = 1e-24


def pearson_distance(
    student: Tensor, teacher: Tensor, *, region: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """
    PKD (Cao et al., NeurIPS 2022, https://arxiv.org/abs/2207.02039): every channel of both maps is
    standardised over the batch and the grid, and the mean of squares is taken.

        z(x)_nci = (x_nci - mean_c) / (std_c + eps),   mean and unbiased std over all (n, i)
        1/2 mean_{n,c,i} ( z(s) - z(t) )^2   =   (n - 1) / n * mean_c (1 - r_c)   for eps = 0

    with r_c Pearson's correlation of the channel over n = N H W cells: it lies in [0, 2] and minds
    neither the scale nor the offset of a channel. The statistics couple the images of a batch (of
    one process): the value of a batch is not the mean of its images' values.

    Args:
        student: ``(N, C, H, W)``. Receives the gradient, through its statistics too.
        teacher: of the same shape, a constant.
        region: ``(N, 1, H, W)`` weights >= 0, in the statistics and in the mean; where all are 0,
            the value is exactly 0.
        eps: added to the standard deviation; a constant channel becomes 0.

    Returns:
        float32 (float64 for float64 input) scalar. A constant channel of the student, and a map of
        a single cell, have the gradient 0.
    """
    w = None if region is None else region.detach()
    with torch.no_grad():
        target = _standardized(teacher, w, eps)
    per_cell = (_standardized(student, w, eps) - target).square().mean(1, keepdim=True)
    return _mean(per_cell, w).mean() / 2


def _standardized(x: Tensor, w: Tensor | None, eps: float) -> Tensor:
    x = wide(x)
    centred = x - _mean(x, w)  # (N, C, H, W)
    # Again: what rounding leaves of a constant channel of 1e4 would be scaled up to 1.
    centred = centred - _mean(centred, w)
    var = _mean(centred.square(), w) * _bessel(x, w)  # (1, C, 1, 1)
    # A root has no slope at 0; below the smallest, the clamp's is 0.
    return centred / (var.clamp_min(_SMALLEST).sqrt() + eps)


def _bessel(x: Tensor, w: Tensor | None) -> float | Tensor:
    """Factor n / (n - 1), which makes a variance over n cells unbiased; 1 for a single cell."""
    if w is None:
        n = x[:, 0].numel()
        return n / max(n - 1, 1)
    inside = (w > 0).sum().to(x.dtype)
    return inside / (inside - 1).clamp_min(1)


def _mean(x: Tensor, w: Tensor | None) -> Tensor:
    """Over the batch and the grid, ``(1, C, 1, 1)``; exactly 0 where nothing counts."""
    if w is None:
        return x.mean((0, 2, 3), keepdim=True)
    w = w.to(x.dtype)
    total = w.sum()
    return (w * x).sum((0, 2, 3), keepdim=True) / torch.where(total > 0, total, 1.0)
