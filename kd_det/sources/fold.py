"""Folding a frozen network's normalisation into the convolutions that own it."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, TypeGuard

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

# SyncBatchNorm is a _BatchNorm, but not a BatchNorm2d.
_FOLDABLE = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


@torch.no_grad()
def fold_batch_norm(model: nn.Module, keep: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """
    Fold every BatchNorm that exactly one convolution owns into that convolution, in place.

        weight *= gamma / sqrt(var + eps),   bias = beta + (bias - mean) * gamma / sqrt(var + eps)

    Two forms of ownership are known: the ``norm`` attribute of Detectron2's `Conv2d` wrapper, and
    a norm right behind a convolution inside an `nn.Sequential`. The network must be in eval mode.

    Args:
        model: the frozen network.
        keep: module paths whose outputs are tapped: folding must not change what they return.

    Returns:
        Paths of the folded norms, and paths of the norms that were left alone.
    """
    keep = set(keep)
    # Not children(): it names a module once that a parent holds twice.
    uses = Counter(id(m) for parent in model.modules() for m in parent._modules.values())
    folded = []
    for path, module in model.named_modules():
        norm = getattr(module, "norm", None)
        if isinstance(module, Conv2d) and _is_foldable(norm):
            name = f"{path}.norm"
            if uses[id(norm)] == 1 and uses[id(module)] == 1 and name not in keep:
                _fold(module, norm)
                module.norm = None
                folded.append(name)
        # A subclass with a forward of its own may run its children in any order.
        elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            prefix = f"{path}." if path else ""
            names = list(module._modules)
            for conv_name, norm_name in pairwise(names):
                conv, norm = module._modules[conv_name], module._modules[norm_name]
                if not isinstance(conv, nn.Conv2d) or not _is_foldable(norm):
                    continue
                if getattr(conv, "norm", None) is not None or uses[id(conv)] * uses[id(norm)] != 1:
                    continue
                if getattr(conv, "activation", None) is not None:
                    continue
                if not keep & {prefix + conv_name, prefix + norm_name}:
                    _fold(conv, norm)
                    module._modules[norm_name] = nn.Identity()
                    folded.append(prefix + norm_name)
    left = [path for path, m in model.named_modules() if isinstance(m, _FOLDABLE)]
    return folded, left


def _is_foldable(norm: Any) -> TypeGuard[nn.Module]:
    # Without running statistics a BatchNorm normalises by the batch, in eval mode too.
    return isinstance(norm, _FOLDABLE) and norm.running_mean is not None


def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    var: Tensor = norm.running_var  # type: ignore[assignment]
    gamma = getattr(norm, "weight", None)  # absent without affine parameters
    beta = getattr(norm, "bias", None)
    # float64: the product is rounded once, to the weight's own precision.
    scale = (var.double() + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    if gamma is not None:
        scale = scale * gamma.double()
    bias = -mean.double() if conv.bias is None else conv.bias.double() - mean.double()
    bias = bias * scale
    if beta is not None:
        bias = bias + beta.double()
    # A new parameter: another convolution may share the old one.
    weight = conv.weight.double() * scale[:, None, None, None]  # (out, in, k, k)
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
