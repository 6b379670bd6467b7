"""Keys that a project adds to Detectron2's config, in its teacher's file."""

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch import RetinaNet

import kd_det
from kd_det.build import build_part, project_defaults
from kd_det.fields import fields_of
from kd_det.registry import SOURCES
from kd_det.sources import Teacher
from tests.toys import save_teacher


class Birds(RetinaNet):
    """Cannot be built without the project's keys."""

    @classmethod
    def from_config(cls, cfg):
        assert (cfg.MODEL.BIRDS.LEGS, cfg.MODEL.BIRDS.WINGS) == (2, 4)
        return RetinaNet.from_config(cfg)


def add_birds_config(cfg):
    cfg.MODEL.BIRDS = CfgNode({"LEGS": 2, "WINGS": 2})


@pytest.fixture(autouse=True)
def birds():
    META_ARCH_REGISTRY.register(Birds)
    yield
    del META_ARCH_REGISTRY._obj_map["Birds"]


@pytest.fixture
def files(tmp_path):
    """A teacher's, of which one names one of the project's keys."""
    base, weights = save_teacher(tmp_path)
    config = tmp_path / "birds.yaml"
    own = "MODEL: {META_ARCHITECTURE: Birds, BIRDS: {WINGS: 4}}"
    config.write_text(f"_BASE_: {base}\n{own}\n")
    return str(config), weights


@pytest.mark.parametrize("order", [1, -1])
def test_defaults_are_as_before_merging(order, tmp_path):
    cfg = get_cfg()
    for add in (add_birds_config, kd_det.add_kd_config)[::order]:
        add(cfg)
    (tmp_path / "student.yaml").write_text("MODEL: {DEVICE: cpu, BIRDS: {LEGS: 3}}")
    cfg.merge_from_file(str(tmp_path / "student.yaml"))
    cfg.merge_from_list(["MODEL.BIRDS.WINGS", 6])
    for changed in (cfg, cfg.clone()):
        found = project_defaults(changed)
        assert found.pop("VERSION") == 2
        assert dict(found.MODEL.pop("BIRDS")) == {"LEGS": 2, "WINGS": 2}
        expected = get_cfg()
        assert found.MODEL == expected.MODEL  # DEVICE is not the project's
        assert set(found) == set(expected) - {"VERSION"}


def test_a_teacher_of_the_project(files):
    cfg = get_cfg()
    kd_det.add_kd_config(cfg)
    add_birds_config(cfg)
    config, weights = files
    cfg.merge_from_file(config)
    kd = {
        "ENABLED": True,
        "STUDENT": {"META_ARCHITECTURE": "Birds"},
        "SOURCES": {"TEACHER": {"TYPE": "Teacher", "CONFIG_FILE": config, "WEIGHTS": weights}},
        "TERMS": {"FPN": {"TYPE": "CWD"}},
    }
    cfg.merge_from_other_cfg(CfgNode({"KD": kd, "MODEL": {"META_ARCHITECTURE": "Distiller"}}))
    model = build_model(cfg)
    model.prepare()
    assert type(model.sources["teacher"].hidden.held) is Birds


def test_the_python_door(files):
    config, weights = files
    with pytest.raises(ValueError, match=r"birds\.yaml' cannot be read .*MODEL\.BIRDS"):
        Teacher(config_file=config, weights=weights).shapes(("features",))
    defaults = get_cfg()
    add_birds_config(defaults)
    teacher = Teacher(config_file=config, weights=weights, defaults=defaults)
    assert len(teacher.shapes(("features",))["features"]) == 5
    assert defaults.MODEL.BIRDS.WINGS == 2


class Louder(Teacher):
    """Hands on what it does not know."""

    def __init__(self, *, gain: float = 2.0, **teacher):
        super().__init__(**teacher)
        self.gain = gain


def test_a_subclass_is_offered_the_defaults_too():
    defaults = get_cfg()
    node = CfgNode({"TYPE": "Louder", **{k: v.default for k, v in fields_of(Louder).items()}})
    node.CONFIG_FILE = "birds.yaml"
    SOURCES.register(Louder)
    try:
        assert build_part(node, SOURCES, defaults=defaults, other=1)._origin.defaults is defaults
    finally:
        del SOURCES._obj_map["Louder"]
