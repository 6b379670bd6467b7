"""Networks that learn beside the student: peers, second heads, and terms that teach them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn

from kd_det import Distiller, terms
from kd_det.context import Context, second_view
from kd_det.detectors import running_values, set_running_values
from kd_det.plan import plan_table
from kd_det.sources import Peer, SecondHead, SourceUnavailable
from tests.selves import DML, HEADS, INPUTS, PEER, PI, self_cfg
from tests.steps import exactly, gradients, seeded, step
from tests.toys import batch, save_teacher, toy_cfg, toy_fcos

FORTH = DML["LOGITS"]
BOTH = {"FORTH": FORTH, "BACK": DML["BACK"]}


def peer_of(model: Any) -> nn.Module:
    return model.sources["peer"].model


def in_python(peer: nn.Module, student: nn.Module, **more: Any) -> Distiller:
    both = {
        "forth": terms.PI(mode="sigmoid", source="peer"),
        "back": terms.PI(mode="sigmoid", source="student", learner="peer"),
    }
    distiller = Distiller(student=student, sources={"peer": Peer(model=peer)}, terms=both, **more)
    return distiller.train()


def test_identical_peers_agree(caplog: pytest.LogCaptureFixture) -> None:
    student = seeded(toy_cfg())
    model = in_python(copy.deepcopy(student), student)
    losses = step(model, 0, INPUTS)
    assert caplog.text.count("'student' and 'peer' start from the same weights") == 1
    assert not losses["loss_kd_forth"].any()
    assert not losses["loss_kd_back"].any()
    assert float(losses["peer/loss_cls"]) == float(losses["loss_cls"]) > 0
    (losses["loss_kd_forth"] + losses["loss_kd_back"]).backward()
    assert all(not g.any() for g in gradients(model).values())


def test_each_term_moves_its_learner_alone() -> None:
    model = seeded(self_cfg(PEER, BOTH)).train()
    losses = step(model, 0, INPUTS)
    for term, moved, still in [
        ("forth", model.student, peer_of(model)),
        ("back", peer_of(model), model.student),
    ]:
        assert float(losses[f"loss_kd_{term}"].detach()) > 0
        model.zero_grad()
        losses[f"loss_kd_{term}"].backward(retain_graph=True)
        assert any(g.any() for g in gradients(moved).values())
        assert not gradients(still)


def test_the_two_divergences_are_those_of_both_directions() -> None:
    """KL(peer || student) for the student, KL(student || peer) for the peer."""
    model = seeded(self_cfg(PEER, {k: {**v, "NORMALIZER": "cells"} for k, v in BOTH.items()}))
    losses = step(model.train(), 0, INPUTS)
    swapped = in_python(copy.deepcopy(model.student), copy.deepcopy(peer_of(model)))
    again = step(swapped, 0, INPUTS)
    for a, b in [("forth", "back"), ("back", "forth")]:
        exactly(losses[f"loss_kd_{a}"], again[f"loss_kd_{b}"])
    assert float(losses["loss_kd_forth"]) != float(losses["loss_kd_back"])


def test_the_student_trains_as_without_a_peer() -> None:
    """Its losses, its gradients, its log and its running values, to the bit."""
    cfg = self_cfg(PEER, {})
    model = seeded(cfg).train()
    plain = copy.deepcopy(model.student)
    with EventStorage(0) as ours:
        losses = model(INPUTS)
    with EventStorage(0) as theirs:
        expected = plain(INPUTS)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    assert {k for k in losses if "/" not in k} == set(expected)
    exactly({k: losses[k] for k in expected}, expected)
    exactly(gradients(model.student), gradients(plain))
    assert {k: v for k, v in ours.latest().items() if not k.startswith("kd/")} == theirs.latest()
    assert running_values(model.student) == running_values(plain) != {}
    assert all(p.grad is not None for p in peer_of(model).parameters() if p.requires_grad)


def test_a_second_network_of_the_same_config_starts_from_other_numbers() -> None:
    model = seeded(self_cfg(PEER, BOTH))
    mine, theirs = (m.backbone.fpn_output3.weight for m in model.networks.values())
    assert mine.shape == theirs.shape
    assert not torch.equal(mine, theirs)
    exactly(dict(seeded(toy_cfg()).state_dict()), dict(model.student.state_dict()))


@pytest.mark.parametrize("other", [{"width": 8, "fpn": 16}, {"norm": "FrozenBN"}])
def test_peers_of_different_architectures(tmp_path: Path, other: dict[str, Any]) -> None:
    config, _ = save_teacher(tmp_path, **other)
    sources = {"PEER": {"TYPE": "Peer", "CONFIG_FILE": config}}
    model = seeded(self_cfg(sources, BOTH)).train()
    losses = step(model, 0, INPUTS)
    sum(losses.values()).backward()
    assert all(float(losses[f"loss_kd_{x}"].detach()) > 0 for x in ("forth", "back"))
    size = {k: sum(p.numel() for p in m.parameters()) for k, m in model.networks.items()}
    assert size["student"] != size["peer"] or other.get("norm")


def test_a_peer_and_its_second_head_learn_in_its_own_channel_order() -> None:
    peer = seeded(toy_cfg(), seed=9)
    peer.input_format = "RGB"
    alone = copy.deepcopy(peer)
    model = Distiller(
        student=seeded(toy_cfg()),
        sources={"peer": Peer(model=peer), "third": SecondHead(of="peer")},
        terms={},
    ).train()
    twin = copy.deepcopy(alone)
    twin.head = copy.deepcopy(model.sources["third"].head)
    losses = step(model, 0, INPUTS)
    set_running_values(twin, running_values(peer))
    for name, network, inputs in [("peer", alone, INPUTS), ("third", twin, second_view(INPUTS))]:
        expected = step(network, 0, [{**x, "image": x["image"].flip(0)} for x in inputs])
        for loss, value in expected.items():
            torch.testing.assert_close(losses[f"{name}/{loss}"], value)


def test_peers_of_different_meta_architectures() -> None:
    model = in_python(toy_fcos(), seeded(toy_cfg()))
    losses = step(model, 0, INPUTS)
    assert {"peer/loss_fcos_cls", "peer/loss_fcos_loc", "peer/loss_fcos_ctr"} <= set(losses)
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())


def test_a_peers_log_is_not_the_students() -> None:
    """Both write a number of foreground anchors under one name."""
    student = seeded(toy_cfg())
    with EventStorage(0) as expected:
        copy.deepcopy(student)(INPUTS)
    with EventStorage(0) as found:
        in_python(toy_fcos(), student)(INPUTS)
    exactly({k: v for k, v in found.latest().items() if k in expected.latest()}, expected.latest())
    assert {k for k in found.latest() if not k.startswith("kd/")} == set(expected.latest())


def test_connectors_lead_from_the_learner(tmp_path: Path) -> None:
    config, _ = save_teacher(tmp_path, fpn=16)
    sources = {"PEER": {"TYPE": "Peer", "CONFIG_FILE": config}}
    back = {"TYPE": "CWD", "TAP": "features", "SOURCE": "STUDENT", "LEARNER": "PEER"}
    model = seeded(self_cfg(sources, {"BACK": back})).train()
    row = model.wiring.rows["back"][0]
    assert (row.student_channels, row.target_channels) == (16, 8)
    losses = step(model, 0, INPUTS)
    losses["loss_kd_back"].backward()
    assert gradients(peer_of(model))
    assert not gradients(model.student)
    assert "peer: features.p3" in plan_table(model, (2, 128, 128))


def test_precise_statistics_of_a_peer() -> None:
    """PreciseBN trains without gradients, and clears the statistics of norms that do not run."""
    model = seeded(self_cfg(HEADS, BOTH)).train()
    alone = copy.deepcopy(peer_of(model))
    data = [batch(((64, 96),), seed=i) for i in range(3)]
    with torch.no_grad():
        losses = model(data[0])
    assert {"loss_cls", "peer/loss_cls"} <= set(losses)
    assert not [k for k in losses if "kd" in k or "second" in k]
    for each in (model, alone):
        with EventStorage(0), torch.no_grad():
            update_bn_stats(each, data, 3)
    found, expected = peer_of(model).state_dict(), alone.state_dict()
    exactly(*({k: v for k, v in x.items() if "running" in k} for x in (found, expected)))


def test_three_peers_teach_each_other() -> None:
    """1 / (P - 1) times the sum over the others."""
    sources = {"ONE": {"TYPE": "Peer"}, "TWO": {"TYPE": "Peer"}}
    names = ("STUDENT", "ONE", "TWO")
    pairs = {
        f"{a}_{b}": {**PI, "LEARNER": a, "SOURCE": b, "WEIGHT": 0.5}
        for a in names
        for b in names
        if a != b
    }
    model = seeded(self_cfg(sources, pairs)).train()
    losses = step(model, 0, INPUTS)
    assert len([k for k in losses if k.startswith("loss_kd_")]) == 6
    sum(x for k, x in losses.items() if k.startswith("loss_kd_")).backward()
    assert all(any(g.any() for g in gradients(m).values()) for m in model.networks.values())


def test_a_peer_starts_from_weights_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, weights = save_teacher(tmp_path)
    sources = {"PEER": {"TYPE": "Peer", "CONFIG_FILE": config, "WEIGHTS": weights}}
    model = seeded(self_cfg(sources, BOTH)).train()
    step(model, 0, INPUTS)
    loaded = torch.load(weights)["model"]
    ours = {k: p.detach() for k, p in peer_of(model).named_parameters()}
    exactly(ours, {k: loaded[k] for k in ours})
    assert "start from the same weights" not in caplog.text
    # A run that goes on has trained it further.
    with torch.no_grad():
        next(peer_of(model).parameters()).add_(1)
    other = seeded(self_cfg(sources, BOTH)).train()
    other.load_kd_state_dict(model.kd_state_dict())
    step(other, 5, INPUTS)
    exactly(next(peer_of(other).parameters()), next(peer_of(model).parameters()))


def test_the_initial_weights_of_the_config_are_the_default(tmp_path: Path) -> None:
    _, weights = save_teacher(tmp_path)
    cfg = self_cfg(PEER, BOTH)
    cfg.MODEL.WEIGHTS = weights
    model = seeded(cfg).train()
    model.prepare()
    loaded = torch.load(weights)["model"]
    exactly(peer_of(model).head.cls_score.weight.detach(), loaded["head.cls_score.weight"])


@pytest.mark.parametrize("field", ["CONFIG_FILE", "WEIGHTS"])
def test_a_missing_file_stops_the_training_alone(field: str) -> None:
    model = seeded(self_cfg({"PEER": {"TYPE": "Peer", field: "nowhere.pth"}}, BOTH)).train()
    with pytest.raises(SourceUnavailable, match=r"nowhere\.pth"):
        step(model, 0, INPUTS)
    model.eval()
    assert "instances" in model(batch(((64, 64),)))[0]


def test_a_peer_needs_no_term_and_outlives_them() -> None:
    """Without terms it is the control: two networks that train side by side."""
    over = {"SCHEDULE": {"TYPE": "Constant", "STOP_ITER": 5}}
    model = seeded(self_cfg(PEER, {"FORTH": {**FORTH, **over}})).train()
    losses = step(model, 0, INPUTS)
    assert float(losses["loss_kd_forth"].detach()) > 0
    losses = step(model, 50, INPUTS)
    assert float(losses["peer/loss_cls"].detach()) > 0
    assert float(losses["loss_kd_forth"]) == 0


@pytest.mark.parametrize(
    ("sources", "terms_", "wrong"),
    [
        (PEER, {"T": {**PI, "SOURCE": "PEER", "LEARNER": "PER"}}, "'per'.*Did you mean 'peer'"),
        (
            {"MEAN": {"TYPE": "EMA"}},
            {"T": {**PI, "SOURCE": "STUDENT", "LEARNER": "MEAN"}},
            "a EMA, which no term can move",
        ),
        ({"STUDENT": {"TYPE": "Peer"}}, {}, "cannot be called 'student'"),
        ({"HEAD": {"TYPE": "SecondHead", "OF": "X"}}, {}, "Source 'head' is made of.*'x'"),
        (
            {**PEER, "A": {"TYPE": "SecondHead"}, "B": {"TYPE": "SecondHead", "OF": "A"}},
            {},
            "Source 'b'.*'a', which is no network",
        ),
        ({"HEAD": {"TYPE": "SecondHead", "VIEW": 3}}, {}, "view 1 or 2, but got 3"),
        (
            {"HEAD": {"TYPE": "SecondHead"}},
            {
                "T": {
                    **PI,
                    "SOURCE": "HEAD",
                    "TAP": "features",
                    "MODE": "sigmoid",
                    "SOURCE_TAP": "x",
                }
            },
            "no tap x",
        ),
    ],
)
def test_what_cannot_work_is_a_sentence(sources: dict, terms_: dict, wrong: str) -> None:
    with pytest.raises((ValueError, KeyError), match=wrong):
        build_model(self_cfg(sources, terms_))


def test_a_learner_has_a_side_of_its_own() -> None:
    """Its network, its normaliser, its maps, and nothing that was made for the student."""
    model = seeded(self_cfg(HEADS, {})).train()
    step(model, 0, INPUTS)
    model.student.loss_normalizer, peer_of(model).loss_normalizer = 10.0, 30.0
    context = Context(INPUTS, "BGR", model.student)
    context.once("key", lambda: "the student's")
    taps = ("cls_logits",)
    for name, normalizer in [("second", 10.0), ("peer", 30.0), ("third", 30.0)]:
        with EventStorage(0):
            found = model.sources[name](context, taps)
        side = found.learner
        assert side is not None
        assert side.once("key", lambda: "its own") == "its own"
        assert side.student is (model.student if name == "second" else peer_of(model))
        assert side.student_maps["cls_logits"]["p3"] is found.maps["cls_logits"]["p3"]
        assert side.positives == pytest.approx(normalizer, rel=0.2)  # moved on by one batch


def test_the_student_is_no_peer_of_its_own() -> None:
    student = seeded(toy_cfg())
    with pytest.raises(ValueError, match="Source 'peer': its network is that of 'student' itself"):
        in_python(student, student)


class Between(terms.PI):
    """A term that moves both sides."""

    moves_target = True

    def compare(self, student: Tensor, target: Tensor, *rest: Any) -> Tensor:
        return (student.sigmoid() - target.sigmoid()).abs().mean()


class Inherits(Between):
    """One that does not say so."""


@pytest.mark.parametrize(("kind", "both"), [(Between, True), (Inherits, False)])
def test_a_term_may_move_both_sides(kind: type, both: bool) -> None:
    student = seeded(toy_cfg())
    model = Distiller(
        student=student,
        sources={"peer": Peer(model=seeded(toy_cfg(), seed=9))},
        terms={"both": kind(source="peer", mode="sigmoid")},
    ).train()
    step(model, 0, INPUTS)["loss_kd_both"].backward()
    assert any(g.any() for g in gradients(model.student).values())
    assert any(g.any() for g in gradients(peer_of(model)).values()) == both


def test_a_second_head_is_a_head_of_the_network_that_sees_the_second_view() -> None:
    model = seeded(self_cfg(HEADS, {})).train()
    losses = step(model, 0, INPUTS)
    for name, network in [("second", model.student), ("third", peer_of(model))]:
        twin = copy.deepcopy(network)
        twin.head = copy.deepcopy(model.sources[name].head)
        # Its loss counts this batch's anchors once more, from where its network's had got.
        set_running_values(twin, running_values(network))
        expected = step(twin, 0, second_view(INPUTS))
        for loss, value in expected.items():
            torch.testing.assert_close(losses[f"{name}/{loss}"], value)
        assert float(losses[f"{name}/loss_cls"]) != float(losses["loss_cls"])


def test_each_head_sees_its_view_only() -> None:
    model = seeded(self_cfg({"SECOND": {"TYPE": "SecondHead"}}, {})).train()
    state = copy.deepcopy(model)
    losses = step(model, 0, INPUTS)
    for key, same in [("view_2", "loss_cls"), ("image", "second/loss_cls")]:
        other = copy.deepcopy(state)
        found = step(other, 0, [{**x, key: 255 - x[key]} for x in INPUTS])
        for name in ("loss_cls", "second/loss_cls"):
            assert bool(found[name] == losses[name]) == (name == same)


def test_a_second_head_trains_its_backbone_and_not_the_first_head() -> None:
    model = seeded(self_cfg(HEADS, {})).train()
    step(model, 0, INPUTS)["third/loss_cls"].backward()
    assert gradients(model.student) == {}
    own = gradients(peer_of(model))
    assert any(k.startswith("backbone.") for k in own)
    assert not any(k.startswith("head.") for k in own)
    assert gradients(model.sources["third"])


def test_a_batch_without_second_views_is_a_sentence() -> None:
    model = seeded(self_cfg({"SECOND": {"TYPE": "SecondHead"}}, {})).train()
    with pytest.raises(ValueError, match=r"no 'view_2': set KD\.VIEWS\.ENABLED"):
        step(model, 0, batch())
    same = seeded(self_cfg({"SECOND": {"TYPE": "SecondHead", "VIEW": 1}}, {})).train()
    assert "second/loss_cls" in step(same, 0, batch())


def test_a_copy_is_a_run_of_its_own() -> None:
    model = seeded(self_cfg(HEADS, BOTH)).train()
    other = copy.deepcopy(model)
    assert set(map(id, other.networks.values())).isdisjoint(map(id, model.networks.values()))
    assert other.networks["peer"] is peer_of(other)
    step(other, 0, INPUTS)["third/loss_cls"].backward()
    assert not gradients(model)
    assert gradients(peer_of(other))
