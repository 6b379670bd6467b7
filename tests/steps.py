"""Single steps of toy Distillers."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from tests.toys import batch

FPN = {"FPN": {"TYPE": "CWD", "TAP": "features"}}


def seeded(cfg: CfgNode, seed: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(cfg)


def with_schedule(**schedule: object) -> dict:
    return {"FPN": {**FPN["FPN"], "SCHEDULE": {"TYPE": "Constant", **schedule}}}


def step(model: nn.Module, iteration: int, inputs: list | None = None) -> dict[str, Tensor]:
    with EventStorage(iteration):
        return model(inputs or batch())


def resumed_step(
    model: nn.Module, iteration: int, inputs: list, storage: EventStorage | None = None
) -> dict[str, Tensor]:
    """The losses of one forward at an iteration, as of a resumed run: nothing is inherited."""
    model._restored = True
    with storage or EventStorage(iteration) as current:
        current.iter = iteration
        return model(inputs)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def exactly(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@contextlib.contextmanager
def rng_unchanged() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), cpu)
