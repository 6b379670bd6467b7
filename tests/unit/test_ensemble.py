"""The source Ensemble: whom it reads, what it gives, what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kd_det import losses
from kd_det.context import Context
from kd_det.sources import Ensemble
from kd_det.terms import PI
from tests.lone_terms import STRIDES, maps, run, shapes, toy_context, toy_student, wired

TAPS = ("cls_logits",)
LEVELS = shapes("cls_logits", 0)
FOUR = {"heads": ("student", "peer"), "second_heads": ("second", "other")}


def wire(source, **changed):
    looks = {name: {"cls_logits": changed.get(name, LEVELS)} for name in source.members}
    source.wire_members(looks)
    return source


def said(*members, canvas=(64, 96)):
    """What these members say, each something else, with gradients."""
    found = {}
    for i, name in enumerate(members):
        logits = maps("cls_logits", 0, canvas=canvas)
        found[name] = {"cls_logits": {k: x.roll(i, 1).requires_grad_() for k, x in logits.items()}}
    return found


def given(source, targets, taps=TAPS):
    return source(Context([], "BGR", torch.nn.Identity(), targets=targets), taps)


@pytest.mark.parametrize("mode", losses.MODES)
def test_a_level_is_the_ensemble_of_its_members(mode):
    source = wire(Ensemble(**FOUR, mode=mode))
    assert source.reads(TAPS) == dict.fromkeys(("student", "peer", "second", "other"), TAPS)
    assert source.shapes(TAPS) == {"cls_logits": LEVELS}
    targets = said(*source.members)
    found = given(source, targets)
    assert not found.losses
    assert list(found.maps["cls_logits"]) == list(STRIDES)
    for level, logits in found.maps["cls_logits"].items():
        s, p, s2, p2 = (targets[name]["cls_logits"][level] for name in source.members)
        assert_close(logits, losses.ensemble_logits([(s, s2), (p, p2)], mode=mode, classes=3))
        assert not torch.allclose(logits, (s + p + s2 + p2) / 4)


def test_without_second_heads_it_is_the_mean():
    for seconds in ((), ("", "")):
        source = wire(Ensemble(heads=("student", "peer"), second_heads=seconds))
        assert source.members == ("student", "peer")
        targets = said("student", "peer")
        for level, logits in given(source, targets).maps["cls_logits"].items():
            s, p = (targets[name]["cls_logits"][level] for name in source.members)
            assert_close(logits, ((s + p) / 2).detach())


def test_a_network_may_have_one_head():
    source = wire(Ensemble(heads=("student", "peer"), second_heads=("", "second")))
    assert source.members == ("student", "peer", "second")
    targets = said(*source.members)
    s, p, second = (targets[name]["cls_logits"]["p3"] for name in source.members)
    found = given(source, targets).maps["cls_logits"]["p3"]
    assert_close(found, losses.ensemble_logits([(s, None), (p, second)], classes=3))


def test_what_imitates_it_moves_the_head_alone():
    context = toy_context(toy_student())
    source = wire(Ensemble(**FOUR))
    targets = said(*source.members)
    term = wired(PI(mode="sigmoid", tau=3.0))
    sum(run(term, context, targets["peer"], given(source, targets).maps).values()).backward()
    for name, of in targets.items():
        assert (of["cls_logits"]["p3"].grad is not None) == (name == "peer")


def test_members_that_pad_differently_share_a_grid():
    source = wire(Ensemble(heads=("student", "peer")))
    targets = {**said("student"), **said("x", "peer", canvas=(64, 128))}
    found = given(source, targets).maps["cls_logits"]["p3"]
    s, p = (targets[name]["cls_logits"]["p3"] for name in source.members)
    assert_close(found, ((s + p[..., :12]) / 2).detach())


def test_half_precision_is_computed_in_float32():
    source = wire(Ensemble(**FOUR))
    targets = said(*source.members)
    half = {
        name: {"cls_logits": {k: x.half() for k, x in of["cls_logits"].items()}}
        for name, of in targets.items()
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = given(source, half).maps["cls_logits"]["p3"]
    assert found.dtype == torch.float32
    assert_close(found, given(source, targets).maps["cls_logits"]["p3"], rtol=1e-2, atol=2e-3)


def test_names_come_from_whoever_knows_them():
    named = [replace(s, names=("a", "b", "c")) for s in LEVELS]
    source = wire(Ensemble(heads=("student", "peer")), peer=named)
    assert source.shapes(TAPS) == {"cls_logits": named}


def test_asked_for_nothing_it_reads_nothing():
    source = wire(Ensemble(**FOUR))
    assert source.reads(()) == source.shapes(()) == given(source, {}, ()).maps == {}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (LEVELS[:-1], r"same levels.*'student' are p3 \(stride 8, 2 anchor.*'peer' p3"),
        ([replace(s, stride=2 * s.stride) for s in LEVELS], r"'peer' p3 \(stride 16"),
        ([replace(s, anchors=1) for s in LEVELS], r"'peer' p3 \(stride 8, 1 anchor\(s\) x 6 cl"),
        ([replace(s, channels=8) for s in LEVELS], "2 anchor.* x 3 classes.*'peer'.* x 4 classes"),
        ([replace(s, anchors=0) for s in LEVELS], r"'peer' p3 \(stride 8, 6 channels\)"),
    ],
)
def test_members_that_look_otherwise_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        wire(Ensemble(heads=("student", "peer")), peer=changed)


def test_members_with_other_classes_are_refused():
    ours, theirs = ([replace(s, names=tuple(names)) for s in LEVELS] for names in ("abc", "acb"))
    source = Ensemble(heads=("student", "peer", "other"))
    with pytest.raises(ValueError, match="'peer' are a, b, c, and those of 'other' a, c, b"):
        wire(source, peer=ours, other=theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "two members or more.*HEADS are 'student' and SECOND_HEADS none"),
        ({"heads": ("peer", "peer")}, "each named once"),
        ({**FOUR, "second_heads": ("student", "other")}, "each named once"),
        ({"heads": ("student", "peer", "")}, "each named once"),
        ({**FOUR, "second_heads": ("second",)}, "second head for each.*SECOND_HEADS 'second'"),
        ({**FOUR, "mode": "l1"}, "mode is one of softmax, sigmoid, but got 'l1'"),
    ],
)
def test_errors_of_its_fields(options, message):
    with pytest.raises(ValueError, match=message):
        Ensemble(**options)


def test_another_tap_is_an_error():
    source = wire(Ensemble(**FOUR))
    asked = ("cls_logits", "features")
    assert source.reads(asked) == source.reads(TAPS)
    with pytest.raises(KeyError, match="Ensemble has no tap features: only cls_logits"):
        source.shapes(asked)
