"""
Channel-wise distillation, in blocks of rows that stay in cache.

Shape shorthand in this module:

    N images, C channels, M = H * W positions of the grid; a *row* is one (n, c) channel map.
"""

from typing import Any

import torch
from torch import Tensor

# Bytes of float32 that one block of rows holds per temporary. About five temporaries live at once:
# on a CPU they should stay in the second-level cache, on other devices launches should be few.
_BLOCK_BYTES = {"cpu": 1 << 20}
_BLOCK_BYTES_ELSEWHERE = 1 << 26

# A cell's gradient, 1 / (N C M) or so, is below float16's smallest number, and a loss scale only
# comes in the backward: a float16 map's gradient is saved in units that fill float16's range.
_FLOAT16_RANGE = 2.0**15


def channel_wise_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    tau: float = 1.0,
    region: Tensor | None = None,
    channel_weight: Tensor | None = None,
) -> Tensor:
    """
    Channel-wise distillation (CWD; Shu et al., ICCV 2021, https://arxiv.org/abs/2011.13256, eq. 4
    and 5): each channel becomes a distribution over the H x W positions, compared by
    KL(teacher || student).

        tau^2 / (N C) * sum_{n,c} KL( softmax_HW(t_nc / tau) || softmax_HW(s_nc / tau) )

    There is no division by H W: a row's divergence is in nats and does not depend on the size of
    the grid. It is the true divergence (published code drops the teacher's entropy now and then,
    which gives the same gradient and a value that never reaches 0). The gradient with respect to
    the student is ``tau / (N C) * (softmax(s / tau) - softmax(t / tau))``.

    Args:
        student: ``(N, C, H, W)`` map, any floating dtype and memory format. Receives the gradient.
        teacher: ``(N, C, H, W)`` map of the same shape. Treated as a constant.
        tau: temperature, > 0. Larger is softer; tau^2 keeps the gradient's scale comparable.
        region: ``(N, 1, H, W)`` weights >= 0 of the positions: the softmax becomes
            ``w exp(x) / sum w exp(x)``, so that 0 leaves a position out (padding) and 1 changes
            nothing. An image whose weights are all 0 contributes exactly 0.
        channel_weight: ``(N, C)`` weights >= 0 of the rows. The mean over the channels of an image
            becomes the weighted mean ``sum_c a_nc KL_nc / sum_c a_nc``; ``None`` is the paper.

    Returns:
        Scalar, float32 (float64 when a map is float64): mean over N and C, sum over H x W. It is 0
        iff the maps agree up to a constant per row. Computed in that dtype under autocast too,
        with one tensor of the student's shape and dtype saved for the backward.

    Raises:
        ValueError: if the shapes do not fit, or ``tau`` is not a positive finite number.
        RuntimeError: in a backward with ``create_graph=True``.
    """
    _check(student, teacher, tau, region, channel_weight)
    # A plain function of tensors for autograd: options are resolved to two weight tensors first.
    return _ChannelWiseKL.apply(student, teacher.detach(), float(tau), region, channel_weight)


class _ChannelWiseKL(torch.autograd.Function):
    """
    The gradient is formed in the forward, where both softmaxes are at hand: the backward scales
    one saved tensor. Differentiating twice is refused.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        tau: float,
        region: Tensor | None,
        channel_weight: Tensor | None,
    ) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):
            wide = torch.float64 in (student.dtype, teacher.dtype)
            dtype = torch.float64 if wide else torch.float32
            weight, mean = _row_weight(student, channel_weight, dtype)
            unit = _FLOAT16_RANGE if student.dtype == torch.float16 else 1.0
            grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
            total = student.new_zeros((), dtype=dtype)
            for image, rows in _blocks(student, dtype):
                total += _block(
                    student[image, rows],
                    teacher[image, rows],
                    tau,
                    None if region is None else region[image],
                    weight[image, rows],
                    None if grad is None else grad[image, rows],
                    unit,
                )
        if grad is not None:
            ctx.save_for_backward(grad)
            ctx.factor = tau * mean / unit
        return total * (tau**2 * mean)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # create_graph=True. PyTorch's once_differentiable would let it pass where the loss is
            # the end of the graph, with a second derivative of 0.
            raise RuntimeError(
                "channel_wise_kl can be differentiated once only: its gradient is formed in the "
                "forward. Take it without create_graph=True."
            )
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        (grad,) = ctx.saved_tensors
        # One element, not a scalar: a scalar would be rounded to the map's dtype first, and this
        # one is 0 in float16 without a loss scale.
        factor = (grad_output * ctx.factor).reshape(1)
        return torch.mul(grad, factor, out=torch.empty_like(grad)), None, None, None, None


def _block(
    student: Tensor,
    teacher: Tensor,
    tau: float,
    region: Tensor | None,
    weight: Tensor,
    grad: Tensor | None,
    unit: float,
) -> Tensor:
    """
    One block of n images and c channels: sum of weight * KL, and unit * weight * (q - p) written to
    ``grad``.

    With e = w exp(x - max) and z = sum e, a row needs each exponential once:
    KL = sum_i e_t (t - s) / z_t - log z_t + log z_s, all maps shifted by their row's maximum.
    """
    n, c, h, w = student.shape
    shape = (n * c, h * w)
    dtype = weight.dtype
    t = teacher.to(dtype).reshape(shape)  # (n c, M)
    s = student.to(dtype).reshape(shape)
    if tau != 1.0:
        t, s = t / tau, s / tau
    gap = t - s
    if region is not None:
        log_w = region.to(dtype).log().expand(n, c, h, w).reshape(shape)  # -inf where weight is 0
        t, s = t + log_w, s + log_w
    # A row without a position left has maximum -inf: clamped, its exponentials are exactly 0 ...
    lowest = torch.finfo(dtype).min
    t_max = t.amax(1, keepdim=True).clamp_min(lowest)  # (n c, 1)
    s_max = s.amax(1, keepdim=True).clamp_min(lowest)
    gap -= t_max - s_max
    e_t = (t - t_max).exp_()
    e_s = (s - s_max).exp_()
    # ... and its z is clamped to 1, which a row with positions never falls below.
    z_t = e_t.sum(1, keepdim=True).clamp_min_(1)
    z_s = e_s.sum(1, keepdim=True).clamp_min_(1)
    weight = weight.reshape(-1, 1)  # (n c, 1)
    if grad is not None:
        step = weight * unit
        q_minus_p = e_s.mul_(step / z_s).addcmul_(e_t, step / z_t, value=-1)  # (n c, M)
        grad.copy_(q_minus_p.view(n, c, h, w))
    kl = e_t.mul_(gap).sum(1, keepdim=True) / z_t - z_t.log() + z_s.log()
    return (kl * weight).sum()


def _row_weight(
    x: Tensor, channel_weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """(N, C) weights of the rows and a factor: 1 and 1 / (N C), or a_nc / sum_c a_nc and 1 / N."""
    n, c = x.shape[:2]
    if channel_weight is None:
        return x.new_ones((n, c), dtype=dtype), 1 / max(n * c, 1)
    a = channel_weight.detach().to(dtype)
    return a / a.sum(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny), 1 / max(n, 1)


def _blocks(x: Tensor, dtype: torch.dtype) -> list[tuple[slice, slice]]:
    """Cut (N, C) into blocks of whole images, or of channels of one image, of a bounded size."""
    n, c, h, w = x.shape
    budget = _BLOCK_BYTES.get(x.device.type, _BLOCK_BYTES_ELSEWHERE) // dtype.itemsize
    rows = max(budget // max(h * w, 1), 1)
    if rows >= c:
        images = max(rows // max(c, 1), 1)
        return [(slice(i, i + images), slice(0, c)) for i in range(0, n, images)]
    return [(slice(i, i + 1), slice(j, j + rows)) for i in range(n) for j in range(0, c, rows)]


def _check(
    student: Tensor,
    teacher: Tensor,
    tau: float,
    region: Tensor | None,
    channel_weight: Tensor | None,
) -> None:
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(
            "channel_wise_kl compares two (N, C, H, W) maps of one shape, but the student's is "
            f"{tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; "
            "put a connector or a resize between them."
        )
    if not 0 < tau < float("inf"):
        raise ValueError(f"channel_wise_kl needs a temperature tau > 0, but got {tau}.")
    n, c, h, w = student.shape
    if region is not None and tuple(region.shape) != (n, 1, h, w):
        raise ValueError(
            f"channel_wise_kl needs a region of shape (N, 1, H, W) = {(n, 1, h, w)}, but got "
            f"{tuple(region.shape)}."
        )
    if channel_weight is not None and tuple(channel_weight.shape) != (n, c):
        raise ValueError(
            f"channel_wise_kl needs channel weights of shape (N, C) = {(n, c)}, but got "
            f"{tuple(channel_weight.shape)}."
        )
