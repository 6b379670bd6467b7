"""Distances between what two detectors say of one box: scores and deltas."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_kl(student: Tensor, teacher: Tensor, *, tau: float = 1.0) -> Tensor:
    """
    Divergence of two distributions over classes, row by row.

        tau^2 * KL( softmax(t / tau) || softmax(s / tau) )

    Args:
        student: ``(..., C)`` logits of classes that exclude each other.
        teacher: ``(..., C)``, a constant.
        tau: temperature; its square keeps the gradient's size (Hinton et al., 2015).

    Returns:
        ``(...)`` in nats, float32 (float64 for float64 input); gradient tau * (q - p).
    """
    log_q = F.log_softmax(_wide(student) / tau, dim=-1)
    log_p = F.log_softmax(_wide(teacher.detach()) / tau, dim=-1)
    return tau**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def bernoulli_kl(student: Tensor, teacher: Tensor, *, tau: float = 1.0) -> Tensor:
    """
    Divergence of two probabilities, element by element.

        tau^2 * [ p log(p / q) + (1 - p) log((1 - p) / (1 - q)) ],   p = sigmoid(t / tau)

    Args:
        student: logits of any shape, each a yes or no of its own.
        teacher: of the same shape, a constant.
        tau: temperature.

    Returns:
        Of that shape, in nats, float32 (float64 for float64 input); gradient tau * (q - p).
    """
    s, t = _wide(student) / tau, _wide(teacher.detach()) / tau
    p = torch.sigmoid(t)
    yes = F.logsigmoid(t) - F.logsigmoid(s)
    no = F.logsigmoid(-t) - F.logsigmoid(-s)
    return tau**2 * (p * yes + (1 - p) * no)


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
    s, t = torch.broadcast_tensors(_wide(student), _wide(teacher.detach()))
    if set(ratio) != {1.0}:
        t = t * t.new_tensor(ratio).view([4] + [1] * (-dim - 1))
    return F.smooth_l1_loss(s, t, beta=beta, reduction="none").sum(dim)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
