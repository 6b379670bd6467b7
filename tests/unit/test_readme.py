"""What the README shows runs as it stands there."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.modeling import build_model
from omegaconf import OmegaConf

from kd_det import Distiller, Teacher
from kd_det.terms import CWD
from tests.toys import batch, save_teacher, toy_cfg

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def block(language: str, words: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    found = [b for b in blocks if words in b]
    assert len(found) == 1, f"one {language} block with {words!r}, but {len(found)}"
    return found[0]


@pytest.fixture(autouse=True)
def teacher_here(tmp_path, monkeypatch):
    """A toy teacher under the README's file names."""
    config, weights = save_teacher(tmp_path)  # teacher.yaml, teacher.pth
    shutil.copy(config, tmp_path / "retinanet_R_101_FPN_3x.yaml")
    shutil.copy(weights, tmp_path / "r101.pkl")
    monkeypatch.chdir(tmp_path)


def test_the_yaml_door_builds():
    text = yaml.safe_load(block("yaml", "KD:"))
    assert text.pop("_BASE_").endswith(".yaml")
    cfg = toy_cfg()
    cfg.merge_from_other_cfg(CfgNode(text))
    model = build_model(cfg)
    assert isinstance(model, Distiller)
    assert [row.level for row in model.wiring.rows["fpn"]] == ["p3", "p4", "p5", "p6"]
    cfg.KD.ENABLED = False
    assert type(build_model(cfg)).__name__ == "RetinaNet"


def test_the_python_door_trains():
    names = {"student": build_model(toy_cfg()), "batched_inputs": batch()}
    exec(block("python", "losses = model(batched_inputs)"), names)
    assert set(names["losses"]) == {"loss_cls", "loss_box_reg", "loss_kd_fpn"}


def test_the_lazyconfig_door_builds():
    student = LazyCall(build_model)(cfg=None)
    names = {"L": LazyCall, "Distiller": Distiller, "Teacher": Teacher, "CWD": CWD}
    exec(block("python", "L(Distiller)"), {**names, "model": student}, names)
    names["model"].student = build_model(toy_cfg())
    root = OmegaConf.create({"train": {"max_iter": 7}}, flags={"allow_objects": True})
    root.model = names["model"]
    model = instantiate(root.model)
    assert isinstance(model, Distiller)
    assert model.max_iter == 7


def test_the_two_lines_are_the_ones_that_the_scripts_use():
    lines = block("python", "add_kd_config").split("\n")
    assert lines[0].startswith("import kd_det")
    names = {"cfg": toy_cfg()}
    exec("\n".join(lines), names)
    assert "KD" in names["cfg"]
