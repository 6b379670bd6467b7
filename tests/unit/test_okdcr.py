"""OKDCR as a whole: two networks of two heads, consistency, and the ensemble that teaches them."""

import re

import pytest
import torch

from kd_det.context import Context
from tests.selves import self_cfg
from tests.steps import seeded, step
from tests.toys import batch

SOURCES = {
    "PEER": {"TYPE": "Peer"},
    "HEAD": {"TYPE": "SecondHead"},
    "PEER_HEAD": {"TYPE": "SecondHead", "OF": "PEER"},
    "BOTH": {
        "TYPE": "Ensemble",
        "HEADS": ["STUDENT", "PEER"],
        "SECOND_HEADS": ["HEAD", "PEER_HEAD"],
    },
}
LEARNERS = ("STUDENT", "HEAD", "PEER", "PEER_HEAD")
PAIRS = [("STUDENT", "HEAD"), ("PEER", "PEER_HEAD"), ("STUDENT", "PEER"), ("HEAD", "PEER_HEAD")]
TERMS = {f"{a}_AND_{b}": {"TYPE": "Consistency", "LEARNER": a, "SOURCE": b} for a, b in PAIRS} | {
    f"TO_{name}": {
        "TYPE": "PI",
        "SOURCE": "BOTH",
        "LEARNER": name,
        "MODE": "sigmoid",
        "TAU": 3.0,
        "SCHEDULE": {"TYPE": "Ramp"},
    }
    for name in LEARNERS
}
HEADS = {
    "student": "student.head.cls_score.weight",
    "head": "sources.head.head.cls_score.weight",
    "peer": "sources.peer.model.head.cls_score.weight",
    "peer_head": "sources.peer_head.head.cls_score.weight",
}
BACKBONES = {
    "student": "student.backbone.fpn_lateral3.weight",
    "peer": "sources.peer.model.backbone.fpn_lateral3.weight",
}


def two_views():
    inputs = batch(((64, 64), (50, 60)))
    for x in inputs:
        x["view_2"] = 255 - x["image"]
    return inputs


@pytest.fixture(scope="module")
def model():
    model = seeded(self_cfg(SOURCES, TERMS)).train()
    losses = step(model, 0, two_views())  # the ensemble does not teach yet
    assert all(float(losses[f"loss_kd_to_{name}"]) == 0 for name in HEADS)
    return model


def moved(model, loss):
    """Heads and backbones that this loss moves."""
    named = dict(model.named_parameters())
    wanted = [named[k] for k in (*HEADS.values(), *BACKBONES.values())]
    found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    names = [*HEADS, *(f"{k} backbone" for k in BACKBONES)]
    return {k for k, g in zip(names, found, strict=True) if g is not None and g.any()}


def test_who_moves_whom(model):
    losses = step(model, 50, two_views())
    network = {k: k.removesuffix("_head").replace("head", "student") for k in HEADS}
    for a, b in [(a.lower(), b.lower()) for a, b in PAIRS]:
        expected = {a, b, f"{network[a]} backbone", f"{network[b]} backbone"}
        assert moved(model, losses[f"loss_kd_{a}_and_{b}"]) == expected
    for name in HEADS:
        assert moved(model, losses[f"loss_kd_to_{name}"]) == {name, f"{network[name]} backbone"}


def test_its_values_are_those_of_the_four_heads(model):
    seen = {}
    handle = model.sources["both"].register_forward_hook(lambda m, args, out: seen.update(
        context=args[0], found=out
    ))  # fmt: skip
    losses = step(model, 50, two_views())
    handle.remove()
    context: Context = seen["context"]
    z = [context.targets[k]["cls_logits"] for k in ("student", "head", "peer", "peer_head")]
    level = "p3"
    s, s2, p, p2 = (x[level].detach().sigmoid() for x in z)
    weights = [(-(a - b).abs().mean(1, keepdim=True)).exp() for a, b in ((s, s2), (p, p2))]
    means = [(z[i][level] + z[i + 1][level]).detach() / 2 for i in (0, 2)]
    expected = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    torch.testing.assert_close(seen["found"].maps["cls_logits"][level], expected)
    assert 0 < float(losses["loss_kd_to_head"].detach()) < 100


def test_another_tap_of_an_ensemble_is_an_error():
    terms = {"FPN": {"TYPE": "FitNet", "TAP": "features", "SOURCE": "BOTH"}}
    with pytest.raises(KeyError, match=re.escape("Source 'both': An Ensemble has no tap features")):
        seeded(self_cfg(SOURCES, terms))
