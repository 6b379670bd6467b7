"""Shared by all tests: kd_det comes before Detectron2, and every test starts from one seed."""

import kd_det  # isort: skip  # first: Detectron2 0.6 is importable after it

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.toys import save_teacher

assert kd_det

# The toys are so small that threads only wait for each other: a loaded machine is 5 times slower
# with them.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # Detectron2 draws from the global one
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Results of teachers are cached for this session only, in its subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(config file, weights file) of a toy RetinaNet with twice the toy student's FPN channels."""
    return save_teacher(tmp_path_factory.mktemp("teacher"), fpn=16)
