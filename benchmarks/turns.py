"""Variants that take turns, and what is said of their seconds."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Samples = dict[str, list[float]]
"""By variant, its seconds in each repetition."""


class Spread(NamedTuple):
    """Quartiles."""

    low: float
    median: float
    high: float

    def text(self, digits: int = 2, unit: float = 1.0) -> str:
        """``median (low-high)``, each times ``unit``."""
        low, median, high = (f"{x * unit:.{digits}f}" for x in self)
        return f"{median} ({low}-{high})"


def spread(values: Sequence[float]) -> Spread:
    """Quartiles of some values; of a single one, that one."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def ratios(samples: Samples, name: str, *bases: str) -> list[float]:
    """In every repetition the seconds of ``name`` over the sum of those of ``bases``."""
    sums = [sum(each) for each in zip(*(samples[base] for base in bases), strict=True)]
    return [x / base for x, base in zip(samples[name], sums, strict=True)]


def take_turns(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    *,
    before: Callable[[], object] = lambda: None,
    warmup: int = 1,
) -> Samples:
    """
    Time variants in turns, A B C, C B A, ...: what slows the machine for a while slows all of them,
    and each has been first and last.

    Args:
        variants: what to call, by name.
        repeats: how often each is timed.
        device: a CUDA device's own clock is read; elsewhere the host's.
        before: called before each call, outside of its time.
        warmup: rounds that are not timed.
    """
    samples: Samples = {name: [] for name in variants}
    for repetition in range(warmup + repeats):
        gc.collect()
        for name, work in list(variants.items())[:: -1 if repetition % 2 else 1]:
            before()
            taken = seconds(work, device)
            if repetition >= warmup:
                samples[name].append(taken)
    return samples


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, on the device that it works on."""
    gc.disable()  # a collection in the middle would be charged to whom it meets
    try:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize(device)
            return begin.elapsed_time(end) / 1e3  # from milliseconds
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    finally:
        gc.enable()
