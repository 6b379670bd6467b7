"""The promises of the Distiller, on toy detectors."""

import contextlib
import copy
import gc
import logging
import random
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

import kd_det
from kd_det import terms
from kd_det.config import student_config
from kd_det.distiller import Distiller
from kd_det.registry import TERMS
from kd_det.schedules import Constant, Ramp
from kd_det.sources import SourceUnavailable, Teacher
from tests.toys import batch, distiller_cfg, save_teacher

FPN = {"FPN": {"TYPE": "CWD", "TAP": "features"}}


def seeded(cfg: CfgNode, seed: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(cfg)


def with_schedule(**schedule: object) -> dict:
    return {"FPN": {**FPN["FPN"], "SCHEDULE": {"TYPE": "Constant", **schedule}}}


def step(model: nn.Module, iteration: int, inputs: list | None = None) -> dict[str, Tensor]:
    with EventStorage(iteration):
        return model(inputs or batch())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def exactly(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@contextlib.contextmanager
def rng_unchanged() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), cpu)


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


# 4 and 5. Errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "error", "message"),
    [
        ({"TAP": "featurs"}, KeyError, r"Term 'fpn': .*'featurs'"),
        ({"TAP": "backbone.fpn_outptu3"}, KeyError, r"Term 'fpn': .*Did you mean .*fpn_output3"),
        ({"SOURCE_TAP": "rpn_logits"}, KeyError, r"Source 'teacher': .*'rpn_logits'"),
        ({"LEVELS": ["p3", "p44"]}, ValueError, r"Term 'fpn': .*'p44'.* Did you mean 'p4'"),
        ({"SOURCE": "TEECHER"}, KeyError, r"Term 'fpn' .*'teecher'.*Did you mean 'teacher'"),
        ({"CONNECTOR": "Identity"}, ValueError, r"Term 'fpn': level p3 .* 8 channels .* 16"),
        ({"LEVEL_WEIGHTS": [1.0]}, ValueError, r"Term 'fpn': .*1 LEVEL_WEIGHTS for 5 levels"),
        ({"TAP": "res3", "SOURCE_TAP": "features"}, None, ""),
        ({"TAP": "backbone.bottom_up.res3"}, None, ""),
    ],
)
def test_what_does_not_fit_names_the_term(
    teacher: tuple[str, str], term: dict, error: type | None, message: str
) -> None:
    cfg = distiller_cfg(teacher, {"FPN": {**FPN["FPN"], **term}})
    if error is None:
        step(build_model(cfg), 0)
        return
    with pytest.raises(error, match=message):
        build_model(cfg)


def test_class_counts_that_differ_name_both_and_the_way_out(teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, {"LOGITS": {"TYPE": "CWD", "TAP": "cls_logits"}}, classes=5)
    with pytest.raises(ValueError, match=r"(?s)Term 'logits': level p3.* 5 .* 3.*TAP: features"):
        build_model(cfg)


def test_an_unnamed_source_among_several_is_an_error(teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, FPN)
    again = {k: v for k, v in cfg.KD.SOURCES.TEACHER.items() if k != "ENABLED"}
    cfg.merge_from_other_cfg(CfgNode({"KD": {"SOURCES": {"SECOND": again}}}))
    with pytest.raises(ValueError, match=r"Term 'fpn' names no SOURCE.*teacher, second"):
        build_model(cfg)


@pytest.mark.parametrize("name", ["a-b", "keys", "1", "type"])
def test_names_that_cannot_be_attributes(teacher: tuple[str, str], name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot name a source or a term"):
        build_model(distiller_cfg(teacher, {name: FPN["FPN"]}))


@pytest.mark.parametrize("calls", [0, 10])
def test_a_tap_that_fires_another_number_of_times_is_an_error(
    teacher: tuple[str, str], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is shared over five levels."""
    tap = {"TYPE": "CWD", "TAP": "head.bbox_subnet.0"}
    model = build_model(distiller_cfg(teacher, {"BOX": {**tap, "CONNECTOR": "Auto"}}))
    assert float(step(model, 0)["loss_kd_box"]) > 0
    head = model.student.head
    forward = head.forward

    def bypassed(features: list[Tensor]) -> object:
        logits = [head.cls_score(x) for x in features]
        return logits, [head.bbox_pred(x) for x in features]

    changed = bypassed if calls == 0 else lambda x: (forward(x), forward(x))[1]
    monkeypatch.setattr(head, "forward", changed)
    with pytest.raises(RuntimeError, match=rf"head.bbox_subnet.0' was called {calls} time"):
        step(model, 0)


# 6. Losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "iteration"),
    [({"START_ITER": 3}, 0), ({"START_ITER": 3}, 2), ({"STOP_ITER": 5}, 5), ({"STOP_ITER": 5}, 99)],
)
def test_idle_terms_are_an_attached_zero(
    teacher: tuple[str, str], schedule: dict, iteration: int
) -> None:
    model = build_model(distiller_cfg(teacher, with_schedule(**schedule)))
    plain = build_model(student_config(distiller_cfg(teacher, FPN)))
    plain.load_state_dict(model.student.state_dict())
    model._restored = True  # as a resumed run
    losses, expected = step(model, iteration), step(plain, iteration)
    assert float(losses["loss_kd_fpn"]) == 0.0
    assert losses["loss_kd_fpn"].requires_grad
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for p in model.terms.parameters():
        assert torch.count_nonzero(p.grad) == 0
    exactly(gradients(model.student), gradients(plain))


@pytest.mark.parametrize(("schedule", "iteration"), [({"START_ITER": 3}, 3), ({"STOP_ITER": 5}, 4)])
def test_a_window_is_open_at_its_edges(
    teacher: tuple[str, str], schedule: dict, iteration: int
) -> None:
    model = build_model(distiller_cfg(teacher, with_schedule(**schedule)))
    model._restored = True
    assert float(step(model, iteration)["loss_kd_fpn"]) > 0


def test_no_foreground_is_a_finite_loss_for_every_term(cfg: CfgNode) -> None:
    model = build_model(cfg)
    losses = step(model, 0, batch(boxes=0))
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_two_backward_calls(cfg: CfgNode) -> None:
    model = build_model(cfg)
    losses = step(model, 0)
    sum(losses.values()).backward(retain_graph=True)
    once = gradients(model)
    sum(losses.values()).backward()
    torch.testing.assert_close(gradients(model), {k: 2 * g for k, g in once.items()})


def test_an_identical_teacher_gives_zero(tmp_path: Path) -> None:
    config, weights = save_teacher(tmp_path)
    cfg = distiller_cfg((config, weights))
    model = build_model(cfg)
    model.load_state_dict(torch.load(weights)["model"])
    for m in model.student.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
    losses = step(model, 0)
    for name in ("loss_kd_fpn", "loss_kd_logits"):
        assert abs(float(losses[name])) < 1e-5
    assert float(losses["loss_cls"]) > 0


# 7. Cheap -------------------------------------------------------------------------------------


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_teacher_runs_only_as_deep_as_the_taps(teacher: tuple[str, str]) -> None:
    for terms_, head_calls in [(FPN, 0), ({"L": {"TYPE": "CWD", "TAP": "cls_logits"}}, 1)]:
        model = build_model(distiller_cfg(teacher, terms_))
        model.prepare()
        held = model.sources["teacher"].hidden.held
        backbone, head, whole = map(count_calls, (held.backbone, held.head, held))
        step(model, 0)
        assert (len(backbone), len(head), len(whole)) == (1, head_calls, 0)


def test_before_its_start_the_teacher_is_not_even_read(teacher: tuple[str, str]) -> None:
    model = build_model(distiller_cfg(teacher, with_schedule(START_ITER=2)))
    step(model, 0)
    step(model, 1)
    assert model.sources["teacher"].hidden.held is None
    step(model, 2)
    assert model.sources["teacher"].hidden.held is not None


def test_a_stopped_schedule_stops_and_frees_the_teacher(teacher: tuple[str, str]) -> None:
    model = build_model(distiller_cfg(teacher, with_schedule(STOP_ITER=2)))
    step(model, 0)
    held = model.sources["teacher"].hidden.held
    alive, calls = weakref.ref(held), count_calls(held.backbone)
    del held
    step(model, 1)
    assert len(calls) == 1
    assert alive() is not None
    step(model, 2)
    gc.collect()
    assert alive() is None
    assert len(calls) == 1
    step(model, 3)
    assert model.sources["teacher"].hidden.held is None


def test_a_source_lives_as_long_as_one_term_needs_it(teacher: tuple[str, str]) -> None:
    both = {**with_schedule(STOP_ITER=2), "LOGITS": {"TYPE": "CWD", "TAP": "cls_logits"}}
    model = build_model(distiller_cfg(teacher, both))
    for iteration in range(4):
        losses = step(model, iteration)
    assert float(losses["loss_kd_fpn"]) == 0
    assert float(losses["loss_kd_logits"]) > 0
    assert model.sources["teacher"].hidden.held is not None


def test_only_what_active_terms_tap_is_recorded_and_hooks_go(cfg: CfgNode) -> None:
    model = build_model(cfg)
    step(model, 0)
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(m._forward_hooks for m in model.sources["teacher"].hidden.held.modules())


def test_a_deepcopy_shares_the_teacher_and_nothing_else(cfg: CfgNode) -> None:
    model = build_model(cfg)
    step(model, 0)
    other = copy.deepcopy(model)
    assert other.sources["teacher"].hidden.held is model.sources["teacher"].hidden.held
    exactly(step(other, 1), step(copy.deepcopy(model), 1))
    ours = {id(p) for p in model.parameters()}
    assert not ours & {id(p) for p in other.parameters()}
    # The copy's wiring is the copy's: its connectors are the ones that train.
    assert other.wiring.terms["fpn"] is other.terms["fpn"]
    sum(step(other, 1).values()).backward()
    assert all(p.grad is not None for p in other.terms.parameters())
    assert all(p.grad is None for p in model.terms.parameters())


# Diagnostics ----------------------------------------------------------------------------------


def test_values_of_levels_reach_the_storage_raw_and_weighted(cfg: CfgNode) -> None:
    cfg.merge_from_list(
        ["KD.TERMS.FPN.LEVEL_WEIGHTS", "[1, 0.5, 0.25, 0, 2]", "KD.LOG_PERIOD", "5"]
    )
    model = build_model(cfg)
    model._restored = True
    for iteration, logged in [(3, False), (4, True), (5, False), (9, True)]:
        with EventStorage(iteration) as storage:
            losses = model(batch(((256, 256),)))
            latest = {k: v[0] for k, v in storage.latest().items() if k.startswith("kd/")}
        assert bool(latest) == logged
        assert not any(k.startswith("kd") for k in losses)
    levels = ["p3", "p4", "p5", "p6", "p7"]
    names = [f"kd/{t}/{p}" for t in ("fpn", "logits") for p in levels]
    assert set(latest) == {*names, *(f"{n}/weighted" for n in names)}
    for level, weight in zip(levels, [1, 0.5, 0.25, 0, 2], strict=True):
        raw = latest[f"kd/fpn/{level}"]
        assert latest[f"kd/fpn/{level}/weighted"] == pytest.approx(5.0 * weight * raw)
        assert raw > 0
    for term in ("fpn", "logits"):
        total = sum(v for k, v in latest.items() if k.startswith(f"kd/{term}/") and "weighted" in k)
        assert float(losses[f"loss_kd_{term}"]) == pytest.approx(total, rel=1e-5)


def test_idle_terms_are_not_logged(teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, with_schedule(START_ITER=5))
    cfg.KD.LOG_PERIOD = 1
    with EventStorage(0) as storage:
        build_model(cfg)(batch())
        assert not any(k.startswith("kd/") for k in storage.latest())


# Does it distil? ------------------------------------------------------------------------------


def test_distillation_moves_the_students_backbone(teacher: tuple[str, str]) -> None:
    """Connectors frozen, task loss off, one batch: only the student can lower the loss."""
    model = build_model(distiller_cfg(teacher, FPN))
    connectors = list(model.terms.parameters())
    assert connectors
    for p in connectors:
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=1e-3, momentum=0.9)
    values = []
    for i in range(20):
        loss = step(model, 0)["loss_kd_fpn"]
        optimizer.zero_grad()
        loss.backward()
        if i == 0:
            found = gradients(model.student)
            backbone = [g for k, g in found.items() if k.startswith("backbone.")]
            assert backbone
            assert all(
                torch.count_nonzero(g) > 0
                for k, g in found.items()
                if "fpn_" in k and "weight" in k
            )
            assert any(
                torch.count_nonzero(g) > 0 for k, g in found.items() if "bottom_up.stem" in k
            )
            assert not any(k.startswith("head.") for k in found)
        optimizer.step()
        values.append(float(loss))
    assert values[-1] < 0.8 * values[0]
    assert all(p.grad is None for p in connectors)


# Other students and teachers -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher_arch", "levels"),
    [
        ("GeneralizedRCNN", "GeneralizedRCNN", 5),
        ("RetinaNet", "GeneralizedRCNN", 3),
        ("GeneralizedRCNN", "RetinaNet", 3),
    ],
)
def test_across_architectures(tmp_path: Path, student: str, teacher_arch: str, levels: int) -> None:
    teacher = save_teacher(tmp_path, arch=teacher_arch, fpn=16)
    model = build_model(distiller_cfg(teacher, FPN, arch=student))
    assert len(model.wiring.rows["fpn"]) == levels
    losses = step(model, 0)
    assert float(losses["loss_kd_fpn"].detach()) > 0
    sum(losses.values()).backward()


def test_the_python_door_is_the_same_model(cfg: CfgNode, teacher: tuple[str, str]) -> None:
    by_config = seeded(cfg)
    torch.manual_seed(7)
    by_hand = kd_det.Distiller(
        student=build_model(student_config(cfg)),
        sources={"teacher": kd_det.Teacher(config_file=teacher[0], weights=teacher[1])},
        terms={
            "fpn": terms.CWD(tap="features", weight=5.0),
            "logits": terms.CWD(tap="cls_logits"),
        },
        max_iter=cfg.SOLVER.MAX_ITER,
    )
    by_hand.load_state_dict(by_config.state_dict())
    exactly(step(by_hand, 0), step(by_config, 0))
    assert by_hand.kd_state_dict()["plan"] == by_config.kd_state_dict()["plan"]


def test_the_log_names_what_is_left_alone(cfg: CfgNode, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kd_det"):
        build_model(cfg).prepare()
    assert any("BatchNorm layers folded" in r.getMessage() for r in caplog.records)
    assert "CWD" in TERMS
