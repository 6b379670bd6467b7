"""The EMA source: what its average is, when it moves, and how it is run."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kd_det.context import Context
from kd_det.detectors import describe
from kd_det.sources import EMA
from kd_det.sources.ema import average
from tests.selves import EMA as MEAN
from tests.selves import FPN, INPUTS, PI, self_cfg
from tests.steps import exactly, seeded, step

TAPS = ("features", "cls_logits")
AVERAGED = ("head.cls_score.weight", "backbone.bottom_up.stem.conv1.norm.running_mean")


def moved(model: nn.Module) -> None:
    """The student's weights as no optimizer would leave them."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)


def of(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.sources["mean"].hidden.held.state_dict().items()}


def test_the_average_is_the_recursion_of_the_weights_that_each_step_ran_with() -> None:
    model = seeded(self_cfg({"MEAN": {"TYPE": "EMA", "MOMENTUM": 0.25}}, {"FPN": FPN})).train()
    model.prepare()
    moved(model.student)  # what is loaded after prepare() is what the average begins with
    expected: dict[str, torch.Tensor] = {}
    for i in range(5):
        step(model, i, INPUTS)
        ran = {k: v.double() for k, v in model.student.state_dict().items()}
        m = [0, 2 / 11, 3 / 12, 0.25, 0.25][i]  # min(0.25, (1 + i) / (10 + i)), and first a copy
        expected = {k: m * expected[k] + (1 - m) * ran[k] if i else ran[k] for k in AVERAGED}
        for k, v in expected.items():
            torch.testing.assert_close(of(model)[k].double(), v, rtol=1e-5, atol=1e-7)
        moved(model.student)
    # BatchNorm counts its batches in an integer: a copy.
    assert of(model)["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"] == 5


def test_the_first_move_is_a_copy_to_the_bit() -> None:
    model = seeded(self_cfg(MEAN, {"FPN": FPN})).train()
    step(model, 0, INPUTS)
    exactly(of(model), dict(model.student.state_dict()))


@pytest.mark.parametrize(("momentum", "move", "expected"), [
    (0.999, 0, 0.0), (0.999, 1, 2 / 11), (0.999, 90, 0.91), (0.999, 9000, 0.999), (0.5, 90, 0.5),
    (0.0, 5, 0.0),
])  # fmt: skip
def test_the_momentum_warms_up(momentum: float, move: int, expected: float) -> None:
    assert EMA(momentum=momentum).momentum_of(move) == pytest.approx(expected)


def test_it_moves_every_so_many_steps_and_while_its_terms_are_idle() -> None:
    late = {**FPN, "SCHEDULE": {"TYPE": "Constant", "START_ITER": 50}}
    model = seeded(self_cfg({"MEAN": {"TYPE": "EMA", "STEPS": 2}}, {"FPN": late})).train()
    model.prepare()
    runs: list[int] = []
    held = model.sources["mean"].hidden.held
    held.backbone.register_forward_hook(lambda *_: runs.append(1))
    changed = []
    for i in range(4):
        before = of(model)["head.cls_score.weight"]
        moved(model.student)
        losses = step(model, i, INPUTS)
        changed.append(not torch.equal(before, of(model)["head.cls_score.weight"]))
        assert float(losses["loss_kd_fpn"]) == 0
    assert changed == [True, False, True, False]
    assert not runs  # it followed, and was not run
    step(model, 50, INPUTS)
    assert runs == [1]


def test_its_maps_are_those_of_a_plain_detector_in_eval_mode() -> None:
    model = seeded(self_cfg(MEAN, {"LOGITS": PI, "FPN": FPN})).train()
    for i in range(2):
        step(model, i, INPUTS)
        moved(model.student)
    source = model.sources["mean"]
    context = Context(INPUTS, "BGR", model.student)
    found = source(context, TAPS).maps
    plain = copy.deepcopy(model.student)
    plain.load_state_dict(of(model))
    plain.eval()
    with torch.no_grad():
        features = plain.backbone(plain.preprocess_image(INPUTS).tensor)
        levels = [features[f] for f in plain.head_in_features]
        logits, _ = plain.head(levels)
    exactly(list(found["features"].values()), levels)
    exactly(list(found["cls_logits"].values()), logits)
    held = source.hidden.held
    assert not any(m.training for m in model.train().sources["mean"].hidden.held.modules())
    assert not any(p.requires_grad for p in held.parameters())


def test_it_runs_no_deeper_than_its_taps() -> None:
    model = seeded(self_cfg(MEAN, {"FPN": FPN})).train()
    model.prepare()
    held = model.sources["mean"].hidden.held

    def never(*_: Any) -> None:
        raise AssertionError("the head was run")

    held.head.register_forward_hook(never)
    assert float(step(model, 0, INPUTS)["loss_kd_fpn"].detach()) > 0


def test_it_is_seen_by_no_optimizer_and_in_no_checkpoint_but_the_kd_state() -> None:
    model = seeded(self_cfg(MEAN, {"FPN": FPN}))
    model.prepare()
    student = dict(model.student.named_parameters())
    assert len(list(model.parameters())) == len(student)
    assert list(model.state_dict()) == list(model.student.state_dict())
    assert list(model.kd_state_dict()["tensors"]) == ["sources.mean._extra_state"]
    model.double()
    assert next(model.sources["mean"].hidden.held.parameters()).dtype == torch.float64
    other = copy.deepcopy(model)
    assert other.sources["mean"]._student.module is other.student
    moved(other.sources["mean"].hidden.held)
    assert not torch.equal(of(other)["head.cls_score.weight"], of(model)["head.cls_score.weight"])


def test_a_two_stage_student_is_its_own_teacher_on_its_own_boxes() -> None:
    box_head = {"TYPE": "BoxHead"}
    model = seeded(self_cfg(MEAN, {"BOX": box_head}, arch="GeneralizedRCNN")).train()
    step(model, 0, INPUTS)
    moved(model.student)
    losses = step(model, 1, INPUTS)
    assert 0 < sum(float(v.detach()) for k, v in losses.items() if "kd" in k) < float("inf")
    assert describe(model.student).roi_head() is not None


def test_tied_weights_move_once() -> None:
    student = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    student[1].weight = student[0].weight
    model = copy.deepcopy(student)
    with torch.no_grad():
        student[0].weight.add_(1)
    expected = (model[0].weight + student[0].weight) / 2
    average(model, student, 0.5)
    torch.testing.assert_close(model[1].weight, expected)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: EMA(momentum=1.0), r"momentum in \[0, 1\), but got 1.0"),
    (lambda: EMA(momentum=float("nan")), "but got nan"),
    (lambda: EMA(steps=0), "steps >= 1, but got 0"),
])  # fmt: skip
def test_errors(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
