"""Memory for gradients on the CPU that is used again in the next step."""

import mmap
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

# Not shared with forked processes (data loader workers). Windows has no such flags, nor forks.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Buffers:
    """
    Lends memory to tensors and takes it back when the last tensor on it is gone.

    PyTorch has no caching allocator for the CPU: a map of tens of MiB gets fresh pages from the
    system in every step, and the faults of its first writes cost as much as a third of a whole
    distillation loss. What is kept between steps is what the last ones needed at once.

    Args:
        smallest: bytes of the smallest tensor that gets borrowed memory: smaller ones the C
            library's own heap uses again.
    """

    def __init__(self, smallest: int = 4 << 20) -> None:
        self.smallest = smallest
        self._free: list[mmap.mmap] = []

    @property
    def free_bytes(self) -> int:
        """Bytes kept for later, lent to nobody."""
        return sum(len(memory) for memory in self._free)

    def empty_like(self, x: Tensor) -> Tensor:
        """``torch.empty_like(x)``, of borrowed memory where that pays."""
        # A subclass may have no memory of its own (fake tensors say that they are on the CPU), and
        # who follows operators, as a dry run does for its peak, is to see an allocation.
        plain = type(x) is Tensor and _get_current_dispatch_mode() is None
        if x.device.type != "cpu" or x.nbytes < self.smallest or not plain:
            return torch.empty_like(x)
        memory = self._take(x.nbytes)
        lease = memoryview(memory)
        # The storage holds the view, so the view ends with the last tensor on the storage.
        flat = torch.frombuffer(lease, dtype=x.dtype, count=x.numel())
        weakref.finalize(lease, self._free.append, memory).atexit = False
        return flat.as_strided(x.shape, torch.empty_like(x, device="meta").stride())

    def _take(self, size: int) -> mmap.mmap:
        # Pop and append are atomic: two threads never get one buffer.
        fitting = [memory for memory in self._free if size <= len(memory)]
        for memory in sorted(fitting, key=len):
            try:
                self._free.remove(memory)
                return memory
            except ValueError:  # another thread was faster
                continue
        if self._free:
            self._free.pop()  # too small for this run's maps
        return mmap.mmap(-1, size, **_PRIVATE)

    def clear(self) -> None:
        """Give free memory back to the system."""
        self._free.clear()


GRADIENTS = Buffers()
"""The process's buffers for saved gradients."""
