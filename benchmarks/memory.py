"""What a call allocates."""

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from kd_det.losses.buffers import GRADIENTS


class Memory(NamedTuple):
    """
    Attributes:
        peak: most bytes that the call had allocated at once.
        held: bytes that were still allocated when it had returned, with its result alive.
    """

    peak: int
    held: int


def measure_memory(work: Callable[[], object], device: torch.device) -> Memory:
    """
    Count what one call allocates beyond what is there before it, by the allocator's own account
    (compiled code and workspaces of operators included, those inside of oneDNN not).
    """
    gc.collect()
    if device.type != "cuda":
        return _on_the_host(work)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    held = torch.cuda.memory_allocated(device) - before
    del result
    return Memory(peak, held)


def _on_the_host(work: Callable[[], object]) -> Memory:
    # PyTorch's allocator on the host keeps no statistics, but tells the profiler of every block.
    cpu = [ProfilerActivity.CPU]
    with _nothing_kept(), profile(activities=cpu, profile_memory=True) as profiler:
        result = work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del result
    blocks = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    peak = now = 0
    for block in sorted(blocks, key=lambda e: (e["ts"], e["args"].get("Ev Idx", 0))):
        now += block["args"]["Bytes"]
        peak = max(peak, now)
    return Memory(peak, now)


@contextmanager
def _nothing_kept() -> Iterator[None]:
    """What kd_det keeps from step to step on the host is counted as if it were allocated anew."""
    smallest, GRADIENTS.smallest = GRADIENTS.smallest, sys.maxsize
    try:
        yield
    finally:
        GRADIENTS.smallest = smallest
