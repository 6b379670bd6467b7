"""
The places where published methods will be added, each with one small real user.

Several terms and sources, a region, a network with its own optimizer, ground truth and anchors,
several levels at once, a trainable module on the teacher's side, a self-teacher (tests/parts.py).
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from kd_det.kd_state import KDState
from kd_det.registry import REGIONS, SOURCES, TERMS
from tests.parts import L2, BoxInterior, Critic, Positives, Relation, SelfTeacher, Translator
from tests.toys import batch, distiller_cfg, save_teacher

FPN = {"TYPE": "CWD", "TAP": "features"}
INPUTS = batch(((128, 128), (96, 128)))


@pytest.fixture(autouse=True)
def own_parts() -> Iterator[None]:
    """Registered for one test: what a user's module does by being imported."""
    own = [(REGIONS, BoxInterior), (SOURCES, SelfTeacher)]
    own += [(TERMS, t) for t in (L2, Critic, Positives, Relation, Translator)]
    for registry, cls in own:
        registry.register(cls)
    yield
    for registry, cls in own:
        del registry._obj_map[cls.__name__]


def step(model: nn.Module, iteration: int = 0) -> dict[str, Tensor]:
    with EventStorage(iteration):
        return model(INPUTS)


# Several terms of one type, several sources -----------------------------------------------------


def test_two_terms_of_one_type_and_two_sources(tmp_path, teacher: tuple[str, str]) -> None:
    second = save_teacher(tmp_path, seed=2)
    cfg = distiller_cfg(teacher, {})
    other = {"TYPE": "Teacher", "CONFIG_FILE": second[0], "WEIGHTS": second[1]}
    terms = {
        "NEAR": {**FPN, "SOURCE": "TEACHER", "LEVELS": ["p3"], "TAU": 2.0},
        "FAR": {**FPN, "SOURCE": "SECOND", "LEVELS": ["p4", "p5"]},
        "AGAIN": {**FPN, "SOURCE": "SECOND", "LEVELS": ["p4", "p5"], "WEIGHT": 3.0},
    }
    cfg.merge_from_other_cfg(CfgNode({"KD": {"SOURCES": {"SECOND": other}, "TERMS": terms}}))
    model = build_model(cfg)
    assert model.wiring.source_of == {"near": "teacher", "far": "second", "again": "second"}
    losses = step(model)
    torch.testing.assert_close(losses["loss_kd_again"], 3 * losses["loss_kd_far"])
    assert float(losses["loss_kd_near"]) > 0
    # A connector where the channels differ (8 and 16), none where they agree.
    assert [len(list(model.terms[n].parameters())) for n in ("near", "far")] == [2, 0]
    calls: list[str] = []
    for name, source in model.sources.items():
        source.hidden.held.backbone.register_forward_hook(lambda *_, n=name: calls.append(n))
    step(model)
    assert sorted(calls) == ["second", "teacher"]  # one forward serves two terms


def test_a_source_that_no_term_names_is_not_kept(tmp_path, teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, {"A": {**FPN, "SOURCE": "TEACHER"}})
    missing = {"TYPE": "Teacher", "CONFIG_FILE": "none.yaml", "WEIGHTS": "none.pth"}
    cfg.merge_from_other_cfg(CfgNode({"KD": {"SOURCES": {"UNUSED": missing}}}))
    model = build_model(cfg)
    assert list(model.sources) == ["teacher"]
    step(model)


# A region ---------------------------------------------------------------------------------------


def test_a_region_with_a_field_of_its_own(teacher: tuple[str, str]) -> None:
    region = {"TYPE": "BoxInterior", "MARGIN": 4}
    terms = {
        "IN": {"TYPE": "L2", "TAP": "features", "LEVELS": ["p3"], "REGION": region},
        "ALL": {"TYPE": "L2", "TAP": "features", "LEVELS": ["p3"], "REGION": "Ones"},
    }
    cfg = distiller_cfg(teacher, terms)
    model = build_model(cfg)
    assert model.terms["in"].region.margin == 4.0
    assert model.wiring.rows["in"][0].region == "BoxInterior"
    model.terms["all"].load_state_dict(model.terms["in"].state_dict())
    values = step(model)
    assert 0 < float(values["loss_kd_in"]) != float(values["loss_kd_all"])
    # Without boxes the region is empty: exactly 0, and attached.
    with EventStorage(0):
        losses = model(batch(((128, 128),), boxes=0))
    assert float(losses["loss_kd_in"]) == 0
    losses["loss_kd_in"].backward()
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.terms["in"].parameters())


# An auxiliary network ---------------------------------------------------------------------------


def test_an_auxiliary_network_with_its_own_optimizer(tmp_path, teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, {"GAN": {"TYPE": "Critic", "LR": 0.1}})
    model = build_model(cfg)
    critic = model.terms["gan"]
    before = copy.deepcopy(critic.net.state_dict())
    optimizer = build_optimizer(cfg, model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in critic.net.parameters()}
    assert {id(p) for p in critic.connector.parameters()} <= trained
    for _ in range(2):
        loss = sum(step(model).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not torch.equal(before["weight"], critic.net.weight)
    assert all(torch.count_nonzero(p.grad) for p in critic.connector.parameters())

    assert list(model.state_dict()) == list(model.student.state_dict())
    for level_b in (False, True):
        other = build_model(cfg)
        if level_b:
            torch.save(KDState(model).state_dict(), tmp_path / "kd.pth")
            KDState(other).load_state_dict(torch.load(tmp_path / "kd.pth"))
        else:
            torch.save(model.state_dict(), tmp_path / "model.pth")
            other.load_state_dict(torch.load(tmp_path / "model.pth"))
        restored = other.terms["gan"]
        torch.testing.assert_close(dict(restored.net.state_dict()), dict(critic.net.state_dict()))
        momentum = restored.optimizer.state_dict()["state"]
        assert momentum
        torch.testing.assert_close(momentum, critic.optimizer.state_dict()["state"])
        assert other.check_resume(3) is True
    lost = build_model(cfg)
    lost.load_state_dict(model.student.state_dict())
    with pytest.raises(RuntimeError, match="cannot be restored"):
        step(lost, 3)


# Ground truth and anchors -----------------------------------------------------------------------


def test_a_term_that_sees_ground_truth_and_anchors(teacher: tuple[str, str]) -> None:
    terms = {"POS": {"TYPE": "Positives", "IOU": 0.1}, "NONE": {"TYPE": "Positives", "IOU": 1.0}}
    model = build_model(distiller_cfg(teacher, terms))
    losses = step(model)
    assert float(losses["loss_kd_pos"]) > 0
    assert float(losses["loss_kd_none"]) == 0
    assert losses["loss_kd_none"].requires_grad
    with EventStorage(0):
        losses = model(batch(((128, 128),), boxes=0))
    assert float(losses["loss_kd_pos"]) == 0
    losses["loss_kd_pos"].backward()


# Several levels at once -------------------------------------------------------------------------


def test_a_term_over_all_levels_at_once(teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, {"REL": {"TYPE": "Relation", "WEIGHT": 2}})
    cfg.KD.LOG_PERIOD = 1
    model = build_model(cfg)
    with EventStorage(0) as storage:
        losses = model(INPUTS)
        model.flush()
        logged = {k for k in storage.latest() if k.startswith("kd/")}
    assert logged == {"kd/rel/all", "kd/rel/all/weighted"}
    losses["loss_kd_rel"].backward()
    assert torch.count_nonzero(model.student.backbone.fpn_output3.weight.grad)


# A trainable module on the teacher's side ---------------------------------------------------------


def test_a_trainable_module_on_the_teachers_side(teacher: tuple[str, str]) -> None:
    model = build_model(
        distiller_cfg(teacher, {"T": {"TYPE": "Translator", "LEVELS": ["p3", "p4"]}})
    )
    losses = step(model)
    losses["loss_kd_t"].backward()
    translators = list(model.terms["t"].translators.parameters())
    assert len(translators) == 4
    assert all(torch.count_nonzero(p.grad) for p in translators)
    held = model.sources["teacher"].hidden.held
    assert all(p.grad is None for p in held.parameters())
    assert list(model.state_dict()) == list(model.student.state_dict())
    assert any("translators" in k for k in model.kd_state_dict()["tensors"])


# A self-teacher -----------------------------------------------------------------------------------


def self_cfg(teacher: tuple[str, str], **source: object) -> CfgNode:
    term = {"TYPE": "CWD", "TAP": "features", "SOURCE": "SELF", "SOURCE_TAP": "refined"}
    cfg = distiller_cfg(teacher, {})
    kd = {"SOURCES": {"SELF": {"TYPE": "SelfTeacher", **source}}, "TERMS": {"FPN": term}}
    cfg.merge_from_other_cfg(CfgNode({"KD": kd}))
    return cfg


def test_a_self_teacher_trains_and_is_imitated(tmp_path, teacher: tuple[str, str]) -> None:
    model = build_model(self_cfg(teacher))
    assert list(model.sources) == ["self"]
    losses = step(model)
    assert {"loss_self", "loss_kd_fpn"} <= set(losses)
    own = list(model.sources["self"].parameters())
    losses["loss_kd_fpn"].backward(retain_graph=True)
    assert all(p.grad is None for p in own)  # imitating it does not move it
    losses["loss_self"].backward()
    assert all(p.grad is not None for p in own)
    assert torch.count_nonzero(model.student.backbone.fpn_output3.weight.grad)
    assert list(model.state_dict()) == list(model.student.state_dict())
    other = build_model(self_cfg(teacher))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other.load_state_dict(torch.load(tmp_path / "model.pth"))
    torch.testing.assert_close(
        dict(other.sources["self"].state_dict()), dict(model.sources["self"].state_dict())
    )


def test_a_self_teacher_without_an_active_term_is_touched(teacher: tuple[str, str]) -> None:
    """DDP waits for the gradient of every parameter, of those of an idle source too."""
    cfg = self_cfg(teacher)
    cfg.merge_from_list(["KD.TERMS.FPN.SCHEDULE.START_ITER", "5"])
    model = build_model(cfg)
    losses = step(model)
    assert "loss_self" not in losses
    assert float(losses["loss_kd_fpn"]) == 0
    sum(losses.values()).backward()
    for p in model.parameters():
        assert p.grad is not None
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.sources["self"].parameters())


def test_a_source_may_not_replace_the_students_losses(teacher: tuple[str, str]) -> None:
    model = build_model(self_cfg(teacher, NAME="loss_cls"))
    with pytest.raises(ValueError, match="Source 'self' has losses of its own called loss_cls"):
        step(model)


def test_a_wrong_tap_of_a_source_of_ones_own(teacher: tuple[str, str]) -> None:
    cfg = self_cfg(teacher)
    cfg.merge_from_list(["KD.TERMS.FPN.SOURCE_TAP", "refind"])
    with pytest.raises(KeyError, match="Source 'self': SelfTeacher has no tap refind"):
        build_model(cfg)
