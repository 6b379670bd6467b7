"""An output folder that cannot take the run is found out before the run."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

from kd_det.engine import check_output_dir, remove_stale
from kd_det.engine.output_dir import checkpoint_bytes
from tests.toys import toy_cfg


def cfg(folder):
    return SimpleNamespace(OUTPUT_DIR=str(folder))


def test_a_good_folder_is_made_and_left_empty(tmp_path):
    check_output_dir(cfg(tmp_path / "a" / "b"), nn.Linear(2, 2))
    assert os.listdir(tmp_path / "a" / "b") == []


@pytest.mark.parametrize("folder", ["", "s3://bucket/run"])
def test_addresses_are_left_alone(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check_output_dir(cfg(folder), nn.Linear(2, 2))
    assert os.listdir(tmp_path) == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(
        ValueError, match=r"OUTPUT_DIR is '.*out', which cannot be written \(File ex"
    ):
        check_output_dir(cfg(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"Not a directory"):
        check_output_dir(cfg(tmp_path / "out" / "run"))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a read-only file system")
def test_a_read_only_folder_is_refused():
    with pytest.raises(ValueError, match=r"'/proc/self/run', which cannot be written"):
        check_output_dir(cfg("/proc/self/run"))
    with pytest.raises(ValueError, match=r"'/proc/self', which cannot be written"):
        check_output_dir(cfg("/proc/self"))


def test_a_folder_without_room_is_refused(tmp_path, monkeypatch):
    model = nn.Linear(2**18, 4)  # 4 MiB, and 4 MiB of momentum
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 2**20))
    with pytest.raises(ValueError, match=r"5\.0 MiB are free, but a .* about 8\.0 MiB: make room"):
        check_output_dir(cfg(tmp_path), model)
    check_output_dir(cfg(tmp_path), model.requires_grad_(False))
    check_output_dir(cfg(tmp_path))


def test_the_estimate_is_near_the_truth(tmp_path):
    model = build_model(toy_cfg(width=16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model")
    size = os.path.getsize(tmp_path / "model.pth")
    assert 0.8 * size < checkpoint_bytes(model) < 1.2 * size


def test_what_a_killed_save_left_is_removed(tmp_path):
    keep = ["model_0000001.pth", "last_checkpoint", "notes.tmp", "metrics.json"]
    stale = ["last_checkpoint.tmp", "model_0000003.pth.tmp", "student.yaml.tmp"]
    for name in keep + stale:
        (tmp_path / name).write_text("")
    assert remove_stale(str(tmp_path)) == stale
    assert sorted(os.listdir(tmp_path)) == sorted(keep)
    assert remove_stale(str(tmp_path / "none")) == []
