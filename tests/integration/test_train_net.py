"""train_net.py as a user calls it: train, resume, evaluate, inspect, on one process and two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.toys import distiller_cfg, save_teacher

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"

needs_data = pytest.mark.skipif(
    not (DATA / "coco").is_dir(), reason="the 27-image COCO stand-in is not beside the checkout"
)


def train_net(*words: str, launcher: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *launcher, str(ROOT / "train_net.py"), *words]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(DATA), "PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-3000:]
    return child.stdout + child.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A distilled toy on the COCO stand-in, with a connector."""
    folder = tmp_path_factory.mktemp("config")
    cfg = distiller_cfg(save_teacher(folder / "teacher", classes=80, fpn=16), classes=80, fpn=8)
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    cfg.DATASETS.TEST = ("coco_2017_val",)
    cfg.SOLVER.MAX_ITER = 4
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.TEST.EVAL_PERIOD = 4
    cfg.SEED = 1
    (folder / "toy.yaml").write_text(cfg.dump())
    return folder / "toy.yaml"


@needs_data
def test_train_resume_evaluate(config, tmp_path):
    out = tmp_path / "out"
    common = ("--config-file", str(config))
    train_net(*common, "OUTPUT_DIR", str(out), "SOLVER.MAX_ITER", "2")
    checkpoint = torch.load(out / "model_0000001.pth")
    assert checkpoint["kd"]["tensors"]  # the connectors
    assert "optimizer" in checkpoint["trainer"]["_trainer"]
    assert not [k for k in checkpoint["model"] if k.startswith(("student", "terms", "sources"))]

    log = train_net(*common, "--resume", "OUTPUT_DIR", str(out))
    assert "Starting training from iteration 2" in log
    rows = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert [row for row in rows if "loss_kd_fpn" in row]
    trained = next(row["bbox/AP"] for row in rows if "bbox/AP" in row)

    results = train_net(
        *common, "--eval-only", "MODEL.WEIGHTS", str(out / "model_final.pth"),
        "OUTPUT_DIR", str(tmp_path / "eval"), "KD.SOURCES.TEACHER.WEIGHTS", "gone.pth",
    )  # fmt: skip
    assert f"copypaste: {trained:.4f}" in results
    assert (out / "student.yaml").is_file()
    assert "KD" not in (out / "student.yaml").read_text()


@needs_data
def test_dry_run_trains_and_writes_nothing(config, tmp_path):
    out = tmp_path / "out"
    log = train_net("--config-file", str(config), "--dry-run", "OUTPUT_DIR", str(out))
    assert "conv1x1" in log
    assert "peak memory of the step" in log
    assert not list(out.glob("*.pth"))
    assert not (out / "student.yaml").exists()


@needs_data
def test_the_matched_baseline_is_the_same_file(config, tmp_path):
    out = tmp_path / "out"
    train_net("--config-file", str(config), "OUTPUT_DIR", str(out), "KD.ENABLED", "False")
    rows = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert not [key for row in rows for key in row if "kd" in key]
    assert "kd" not in torch.load(out / "model_final.pth")


@needs_data
@pytest.mark.dist
def test_two_cpu_processes_under_torchrun(config, tmp_path):
    out = tmp_path / "out"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    train_net("--config-file", str(config), "OUTPUT_DIR", str(out), launcher=launcher)
    checkpoint = torch.load(out / "model_final.pth")
    assert checkpoint["kd"]["tensors"]
    assert not [k for k in checkpoint["model"] if k.startswith("module.")]
    # One process takes the run further.
    log = train_net(
        "--config-file", str(config), "--resume", "OUTPUT_DIR", str(out), "SOLVER.MAX_ITER", "6"
    )
    assert "Starting training from iteration 4" in log


@needs_data
def test_a_missing_teacher_stops_before_the_first_batch(config, tmp_path):
    command = [
        sys.executable, str(ROOT / "train_net.py"), "--config-file", str(config),
        "OUTPUT_DIR", str(tmp_path), "KD.SOURCES.TEACHER.WEIGHTS", "gone.pth",
    ]  # fmt: skip
    environment = {**os.environ, "DETECTRON2_DATASETS": str(DATA), "PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode != 0
    assert "there is no weights file 'gone.pth'" in child.stderr
    assert not list(tmp_path.glob("*.pth"))
