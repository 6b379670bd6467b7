"""Whole runs of train_net.py on several processes, and what one of them leaves to the other."""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.synthetic import synthetic_run

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

pytestmark = pytest.mark.dist


def train_net(config: Path, out: Path, *words: str, two: bool = False, gpu: bool = False) -> str:
    launcher = TORCHRUN if two else ()
    command = [*launcher, str(ROOT / "train_net.py"), "--config-file", str(config)]
    if "--resume" in words:
        command.append("--resume")
    return run([*command, "OUTPUT_DIR", str(out), *(w for w in words if w != "--resume")], gpu=gpu)


def run(words: list[str], *, gpu: bool = False) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, *words]
    child = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-5000:]
    return child.stdout + child.stderr


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "kd_run.json").read_text())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    cfg = synthetic_run(folder)
    (folder / "toy.yaml").write_text(cfg.dump())
    return folder / "toy.yaml"


@pytest.fixture(scope="module")
def by_two(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    train_net(config, out, two=True)
    return out


def check_checkpoint(file: Path) -> None:
    saved = torch.load(file)
    assert saved["kd"]["tensors"]
    assert not [k for k in saved["model"] if k.startswith(("module.", "student.", "terms."))]
    assert all(torch.isfinite(x).all() for x in saved["model"].values())


def test_two_processes_train_evaluate_and_write_one_of_everything(by_two: Path) -> None:
    for name in ("model_0000001.pth", "model_0000003.pth", "model_final.pth"):
        check_checkpoint(by_two / name)
    assert "KD" not in (by_two / "student.yaml").read_text()
    assert [p.name for p in by_two.glob("kd_run.json*")] == ["kd_run.json"]
    assert not list(by_two.glob("*.tmp"))
    found = record(by_two)
    assert (found["world_size"], found["resumed"]) == (2, [])
    assert "torchrun --nproc-per-node 2" in found["baseline"]["command"]
    assert [x["images"] for x in found["datasets"]["train"].values()] == [12]
    last = [row for row in rows(by_two) if "loss_kd_fpn" in row][-1]
    assert all(math.isfinite(last[k]) for k in ("total_loss", "loss_kd_fpn", "loss_kd_logits"))
    assert [row for row in rows(by_two) if "bbox/AP" in row]


def test_one_process_continues_the_run_of_two(config: Path, by_two: Path) -> None:
    log = train_net(config, by_two, "--resume", "SOLVER.MAX_ITER", "6", "TEST.EVAL_PERIOD", "0")
    assert "Starting training from iteration 4" in log
    found = record(by_two)
    assert found["world_size"] == 2
    (resumed,) = found["resumed"]
    assert (resumed["iteration"], resumed["world_size"]) == (4, 1)
    check_checkpoint(by_two / "model_0000005.pth")
    assert rows(by_two)[-1]["iteration"] >= 5


@pytest.fixture(scope="module")
def by_one(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    train_net(config, out, "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()")
    return out


def test_the_recorded_command_trains_the_matched_baseline(by_one: Path) -> None:
    python, *words = shlex.split(record(by_one)["baseline"]["command"])
    assert python == "python"
    run(words)
    out = by_one.with_name(by_one.name + "_baseline")
    assert rows(out)[-1]["iteration"] >= 1
    assert not [key for row in rows(out) for key in row if "kd" in key]
    assert "kd" not in torch.load(out / "model_final.pth")
    found = record(out)
    assert found["plan"] == found["sources"] == {}
    assert "plain student" in found["baseline"]["reason"]
    for key in ("seed", "datasets", "weights", "versions"):
        assert found[key] == record(by_one)[key]


def test_two_processes_continue_the_run_of_one(config: Path, by_one: Path) -> None:
    before = torch.load(by_one / "model_0000001.pth")
    log = train_net(config, by_one, "--resume", "DATASETS.TEST", "()", two=True)
    assert "Starting training from iteration 2" in log
    found = record(by_one)
    (resumed,) = found["resumed"]
    assert (found["world_size"], resumed["world_size"], resumed["iteration"]) == (1, 2, 2)
    check_checkpoint(by_one / "model_0000003.pth")
    # The connectors went on from where they were.
    key = "terms.fpn.connectors.p3.weight"
    old, new = before["kd"]["tensors"], torch.load(by_one / "model_0000003.pth")["kd"]["tensors"]
    assert 0 < float((old[key] - new[key]).abs().max()) < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("amp", [False, True])
def test_two_gpus_over_nccl(config: Path, tmp_path: Path, amp: bool) -> None:
    words = ("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", str(amp))
    train_net(config, tmp_path, *words, two=True, gpu=True)
    check_checkpoint(tmp_path / "model_final.pth")
    found = record(tmp_path)
    assert found["world_size"] == 2
    assert len(found["versions"]["gpus"]) >= 2
    log = train_net(config, tmp_path, *words, "--resume", "SOLVER.MAX_ITER", "6", gpu=True)
    assert "Starting training from iteration 4" in log


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_mixed_precision_on_a_gpu(config: Path, tmp_path: Path, precision: str) -> None:
    words = ("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "True")
    words += ("KD.SOURCES.TEACHER.PRECISION", precision)
    train_net(config, tmp_path, *words, "SOLVER.MAX_ITER", "2", gpu=True)
    check_checkpoint(tmp_path / "model_final.pth")
    saved = torch.load(tmp_path / "model_0000001.pth")
    assert "grad_scaler" in saved["trainer"]["_trainer"]
    train_net(config, tmp_path, *words, "--resume", gpu=True)
    last = [row for row in rows(tmp_path) if "loss_kd_fpn" in row][-1]
    assert last["iteration"] >= 3
    assert math.isfinite(last["total_loss"])
