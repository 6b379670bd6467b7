"""Where the host would wait for a GPU, found on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Ops(TorchDispatchMode):
    """Names of the operators that run, and of those that fetch a number from the device."""

    FETCH = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.fetched: list[str] = []

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: object = None
    ) -> object:
        name = func.overloadpacket.__name__
        # What inference mode shows of the same fetch.
        name = "_local_scalar_dense" if name == "item" else name
        self.names.append(name)
        masked = name in ("index", "index_put_", "index_put") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in self.FETCH or masked:
            self.fetched.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ops]:
    """Operators, and what reads memory without one, which on a GPU would wait."""
    with Ops() as ops, monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "cpu", "__array__"):
            original = getattr(torch.Tensor, name)

            def reading(x: torch.Tensor, *a: object, n: str = name, o: object = original) -> object:
                ops.fetched.append(n)
                return o(x, *a)

            patch.setattr(torch.Tensor, name, reading)
        yield ops
