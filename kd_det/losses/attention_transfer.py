"""Attention transfer."""

import torch
from torch import Tensor

from kd_det.losses.reduce import mean_over_images, wide

_SMALLEST = 1e-12


def attention_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    p: float = 2.0,
    region: Tensor | None = None,
    over_cells: str = "mean",
) -> Tensor:
    """
    Attention transfer (AT; Zagoruyko and Komodakis, ICLR 2017, https://arxiv.org/abs/1612.03928),
    as in the authors' code: energy maps of unit norm are compared by their squared difference.

        Q(F)_i = 1/C sum_c |F_ci|^p,   q = Q / ||Q||_2 over the cells of the image
        1/N sum_n mean_i (q(S)_ni - q(T)_ni)^2

    The mean over M cells of a difference of unit vectors is at most 4 / M (2 / M in fact, as q >=
    0): on a P3 of 16800 cells it is 260 times weaker than on an 8 x 8 map. ``over_cells="sum"``
    leaves the division out, so that levels of all sizes count alike.

    Args:
        student: ``(N, C, H, W)``. Receives the gradient.
        teacher: ``(N, C', H, W)``, a constant; its channels may be others.
        p: power, >= 1.
        region: ``(N, 1, H, W)`` weights >= 0 of the cells, in the norm and in the mean: 0 leaves a
            cell out. An image without a cell adds exactly 0.
        over_cells: ``"mean"`` (published) or ``"sum"``.

    Returns:
        float32 (float64 for float64 input) scalar. A map that is 0 everywhere has q = 0 and the
        gradient 0.

    Raises:
        ValueError: if ``p`` is below 1, or ``over_cells`` is unknown.
    """
    if not 1 <= p < float("inf"):
        raise ValueError(f"Attention transfer needs a finite p >= 1, but got {p}.")
    if over_cells not in ("mean", "sum"):
        raise ValueError(f"over_cells is 'mean' or 'sum', but got '{over_cells}'.")
    weights = None if region is None else region.detach()
    with torch.no_grad():
        target = _of_unit_norm(energy(teacher, p), weights)
    gap = (_of_unit_norm(energy(student, p), weights) - target).square()  # (N, 1, H, W)
    if over_cells == "mean":
        return mean_over_images(gap, weights)
    weighted = gap if weights is None else gap * weights.to(gap.dtype)
    return weighted.sum((1, 2, 3)).mean()


def energy(x: Tensor, p: float = 2.0) -> Tensor:
    """
    How strongly a map responds at each cell: ``1/C sum_c |x_ci|^p``.

    Args:
        x: ``(N, C, H, W)``.
        p: power, >= 1.

    Returns:
        float32 (float64 for float64 input) ``(N, 1, H, W)``.
    """
    x = wide(x)
    return (x.square() if p == 2 else x.abs().pow(p)).mean(1, keepdim=True)


def _of_unit_norm(x: Tensor, weights: Tensor | None) -> Tensor:
    """Energies divided by their norm over the cells that count; 0 in the others."""
    if weights is not None:
        x = x * (weights > 0)
    # First by the largest: squares of the energies of a map of 1e4 would leave float32.
    x = x / x.detach().amax((2, 3), keepdim=True).clamp_min(_SMALLEST)
    share = x if weights is None else x * weights.to(x.dtype).sqrt()
    norm = torch.linalg.vector_norm(share, dim=(2, 3), keepdim=True)  # its gradient at 0 is 0
    return x / norm.clamp_min(_SMALLEST)
