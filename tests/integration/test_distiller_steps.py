"""The promises of the Distiller, on toy detectors: errors, losses, cost, diagnostics."""

import copy
import gc
import logging
import weakref
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import kd_det
from kd_det import terms
from kd_det.config import student_config
from kd_det.registry import TERMS
from tests.steps import FPN, exactly, gradients, seeded, step, with_schedule
from tests.toys import batch, distiller_cfg, save_teacher


@pytest.fixture
def cfg(teacher: tuple[str, str], tmp_path: Path) -> CfgNode:
    cfg = distiller_cfg(teacher)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


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
    logits = {"L": {"TYPE": "CWD", "TAP": "cls_logits"}}
    res3 = {"R": {"TYPE": "CWD", "TAP": "res3"}}
    for terms_, expected in [
        (FPN, (1, 1, 0, 0)),
        (logits, (1, 1, 5, 0)),  # its levels
        (FPN | logits | res3, (1, 1, 5, 0)),  # shared: recorded once
        (res3, (0, 0, 0, 0)),
    ]:
        model = build_model(distiller_cfg(teacher, terms_))
        model.prepare()
        held = model.sources["teacher"].hidden.held
        head, res5 = held.head, held.backbone.bottom_up.res5
        counts = [count_calls(m) for m in (res5, held.backbone, head.cls_score, head.bbox_subnet)]
        whole = count_calls(held)
        step(model, 0)
        assert tuple(map(len, counts)) == expected
        assert not whole


def test_before_its_start_the_teacher_is_read_and_checked_but_not_run(
    teacher: tuple[str, str],
) -> None:
    model = build_model(distiller_cfg(teacher, with_schedule(START_ITER=2)))
    step(model, 0)
    calls = count_calls(model.sources["teacher"].hidden.held.backbone)
    step(model, 1)
    assert not calls
    step(model, 2)
    assert len(calls) == 1


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
    for iteration, logged in [(2, False), (3, True), (4, False), (8, True)]:
        with EventStorage(iteration) as storage:
            losses = model(batch(((256, 256),)))
            assert not any(k.startswith("kd/") for k in storage.latest())
            model.flush()
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
        model = build_model(cfg)
        model(batch())
        model.flush()
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
