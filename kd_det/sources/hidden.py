"""A module that its owner's module tree does not show."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Hidden(nn.Module):
    """
    Holds a module outside of ``parameters()``, ``state_dict()``, ``modules()``, DDP, optimizers and
    EMA copies, and still passes ``.to()``, ``.half()``, ``.cuda()`` on to it.

    A module that comes later (`hold`) is brought to where the owner has been moved meanwhile.

    Args:
        shared: whether a deepcopy shares the held module instead of copying it, which is right for
            what never changes.
    """

    _place: Tensor

    def __init__(self, *, shared: bool = True) -> None:
        super().__init__()
        self.__dict__["_box"] = Shared(None) if shared else Box(None)
        # Moves with the owner and remembers where to; empty, and in no state_dict.
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def held(self) -> nn.Module | None:
        """The held module, or ``None``."""
        return self.__dict__["_box"].module

    def hold(self, module: nn.Module | None) -> None:
        """Hold ``module`` (in eval mode, without gradients), or let the held one go."""
        if module is not None:
            module = module.eval().requires_grad_(False)
            module = module.to(device=self._place.device)
        self.__dict__["_box"].module = module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.held is not None:
            self.held._apply(fn)
        return self


class Box:
    """A reference to a module that no module tree shows."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module


class Shared(Box):
    """One that deepcopy shares."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self
