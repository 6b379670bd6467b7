"""Channel Distillation: what is left of a channel when the positions are gone."""

from torch import Tensor

from kd_det.losses.reduce import wide


def channel_mean(student: Tensor, teacher: Tensor, *, region: Tensor | None = None) -> Tensor:
    """
    Squared difference of the mean response of every channel (Zhou et al., 2020,
    https://arxiv.org/abs/2006.01683).

        1 / (N C) * sum_{n,c} ( mean_i s_nci - mean_i t_nci )^2

    Shuffling the positions of one side changes nothing: it says which channels fire in an image
    and never where.

    Args:
        student: ``(N, C, H, W)``. Receives the gradient.
        teacher: of the same channels, a constant.
        region: ``(N, 1, H, W)`` weights >= 0 of the mean over positions; an image without one
            adds exactly 0 (and still counts in N).

    Returns:
        float32 (float64 for float64 input) scalar.
    """
    # The difference first: near agreement, two means of 1e4 would leave nothing of it.
    gap = wide(student) - wide(teacher.detach())
    if region is None:
        return gap.mean((2, 3)).square().mean()
    w = region.detach().to(gap.dtype)
    total = w.sum((2, 3))  # (N, 1)
    return ((w * gap).sum((2, 3)) / total.masked_fill(total <= 0, 1)).square().mean()
