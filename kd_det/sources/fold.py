"""Folding a frozen network's normalisation into the convolutions that own it."""

from collections import Counter
from collections.abc import Iterable

import torch
from detectron2.layers import FrozenBatchNorm2d
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
    uses = Counter(id(m) for parent in model.modules() for m in parent.children())
    folded = []
    for path, module in model.named_modules():
        norm = getattr(module, "norm", None)
        if isinstance(module, nn.Conv2d) and isinstance(norm, _FOLDABLE):
            name = f"{path}.norm"
            if uses[id(norm)] == 1 and uses[id(module)] == 1 and name not in keep:
                _fold(module, norm)
                module.norm = None
                folded.append(name)
        elif isinstance(module, nn.Sequential):
            prefix = f"{path}." if path else ""
            names = list(module._modules)
            for conv_name, norm_name in zip(names, names[1:], strict=False):
                conv, norm = module._modules[conv_name], module._modules[norm_name]
                if not isinstance(conv, nn.Conv2d) or not isinstance(norm, _FOLDABLE):
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
    conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])  # (out, in, k, k)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
