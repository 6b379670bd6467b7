"""Two gloo processes: a measurement in the forward changes no gradient and stalls nobody."""

import kd_det  # isort: skip  # first, in the spawned processes too: 0.6 is importable after it

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.test_ddp import copied, spawned
from tests.toys import batch, distiller_cfg

assert kd_det
pytestmark = pytest.mark.dist


def train(rank: int, teacher: tuple[str, str], enabled: bool) -> dict[str, Any]:
    """Three steps of SGD around a measurement, on different images."""
    cfg = distiller_cfg(teacher)
    cfg.KD.DIAGNOSTICS.ENABLED = enabled
    torch.manual_seed(0)
    model = DistributedDataParallel(build_model(cfg), broadcast_buffers=False)
    model.module._restored = True  # as a resumed run
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    gradients = []
    with EventStorage(17) as storage:
        for iteration in (17, 18, 19):
            storage.iter = iteration
            losses = model(batch(((64, 64),), seed=10 * rank + iteration))
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
            sum(losses.values()).backward()
            gradients.append(copied((k, p.grad) for k, p in model.named_parameters()))
            optimizer.step()
        measured = {k for k in storage.latest() if k.endswith("grad_ratio")}
    return {"gradients": gradients, "measured": measured}


def train_both(rank: int, teacher: tuple[str, str]) -> dict[bool, dict[str, Any]]:
    # Or TorchScript's loss is another kernel in the second run: it specialises itself as it runs.
    torch._C._jit_set_profiling_executor(False)
    torch._C._jit_set_profiling_mode(False)
    return {enabled: train(rank, teacher, enabled) for enabled in (True, False)}


def test_gradients_are_bit_equal_and_averaged(teacher: tuple[str, str], tmp_path: Path) -> None:
    ranks = spawned(train_both, tmp_path, teacher)
    for rank in ranks:
        torch.testing.assert_close(
            rank[True]["gradients"], rank[False]["gradients"], rtol=0, atol=0
        )
        assert rank[True]["measured"] == {"kd/fpn/grad_ratio", "kd/logits/grad_ratio"}
        assert not rank[False]["measured"]
    torch.testing.assert_close(
        ranks[0][True]["gradients"], ranks[1][True]["gradients"], rtol=0, atol=0
    )
