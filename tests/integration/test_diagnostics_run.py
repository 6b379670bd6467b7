"""Diagnostics of training steps on toy detectors: what they say, and that they disturb nothing."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from kd_det.config import student_config
from kd_det.connectors import Connector
from kd_det.registry import CONNECTORS
from tests.steps import FPN, exactly, gradients, resumed_step, rng_unchanged, seeded
from tests.toys import batch, distiller_cfg
from tests.waits import Ops, counted

MEASURED, NOT_MEASURED = 18, 12
INPUTS = batch(((64, 64), (48, 64)))  # with padding, so that there is a region


@pytest.fixture
def cfg(teacher: tuple[str, str], tmp_path: Path) -> CfgNode:
    cfg = distiller_cfg(teacher)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


def at(model: nn.Module, iteration: int, storage: EventStorage | None = None) -> dict:
    return resumed_step(model, iteration, INPUTS, storage)


def written(model: nn.Module, *iterations: int) -> dict[str, float]:
    storage = EventStorage(0)
    for iteration in iterations:
        at(model, iteration, storage)
    model.flush(wait=True)
    return {k: v for k, (v, _) in storage.latest().items() if k.startswith("kd/")}


# What is written ------------------------------------------------------------------------------


def test_a_measurement_names_every_term_level_and_source(cfg: CfgNode) -> None:
    found = written(build_model(cfg), MEASURED, MEASURED + 1)
    expected = {"kd/time/teacher", "kd/time_share/teacher"}
    for term in ("fpn", "logits"):
        expected.add(f"kd/{term}/grad_ratio")
        for level in ("p3", "p4", "p5", "p6", "p7"):
            for what in ("", "/weighted", "/channel_agreement", "/top_overlap"):
                expected.add(f"kd/{term}/{level}{what}")
    assert set(found) == expected
    assert 0 < found["kd/time_share/teacher"] < 1
    assert 0 < found["kd/fpn/grad_ratio"] < float("inf")
    assert written(build_model(cfg), NOT_MEASURED, NOT_MEASURED + 1) == {}


def test_scalars_are_there_when_detectron2_writes(cfg: CfgNode) -> None:
    """Measured at 18, written into the storage by the forward of 19, after which writers run."""
    model, storage = build_model(cfg), EventStorage(0)
    at(model, 18, storage)
    assert not any(k.startswith("kd/") for k in storage.latest())
    at(model, 19, storage)
    assert storage.latest()["kd/fpn/p3"][1] == 19
    assert storage.latest()["kd/fpn/grad_ratio"][1] == 19


@pytest.mark.parametrize("term", ["fpn", "logits"])
def test_the_ratio_is_that_of_plain_autograd(cfg: CfgNode, term: str) -> None:
    model = seeded(cfg)
    found = written(seeded(cfg), MEASURED)[f"kd/{term}/grad_ratio"]
    features = []
    handle = model.student.backbone.register_forward_hook(
        lambda m, i, out: features.extend(out[f] for f in model.student.head_in_features)
    )
    losses = at(model, MEASURED)
    handle.remove()

    def norm(loss: torch.Tensor) -> float:
        found = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
        return sum(float((g**2).sum()) for g in found if g is not None) ** 0.5

    task = norm(losses["loss_cls"] + losses["loss_box_reg"])
    assert found == pytest.approx(norm(losses[f"loss_kd_{term}"]) / task, rel=1e-4)


def test_the_ratio_grows_with_the_weight(cfg: CfgNode) -> None:
    once = written(seeded(cfg), MEASURED)
    cfg.KD.TERMS.FPN.WEIGHT = 10.0
    twice = written(seeded(cfg), MEASURED)
    assert twice["kd/fpn/grad_ratio"] == pytest.approx(2 * once["kd/fpn/grad_ratio"], rel=1e-4)
    assert twice["kd/logits/grad_ratio"] == pytest.approx(once["kd/logits/grad_ratio"], rel=1e-4)


def test_without_shared_features_the_terms_own_tap_counts(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(cfg)
    model.wiring.terms.pop("logits")
    monkeypatch.setattr(type(model.diagnostics), "begin", lambda *a: {})
    other = written(seeded(cfg), MEASURED)  # nothing is watched beside the terms' taps
    assert other["kd/logits/grad_ratio"] > 0


def of_diagnostics(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("kd_det.diagnostics")]


def test_what_cannot_be_differentiated_costs_the_ratio_not_the_run(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("not compatible with .grad()\nmore")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    found = written(build_model(cfg), MEASURED, MEASURED + 20)
    assert "kd/fpn/grad_ratio" not in found
    assert "kd/fpn/p3/channel_agreement" in found
    (said,) = of_diagnostics(caplog)
    assert said.endswith("(not compatible with .grad()).")


def test_a_twin_agrees_with_its_teacher(teacher: tuple[str, str]) -> None:
    model = build_model(distiller_cfg(teacher, FPN, fpn=16))
    model.load_state_dict(torch.load(teacher[1])["model"])
    for m in model.student.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
    found = written(model, MEASURED)
    for level in ("p3", "p4"):
        assert found[f"kd/fpn/{level}/channel_agreement"] > 0.999
        assert found[f"kd/fpn/{level}/top_overlap"] > 0.9


def test_after_the_first_200_iterations_a_weight_is_suggested(
    cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    cfg.merge_from_list(["KD.DIAGNOSTICS.TARGET_RATIO", "0.5"])
    with caplog.at_level(logging.INFO, logger="kd_det.diagnostics"):
        found = written(seeded(cfg), 158, 178, 198)
        assert len(of_diagnostics(caplog)) == 2  # one line per term
        assert written(seeded(cfg), 298, 398, 498).keys() == found.keys() - {
            "kd/fpn/suggested_weight",
            "kd/logits/suggested_weight",
        }
        assert len(of_diagnostics(caplog)) == 2
    cfg.KD.TERMS.FPN.WEIGHT = found["kd/fpn/suggested_weight"]
    ratios = [written(seeded(cfg), i)["kd/fpn/grad_ratio"] for i in (158, 178, 198)]
    assert sorted(ratios)[1] == pytest.approx(0.5, rel=0.2)  # BatchNorm has moved in between


@pytest.mark.parametrize(
    "setting", [["KD.DIAGNOSTICS.ENABLED", False], ["KD.DIAGNOSTICS.PERIOD", 0]]
)
def test_it_can_be_switched_off(cfg: CfgNode, setting: list) -> None:
    cfg.merge_from_list(setting)
    found = written(build_model(cfg), MEASURED, MEASURED + 1)
    assert set(found) == {k for k in found if k.endswith("/weighted") or k.count("/") == 2}
    assert len(found) == 20


def test_wrong_settings_name_the_key(cfg: CfgNode) -> None:
    with pytest.raises(ValueError, match=r"KD\.DIAGNOSTICS\.PERIODE.*Did you mean 'PERIOD'"):
        cfg.merge_from_list(["KD.DIAGNOSTICS.PERIODE", 3])
    cfg.KD.DIAGNOSTICS.TARGET_RATIO = -1.0
    with pytest.raises(ValueError, match=r"KD\.DIAGNOSTICS: .*target_ratio > 0, but got -1"):
        build_model(cfg)


def test_panels_every_vis_period(cfg: CfgNode) -> None:
    cfg.VIS_PERIOD = 4
    model = build_model(cfg)
    model.student.vis_period = 0  # the student's own pictures
    for iteration, count in [(4, 10), (5, 0)]:
        storage = EventStorage(iteration)
        at(model, iteration, storage)
        images = {name: image for name, image, _ in storage._vis_data}
        assert len(images) == len(storage._vis_data) == count
        assert all(x.shape[0] == 3 and x.dtype == torch.uint8 for x in images.values())
        if count:
            assert "kd/fpn/p3" in images
            assert min(images["kd/fpn/p7"].shape[1:]) > 100  # one cell, and still to be seen
    model(batch())  # without a storage there is nowhere to show them


# What is left alone ---------------------------------------------------------------------------


@CONNECTORS.register()
class Noisy(Connector):
    """Has running statistics and draws random numbers."""

    def __call__(self, in_channels: int, out_channels: int) -> nn.Module:
        conv = nn.Conv2d(in_channels, out_channels, 1)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.Dropout(0.5))


def test_gradients_losses_and_states_are_bit_equal(cfg: CfgNode) -> None:
    cfg.KD.TERMS.FPN.LEVELS = ["p3", "p4"]  # BatchNorm wants more than one cell
    cfg.merge_from_list(["KD.TERMS.FPN.CONNECTOR.TYPE", "Noisy"])
    results = []
    for enabled in (True, False):
        cfg.KD.DIAGNOSTICS.ENABLED = enabled
        cfg.VIS_PERIOD = 2 if enabled else 0
        model = seeded(cfg)
        model.student.vis_period = 0
        losses = at(model, MEASURED)
        sum(losses.values()).backward()
        state = {k: v.clone() for k, v in model.terms.state_dict().items()}
        state |= {k: v.clone() for k, v in model.student.state_dict().items()}
        modes = [m.training for m in model.modules()]
        results.append((losses, gradients(model), state, torch.get_rng_state(), modes))
    exactly(*[[r[0], r[1], r[2], r[3]] for r in results])
    assert results[0][4] == results[1][4]
    assert all(results[0][4])


def test_measuring_draws_no_random_numbers_and_sets_no_gradient(cfg: CfgNode) -> None:
    model = build_model(cfg)
    at(model, 0)
    with rng_unchanged():
        at(model, MEASURED)
    assert gradients(model) == {}


def test_the_host_waits_as_often_as_for_the_plain_student(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.VIS_PERIOD = 9
    cfg.KD.TERMS.LOGITS.CHANNEL_WEIGHT = "teacher_max_prob"
    cfg.KD.TERMS.FPN.STANDARDIZE = True
    plain, model = seeded(student_config(cfg)), seeded(cfg)
    plain.vis_period = model.student.vis_period = 0
    at(model, 0)
    at(plain, 0)
    features: list[torch.Tensor] = []
    plain.head.register_forward_pre_hook(lambda m, args: features.extend(args[0]))
    with counted(monkeypatch) as stock:
        losses = at(plain, MEASURED)
    with counted(monkeypatch) as backward:  # of Detectron2's own losses: masks become indices
        torch.autograd.grad(sum(losses.values()), features)
    with counted(monkeypatch) as sizes:  # sizes of images, which Detectron2 holds in host tensors
        plain.preprocess_image(INPUTS)
    with counted(monkeypatch) as ours:
        at(model, MEASURED)
    assert stock.fetched
    assert sorted(ours.fetched) == sorted(stock.fetched + backward.fetched + sizes.fetched)
    with counted(monkeypatch) as flush:
        model.flush()
    assert set(flush.fetched) == {"tolist"}  # of numbers that have arrived on the host
    with counted(monkeypatch) as ours:
        at(model, NOT_MEASURED)
    assert ours.fetched == stock.fetched + sizes.fetched


def test_between_measurements_it_costs_nothing(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (calls.append(1), grad(*a, **k))[1])
    ops = {}
    for enabled in (True, False):
        cfg.KD.DIAGNOSTICS.ENABLED = enabled
        model = seeded(cfg)
        at(model, 0)
        for iteration in (NOT_MEASURED, MEASURED):
            calls.clear()
            with Ops() as ops[enabled, iteration]:
                at(model, iteration)
            measured = enabled and iteration == MEASURED
            assert len(calls) == (3 if measured else 0)  # two terms and the task
    assert ops[True, NOT_MEASURED].names == ops[False, NOT_MEASURED].names
    assert len(ops[True, MEASURED].names) > len(ops[False, MEASURED].names)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_nothing_waits_for_the_gpu(
    cfg: CfgNode, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.MODEL.DEVICE = "cuda"
    cfg.VIS_PERIOD = 9
    model = build_model(cfg)
    model.student.vis_period = 0
    # Uploading images waits, and a student's losses do, forward and backward: neither is ours.
    inputs = [
        {**x, "image": x["image"].cuda(), "instances": x["instances"].to("cuda")} for x in INPUTS
    ]

    def allowed(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("default")
            result = function(*args, **kwargs)
            torch.cuda.set_sync_debug_mode(before)
            return result

        return call

    model.student.forward = allowed(model.student.forward)
    monkeypatch.setattr(torch.autograd, "grad", allowed(torch.autograd.grad))
    model._restored = True
    storage = EventStorage(0)
    with storage, torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        model(inputs)
        try:
            storage.iter = MEASURED
            torch.cuda.set_sync_debug_mode("error")
            losses = model(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.isfinite(v) for v in losses.values())  # waits, as the trainer does
        storage.iter = MEASURED + 1
        model(inputs)
    latest = storage.latest()
    for key in ("grad_ratio", "p3/channel_agreement", "p3"):
        assert 0 < abs(latest[f"kd/fpn/{key}"][0]) < float("inf")
    assert 0 < latest["kd/time_share/teacher"][0] <= 1
