"""Squared distance of feature maps under a region."""

from torch import Tensor

from kd_det.losses.reduce import mean_over_cells, wide


def imitation(
    student: Tensor,
    teacher: Tensor,
    *,
    region: Tensor | None = None,
    over_channels: str = "mean",
) -> Tensor:
    """
    Half the squared distance of two maps, mean over the cells that count.

        1 / (2 sum w) * sum_{n,i} w_ni * mean_c (s_nci - t_nci)^2

    Args:
        student: ``(N, C, H, W)``. Receives the gradient.
        teacher: of the same shape, a constant.
        region: ``(N, 1, H, W)`` weights >= 0; ``None`` counts every cell 1. The sum of the weights
            is that of the whole batch; where it is 0, so is the value, exactly.
        over_channels: ``"mean"``, or ``"sum"``: a factor C.

    Returns:
        float32 (float64 for float64 input) scalar.

    Raises:
        ValueError: if ``over_channels`` is unknown.
    """
    if over_channels not in ("mean", "sum"):
        raise ValueError(f"over_channels is 'mean' or 'sum', but got '{over_channels}'.")
    squares = (wide(student) - wide(teacher.detach())).square()
    per_cell = getattr(squares, over_channels)(1, keepdim=True)  # (N, 1, H, W)
    return mean_over_cells(per_cell, region) / 2
