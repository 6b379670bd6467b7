"""What docs/teacher.md shows runs as it stands there."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from kd_det import Distiller
from kd_det.build import build_items
from kd_det.data import is_unlabelled
from kd_det.registry import SOURCES, TERMS
from tests import toys
from tests.configs import kd_cfg
from tests.teachers import TAPS, context

DOCS = (Path(__file__).resolve().parents[2] / "docs/teacher.md").read_text()

LAZY = """
from detectron2.config import LazyCall, get_cfg
from detectron2.modeling import build_model

_cfg = get_cfg()
_cfg.merge_from_file("teacher.yaml")
model = LazyCall(build_model)(cfg=_cfg)
"""


class Script(nn.Module):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": images[:, :, ::8, ::8], "cls_logits": images[:, :, ::8, ::8]}


def block(language: str, words: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)
    (found,) = [b for b in blocks if words in b]
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The files of the page, of a toy teacher."""
    config, weights = toys.save_teacher(tmp_path)  # teacher.yaml, teacher.pth
    (tmp_path / "output").mkdir()
    shutil.copy(config, tmp_path / "output/config.yaml")
    shutil.copy(weights, tmp_path / "output/model_final.pth")
    (tmp_path / "teacher.py").write_text(LAZY)
    torch.jit.script(Script()).save(str(tmp_path / "teacher.pt"))
    monkeypatch.chdir(tmp_path)


def test_the_sources_of_the_page(here):
    cfg = kd_cfg()
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(block("yaml", "ScriptedTeacher"))))
    sources = build_items(cfg.KD.SOURCES, SOURCES, "KD.SOURCES")
    assert list(sources) == ["yaml", "lazy", "zoo", "run", "script"]
    assert sources.pop("zoo").weights_file.endswith("190397697/model_final_971ab9.pkl")
    maps = {}
    for name, source in sources.items():
        assert len(source.shapes(TAPS)["features"]) == (1 if name == "script" else 5)
        source.prepare(TAPS)
        maps[name] = source(context(), TAPS).maps["features"]
    for name in ("lazy", "run"):
        torch.testing.assert_close(maps[name], maps["yaml"])


def test_the_sets_of_the_page(here):
    cfg = kd_cfg()
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(block("yaml", "more:"))))
    try:
        assert [is_unlabelled(name) for name in cfg.DATASETS.TRAIN] == [False, True]
        cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(block("yaml", "PEOPLE:"))))
        assert build_items(cfg.KD.SOURCES, SOURCES, "KD.SOURCES")["people"].classes == ("person",)
        assert {t.source for t in build_items(cfg.KD.TERMS, TERMS, "KD.TERMS").values()} == {
            "cars",
            "people",
        }
    finally:
        for name in ("few", "more"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_the_function_of_the_page():
    names = {"student": build_model(toys.toy_cfg()), "network": nn.Conv2d(3, 4, 8, stride=8)}
    exec(block("python", "Declared"), names)
    assert isinstance(names["model"], Distiller)
    losses = names["model"].train()(toys.batch())
    assert float(losses["loss_kd_fpn"].detach()) > 0
