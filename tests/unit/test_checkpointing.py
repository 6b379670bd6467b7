"""Checkpoints are there whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from kd_det.engine import AtomicPaths


def checkpointer(folder: Path) -> DetectionCheckpointer:
    result = DetectionCheckpointer(nn.Linear(2, 2), str(folder))
    result.path_manager = AtomicPaths(result.path_manager)
    return result


def test_a_failing_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    saver = checkpointer(tmp_path)
    saver.save("model_0")
    before = (tmp_path / "model_0.pth").read_bytes()

    def torn(data, f):
        f.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="no space"):
        saver.save("model_0")
    assert (tmp_path / "model_0.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth"]
    assert saver.get_checkpoint_file() == str(tmp_path / "model_0.pth")


def test_reading_and_remote_paths_are_the_wrapped_managers(tmp_path):
    saver = checkpointer(tmp_path)
    saver.save("model_0")
    assert saver.has_checkpoint()
    assert set(saver.load(saver.get_checkpoint_file(), checkpointables=[])) == set()


FULL = """
import resource, sys
import kd_det
from torch import nn
from detectron2.checkpoint import DetectionCheckpointer
saver = DetectionCheckpointer(nn.Linear(300, 300), sys.argv[1])
saver.path_manager = kd_det.engine.AtomicPaths(saver.path_manager)
saver.save("model_0")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
saver.save("model_1")
"""


def test_a_full_disk_is_a_sentence_and_leaves_the_last_checkpoint(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    said = child.stderr.strip().splitlines()[-1]
    assert said.startswith(f"OSError: '{tmp_path}/model_1.pth' could not be written (File too la")
    assert "MiB are free there). Earlier checkpoints are intact: make room, and continue" in said
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth"]
    fresh = DetectionCheckpointer(nn.Linear(300, 300), str(tmp_path))
    assert fresh.get_checkpoint_file().endswith("model_0.pth")
    fresh.load(fresh.get_checkpoint_file(), checkpointables=[])


def test_an_error_that_is_not_the_disks_passes_as_it_is(tmp_path, monkeypatch):
    saver = checkpointer(tmp_path)
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saver.save("model_0")
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys, torch
import kd_det
from torch import nn
from detectron2.checkpoint import DetectionCheckpointer
saver = DetectionCheckpointer(nn.Linear(2, 2), sys.argv[1])
saver.path_manager = kd_det.engine.AtomicPaths(saver.path_manager)
saver.save("model_0")
def save(data, f):
    f.write(b"half of it"); f.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
saver.save("model_1")
"""


def test_a_kill_during_a_write_leaves_the_folder_loadable(tmp_path):
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert child.returncode == -signal.SIGKILL
    fresh = checkpointer(tmp_path)
    assert fresh.get_checkpoint_file().endswith("model_0.pth")
    fresh.load(fresh.get_checkpoint_file(), checkpointables=[])
    assert not (tmp_path / "model_1.pth").exists()
