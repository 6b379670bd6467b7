"""A toy run from files on disk, started as train_net.py starts it, that must not take a step."""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import train_net
from kd_det.distiller import Distiller
from kd_det.engine.errors import is_plain, sentence
from tests.toys import distiller_cfg, save_teacher

CLASSES = ("ape", "bee", "cow")


def write_run(folder: Path) -> None:
    """``run.yaml``, ``toy.json``, ``images/`` and ``teacher/``: 2 images, 3 classes, CWD."""
    teacher = save_teacher(folder / "teacher", fpn=16)
    (folder / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(folder / "images" / name)
    images = [
        {"id": i, "file_name": name, "height": 64, "width": 64}
        for i, name in enumerate(("a.png", "b.png"))
    ]
    box = {"category_id": 1, "bbox": [8, 8, 30, 30], "area": 900, "iscrowd": 0}
    content = {
        "images": images,
        "annotations": [{"id": i + 1, "image_id": i, **box} for i in range(2)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    (folder / "toy.json").write_text(json.dumps(content))
    cfg = yaml.safe_load(distiller_cfg(teacher).dump())
    cfg["KD"]["SOURCES"]["TEACHER"].update(
        CONFIG_FILE="teacher/teacher.yaml", WEIGHTS="teacher/teacher.pth"
    )
    cfg["KD"]["DATASETS"] = {"toy": {"JSON": "toy.json", "IMAGES": "images"}}
    cfg["DATASETS"] = {"TRAIN": ["toy"], "TEST": ["toy"]}
    (folder / "run.yaml").write_text(yaml.safe_dump(cfg))


class ToyRun:
    """
    A copy of the files that a test may break.

    Args:
        whole: folder of `write_run`.
        folder: where the copy goes.
        monkeypatch: of the test.
    """

    def __init__(self, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copytree(whole, folder)
        self.folder = folder
        self.out = folder / "out"
        self.config = "run.yaml"

        def step(*_: Any, **__: Any) -> None:
            raise AssertionError("a training step ran")

        monkeypatch.setattr(Distiller, "_step", step)
        monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", step)  # without a Distiller
        # Without its log of the whole environment, which takes longer than everything else.
        monkeypatch.setattr(
            train_net, "default_setup", lambda cfg, _: os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        )
        monkeypatch.setattr(train_net, "setup_logger", lambda *_, **__: None)
        monkeypatch.chdir(folder)

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change what ``run.yaml`` says."""
        content = yaml.safe_load((self.folder / "run.yaml").read_text())
        change(content)
        (self.folder / "run.yaml").write_text(yaml.safe_dump(content))

    def annotate(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change what ``toy.json`` says."""
        content = json.loads((self.folder / "toy.json").read_text())
        change(content)
        (self.folder / "toy.json").write_text(json.dumps(content))

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the folder."""
        (self.folder / name).write_bytes(content)

    def arguments(self, *words: str, resume: bool = False) -> argparse.Namespace:
        """Of ``train_net.py --config-file run.yaml OUTPUT_DIR out ...``, in a new process."""
        self.forget()
        command = ["--config-file", self.config, *(["--resume"] if resume else [])]
        command += ["OUTPUT_DIR", str(self.out), *words]
        return train_net.argument_parser().parse_args(command)

    def start(self, *words: str, resume: bool = False) -> None:
        """What train_net.py does in its process."""
        train_net.main(self.arguments(*words, resume=resume))

    @staticmethod
    def forget() -> None:
        """Forget the dataset that configs registered."""
        if "toy" in DatasetCatalog.list():
            DatasetCatalog.remove("toy")
            MetadataCatalog.pop("toy")

    def refused(self, *words: str, says: tuple[str, ...], resume: bool = False) -> None:
        """Start, and see the sentence, no step, and nothing half-written."""
        before = set(self.out.rglob("*"))
        with pytest.raises((ValueError, KeyError, FileNotFoundError, RuntimeError)) as e:
            self.start(*words, resume=resume)
        said = sentence(e.value)
        assert is_plain(e.value), f"the command line would show a traceback of: {said}"
        assert "\n" not in said
        for part in says:
            assert part in said
        if self.out.is_dir():
            left = {p.name for p in set(self.out.rglob("*")) - before}
            # Detectron2's writers open their files before the first hook.
            assert not [n for n in left if n != "metrics.json" and "tfevents" not in n]
