"""A second draw of a module's initialisation."""

import copy

import torch
from torch import nn


@torch.no_grad()
def drawn_anew(module: nn.Module) -> nn.Module:
    """
    A copy that trains, with the entries of every parameter in another order: of one that has just
    been initialised, whatever the rule was, a second draw; what was constant (a bias, the gain of a
    norm) stays as it is.
    """
    module = copy.deepcopy(module).requires_grad_(True)
    for p in module.parameters():
        p.copy_(p.flatten()[torch.randperm(p.numel(), device=p.device)].view_as(p))
    return module
