"""The file of docs/extending.md, imported as it stands there, and its config."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch import RetinaNet
from torch import nn

from kd_det import registry
from kd_det.build import build_items
from kd_det.connectors import Connector
from kd_det.regions import Padding, Region
from kd_det.schedules import Constant
from kd_det.sources import Targets, Teacher
from kd_det.terms import CWD
from tests.steps import step
from tests.toys import distiller_cfg, save_teacher

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text()
REGISTRIES = ("TERMS", "REGIONS", "CONNECTORS", "SOURCES", "DETECTORS")


class MyRetinaNet(RetinaNet):
    """A user's meta-architecture."""


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CfgNode]:
    """The page's config of a student that has the page's detector; its file is imported."""
    before = {name: set(dict(getattr(registry, name))) for name in REGISTRIES}
    (tmp_path / "my_parts.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    META_ARCH_REGISTRY.register(MyRetinaNet)
    my_parts = importlib.import_module("my_parts")
    monkeypatch.chdir(tmp_path)
    teacher = save_teacher(tmp_path, arch="RetinaNet", fpn=16)  # teacher.yaml, teacher.pth
    cfg = distiller_cfg(teacher, {})
    cfg.KD.STUDENT.META_ARCHITECTURE = "MyRetinaNet"
    config = Path(teacher[0])
    config.write_text(config.read_text().replace("RetinaNet\n", "MyRetinaNet\n"))
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(block("yaml"))))
    yield cfg
    del META_ARCH_REGISTRY._obj_map["MyRetinaNet"]
    for name in REGISTRIES:
        parts = getattr(registry, name)
        (added,) = set(dict(parts)) - before[name]
        assert parts.get(added) is getattr(my_parts, added)
        del parts._obj_map[added]
    sys.modules.pop("my_parts")


def test_every_part_does_what_it_says(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(cfg)
    term = model.terms["neck"]
    (row,) = model.wiring.rows["neck"]
    assert (row.tap, row.region, row.loss) == ("lateral", "Loud", "Huber")
    assert (row.student_channels, row.target_channels) == (8, 16)
    (connector,) = term.connectors.values()
    assert isinstance(connector, nn.Conv2d)
    assert connector.bias is None

    seen = {}

    def compare(student: torch.Tensor, target: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
        seen.update(student=student, target=target, region=region)
        return type(term).compare(term, student, target, region)

    def forward(self: Teacher, *args: Any) -> Targets:
        seen["raw"] = of_teacher(self, *args)
        return seen["raw"]

    term.compare = compare
    of_teacher = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", forward)
    found = step(model, 0)["loss_kd_neck"]
    student, target, region = (seen[k] for k in ("student", "target", "region"))
    assert set(region.unique().tolist()) == {0.0, 1.0}
    apart = (student - target).abs()
    huber = torch.where(apart < 0.5, apart**2 / 2, 0.5 * (apart - 0.25))
    torch.testing.assert_close(found, (huber * region).mean())
    found.backward()
    assert torch.count_nonzero(connector.weight.grad)

    (raw,) = seen["raw"].maps["lateral"].values()
    torch.testing.assert_close(target, nn.functional.avg_pool2d(raw, 3, 1, 1))


def test_its_fields_are_checked_and_overridden(cfg: CfgNode) -> None:
    cfg.merge_from_list(["KD.TERMS.NECK.DELTA", "2", "KD.TERMS.NECK.REGION", "Padding"])
    term = build_model(cfg).terms["neck"]
    assert term.delta == 2.0
    assert isinstance(term.region, Padding)
    with pytest.raises(ValueError, match=r"no field KD\.TERMS\.NECK\.DELTE\. Did you mean 'DELTA'"):
        cfg.merge_from_list(["KD.TERMS.NECK.DELTE", 1])


def test_it_is_short() -> None:
    assert len(block("python").splitlines()) < 40


class Far(Region):
    def __init__(self, *, reach: float = 1.0) -> None:
        self.reach = reach


class Wide(Connector):
    def __init__(self, *, width: int = 4) -> None:
        self.width = width


class Late(Constant):
    def __init__(self, *, hour: int = 1, **window: Any) -> None:
        super().__init__(**window)
        self.hour = hour


class Sharp(CWD):
    def __init__(self, *, edge: tuple[float, ...] = (1.0,), **cwd: Any) -> None:
        super().__init__(**cwd)
        self.edge = edge


class Old(Teacher):
    def __init__(self, *, name: str = "", **teacher: Any) -> None:
        super().__init__(**teacher)
        self.name = name


def test_constructors_of_every_kind_are_fields(teacher: tuple[str, str]) -> None:
    kinds = {"REGIONS": Far, "CONNECTORS": Wide, "SCHEDULES": Late, "TERMS": Sharp, "SOURCES": Old}
    for name, cls in kinds.items():
        getattr(registry, name).register(cls)
    try:
        parts = {"REGION": {"TYPE": "Far"}, "CONNECTOR": {"TYPE": "Wide"}, "SCHEDULE": "Late"}
        cfg = distiller_cfg(teacher, {"FPN": {"TYPE": "Sharp", "EDGE": [2], **parts}})
        old = {"TYPE": "Old", "NAME": "Ann"}
        cfg.merge_from_other_cfg(CfgNode({"KD": {"SOURCES": {"TEACHER": old}}}))
        for key, value in (("REGION.REACH", 3), ("CONNECTOR.WIDTH", 5), ("SCHEDULE.HOUR", 7)):
            cfg.merge_from_list([f"KD.TERMS.FPN.{key}", value])
        term = build_items(cfg.KD.TERMS, registry.TERMS, "KD.TERMS")["fpn"]
        source = build_items(cfg.KD.SOURCES, registry.SOURCES, "KD.SOURCES")["teacher"]
    finally:
        for name, cls in kinds.items():
            del getattr(registry, name)._obj_map[cls.__name__]
    found = (term.region.reach, term.connector.width, term.schedule.hour, term.edge, source.name)
    assert found == (3.0, 5, 7, (2.0,), "Ann")
