"""The walk-through of docs/own_dataset.md, with the files and commands that stand there."""

import csv
import json
import logging
import re
import shlex
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import defaults

import train_net
from kd_det.__main__ import main
from kd_det.data import make_synthetic_coco

ROOT = Path(__file__).resolve().parents[2]
BCCD = ROOT.parent / "shared" / "data" / "bccd"
PAGE = (ROOT / "docs" / "own_dataset.md").read_text()

# Below the page's own lines: detectors that a test can train.
TINY = """
MODEL:
  BACKBONE: {FREEZE_AT: 0}
  RESNETS: {NORM: BN, STEM_OUT_CHANNELS: 4, RES2_OUT_CHANNELS: 4, WIDTH_PER_GROUP: 4}
  FPN: {OUT_CHANNELS: 8}
  RETINANET: {NUM_CONVS: 1}
INPUT: {MIN_SIZE_TRAIN: [48], MIN_SIZE_TEST: 48}
DATALOADER: {NUM_WORKERS: 0}
"""
SHORT = [*"SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 TEST.EVAL_PERIOD 1 MODEL.WEIGHTS".split(), ""]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def bccd(folder: Path) -> dict[str, str]:
    """A few of its images."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").symlink_to(BCCD / "images")
    for split in ("train", "val"):
        content = json.loads((BCCD / "annotations" / f"instances_{split}.json").read_text())
        content["images"] = content["images"][:6]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return {"0001.jpg": "BloodImage_00001.jpg"}


def synthetic(folder: Path) -> dict[str, str]:
    """Six classes, and a folder of images per split."""
    make_synthetic_coco(folder, num_train=6, num_val=4)
    return {
        "NUM_CLASSES: 3": "NUM_CLASSES: 6",
        'train.json", IMAGES: "../my_data/images': 'train.json", IMAGES: "../my_data/train',
        'val.json", IMAGES: "../my_data/images': 'val.json", IMAGES: "../my_data/val',
        "images/0001.jpg": "val/000001.png",
    }


def adapted(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def execute(command: str) -> None:
    words = shlex.split(command)
    if words[:2] == ["python", "train_net.py"]:
        train_net.main(train_net.argument_parser().parse_args([*words[2:], *SHORT]))
    else:
        assert words[:3] == ["python", "-m", "kd_det"]
        assert main([*words[3:], *(SHORT if words[3] == "plan" else [])]) == 0


def test_it_is_as_short_as_it_says():
    lines = [line for block in blocks("yaml") for line in block.splitlines() if line[0] != "#"]
    assert len(lines) <= 10
    code = [line for block in blocks("python") for line in block.splitlines() if line]
    assert len(code) <= 2


@pytest.fixture
def _quiet(monkeypatch):
    """Without the log of the whole environment, and handlers that outlive the test."""
    monkeypatch.setattr(defaults, "collect_env_info", str)
    for module in (defaults, train_net):
        monkeypatch.setattr(module, "setup_logger", lambda *_, **__: logging.getLogger("d2"))
    yield
    for name in ("my_train", "my_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name)


needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason="bccd is not beside the checkout")


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("dataset", [synthetic, pytest.param(bccd, marks=needs_bccd)])
def test_the_walk_through(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    changes = dataset(tmp_path / "my_data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tiny.yaml").write_text(TINY)
    for block in blocks("yaml"):
        name = re.match(r"# (mine/\w+\.yaml)\n", block)[1]
        tiny = '_BASE_: "tiny.yaml"\n' if name == "mine/data.yaml" else ""
        (tmp_path / name).write_text(tiny + adapted(block, changes))
    commands = adapted("".join(blocks("bash")), changes).splitlines()
    assert len(commands) == 7
    for command in commands:
        execute(command)
    printed = capsys.readouterr().out
    assert "losses of one batch" in printed
    assert "fpn CWD 5, logits CWD 1" in printed
    out = tmp_path / "output" / "mine"
    with open(out / "compared" / "compare.csv", newline="") as f:
        evaluated = [row["run"] for row in csv.DictReader(f)]
    assert evaluated == [name for name in ("plain", "distilled", "teacher") for _ in range(2)]
    assert (out / "maps.png").is_file()
    exported = torch.load(out / "student" / "model.pth")["model"]
    trained = torch.load(out / "distilled" / "model_final.pth")["model"]
    torch.testing.assert_close(dict(exported), dict(trained), rtol=0, atol=0)
