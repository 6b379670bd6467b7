"""The promises of the Distiller, on toy detectors."""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.events import get_event_storage

from kd_det import terms
from kd_det.config import student_config
from kd_det.distiller import Distiller
from kd_det.schedules import Constant, Ramp
from kd_det.sources import SourceUnavailable, Teacher
from tests.steps import FPN, exactly, gradients, rng_unchanged, seeded, step
from tests.toys import batch, distiller_cfg, save_teacher


@pytest.fixture
def cfg(teacher: tuple[str, str], tmp_path: Path) -> CfgNode:
    cfg = distiller_cfg(teacher)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


# 1. Drop-in -----------------------------------------------------------------------------------


def test_disabled_is_the_plain_student(cfg: CfgNode) -> None:
    cfg.KD.ENABLED = False
    model = seeded(cfg)
    assert type(model) is RetinaNet
    plain = seeded(student_config(cfg))
    assert list(model.state_dict()) == list(plain.state_dict())
    exactly(dict(model.state_dict()), dict(plain.state_dict()))


def test_the_student_is_drawn_as_without_distillation(cfg: CfgNode) -> None:
    plain = seeded(student_config(cfg))
    after_plain = torch.get_rng_state()
    distiller = seeded(cfg)
    exactly(dict(distiller.student.state_dict()), dict(plain.state_dict()))
    assert torch.equal(torch.get_rng_state(), after_plain)
    assert sum(p.numel() for p in distiller.terms.parameters()) > 0


def test_building_sources_and_connectors_leaves_every_random_state(
    cfg: CfgNode, teacher: tuple[str, str]
) -> None:
    student = build_model(student_config(cfg))
    with rng_unchanged():
        distiller = Distiller(
            student=student,
            sources={"teacher": Teacher(config_file=teacher[0], weights=teacher[1])},
            terms={"fpn": terms.CWD(tap="features")},
        )
    assert len(list(distiller.terms.parameters())) > 0
    with rng_unchanged():
        distiller.prepare()


def test_a_step_draws_no_random_numbers_of_its_own(cfg: CfgNode) -> None:
    """The target's first use (loading, folding) included."""
    model = seeded(cfg)
    with rng_unchanged():
        step(model, 0)


@pytest.mark.parametrize("how", ["weight", "enabled"])
def test_all_weights_zero_is_the_plain_run(cfg: CfgNode, how: str) -> None:
    for term in cfg.KD.TERMS.values():
        term["WEIGHT" if how == "weight" else "ENABLED"] = 0.0 if how == "weight" else False
    distiller, plain = seeded(cfg), seeded(student_config(cfg))
    assert len(distiller.terms) == len(distiller.sources) == len(distiller.wiring.taps) == 0
    found, expected = step(distiller, 0), step(plain, 0)
    exactly(found, expected)
    sum(found.values()).backward()
    sum(expected.values()).backward()
    exactly(gradients(distiller.student), gradients(plain))
    assert gradients(plain)


def test_one_weight_zero_leaves_the_other_term(cfg: CfgNode) -> None:
    cfg.KD.TERMS.FPN.WEIGHT = 0.0
    model = build_model(cfg)
    assert list(model.terms) == ["logits"]
    assert list(model.wiring.taps) == ["cls_logits"]
    assert "loss_kd_fpn" not in step(model, 0)


def test_the_student_losses_are_untouched_and_the_total_moves_the_student(cfg: CfgNode) -> None:
    distiller, plain = seeded(cfg), seeded(student_config(cfg))
    found, expected = step(distiller, 0), step(plain, 0)
    assert list(found) == ["loss_cls", "loss_box_reg", "loss_kd_fpn", "loss_kd_logits"]
    exactly({k: found[k] for k in expected}, expected)
    assert all(v.dim() == 0 and v.requires_grad for v in found.values())
    sum(found.values()).backward()
    sum(expected.values()).backward()
    ours, stocks = gradients(distiller.student), gradients(plain)
    assert not torch.equal(ours["head.cls_score.weight"], stocks["head.cls_score.weight"])
    assert all(p.grad is not None for p in distiller.terms.parameters())


# 1a. Clocks -----------------------------------------------------------------------------------


def test_a_bare_loop_needs_no_storage_and_leaves_none(cfg: CfgNode) -> None:
    model = build_model(cfg)
    losses = model(batch())
    assert "loss_kd_fpn" in losses
    with pytest.raises((AssertionError, IndexError)):
        get_event_storage()


def test_the_clock_is_the_iteration_over_max_iter(teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, {"FPN": {**FPN["FPN"], "SCHEDULE": {"TYPE": "Ramp", "RATE": 1.0}}})
    model = build_model(cfg)
    reference = build_model(distiller_cfg(teacher, FPN))
    reference.load_state_dict(model.state_dict())
    full = step(reference, 0)["loss_kd_fpn"]
    for iteration in (0, 25, 50, 100):  # MAX_ITER is 100
        torch.testing.assert_close(step(model, iteration)["loss_kd_fpn"], full * iteration / 100)


def test_set_progress_drives_a_loop_without_storage(teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, {"FPN": {**FPN["FPN"], "SCHEDULE": {"TYPE": "Ramp", "RATE": 1.0}}})
    model = build_model(cfg)
    with pytest.raises(ValueError, match=r"no clock: .*max_iter.*set_progress"):
        model(batch())
    model.set_progress(1.0)
    full = model(batch())["loss_kd_fpn"]
    model.set_progress(0.25)
    torch.testing.assert_close(model(batch())["loss_kd_fpn"], full * 0.25)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"Progress is in \[0, 1\]"):
            model.set_progress(wrong)


def test_a_storage_without_max_iter_is_no_clock(cfg: CfgNode, teacher: tuple[str, str]) -> None:
    def distiller(schedule: object) -> Distiller:
        return Distiller(
            student=build_model(student_config(cfg)),
            sources={"teacher": Teacher(config_file=teacher[0], weights=teacher[1])},
            terms={"fpn": terms.CWD(tap="features", schedule=schedule)},
        )

    with pytest.raises(ValueError, match="no clock"):
        step(distiller(Ramp()), 0)
    step(distiller(Constant()), 0)
    stopping = distiller(Constant(stop_iter=5))
    stopping.set_progress(0.5)
    with pytest.raises(ValueError, match="length of the run is unknown"):
        stopping(batch())


def test_a_log_period_of_zero_is_refused(cfg: CfgNode) -> None:
    cfg.KD.LOG_PERIOD = 0
    with pytest.raises(ValueError, match="log_period >= 1"):
        build_model(cfg)


# 2. Checkpoints: see tests/unit/test_kd_state.py; here the way through a step --------------------


def test_a_resumed_step_needs_the_kd_state(cfg: CfgNode) -> None:
    first = seeded(cfg)
    step(first, 0)
    resumed = seeded(cfg, 8)
    resumed.load_state_dict(first.state_dict())
    found, expected = step(resumed, 5), step(first, 5)
    for name in ("loss_kd_fpn", "loss_kd_logits"):  # (RetinaNet's own normaliser has a memory)
        exactly(found[name], expected[name])
    lost = seeded(cfg, 8)
    lost.load_state_dict(first.student.state_dict())
    with pytest.raises(RuntimeError, match=r"cannot be restored.*kd_det\.TrainerMixin"):
        step(lost, 5)
    step(lost, 0)  # a new run from that checkpoint


def test_another_teacher_stops_a_resumed_step(teacher: tuple[str, str], tmp_path: Path) -> None:
    first = build_model(distiller_cfg(teacher, FPN))
    step(first, 0)
    other = save_teacher(tmp_path, seed=9, fpn=16)
    resumed = build_model(distiller_cfg(other, FPN))
    resumed.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="Source 'teacher' is not the one"):
        step(resumed, 5)
    new = build_model(distiller_cfg(other, FPN))
    new.load_state_dict(first.state_dict())
    step(new, 0)


def test_student_yaml_is_written_by_the_first_step(cfg: CfgNode) -> None:
    model = build_model(cfg)
    file = Path(cfg.OUTPUT_DIR) / "student.yaml"
    assert not file.exists()
    step(model, 0)
    loaded = CfgNode.load_cfg(file.read_text())
    assert "KD" not in loaded
    assert loaded.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert not list(file.parent.glob("*.tmp"))


def test_a_new_run_inherits_and_a_resumed_one_does_not(teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, FPN, fpn=16)
    cfg.merge_from_list(["KD.STUDENT.INIT_FROM", "TEACHER"])
    theirs = torch.load(teacher[1])["model"]
    new = seeded(cfg)
    drawn = new.student.head.cls_score.weight.detach().clone()
    step(new, 0)
    exactly(new.student.head.cls_score.weight.detach(), theirs["head.cls_score.weight"])
    exactly(new.student.backbone.fpn_output3.weight.detach(), theirs["backbone.fpn_output3.weight"])
    stem = "backbone.bottom_up.stem.conv1.weight"
    assert not torch.equal(dict(new.student.named_parameters())[stem], theirs[stem])
    resumed = seeded(cfg)
    resumed.load_state_dict(resumed.state_dict())
    step(resumed, 5)
    exactly(resumed.student.head.cls_score.weight.detach(), drawn)


def test_inheritance_alone_is_enough_to_enable(teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, {}, fpn=16)
    cfg.merge_from_list(["KD.STUDENT.INIT_FROM", "TEACHER"])
    model = build_model(cfg)
    assert set(step(model, 0)) == {"loss_cls", "loss_box_reg"}
    theirs = torch.load(teacher[1])["model"]
    exactly(model.student.head.cls_score.weight.detach(), theirs["head.cls_score.weight"])


# 3. Evaluation --------------------------------------------------------------------------------


def test_evaluation_is_the_plain_students(cfg: CfgNode) -> None:
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    distiller, plain = seeded(cfg).eval(), seeded(student_config(cfg)).eval()
    with torch.no_grad():
        found, expected = distiller(batch()), plain(batch())
    for a, b in zip(found, expected, strict=True):
        assert len(a["instances"]) > 0
        exactly(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        exactly(a["instances"].scores, b["instances"].scores)
        assert torch.equal(a["instances"].pred_classes, b["instances"].pred_classes)


@pytest.mark.parametrize("gone", ["config", "weights", "both"])
def test_evaluation_needs_no_teacher_and_training_says_so(tmp_path: Path, gone: str) -> None:
    config, weights = save_teacher(tmp_path / "teacher", fpn=16)
    trained = build_model(distiller_cfg((config, weights), FPN))
    step(trained, 0)
    saved = trained.state_dict()
    cfg = distiller_cfg((config, weights), FPN)
    if gone != "weights":
        Path(config).unlink()
    if gone != "config":
        Path(weights).unlink()
    model = build_model(cfg)
    result = model.load_state_dict(saved)
    assert result.missing_keys == result.unexpected_keys == []
    with torch.no_grad():
        model.eval()(batch())
    what = "weights file" if gone == "weights" else "config file"
    for train in (lambda: step(model.train(), 0), model.prepare):
        with pytest.raises(SourceUnavailable, match=rf"no {what} '.*teacher\.(yaml|pth)'"):
            train()


def test_training_mode_never_reaches_the_teacher(cfg: CfgNode) -> None:
    model = build_model(cfg)
    step(model, 0)
    held = model.sources["teacher"].hidden.held
    before = copy.deepcopy(held.state_dict())
    for _ in range(2):
        model.train()
        sum(step(model, 1).values()).backward()
    assert not any(m.training for m in held.modules())
    assert not any(p.requires_grad for p in held.parameters())
    assert all(p.grad is None for p in held.parameters())
    exactly(dict(held.state_dict()), dict(before))
    ids = {id(x) for x in [*held.parameters(), *held.buffers()]}
    assert not ids & {id(x) for x in [*model.parameters(), *model.buffers()]}
