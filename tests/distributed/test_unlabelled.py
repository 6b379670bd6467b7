"""Two gloo processes of which each step another one has labels: nobody waits."""

import kd_det  # isort: skip  # first, in the spawned processes too: 0.6 is importable after it

from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.test_ddp import spawned
from tests.toys import batch, distiller_cfg

assert kd_det
pytestmark = pytest.mark.dist

LABELLED = ((2, 2), (2, 0), (0, 1), (0, 0))  # images with labels in each step, on each rank


def steps(rank: int, teacher: tuple[str, str]) -> list[Any]:
    terms = {"FPN": {"TYPE": "CWD", "TAP": "features"}}  # not the class scores: the task's alone
    model = DistributedDataParallel(build_model(distiller_cfg(teacher, terms)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    found: list[Any] = []
    for iteration, labelled in enumerate(LABELLED):
        inputs = batch(seed=2 * iteration + rank)
        for x in inputs[labelled[rank] :]:
            del x["instances"]
        with EventStorage(iteration):
            losses = model(inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        score = model.module.student.head.cls_score.weight.grad.abs().sum()
        found.append(({k: float(v.detach()) for k, v in losses.items()}, float(score)))
    return found


def test_no_rank_waits_for_labels(
    teacher: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    ranks = spawned(steps, tmp_path_factory.mktemp("unlabelled"), teacher)
    for labelled, *pair in zip(LABELLED, *ranks, strict=True):
        for count, (losses, _) in zip(labelled, pair, strict=True):
            assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_kd_fpn"}
            assert losses["loss_kd_fpn"] > 0
            assert (losses["loss_cls"] > 0) == (count > 0)
        assert pair[0][1] == pair[1][1]  # the gradients are averaged
        assert (pair[0][1] > 0) == any(labelled)
