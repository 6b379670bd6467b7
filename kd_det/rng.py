"""The global random states: leaving them as they were found, and taking them along."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def seed_rng(words: str) -> None:
    """
    Seed Python, NumPy, the CPU and the current CUDA device, if one is in use, from a text: other
    words give numbers that have nothing to do with these.
    """
    random.seed(words)
    seed = random.getrandbits(32)  # NumPy takes no more
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def get_rng_state(*, cuda: bool = True) -> dict[str, Any]:
    """
    The random states that this process trains with, as tensors and numbers: PyTorch's safe loader
    refuses NumPy's arrays.

    Args:
        cuda: with the current CUDA device's, where one is in use. Images are augmented without.
    """
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = numpy
    state = {
        "python": (version, torch.from_numpy(np.array(words)), gauss),  # 5 x torch.tensor's speed
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if cuda and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Take up the states of `get_rng_state`; a device that is not here any more keeps its own."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
