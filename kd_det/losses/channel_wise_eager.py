"""
Channel-wise KL in plain PyTorch, in blocks of rows that stay in cache.

Shape shorthand: N images, C channels, M = H * W positions; a *row* is one (n, c) channel map, and a
block holds n images and c channels of each.
"""

import torch
from torch import Tensor

# Bytes that one block of rows holds per temporary, of which two to five live at once: on a CPU each
# thread's share should stay in cache while calls and meetings of threads are few, and on other
# devices launches should be few.
_BLOCK_BYTES = {"cpu": 1 << 20}
_BLOCK_BYTES_ELSEWHERE = 1 << 26

# Beyond one thread's share, temporaries together stay below a fifth or so of the map.
_LARGEST_SHARE = 1 / 24


def kl_of_rows(
    student: Tensor,
    teacher: Tensor,
    grad: Tensor | None,
    *,
    tau: float,
    log_w: Tensor | None,
    step: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """
    KL(p || q) of every row, with p = softmax(t / tau + log_w) and q = softmax(s / tau + log_w).

    With lse the logarithm of a row's sum of exponentials,

        KL = <p, t - s> / tau - lse(t) + lse(s),   lse(x) = max x - log max softmax(x)
           = <p, t - s - (max t - max s)> / tau + log(max p / max q)

    so that each exponential is computed once, by PyTorch's own softmax, and the gradient costs one
    subtraction in memory that is there anyway.

    Args:
        student: ``(N, C, H, W)``, any memory format.
        teacher: ``(N, C, H, W)``.
        grad: filled with ``step * (q - p)``; ``None`` where nobody asks.
        tau: temperature.
        log_w: ``(N, 1, M)`` finite, in ``dtype``: logarithms of the positions' weights, half the
            lowest number for 0; ``None`` for all 1. A row of nothing else has p = q exactly, and a
            meaningless KL.
        step: ``(N, C, 1)`` in ``dtype``; ``None`` for all 1.
        dtype: float32 or float64, in which it is computed.

    Returns:
        ``(N, C)`` in ``dtype``.
    """
    stats = torch.empty((5, *student.shape[:2], 1), dtype=dtype, device=student.device)
    scratch = _Scratch(student.device, dtype)
    # Rows that lie in memory as they are needed are read and written in place.
    whole_t, whole_s = (_rows(x, dtype) for x in (teacher, student))
    whole_grad = None if grad is None else _rows(grad, dtype)
    for block in blocks(student, dtype):
        t = scratch.rows("t", teacher[block]) if whole_t is None else whole_t[block]  # (n, c, M)
        s = scratch.rows("s", student[block]) if whole_s is None else whole_s[block]
        gap = torch.sub(t, s, out=scratch("gap", t.shape))
        if log_w is not None:
            t = torch.add(log_w[block[0]], t, alpha=1 / tau, out=scratch("t", t.shape))
            s = torch.add(log_w[block[0]], s, alpha=1 / tau, out=scratch("s", s.shape))
        elif tau != 1.0:
            t = torch.mul(t, 1 / tau, out=scratch("t", t.shape))
            s = torch.mul(s, 1 / tau, out=scratch("s", s.shape))
        max_t, max_s, max_p, max_q, cost = stats[(slice(None), *block)].unbind()
        p = torch.softmax(t, -1, out=scratch("p", t.shape))
        q = scratch("q", t.shape) if whole_grad is None else whole_grad[block]
        torch.softmax(s, -1, out=q)
        for x, peak in ((t, max_t), (s, max_s), (p, max_p), (q, max_q)):
            torch.amax(x, -1, keepdim=True, out=peak)
        # Without the shift between the maps, which cancels: its rounding would not.
        gap.sub_((max_t - max_s).mul_(tau)).mul_(p)
        torch.sum(gap, -1, keepdim=True, out=cost)
        if grad is not None:
            q_minus_p = q.sub_(p)
            if step is not None:
                q_minus_p.mul_(step[block])
            if whole_grad is None:
                grad[block].copy_(q_minus_p.view(grad[block].shape))
    *_, max_p, max_q, cost = stats.squeeze(-1).unbind()  # (N, C)
    return cost.div_(tau).add_(max_p.div_(max_q).log_())


def blocks(x: Tensor, dtype: torch.dtype) -> list[tuple[slice, slice]]:
    """Cut (N, C) into blocks of whole images, or of channels of one image, of a bounded size."""
    n, c, h, w = x.shape
    budget = _BLOCK_BYTES.get(x.device.type, _BLOCK_BYTES_ELSEWHERE)
    if x.device.type == "cpu":
        most = max(budget, int(x.nbytes * _LARGEST_SHARE))
        budget = min(budget * torch.get_num_threads(), most)
    rows = max(budget // dtype.itemsize // max(h * w, 1), 1)
    if rows >= c:
        images = max(rows // max(c, 1), 1)
        return [(slice(i, i + images), slice(0, c)) for i in range(0, n, images)]
    return [(slice(i, i + 1), slice(j, j + rows)) for i in range(n) for j in range(0, c, rows)]


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(N, C, M) view of the map if its rows are in memory one after the other, in ``dtype``."""
    return x.flatten(2) if x.is_contiguous() and x.dtype == dtype else None


class _Scratch:
    """
    Buffers that every block uses again: fresh memory costs more than the arithmetic on it. The
    first block is the largest.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        if name not in self._buffers:
            size = shape.numel()
            self._buffers[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return self._buffers[name][: shape.numel()].view(shape)

    def rows(self, name: str, block: Tensor) -> Tensor:
        """An (n, c, H, W) block, copied to (n, c, M)."""
        rows = self(name, block.shape)
        rows.copy_(block)
        return rows.flatten(2)
