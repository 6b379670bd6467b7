"""Shared by all tests: kd_det comes before Detectron2, and every test starts from one seed."""

import kd_det  # isort: skip  # first: Detectron2 0.6 is importable after it

import random

import numpy as np
import pytest
import torch

assert kd_det


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
