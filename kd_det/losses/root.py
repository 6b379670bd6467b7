"""The square root of a total, with a slope at 0."""

import torch
from torch import Tensor


def root(total: Tensor, *, eps: float = 1e-12) -> Tensor:
    """
    ``sqrt(x)`` for x >= eps, and ``x / sqrt(eps)`` below: 0 at 0, with a finite gradient.

    Args:
        total: sums of squares, >= 0.
        eps: where the root becomes a line.
    """
    return torch.where(total < eps, total / eps**0.5, total.clamp_min(eps).sqrt())


def root_of_squares(
    student: Tensor, teacher: Tensor, region: Tensor | None = None, *, eps: float = 1e-12
) -> Tensor:
    """
    ``root( sum w (s - t)^2 )`` over the whole batch, as FKD's terms are: a norm, no mean, which
    grows with the root of the batch and of the map.

    Args:
        student: receives the gradient.
        teacher: of the same shape; it receives one where it requires one (a teacher-side module).
        region: weights >= 0 of a shape that broadcasts.
        eps: see `root`.

    Returns:
        float32 (float64 for float64 input) scalar.
    """
    wider = torch.promote_types(student.dtype, torch.float32)
    squares = (student.to(wider) - teacher.to(wider)).square()
    if region is not None:
        squares = squares * region.detach().to(wider)
    return root(squares.sum(), eps=eps)
