"""
Two gloo processes with two-stage detectors: the RPN's gradient is that of the joined batch, and no
process waits for another that has no boxes.
"""

import kd_det  # isort: skip  # first, in the spawned processes too: 0.6 is importable after it

import math
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from kd_det.terms import RPN
from tests.distributed.test_ddp import spawned
from tests.two_stage import inputs, pair, rcnn

assert kd_det
pytestmark = pytest.mark.dist

SIZES = ((128, 128), (96, 120))


def built(**terms: Any) -> nn.Module:
    torch.manual_seed(0)
    model = pair(rcnn(), rcnn(seed=5), **terms)
    model.prepare()
    return model


def images(ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    return [x for rank in ranks for x in inputs(*SIZES, seed=10 + rank)]


def rpn_gradients(model: nn.Module, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    with EventStorage(0):
        losses = model(batched_inputs)
    sum(v if k == "loss_kd_rpn" else 0 * v for k, v in losses.items()).backward()
    module = getattr(model, "module", model)
    return {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}


def averaged(rank: int) -> dict[str, Tensor]:
    return rpn_gradients(DistributedDataParallel(built(rpn=RPN(tau=2.0))), images((rank,)))


def two_steps(rank: int) -> list[dict[str, float]]:
    """No boxes on rank 1, and there no proposals in the second step."""
    model = built()
    ddp = DistributedDataParallel(model)
    heads = model.student.roi_heads
    sample = heads.label_and_sample_proposals
    values = []
    for iteration in range(2):
        if rank == 1 and iteration == 1:
            heads.label_and_sample_proposals = lambda *x: [p[:0] for p in sample(*x)]
        with EventStorage(iteration):
            losses = ddp(inputs(*SIZES, seed=rank, boxes=2 * (1 - rank)))
        sum(losses.values()).backward()
        values.append({k: float(v.detach()) for k, v in losses.items()})
    pull = sum(float(p.grad.abs().sum()) for p in model.parameters() if p.requires_grad)
    return [*values, {"pull": pull}]


def both(rank: int) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    return averaged(rank), two_steps(rank)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawned(both, tmp_path_factory.mktemp("two_stage"))


def test_the_rpns_averaged_gradients_are_the_joined_batchs(ranks: list[Any]) -> None:
    joined = rpn_gradients(built(rpn=RPN(tau=2.0)), images((0, 1)))
    alone = rpn_gradients(built(rpn=RPN(tau=2.0)), images((0,)))
    reached = [k for k, g in joined.items() if g.abs().max() > 0]
    assert any("anchor_deltas" in k for k in reached)
    assert len(reached) > 30
    apart = 0.0
    for key in reached:  # in float32: Detectron2's NMS takes no float64
        scale = float(joined[key].abs().max())
        for found, _ in ranks:
            assert_close(found[key], joined[key], rtol=0, atol=1e-4 * scale)
        apart = max(apart, float((alone[key] - joined[key]).abs().max()) / scale)
    assert apart > 0.1


def test_a_rank_without_proposals(ranks: list[Any]) -> None:
    first, second = (values for _, values in ranks)
    assert all(math.isfinite(x) for values in (*first, *second) for x in values.values())
    assert first[1]["loss_kd_box"] > 0
    assert second[0]["loss_kd_box"] > 0
    assert second[1]["loss_kd_box"] == 0
    assert first[-1] == second[-1]
