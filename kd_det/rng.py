"""Leaving the global random states as they were found."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_rng() -> Iterator[None]:
    """
    Restore Python's, NumPy's, the CPU's and every used CUDA device's random state on exit.

    Connectors and teachers are built inside: a run with distillation then draws the same student,
    data order and augmentations as the run without.
    """
    python, numpy = random.getstate(), np.random.get_state()
    # A CUDA context that does not exist yet has no state to disturb, and is not created here.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
