"""Training steps in which nothing can be learnt, or went wrong."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

from kd_det.config import student_config
from kd_det.registry import TERMS
from tests.parts import Relation
from tests.steps import exactly, resumed_step, seeded, with_schedule
from tests.toys import batch, distiller_cfg

INPUTS = batch()


@pytest.fixture
def cfg(teacher: tuple[str, str], tmp_path: Path) -> CfgNode:
    cfg = distiller_cfg(teacher)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


def at(model: nn.Module, iteration: int, storage: EventStorage | None = None) -> dict:
    return resumed_step(model, iteration, INPUTS, storage)


# Without gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["update_bn_stats", "PreciseBN"])
def test_precise_bn_is_the_plain_students_and_runs_no_teacher(cfg: CfgNode, how: str) -> None:
    cfg.KD.TERMS.FPN.SCHEDULE.START_ITER = 3
    distiller, plain = seeded(cfg), seeded(student_config(cfg))
    data = [batch(seed=i) for i in range(3)]
    distiller.prepare()
    calls: list[int] = []
    held = distiller.sources["teacher"].hidden.held
    held.backbone.register_forward_hook(lambda *_: calls.append(1))
    at(plain, 50)
    at(distiller, 50)
    calls.clear()
    for model in (distiller, plain):
        if how == "PreciseBN":
            hooks.PreciseBN(1, model, data, 3).update_stats()
        else:
            with EventStorage(0):
                update_bn_stats(model, data, 3)
    assert calls == []
    exactly(dict(distiller.student.state_dict()), dict(plain.state_dict()))
    # The storage of PreciseBN begins at 0: the clock of the run goes on.
    assert float(at(distiller, 51)["loss_kd_fpn"].detach()) > 0
    assert calls == [1]


def test_without_gradients_nothing_is_started_or_released(teacher: tuple[str, str]) -> None:
    model = build_model(distiller_cfg(teacher, with_schedule(STOP_ITER=60)))
    with torch.no_grad():
        assert set(model(batch())) == {"loss_cls", "loss_box_reg"}  # and without a storage
        at(model, 99)
    assert not model._started
    assert model.sources["teacher"].hidden.held is None
    at(model, 50)
    assert model.sources["teacher"].hidden.held is not None
    at(model, 70)
    assert model.sources["teacher"].hidden.held is None
    with torch.no_grad():
        at(model, 0)
    assert model.sources["teacher"].hidden.held is None


# Numbers gone wrong ---------------------------------------------------------------------------


def broken(cfg: CfgNode) -> nn.Module:
    model = seeded(cfg)
    assert model.explain_non_finite() == ""  # before any step
    at(model, 0)
    assert model.explain_non_finite() == ""
    return model


def test_a_student_that_diverged_is_named_by_its_map(cfg: CfgNode) -> None:
    model = broken(cfg)
    with torch.no_grad():
        model.student.backbone.fpn_output3.weight.fill_(float("inf"))
    losses = at(model, 1)
    assert not torch.isfinite(losses["loss_kd_fpn"])
    text = model.explain_non_finite()
    assert "Term 'fpn', level p3: the value is nan" in text
    assert "the student's map features.p3 is not finite" in text
    assert "SOLVER.BASE_LR" in text
    assert "Term 'logits', level p3" in text
    assert "the student's map cls_logits.p3" in text
    assert "source" not in text
    for level in ("p4", "p5", "p6", "p7"):  # p3 is the pyramid's last map: the others are whole
        assert f"level {level}" not in text
    torch.nn.init.normal_(model.student.backbone.fpn_output3.weight)
    at(model, 2)
    assert model.explain_non_finite() == ""


def test_levels_with_one_reason_share_a_sentence(cfg: CfgNode) -> None:
    model = broken(cfg)
    with torch.no_grad():
        model.student.backbone.bottom_up.stem.conv1.weight.fill_(float("nan"))
    at(model, 1)
    text = model.explain_non_finite()
    assert "Term 'fpn', levels p3, p4, p5, p6, p7: the value is nan; " in text
    assert "the student's map features.<level> is not finite" in text
    assert text.count("lower SOLVER.BASE_LR") == 2  # for each term


def test_a_teacher_that_overflows_is_named_with_its_precision(cfg: CfgNode) -> None:
    model = broken(cfg)
    held = model.sources["teacher"].hidden.held
    with torch.no_grad():
        held.head.cls_score.bias.fill_(float("inf"))
    at(model, 1)
    text = model.explain_non_finite()
    assert "Term 'fpn'" not in text
    assert "Term 'logits', levels p3, p4, p5, p6, p7: " in text
    assert "the map cls_logits.<level> of source 'teacher' is not finite" in text
    assert "bfloat16 or float32" in text
    assert "student's map" not in text


def test_the_connector_or_the_loss_is_what_remains(cfg: CfgNode) -> None:
    model = broken(cfg)
    with torch.no_grad():
        model.terms["fpn"].connectors["p5"].weight.fill_(float("nan"))
    at(model, 1)
    text = model.explain_non_finite()
    assert text.count("Term '") == 1
    assert "Term 'fpn', level p5: the value is nan; both maps are finite" in text


def test_level_weights_count(cfg: CfgNode) -> None:
    """A level of weight 0 spoils the sum all the same, and a weight alone can overflow."""
    cfg.merge_from_list(["KD.TERMS.FPN.LEVEL_WEIGHTS", "[1, 1, 0, 1e38, 1]"])
    cfg.KD.TERMS.FPN.WEIGHT = 1e30
    model = seeded(cfg)
    with torch.no_grad():
        model.terms["fpn"].connectors["p5"].weight.fill_(float("nan"))
    model._restored = True
    with EventStorage(1):
        losses = model(batch(((256, 256),)))
    assert not torch.isfinite(losses["loss_kd_fpn"])
    text = model.explain_non_finite()
    assert text.count("Term '") == 2
    assert "Term 'fpn', level p5: the value is nan" in text
    assert "Term 'fpn', level p6: " in text
    assert "times its weight 1e+68 it is too large" in text


def test_a_term_without_levels_of_maps_is_explained_by_its_taps(
    teacher: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TERMS._obj_map, "Relation", Relation)
    cfg = distiller_cfg(teacher, {"REL": {"TYPE": "Relation"}})
    model = broken(cfg)
    with torch.no_grad():
        model.student.backbone.fpn_output4.bias.fill_(float("nan"))
    at(model, 1)
    text = model.explain_non_finite()
    assert "Term 'rel', level all: the value is nan" in text
    assert "the student's map features.p4" in text


def test_no_map_outlives_the_step(cfg: CfgNode) -> None:
    model = broken(cfg)
    maps = []
    model.student.backbone.register_forward_hook(
        lambda m, i, out: maps.extend(weakref.ref(x) for x in out.values())
    )
    losses = at(model, 18)
    sum(losses.values()).backward()
    del losses
    gc.collect()
    assert maps
    assert not any(x() is not None for x in maps)
