"""Scalars on their way from the device to the EventStorage."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

Report = Callable[[dict[str, float]], Mapping[str, float]]
"""Turns the numbers that arrived into the scalars that are written."""


@dataclass
class _Pending:
    storage: EventStorage
    names: list[str]
    numbers: Tensor
    arrived: torch.cuda.Event | None
    report: Report


class ScalarQueue:
    """
    Takes scalars in the forward without waiting for them, and writes them when they have arrived.

    On CUDA they are stacked and copied to pinned memory behind the work that makes them. A copy of
    the queue (deepcopy, pickle) is empty: what is on its way belongs to the original.
    """

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def put(
        self, storage: EventStorage, scalars: Mapping[str, Tensor], report: Report = dict
    ) -> None:
        """
        Send scalars on their way.

        Args:
            storage: where they will be written, under its iteration at that time.
            scalars: name to 0-dim tensor, all on one device.
            report: what is written, from the numbers under the same names; see `Report`.
        """
        if not scalars:
            return
        numbers = torch.stack([x.detach().float() for x in scalars.values()])
        arrived = None
        if numbers.is_cuda:
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()  # on the current stream, behind the copy
        self._pending.append(_Pending(storage, list(scalars), numbers, arrived, report))

    def flush(self, wait: bool = False) -> None:
        """
        Write what has arrived, in the order in which it was put.

        Args:
            wait: wait for the rest too: at the end of a run.
        """
        while self._pending:
            first = self._pending[0]
            if first.arrived is not None and not first.arrived.query():
                if not wait:
                    return
                first.arrived.synchronize()
            self._pending.popleft()
            numbers = dict(zip(first.names, first.numbers.tolist(), strict=True))
            for name, value in first.report(numbers).items():
                first.storage.put_scalar(name, value)
