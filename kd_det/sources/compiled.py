"""Compiling a frozen network without hiding what is tapped in it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from kd_det.taps import find_module


def compile_between_taps(
    model: nn.Module, roots: Iterable[str], taps: Iterable[str], **options: Any
) -> list[str]:
    """
    Give the forward of every largest module that has no tap strictly inside to `torch.compile`, in
    place. Hooks of a tapped module stay outside of its graph: they are called as in eager mode.
    Nothing is compiled before the first call.

    Args:
        model: the frozen network.
        roots: paths of the modules that are run.
        taps: paths of the tapped modules.
        options: of `torch.compile`.

    Returns:
        Paths of the modules that are compiled.
    """
    taps = set(taps)
    units = {p: m for root in roots for p, m in _units(find_module(model, root), root, taps)}
    for module in units.values():
        # Not module.compile(), which compiles the hooks with it.
        module.forward = torch.compile(module.forward, **options)  # type: ignore[method-assign]
    return list(units)


def _units(module: nn.Module, path: str, taps: set[str]) -> Iterator[tuple[str, nn.Module]]:
    is_list = type(module).forward is nn.Module.forward
    if is_list or any(tap.startswith(path + ".") for tap in taps):
        for name, child in module.named_children():
            yield from _units(child, f"{path}.{name}", taps)
    elif next(module.parameters(), None) is not None:
        yield path, module
