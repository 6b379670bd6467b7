"""
Channel-wise KL as one CUDA kernel in Triton: a program per row reads both maps once for the value,
and again, from the second-level cache, for the gradient; rows of one block are read once.

The one file of this room that imports triton; `channel_wise_kl` opens it when asked to. It has run
in Triton's interpreter (``TRITON_INTERPRET=1``) and compiles for sm_80 and sm_90. No run on a GPU
is on record: it is not chosen by itself, and its block sizes are not tuned.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements that a program holds at a time, and what it needs to hold them in registers.
_LONGEST_BLOCK = 4096
_WARPS = 8

# When the kernel below was decorated, Triton looked at this variable, too.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_device(device: torch.device) -> None:
    """
    Refuse maps that the kernel cannot read.

    Raises:
        ValueError: if they are neither on a CUDA device nor for Triton's interpreter.
    """
    if device.type != "cuda" and not _INTERPRETED:
        raise ValueError(
            f"channel_wise_kl's backend 'triton' needs maps on a CUDA device, but they are on "
            f"'{device}'. Set the backend to 'auto' or 'eager' (or, to test the kernel without a "
            "GPU, TRITON_INTERPRET=1 before triton is imported)."
        )


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
    As `kd_det.losses.channel_wise_eager.kl_of_rows`, of float16, bfloat16 and float32 maps,
    computed in float32. Maps whose rows do not lie in memory one after the other are copied.

    Raises:
        ValueError: if a map is float64.
    """
    if dtype != torch.float32:
        raise ValueError(
            "channel_wise_kl's backend 'triton' computes in float32, but a map is float64. Set the "
            "backend to 'auto' or 'eager'."
        )
    n, c, h, w = student.shape
    m = h * w
    kl = torch.empty((n, c), dtype=dtype, device=student.device)
    out = grad
    if grad is not None and not grad.is_contiguous():
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    if kl.numel():
        block = min(triton.next_power_of_2(m), _LONGEST_BLOCK)
        with torch.cuda.device_of(student):
            # A pointer that its flag switches off is never read: any tensor stands for it.
            _row[(n * c,)](
                student.contiguous(),
                teacher.contiguous(),
                kl if log_w is None else log_w.contiguous(),
                kl if step is None else step.contiguous(),
                kl if out is None else out,
                kl,
                m,
                c,
                1 / tau,
                HAS_WEIGHT=log_w is not None,
                HAS_STEP=step is not None,
                HAS_GRAD=out is not None,
                ONE_BLOCK=m <= block,
                BLOCK=block,
                num_warps=_WARPS,
            )
    if out is not None and out is not grad:
        grad.copy_(out)  # type: ignore[union-attr]
    return kl


@triton.jit
def _load(base, log_w, offsets, inside, inv_tau, HAS_WEIGHT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Raw values of a block, and its logits: -inf beyond the row."""
    raw = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    x = raw * inv_tau
    if HAS_WEIGHT:
        x += tl.load(log_w + offsets, mask=inside, other=0.0)
    return raw, tl.where(inside, x, float("-inf"))


@triton.jit
def _scale(step, row, HAS_STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Factor of the row's gradient."""
    if HAS_STEP:
        return tl.load(step + row)
    else:  # noqa: RET505  # one branch is compiled, and Triton wants to see both
        return 1.0


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    student,
    teacher,
    log_w,
    step,
    grad,
    kl,
    m,
    c,
    inv_tau,
    HAS_WEIGHT: tl.constexpr,
    HAS_STEP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: a batch of maps may have more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    student += row * m
    teacher += row * m
    grad += row * m
    log_w += (row // c) * m
    lanes = tl.arange(0, BLOCK)

    if ONE_BLOCK:
        inside = lanes < m
        raw_t, t = _load(teacher, log_w, lanes, inside, inv_tau, HAS_WEIGHT)
        raw_s, s = _load(student, log_w, lanes, inside, inv_tau, HAS_WEIGHT)
        top_t = tl.max(t, 0)
        top_s = tl.max(s, 0)
        e_t = tl.exp(t - top_t)
        e_s = tl.exp(s - top_s)
        z_t = tl.sum(e_t, 0)
        z_s = tl.sum(e_s, 0)
        cost = tl.sum(e_t * (raw_t - raw_s), 0)
        if HAS_GRAD:
            g = (e_s / z_s - e_t / z_t) * _scale(step, row, HAS_STEP)
            tl.store(grad + lanes, g.to(grad.dtype.element_ty), mask=inside)
    else:
        # Every lane keeps its own maximum, sum and cost; they meet after the last block. A maximum
        # begins at the lowest number: from -inf, exp(max - new max) would not be a number.
        max_t = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
        max_s = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
        sum_t = tl.zeros((BLOCK,), tl.float32)
        sum_s = tl.zeros((BLOCK,), tl.float32)
        costs = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, m, BLOCK):
            inside = start + lanes < m
            raw_t, t = _load(teacher, log_w, start + lanes, inside, inv_tau, HAS_WEIGHT)
            raw_s, s = _load(student, log_w, start + lanes, inside, inv_tau, HAS_WEIGHT)
            new_t = tl.maximum(max_t, t)
            new_s = tl.maximum(max_s, s)
            shrink = tl.exp(max_t - new_t)
            e_t = tl.exp(t - new_t)
            costs = costs * shrink + e_t * (raw_t - raw_s)
            sum_t = sum_t * shrink + e_t
            sum_s = sum_s * tl.exp(max_s - new_s) + tl.exp(s - new_s)
            max_t = new_t
            max_s = new_s
        top_t = tl.max(max_t, 0)
        top_s = tl.max(max_s, 0)
        shrink_t = tl.exp(max_t - top_t)
        z_t = tl.sum(sum_t * shrink_t, 0)
        z_s = tl.sum(sum_s * tl.exp(max_s - top_s), 0)
        cost = tl.sum(costs * shrink_t, 0)
        if HAS_GRAD:
            scale = _scale(step, row, HAS_STEP)
            for start in range(0, m, BLOCK):
                inside = start + lanes < m
                raw_t, t = _load(teacher, log_w, start + lanes, inside, inv_tau, HAS_WEIGHT)
                raw_s, s = _load(student, log_w, start + lanes, inside, inv_tau, HAS_WEIGHT)
                g = (tl.exp(s - top_s) / z_s - tl.exp(t - top_t) / z_t) * scale
                tl.store(grad + start + lanes, g.to(grad.dtype.element_ty), mask=inside)
    tl.store(kl + row, cost / z_t * inv_tau - (top_t - top_s) + tl.log(z_s / z_t))
