"""
Channel-wise distillation: checks, weights and the autograd node. The arithmetic is a kernel's:
plain PyTorch (`channel_wise_eager`) or Triton (`channel_wise_triton`).

Shape shorthand in this module:

    N images, C channels, M = H * W positions of the grid, L levels; a *row* is one (n, c) channel
    map.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_det.losses import channel_wise_eager
from kd_det.losses.buffers import GRADIENTS

BACKENDS = ("auto", "eager", "triton")

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
    backend: str = "auto",
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
        backend: ``"eager"`` is plain PyTorch in blocks of rows that stay in cache, for every
            device; ``"triton"`` is one CUDA kernel. ``"auto"`` is eager everywhere, until runs of
            the Triton kernel on a GPU are on record: so far it has run in Triton's interpreter.

    Returns:
        Scalar, float32 (float64 when a map is float64): mean over N and C, sum over H x W. It is 0
        iff the maps agree up to a constant per row. Computed in that dtype under autocast too,
        with one tensor of the student's shape and dtype saved for the backward, which turns it into
        the gradient in place (unless the graph is kept for another backward). On a CPU that memory
        is kept for the next step (`kd_det.losses.buffers`). Under ``torch.compile`` it runs as it
        is, outside of the compiled graph.

    Raises:
        ValueError: if the shapes do not fit, ``tau`` is not a positive finite number, or the
            backend is unknown or cannot take these maps.
        RuntimeError: in a backward with ``create_graph=True``, or if the backend is not installed.
    """
    values = channel_wise_kl_levels(
        [student],
        [teacher],
        tau=tau,
        regions=[region],
        channel_weights=[channel_weight],
        backend=backend,
    )
    return values.squeeze(0)


def channel_wise_kl_levels(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    tau: float = 1.0,
    regions: Sequence[Tensor | None] | None = None,
    channel_weights: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> Tensor:
    """
    `channel_wise_kl` of every level of a pyramid, as one node of the graph.

    Args:
        students: L maps ``(N, C, H_l, W_l)``; those that require a gradient receive it.
        teachers: L maps of the same shapes, constants.
        tau: temperature, > 0, of all levels.
        regions: for each level weights ``(N, 1, H_l, W_l)`` or ``None``; ``None`` for no regions.
        channel_weights: for each level weights ``(N, C)`` or ``None``; ``None`` for none at all.
        backend: as in `channel_wise_kl`.

    Returns:
        ``(L,)`` unweighted values, float32, or float64 when any map is float64.

    Raises:
        ValueError: as in `channel_wise_kl`, or if the numbers of maps differ or are 0.
        RuntimeError: as in `channel_wise_kl`.
    """
    regions = [None] * len(students) if regions is None else regions
    channel_weights = [None] * len(students) if channel_weights is None else channel_weights
    counts = (len(students), len(teachers), len(regions), len(channel_weights))
    if len(students) == 0 or len(set(counts)) != 1:
        raise ValueError(
            "channel_wise_kl_levels needs as many teachers' maps, regions and channel weights as "
            "students' maps, and at least one, but got {1}, {2} and {3} for {0}.".format(*counts)
        )
    for level in zip(students, teachers, regions, channel_weights, strict=True):
        _check(level[0], level[1], tau, *level[2:])
    run = _ChannelWiseKL.apply
    if torch.compiler.is_compiling():
        # Blocks, scratch memory and a donated buffer are no graph that a compiler could improve.
        run = torch.compiler.disable(run)
    # The teachers' maps are in a tuple, where autograd does not look.
    constants = (tuple(teachers), tuple(regions), tuple(channel_weights))
    return run(_kernel(backend, students), float(tau), *constants, *students)


def _kernel(backend: str, students: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The function that computes the rows of one level."""
    if backend not in BACKENDS:
        raise ValueError(
            f"channel_wise_kl's backend is one of {', '.join(BACKENDS)}, but got '{backend}'."
        )
    if backend != "triton":
        return channel_wise_eager.kl_of_rows
    try:
        # Only here: Triton is not everywhere where PyTorch is.
        from kd_det.losses import channel_wise_triton
    except ImportError as e:
        raise RuntimeError(
            f"channel_wise_kl's backend 'triton' needs the package triton, which does not import "
            f"here ({e}). Install it, or set the backend to 'auto' or 'eager'."
        ) from e
    for student in students:
        channel_wise_triton.check_device(student.device)
    return channel_wise_triton.kl_of_rows


class _ChannelWiseKL(torch.autograd.Function):
    """
    The gradient is formed in the forward, where both softmaxes are at hand: the backward scales
    one saved tensor per level. Differentiating twice is refused.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Callable[..., Tensor],
        tau: float,
        teachers: tuple[Tensor, ...],
        regions: tuple[Tensor | None, ...],
        channel_weights: tuple[Tensor | None, ...],
        *students: Tensor,
    ) -> Tensor:
        wide = any(x.dtype == torch.float64 for x in (*students, *teachers))
        dtype = torch.float64 if wide else torch.float32
        needed = ctx.needs_input_grad[-len(students) :]
        grads = [
            GRADIENTS.empty_like(x) if need else None
            for x, need in zip(students, needed, strict=True)
        ]
        values = []
        ctx.factors = []
        levels = zip(students, teachers, grads, regions, channel_weights, strict=True)
        with torch.autocast(students[0].device.type, enabled=False):
            for student, teacher, grad, region, channel_weight in levels:
                weight, mean = _row_weight(student, channel_weight, dtype)  # (N, C) or None
                unit = _FLOAT16_RANGE if student.dtype == torch.float16 else 1.0
                kl = kernel(
                    student,
                    teacher,
                    grad,
                    tau=tau,
                    log_w=None if region is None else _log(region, dtype),
                    step=_step(weight, unit, student, dtype),
                    dtype=dtype,
                )  # (N, C)
                if region is not None:
                    nowhere = (region > 0).flatten(1).any(1).logical_not()  # (N,)
                    kl = kl.masked_fill(nowhere[:, None], 0)
                values.append((kl if weight is None else kl * weight).sum() * (tau**2 * mean))
                ctx.factors.append(tau * mean / unit)
        ctx.save_for_backward(*grads)
        return torch.stack(values)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # create_graph=True. PyTorch's once_differentiable would let it pass where the loss is
            # the end of the graph, with a second derivative of 0.
            raise RuntimeError(
                "channel_wise_kl can be differentiated once only: its gradient is formed in the "
                "forward. Take it without create_graph=True."
            )
        kept = _graph_is_kept()
        found: list[Tensor | None] = [None] * 5
        for i, grad in enumerate(ctx.saved_tensors):
            # One element, not a scalar: a scalar would be rounded to the map's dtype first, and
            # this one is 0 in float16 without a loss scale.
            factor = grad_output[i : i + 1] * ctx.factors[i]
            found.append(None if grad is None else _scaled(grad, factor, in_place=not kept))
        return tuple(found)


def _scaled(grad: Tensor, factor: Tensor, in_place: bool) -> Tensor:
    """Gradient times factor, in the gradient's dtype."""
    out = grad if in_place else GRADIENTS.empty_like(grad)
    if grad.dtype == factor.dtype:
        return torch.mul(grad, factor, out=out)
    # In blocks: on a CPU PyTorch converts a whole tensor before it multiplies.
    for block in channel_wise_eager.blocks(grad, factor.dtype):
        torch.mul(grad[block], factor, out=out[block])
    return out


def _graph_is_kept() -> bool:
    """
    Whether the running backward keeps the graph (``retain_graph=True``). If not, nobody can ask for
    what this node saved again, and it may become the gradient itself.
    """
    autograd = getattr(torch._C, "_autograd", None)
    asked = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def _log(region: Tensor, dtype: torch.dtype) -> Tensor:
    """
    (N, 1, M) logarithms of the weights, finite: half the lowest number for 0, which absorbs any
    logit, and whose softmax over a row of nothing else is the same for teacher and student.
    """
    return region.detach().flatten(2).to(dtype).log().clamp_min(torch.finfo(dtype).min / 2)


def _row_weight(
    x: Tensor, channel_weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """(N, C) weights of the rows and a factor: 1 and 1 / (N C), or a_nc / sum_c a_nc and 1 / N."""
    n, c = x.shape[:2]
    if channel_weight is None:
        return None, 1 / max(n * c, 1)
    a = channel_weight.detach().to(dtype)
    return a / a.sum(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny), 1 / max(n, 1)


def _step(weight: Tensor | None, unit: float, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(N, C, 1) factors of the saved gradient's rows, or None for 1."""
    if weight is not None:
        return weight[..., None] * unit
    if unit != 1.0:
        return torch.full((*x.shape[:2], 1), unit, dtype=dtype, device=x.device)
    return None


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
