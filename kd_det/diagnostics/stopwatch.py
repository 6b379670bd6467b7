"""How long sources take, and which share of the step that is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.utils.events import EventStorage


class Stopwatch:
    """
    Times one step now and then: from its forward's start to the next forward's, and the sources in
    between. On CUDA the sources are timed by events on the device, read only when they are over.

    The step is the host's: Detectron2's trainer waits for the losses of every step, as its own
    ``time`` scalar supposes.
    """

    def __init__(self) -> None:
        self._storage: EventStorage | None = None
        self._device = torch.device("cpu")
        self._begin = 0.0
        self._seconds: dict[str, float] = {}
        self._events: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy starts with nothing running: events belong to one process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def start(self, storage: EventStorage, device: torch.device) -> None:
        """A step that is to be timed begins; its scalars will go to ``storage``."""
        self._storage, self._device, self._begin = storage, device, time.perf_counter()
        self._seconds, self._events = {}, {}

    @contextmanager
    def source(self, name: str) -> Iterator[None]:
        """Around the run of one source; does nothing in a step that is not timed."""
        if self._storage is None:
            yield
            return
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record(stream)
            yield
            events[1].record(stream)
            self._events[name] = events
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] = time.perf_counter() - begin

    def stop(self) -> None:
        """
        The next step begins: write ``kd/time/<source>`` in seconds and ``kd/time_share/<source>``
        in [0, 1]. A device that is behind even now loses the measurement: nothing waits.
        """
        storage, self._storage = self._storage, None
        if storage is None:
            return
        step = time.perf_counter() - self._begin
        for name, (begin, end) in self._events.items():
            if end.query():
                self._seconds[name] = begin.elapsed_time(end) / 1000  # milliseconds
        for name, seconds in self._seconds.items():
            storage.put_scalar(f"kd/time/{name}", seconds)
            storage.put_scalar(f"kd/time_share/{name}", min(seconds / step, 1.0) if step else 0.0)
