"""Distances between what two detectors say of one box: scores and deltas."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.losses.reduce import wide


def softmax_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    tau: float = 1.0,
    dim: int = -1,
    cross_entropy: bool = False,
) -> Tensor:
    """
    Divergence of two distributions over classes, row by row.

        tau^2 * KL( softmax(t / tau) || softmax(s / tau) )

    Args:
        student: logits of classes that exclude each other, ``(..., C)``.
        teacher: of the same shape, a constant.
        tau: temperature; its square keeps the gradient's size (Hinton et al., 2015).
        dim: which dimension holds the classes.
        cross_entropy: leave the teacher's entropy in: the same gradient, and a value that does not
            fall to 0.

    Returns:
        The shape without ``dim``, in nats, float32 (float64 for float64 input); gradient
        tau * (q - p).
    """
    log_q = F.log_softmax(wide(student) / tau, dim=dim)
    with torch.no_grad():
        log_p = F.log_softmax(wide(teacher) / tau, dim=dim)
        p = log_p.exp()
    gap = -log_q if cross_entropy else log_p - log_q
    return tau**2 * (p * gap).sum(dim)


def bernoulli_kl(
    student: Tensor, teacher: Tensor, *, tau: float = 1.0, cross_entropy: bool = False
) -> Tensor:
    """
    Divergence of two probabilities, element by element.

        tau^2 * [ p log(p / q) + (1 - p) log((1 - p) / (1 - q)) ],   p = sigmoid(t / tau)

    Args:
        student: logits of any shape, each a yes or no of its own.
        teacher: of the same shape, a constant.
        tau: temperature.
        cross_entropy: as in `softmax_kl`.

    Returns:
        Of that shape, in nats, float32 (float64 for float64 input); gradient tau * (q - p).
        Exactly 0 where both agree; elsewhere rounding can leave -1e-7.
    """
    with torch.no_grad():
        t = wide(teacher) / tau
        p = torch.sigmoid(t)
    value = F.binary_cross_entropy_with_logits(wide(student) / tau, p, reduction="none")
    if not cross_entropy:
        with torch.no_grad():  # by the same operator, or it would not be 0 where both agree
            entropy = F.binary_cross_entropy_with_logits(t, p, reduction="none")
        value = value - entropy
    return tau**2 * value


def delta_gap(
    student: Tensor,
    teacher: Tensor,
    *,
    ratio: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    beta: float = 0.0,
    dim: int = -1,
) -> Tensor:
    """
    Smooth L1 between deltas, summed over the four of a box.

        sum_i smooth_l1( s_i - ratio_i * t_i )

    Args:
        student: deltas (dx, dy, dw, dh) along ``dim``.
        teacher: a constant, of a shape that broadcasts with the student's.
        ratio: what brings the teacher's deltas into the student's units.
        beta: where it turns from a parabola into a line; 0 is the L1 distance.
        dim: which dimension holds the four, counted from the last (-1).

    Returns:
        The shape without ``dim``, float32 (float64 for float64 input).
    """
    s, t = torch.broadcast_tensors(wide(student), wide(teacher.detach()))
    if set(ratio) != {1.0}:
        t = t * t.new_tensor(ratio).view([4] + [1] * (-dim - 1))
    return F.smooth_l1_loss(s, t, beta=beta, reduction="none").sum(dim)
