"""Students without a trained teacher: resume, mixed precision, plan, export."""

import io
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from kd_det.detectors import running_values, set_running_values
from kd_det.engine.dry_run import measure_step
from kd_det.kd_state import KDState
from kd_det.plan import plan_table
from tests.selves import AT, FPN, FRSKD, INPUTS, SELVES, self_cfg, train
from tests.steps import exactly, seeded, step
from tests.toys import batch, distiller_cfg


@pytest.fixture(params=SELVES)
def cfg(request: pytest.FixtureRequest) -> CfgNode:
    sources, terms = SELVES[request.param]
    ramp = {"SCHEDULE": {"TYPE": "Ramp", "RATE": 20.0}}
    return self_cfg(sources, {k: {**v, **ramp} for k, v in terms.items()})


def saved(model: Any, optimizer: torch.optim.Optimizer) -> io.BytesIO:
    """A file, as a checkpointer writes it."""
    parts = {"model": model, "kd": KDState(model), "optimizer": optimizer}
    file = io.BytesIO()
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, "running": running_values(model)}, file)
    file.seek(0)
    return file


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def test_a_resumed_run_equals_the_uninterrupted_one(cfg: CfgNode) -> None:
    model = seeded(cfg).train()
    optimizer = sgd(model)
    train(model, optimizer, range(3))
    file = saved(model, optimizer)
    whole = train(model, optimizer, range(3, 6))

    other = seeded(cfg, seed=99).train()
    optimizer = sgd(other)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state["model"])
    KDState(other).load_state_dict(state["kd"])
    optimizer.load_state_dict(state["optimizer"])
    set_running_values(other, state["running"])
    assert train(other, optimizer, range(3, 6)) == whole
    assert all(row["loss_kd_fpn"] > 0 for row in whole)
    exactly(dict(other.state_dict()), dict(model.state_dict()))
    exactly(other.kd_state_dict()["tensors"], model.kd_state_dict()["tensors"])


def test_a_run_that_lost_its_own_teacher_is_not_continued(cfg: CfgNode) -> None:
    with pytest.raises(RuntimeError, match="what trains beside the student"):
        step(seeded(cfg).train(), 5)


def test_under_autocast_losses_are_finite_float32_and_near(cfg: CfgNode) -> None:
    cfg.MODEL.RESNETS.NORM = "FrozenBN"  # random BatchNorms in a row amplify any rounding
    cfg.MODEL.PIXEL_STD = [58.0, 58.0, 58.0]
    exact, model = seeded(cfg).train(), seeded(cfg).train()
    for each in (exact, model):  # or iteration 50 would be refused
        each.load_kd_state_dict(each.kd_state_dict())
    expected = step(exact, 50, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(model, 50, INPUTS)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 or "kd" not in name
        assert torch.isfinite(loss)
        # On toys a P7 has a cell per image, whose BatchNorm makes +-1 of any difference.
        torch.testing.assert_close(loss.float(), expected[name], rtol=0.2, atol=1e-3)
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in found)


def test_the_plan_and_a_measured_step(cfg: CfgNode) -> None:
    model = seeded(cfg).train()
    model.on_start = None
    model.prepare()
    name = model.wiring.source_of["fpn"]
    lines = plan_table(model, (2, 128, 128)).splitlines()
    target = "refined.p4" if name == "self" else "features.p4"
    assert any(line.split()[:4] == [name, "fpn", "features.p4", target] for line in lines)
    beside = [line.split()[0] for line in lines if "trains beside the student" in line]
    assert beside == [k for k, source in model.sources.items() if source.is_learner]
    losses, peak = measure_step(model, INPUTS)
    assert {"loss_kd_fpn", "loss_kd_logits"} <= set(losses)
    assert peak > 0


def test_what_is_left_is_the_plain_student(cfg: CfgNode) -> None:
    model = seeded(cfg).train()
    train(model, sgd(model), range(2))
    cfg.KD.ENABLED = False
    plain = build_model(cfg).eval()
    assert not plain.load_state_dict(model.state_dict()).missing_keys
    model.eval()
    inputs = batch(((64, 64),))
    with torch.no_grad():
        ours, theirs = model(inputs), plain(inputs)
    for a, b in zip(ours, theirs, strict=True):
        exactly(a["instances"].scores, b["instances"].scores)
        exactly(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)


def test_a_self_teacher_beside_a_frozen_one(teacher: tuple[str, str]) -> None:
    terms = {
        "FPN": {**AT, "SOURCE": "SELF"},
        "CWD": {**FPN, "SOURCE": "TEACHER"},
        "MEAN": {**FPN, "SOURCE": "MEAN"},
    }
    cfg = distiller_cfg(teacher, {})
    both = {**FRSKD, "MEAN": {"TYPE": "EMA"}}
    cfg.merge_from_other_cfg(CfgNode({"KD": {"SOURCES": both, "TERMS": terms}}))
    losses = step(build_model(cfg).train(), 0, INPUTS)
    assert all(float(losses[f"loss_kd_{name.lower()}"].detach()) > 0 for name in terms)
    assert "loss_cls_self" in losses
