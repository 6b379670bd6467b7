"""How alike two maps are, and how hard a loss pulls: pure functions, nothing waits."""

from collections.abc import Sequence

import torch
from torch import Tensor

_FLOAT16_UNIT = 2.0**10
"""Gradients of float16 maps are taken times this: many are below float16's smallest number."""


def gradient_norm(loss: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """
    How hard a loss pulls at maps of the graph: ``sqrt(sum over maps of ||d loss / d map||^2)``.

    The graph stays, and no parameter's ``.grad`` is touched: a DDP reducer sees nothing.

    Args:
        loss: a scalar.
        maps: nodes of its graph, of any shapes; maps that it does not depend on count 0.

    Returns:
        float32 scalar; times one constant power of two where a map is float16.
    """
    maps = [x for x in maps if x.requires_grad]
    if not maps or not loss.requires_grad:
        return torch.zeros((), device=loss.device)
    unit = _FLOAT16_UNIT if any(x.dtype == torch.float16 for x in maps) else 1.0
    found = torch.autograd.grad(loss.float() * unit, maps, retain_graph=True, allow_unused=True)
    norms = [
        torch.linalg.vector_norm(g.detach(), dtype=torch.float32) for g in found if g is not None
    ]
    if not norms:
        return torch.zeros((), device=loss.device)
    return torch.linalg.vector_norm(torch.stack(norms))


def channel_agreement(student: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """
    Mean over images and channels of Pearson's correlation over the cells of the region.

        1 / (N C) * sum_{n,c} sum_i (s_i - mean s) (t_i - mean t) / (||s - mean s|| ||t - mean t||)

    1: every channel of the student is a rising affine function of the target's; 0: they have
    nothing to do with each other. A channel that is constant on either side counts 0.

    Args:
        student: ``(N, C, H, W)``.
        target: ``(N, C, H, W)``.
        region: ``(N, 1, H, W)``; cells of weight 0 are left out. ``None`` takes all.

    Returns:
        float32 scalar in [-1, 1].
    """
    if student.numel() == 0:
        return student.new_zeros((), dtype=torch.float32)
    total = student.new_zeros((), dtype=torch.float32)
    for s, t, inside in _images(student, target, region):
        moving = _varies(s, inside) & _varies(t, inside)  # (C)
        s, t = _centred(s, inside), _centred(t, inside)
        scale = torch.linalg.vector_norm(s, dim=1) * torch.linalg.vector_norm(t, dim=1)
        r = (s * t).sum(1) / scale.clamp_min(torch.finfo(torch.float32).tiny)
        total = total + torch.where(moving, r, 0.0).mean().clamp(-1, 1)
    return total / len(student)


def top_overlap(
    student: Tensor, target: Tensor, region: Tensor | None = None, *, share: float = 0.01
) -> Tensor:
    """
    Share of the k strongest cells per channel that student and target have in common, mean over
    images and channels; k = max(1, share of the grid's cells, rounded down).

    Where CWD's softmax looks. A channel that is constant on either side counts 0, and so do cells
    outside of the region; where that has fewer than k cells, k is their number.

    Args:
        student: ``(N, C, H, W)``.
        target: ``(N, C, H, W)``.
        region: as in `channel_agreement`.
        share: of the cells, in (0, 1].

    Returns:
        float32 scalar in [0, 1].
    """
    if student.numel() == 0:
        return student.new_zeros((), dtype=torch.float32)
    cells = student.shape[-2] * student.shape[-1]
    k = max(1, int(share * cells))
    total = student.new_zeros((), dtype=torch.float32)
    for s, t, inside in _images(student, target, region):
        moving = _varies(s, inside) & _varies(t, inside)  # (C)
        both = _is_top(s, inside, k) & _is_top(t, inside, k) & inside  # (C, M)
        wanted = inside.sum().clamp(1, k)
        total = total + torch.where(moving, both.sum(1) / wanted, 0.0).mean()
    return total / len(student)


def _images(
    student: Tensor, target: Tensor, region: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """
    One image after another, which bounds the memory that a measurement takes: ``(C, M)`` views of
    both maps and the ``(1, M)`` cells inside of the region.
    """
    n, c, h, w = student.shape
    everywhere = torch.ones((1, h * w), dtype=torch.bool, device=student.device)
    return [
        (
            student[i].reshape(c, h * w),
            target[i].reshape(c, h * w),
            everywhere if region is None else region[i].reshape(1, h * w) > 0,
        )
        for i in range(n)
    ]


def _varies(x: Tensor, inside: Tensor) -> Tensor:
    """(C) whether a channel has two different values inside; exact, unlike a variance."""
    top = x.masked_fill(~inside, float("-inf")).amax(1)
    return top > x.masked_fill(~inside, float("inf")).amin(1)


def _centred(x: Tensor, inside: Tensor) -> Tensor:
    """(C, M) in float32 minus its mean inside, 0 outside."""
    x = x.float().masked_fill(~inside, 0)
    mean = x.sum(1, keepdim=True) / inside.sum().clamp_min(1)
    return (x - mean).masked_fill_(~inside, 0)


def _is_top(x: Tensor, inside: Tensor, k: int) -> Tensor:
    """(C, M) whether a cell is among its channel's k largest."""
    index = x.masked_fill(~inside, float("-inf")).topk(k, dim=1).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(1, index, True)
