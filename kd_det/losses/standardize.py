"""Standardisation of feature maps before they are compared."""

import torch
from torch import Tensor


def standardize(x: Tensor, mask: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """
    Give every channel of a map zero mean and unit variance over the batch and the grid.

        (x - mean_c) / sqrt(var_c + eps),   mean and variance over all valid (n, h, w)

    This is a BatchNorm without parameters and without running statistics, the form that RTMDet's
    public CWD recipe puts in front of the softmax, so that a channel's scale stops deciding how
    peaked its distribution is. Statistics are those of the local batch (not synchronised).

    Args:
        x: ``(N, C, H, W)``.
        mask: ``(N, 1, H, W)``, non-zero where a cell counts; ``None`` counts every cell. Cells
            that do not count are scaled with the others but leave the statistics alone.
        eps: added to the variance, so that a constant channel gives 0 and a finite gradient.

    Returns:
        float32 (float64 for float64 input) tensor of the shape of ``x``; gradients flow through
        the statistics.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if mask is None:
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)  # (1, C, 1, 1)
    else:
        valid = (mask > 0).to(x.dtype)  # (N, 1, H, W)
        count = valid.sum().clamp_min(1)
        mean = (x * valid).sum(dim=(0, 2, 3), keepdim=True) / count  # (1, C, 1, 1)
        var = ((x - mean).square() * valid).sum(dim=(0, 2, 3), keepdim=True) / count
    return (x - mean) * torch.rsqrt(var + eps)
