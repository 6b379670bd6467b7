"""Two gloo processes on one CPU: DDP around the Distiller, by plain torch.distributed."""

import kd_det  # isort: skip  # first, in the spawned processes too: 0.6 is importable after it

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kd_det.registry import SOURCES
from tests import selves
from tests.parts import SelfTeacher
from tests.selves import two_views
from tests.toys import distiller_cfg

assert kd_det
pytestmark = pytest.mark.dist

WORLD = 2
SECONDS = 300  # a busy machine needs more than one
FPN = {"TYPE": "CWD", "TAP": "features"}  # 8 channels beside 16: it has connectors
LATE = {**FPN, "SCHEDULE": {"TYPE": "Constant", "START_ITER": 50}}


def _worker(rank: int, task: Callable, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    try:
        result: Any = task(rank, *arguments)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, folder / f"{rank}.tmp")
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.pth")
    # No destroy_process_group: after an error it would wait for the other rank.


def spawned(task: Callable, folder: Path, *arguments: object) -> list[Any]:
    """What ``task(rank, *arguments)`` returns on each rank; a stall fails after a while."""
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_worker, args=(rank, task, folder, arguments), daemon=True)
        for rank in range(WORLD)
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(SECONDS)
    stalled = [rank for rank, p in enumerate(processes) if p.is_alive()]
    for p in processes:
        p.kill()
    files = [folder / f"{rank}.pth" for rank in range(WORLD)]
    results = [torch.load(f, weights_only=False) if f.exists() else None for f in files]
    errors = [r for r in results if isinstance(r, str)]
    assert not errors, "\n".join(errors)
    assert not stalled, f"ranks {stalled} stalled"
    assert None not in results, f"exit codes {[p.exitcode for p in processes]}"
    return results


def copied(tensors: Any) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in tensors}


def train(
    rank: int, teacher: tuple[str, str], terms: dict, boxes: tuple[int, int], extra: dict
) -> dict[str, Any]:
    """Two steps of SGD on different images; no find_unused_parameters, as in DefaultTrainer."""
    cfg = distiller_cfg(teacher, {})
    if extra:
        cfg.KD.SOURCES.clear()
    cfg.merge_from_other_cfg(type(cfg)({"KD": {"SOURCES": extra, "TERMS": terms}}))
    torch.manual_seed(rank)  # DDP broadcasts rank 0's parameters
    model = DistributedDataParallel(build_model(cfg), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    values = []
    with EventStorage(0) as storage:
        for iteration in range(2):
            storage.iter = iteration
            losses = model(two_views(((64, 64),), seed=10 * rank + iteration, boxes=boxes[rank]))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            values.append({k: float(v.detach()) for k, v in losses.items()})
    named = list(model.module.named_parameters())
    return {
        "losses": values,
        "missing": [k for k, p in named if p.grad is None],
        "gradients": copied((k, p.grad) for k, p in named if p.grad is not None),
        "parameters": copied(named),
        "keys": list(model.state_dict()),
        "student": list(model.module.student.state_dict()),
        # Running statistics are those of a process, in a peer as in the student.
        "kd": {
            k: v
            for k, v in model.module.kd_state_dict()["tensors"].items()
            if not (k.startswith("sources.peer") and ("running_" in k or "extra_state" in k))
        },
    }


CASES: dict[str, tuple] = {
    "active and idle": ({"FPN": FPN, "LATE": LATE}, (2, 2), {}),
    "all idle": ({"LATE": LATE}, (2, 2), {}),
    "a rank without boxes": ({"FPN": FPN}, (2, 0), {}),
    "an idle source that trains": (
        {"FPN": {**LATE, "SOURCE": "SELF", "SOURCE_TAP": "refined"}},
        (2, 2),
        {"SELF": {"TYPE": "SelfTeacher"}},
    ),
    "the average of the student": ({"FPN": {**FPN, "SOURCE": "MEAN"}}, (2, 2), selves.EMA),
    "FRSKD": ({"FPN": {**selves.AT, "SOURCE": "SELF"}}, (2, 0), selves.FRSKD),
    "a peer": (selves.DML, (2, 0), selves.PEER),
    "a peer in waiting": (
        {"FPN": {**LATE, "SOURCE": "PEER"}, "BACK": {**selves.DML["BACK"], "LEARNER": "PEER"}},
        (2, 2),
        {**selves.PEER, "SECOND": {"TYPE": "SecondHead", "OF": "PEER"}},
    ),
    "OKDCR": (selves.OKDCR, (2, 0), {**selves.HEADS, "ENSEMBLE": selves.ENSEMBLE}),
    "FRSKD in waiting": (
        {"FPN": {**LATE, "SOURCE": "SELF", "SOURCE_TAP": "refined"}},
        (2, 2),
        selves.FRSKD,
    ),
}


def train_all(rank: int, teacher: tuple[str, str]) -> dict[str, dict[str, Any]]:
    SOURCES.register(SelfTeacher)
    return {name: train(rank, teacher, *case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def ranks(
    teacher: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Any]]]:
    """Every case on both ranks; the processes are started once, which is what takes time."""
    return spawned(train_all, tmp_path_factory.mktemp("ddp"), teacher)


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree(ranks: list[dict[str, dict[str, Any]]], case: str) -> None:
    first, second = (rank[case] for rank in ranks)
    assert first["losses"] != second["losses"]  # they saw different images
    assert first["missing"] == second["missing"] == []
    for what in ("gradients", "parameters", "kd"):  # the kd state too: an average is the same
        torch.testing.assert_close(first[what], second[what], rtol=0, atol=0)
    assert first["keys"] == [f"module.{k}" for k in first["student"]]
    assert first["kd"]
    terms = CASES[case][0]
    for losses in (*first["losses"], *second["losses"]):
        for name in terms:
            idle = "SCHEDULE" in terms[name]
            assert (losses[f"loss_kd_{name.lower()}"] == 0) == idle


def stall(rank: int) -> None:
    if rank == 0:
        dist.barrier()


def test_the_harness_notices_a_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.distributed.test_ddp.SECONDS", 15)
    with pytest.raises(AssertionError, match=r"ranks \[0\] stalled|Connection"):
        spawned(stall, tmp_path)
