"""From a value per cell to one value: the two means under a region, and float32."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def mean_over_cells(x: Tensor, region: Tensor | None = None) -> Tensor:
    """
    ``sum_{n,i} w_ni x_ni / sum_{n,i} w_ni``: every cell of the batch alike.

    Args:
        x: ``(N, 1, H, W)``, finite.
        region: ``(N, 1, H, W)`` weights >= 0, constants; ``None`` is 1 everywhere. Where all are
            0, the value is exactly 0, attached to the graph of ``x``.

    Returns:
        Scalar of the dtype of ``x``.
    """
    if region is None:
        return x.mean()
    w = region.detach().to(x.dtype)
    return (w * x).sum() / _or_one(w.sum())


def mean_over_images(x: Tensor, region: Tensor | None = None) -> Tensor:
    """
    ``1/N sum_n [ sum_i w_ni x_ni / sum_i w_ni ]``: every image alike, however many cells it has.
    An image whose weights are all 0 adds exactly 0 (and still counts in N).

    Args:
        x: ``(N, 1, H, W)``, finite.
        region: as in `mean_over_cells`.

    Returns:
        Scalar of the dtype of ``x``.
    """
    if region is None:
        return x.mean()
    w = region.detach().to(x.dtype)
    return ((w * x).sum((1, 2, 3)) / _or_one(w.sum((1, 2, 3)))).mean()


def sum_over_cells(x: Tensor, region: Tensor | None = None) -> Tensor:
    """``sum_{n,i} w_ni x_ni``, see `mean_over_cells`."""
    return x.sum() if region is None else (region.detach().to(x.dtype) * x).sum()


def _or_one(total: Tensor) -> Tensor:
    # Not a tiny number: its inverse, times the factors of a backward, would be infinite.
    return torch.where(total > 0, total, 1.0)
