"""Two gloo processes: whether what DDP averages is the gradient of one on the joined batch."""

import kd_det  # isort: skip  # first, in the spawned processes too: 0.6 is importable after it

import math
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from tests.distributed.test_ddp import spawned
from tests.teachers import measured
from tests.toys import batch, distiller_cfg

assert kd_det
pytestmark = pytest.mark.dist

SIZE = ((52, 60),)  # on a canvas of 64 x 64: padding counts
FPN = {"TYPE": "CWD", "TAP": "features", "WEIGHT": 5.0}  # 8 channels beside 16: it has connectors
LOGITS = {"TYPE": "CWD", "TAP": "cls_logits"}

# Means over images, or over cells of images of one size. Not STANDARDIZE: see OWN.
TERMS: dict[str, dict[str, Any]] = {
    "features": {"FPN": FPN},
    "logits": {"LOGITS": LOGITS},
    "weighted channels": {"LOGITS": {**LOGITS, "CHANNEL_WEIGHT": "teacher_max_prob"}},
    "tau, level weights, padding counted": {
        "FPN": {**FPN, "TAU": 2.0, "LEVEL_WEIGHTS": [1, 2, 3, 4, 5], "REGION": "Ones"}
    },
    "both": {"FPN": FPN, "LOGITS": LOGITS},
    "methods": {
        "FPN": {
            "TYPE": "ChannelDistillation",
            "CONNECTOR": {"TYPE": "Conv", "NORM": False},
            "WEIGHT": 1e-6,
        },
        "AT": {"TYPE": "AT"},
        "HINT": {"TYPE": "FitNet", "REGION": "Ones", "WEIGHT": 1e-6},
        "PI": {"TYPE": "PI"},
        "SIGMOID": {"TYPE": "PI", "MODE": "sigmoid"},
        "BOXES": {"TYPE": "LogitBoxKD", "NORMALIZER": "cells"},
    },
}

# What docs/methods.md says of these: their normalisers or statistics are those of one process.
OWN: dict[str, dict[str, Any]] = {
    "FGFI": {"TYPE": "FGFI", "SCHEDULE": {"TYPE": "Constant", "START_ITER": 0}},
    "FKD": {"TYPE": "FKD"},
    "PKD": {"TYPE": "PKD"},
    "CHANNELS": {"TYPE": "ChannelDistillation"},
    "STANDARDIZED": {**FPN, "STANDARDIZE": True},
    "HINT": {"TYPE": "FitNet", "REGION": "GTBox"},
    "SIGMOID": {"TYPE": "PI", "MODE": "sigmoid", "NORMALIZER": "positives"},
    "BOXES": {"TYPE": "LogitBoxKD"},
}

Found = tuple[dict[str, float], dict[str, Tensor]]
"""Values and gradients of the terms."""


def config(teacher: tuple[str, str], terms: dict[str, Any]) -> CfgNode:
    """A student without statistics of its batch, half of which each process sees."""
    return distiller_cfg(teacher, terms, norm="FrozenBN")


def built(cfg: CfgNode, seed: int) -> nn.Module:
    """In float64: sums in another order differ by nothing that could hide a mistake."""
    torch.manual_seed(seed)
    model = build_model(cfg).train()
    model.prepare()
    return model.double()


def kd_gradients(model: nn.Module, inputs: list[dict[str, Any]]) -> Found:
    """Values of the KD terms, and their gradients alone."""
    with EventStorage(0):
        losses = model(inputs)
    # DDP waits for parameters that only the task's losses reach: they get a zero.
    sum(v if k.startswith("loss_kd_") else 0 * v for k, v in losses.items()).backward()
    module = getattr(model, "module", model)
    values = {k: float(v.detach()) for k, v in losses.items() if k.startswith("loss_kd_")}
    return values, {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}


def images(ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Two images per rank."""
    return [x for rank in ranks for x in batch(SIZE * 2, seed=10 + rank)]


def averaged(rank: int, teacher: tuple[str, str]) -> dict[str, Found]:
    found = {}
    for name, terms in {**TERMS, "own": OWN}.items():
        # Other weights on rank 1: DDP broadcasts rank 0's.
        model = built(config(teacher, terms), seed=rank)
        ddp = DistributedDataParallel(model, broadcast_buffers=False)
        found[name] = kd_gradients(ddp, images((rank,)))
    return found


@pytest.fixture(scope="module")
def teacher(teacher: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """With features of natural size: beside those in the hundreds nothing else would count."""
    return measured(teacher, tmp_path_factory.mktemp("measured"))


@pytest.fixture(scope="module")
def ranks(
    teacher: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Found]]:
    return spawned(averaged, tmp_path_factory.mktemp("gradients"), teacher)


@pytest.mark.parametrize("case", TERMS)
def test_the_averaged_gradients_are_the_joined_batchs(
    ranks: list[dict[str, Found]], teacher: tuple[str, str], case: str
) -> None:
    cfg = config(teacher, TERMS[case])
    values, joined = kd_gradients(built(cfg, 0), images((0, 1)))
    for term, value in values.items():
        mean = sum(rank[case][0][term] for rank in ranks) / 2
        assert mean == pytest.approx(value, rel=1e-6 if "box" in term else 1e-12), term
    assert any(k.startswith("terms.") for k in joined) == ("FPN" in TERMS[case])
    reached = [k for k, g in joined.items() if g.abs().max() > 0]
    assert len(reached) > 30
    assert joined[reached[0]].dtype == torch.float64
    for rank in ranks:
        # Boxes are decoded in float32.
        assert_close(rank[case][1], joined, rtol=1e-9, atol=1e-9)
    # Neither half alone has these gradients.
    _, alone = kd_gradients(built(cfg, 0), images((0,)))
    assert max(float((alone[k] - joined[k]).abs().max()) for k in reached) > 1e-4


def test_own_normalisers_are_those_of_one_process(
    ranks: list[dict[str, Found]], teacher: tuple[str, str]
) -> None:
    cfg = config(teacher, OWN)
    halves = [kd_gradients(built(cfg, 0), images((rank,))) for rank in (0, 1)]
    joined, _ = kd_gradients(built(cfg, 0), images((0, 1)))
    for rank, (values, _) in zip(ranks, halves, strict=True):
        assert rank["own"][0] == pytest.approx(values, rel=1e-9)
        mean = {k: (halves[0][1][k] + halves[1][1][k]) / 2 for k in halves[0][1]}
        assert_close(rank["own"][1], mean, rtol=1e-9, atol=1e-12)
    for term, value in joined.items():
        assert sum(values[term] for values, _ in halves) / 2 != pytest.approx(value, rel=1e-3), term


ODD_SIZES = (((64, 64), (50, 97)), ((130, 40),))


def steps_of_mixed_sizes(rank: int, teacher: tuple[str, str]) -> list[dict[str, float]]:
    """Three steps of SGD; other sizes, grids and numbers of images on each rank, no boxes on 1."""
    terms = {"FPN": FPN, "LOGITS": {**LOGITS, "CHANNEL_WEIGHT": "teacher_max_prob"}}
    model = DistributedDataParallel(build_model(distiller_cfg(teacher, terms)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    values = []
    for iteration in range(3):
        with EventStorage(iteration):
            # The ranks swap their sizes every step; the boxes stay with rank 0.
            sizes = ODD_SIZES[(rank + iteration) % 2]
            losses = model(batch(sizes, seed=rank, boxes=2 * (1 - rank)))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        values.append({k: float(v.detach()) for k, v in losses.items()})
    gradients = [float(p.grad.abs().sum()) for p in model.parameters() if p.requires_grad]
    return [*values, {"gradients": sum(gradients)}]


def test_mixed_sizes_and_a_rank_without_boxes(
    teacher: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    first, second = spawned(steps_of_mixed_sizes, tmp_path_factory.mktemp("mixed"), teacher)
    for values in (*first, *second):
        assert all(math.isfinite(x) for x in values.values()), values
    assert all(x["loss_kd_fpn"] > 0 and x["loss_kd_logits"] > 0 for x in second[:-1])
    assert all(x["loss_box_reg"] == 0 for x in second[:-1])
    assert first[-1] == second[-1]  # the gradients are averaged
