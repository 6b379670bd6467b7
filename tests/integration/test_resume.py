"""
A run that is killed and resumed equals the run that was not: losses bit for bit, in fresh
processes, each started from another seed.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.toys import distiller_cfg, save_noise, save_teacher

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "recorded.py"
PERIOD, KILLED, LENGTH = 4, 7, 10


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A distilled toy with connectors, BatchNorm, random sizes and flips, aspect-ratio groups,
    PreciseBN and an evaluation in between, a schedule, and no SEED: nothing repeats but what is
    saved.
    """
    folder = tmp_path_factory.mktemp("config")
    terms = {
        "FPN": {"TYPE": "CWD", "TAP": "features", "WEIGHT": 5.0,
                "SCHEDULE": {"TYPE": "Ramp", "RATE": 2.0}},
        "LOGITS": {"TYPE": "CWD", "TAP": "cls_logits"},
    }  # fmt: skip
    cfg = distiller_cfg(save_teacher(folder / "teacher", fpn=16), terms, fpn=8)
    cfg.merge_from_other_cfg(type(cfg)({"KD": {"DATASETS": {"resume_noise": save_noise(folder)}}}))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("resume_noise",)
    cfg.INPUT.MIN_SIZE_TRAIN = (40, 48, 56, 64)
    cfg.SOLVER.MAX_ITER = LENGTH
    cfg.SOLVER.CHECKPOINT_PERIOD = PERIOD
    cfg.TEST.EVAL_PERIOD = PERIOD
    # It draws images, and trains without gradients, before each checkpoint is written.
    cfg.TEST.PRECISE_BN.ENABLED, cfg.TEST.PRECISE_BN.NUM_ITER = True, 2
    (folder / "toy.yaml").write_text(cfg.dump())
    return folder / "toy.yaml"


def train(
    config: Path, out: Path, name: str, case: "Case", *words: str, killed: bool = False
) -> dict[int, dict[str, float]]:
    """The losses of every step of a run into the folder ``out``."""
    losses = out.parent / f"{name}.txt"
    command = [sys.executable, *case.launcher, str(SCRIPT), str(config), str(losses), *words]
    command += ["--opts", "OUTPUT_DIR", str(out), *case.opts]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (child.returncode != 0) == killed, child.stdout[-3000:] + child.stderr[-3000:]
    rows = [json.loads(line) for line in losses.read_text().splitlines()]
    assert len({i for i, _ in rows}) == len(rows)
    return dict(rows)


@dataclass(frozen=True)
class Case:
    opts: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    losses: tuple[str, ...] = ("loss_cls", "loss_box_reg", "loss_kd_fpn", "loss_kd_logits")


CASES = {
    "distilled": Case(),
    "plain, in the sampler's order": Case(
        ("KD.ENABLED", "False", "DATALOADER.ASPECT_RATIO_GROUPING", "False"),
        losses=("loss_cls", "loss_box_reg"),
    ),
    "two processes": Case(
        ("SOLVER.IMS_PER_BATCH", "4"),
        ("-m", "torch.distributed.run", "--nproc-per-node", "2"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(config, tmp_path, name):
    case = CASES[name]
    whole = train(config, tmp_path / "whole", "whole", case)
    cut = train(config, tmp_path / "cut", "cut", case, "--kill-at", str(KILLED), killed=True)
    resumed = train(config, tmp_path / "cut", "resumed", case, "--seed", "99")

    assert {*case.losses, "total_loss"} == set(whole[0])
    assert len({row["total_loss"] for row in whole.values()}) == LENGTH  # or anything would do
    assert cut == {i: whole[i] for i in range(KILLED)}
    assert resumed == {i: whole[i] for i in range(PERIOD, LENGTH)}

    final = [torch.load(tmp_path / run / "model_final.pth") for run in ("whole", "cut")]
    for saved in final:  # "Note that this could produce different statistics every time."
        for key in [k for k in saved["model"] if "running_" in k]:
            del saved["model"][key]
    for part in ("model", "kd", "run"):
        if part in final[0]:
            torch.testing.assert_close(
                _tensors(final[0][part]), _tensors(final[1][part]), rtol=0, atol=0
            )


def _tensors(tree: object) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
