"""Class logits across class sets and anchors per cell: which channels of two maps mean the same."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kd_det.channels import CommonChannels, common_channels
from kd_det.connectors import Conv, Identity
from kd_det.detectors import TapShape
from kd_det.regions import Ones
from kd_det.terms import CWD
from tests.parts import L2

BOX = ("dx", "dy", "dw", "dh")


def shape(names="", anchors=1, channels=None, kind="logits"):
    """A level whose classes are called by letters: "abc" has three."""
    count = anchors * len(names) if channels is None else channels
    return TapShape("p3", count, 8, "", kind, 1, anchors, tuple(names))


def logits(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, shape.channels, 4, 5, generator=g)


def by_hand(x, names, keep, anchors=1, reduce=None):
    """The channels of the classes in ``keep``, picked one by one, anchor by anchor."""
    rows = [[x[:, a * len(names) + names.index(c)] for c in keep] for a in range(anchors)]
    stacked = torch.stack([torch.stack(row, 1) for row in rows])  # (A, N, K, H, W)
    if reduce is None:
        return torch.cat(list(stacked), dim=1)
    return reduce(stacked)


def value(term_class, student, target, s, t, **kwargs):
    term = term_class(tap="cls_logits", region=Ones(), **kwargs)
    term.wire({"cls_logits": [student]}, {"cls_logits": [target]})
    context = SimpleNamespace(image_sizes=[(32, 40)] * 2)
    return term({"cls_logits": {"p3": s}}, {"cls_logits": {"p3": t}}, context, None)["p3"]


# -- classes by name ------------------------------------------------------------------------------


@pytest.mark.parametrize("term", [CWD, L2])
@pytest.mark.parametrize("anchors", [1, 3])
def test_another_order_of_classes_is_the_reordered_logits(term, anchors):
    student, target = shape("abc", anchors), shape("cab", anchors)
    s, t = logits(student), logits(target, 1)
    same_order = by_hand(t, "cab", "abc", anchors)
    expected = value(term, student, student, s, same_order)
    assert_close(value(term, student, target, s, t), expected, rtol=0, atol=0)
    assert value(term, student, student, s, t) != expected


def test_a_permutation_costs_the_student_nothing():
    common = common_channels(shape("abc"), shape("cab"))
    assert isinstance(common.student, nn.Identity)
    assert common.target.index.tolist() == [1, 2, 0]
    assert (common.channels, common.name) == (3, "by name")
    assert common.note == "3 classes by name, as student-target: a 0-1, b 1-2, c 2-0"


@pytest.mark.parametrize("anchors", [1, 2])
def test_classes_of_one_side_are_left_out(anchors):
    student, target = shape("abxcd", anchors), shape("dycaz", anchors)
    s, t = logits(student).requires_grad_(), logits(target, 1)
    found = value(L2, student, target, s, t)
    mine = by_hand(s, "abxcd", "acd", anchors)
    assert_close(found, ((mine - by_hand(t, "dycaz", "acd", anchors)) ** 2).mean())
    found.backward()
    # No gradient where the target has no such class, and one everywhere else.
    grad = s.grad.abs().amax((0, 2, 3)).view(anchors, 5)
    assert torch.equal(grad[:, [1, 2]], torch.zeros(anchors, 2))
    assert (grad[:, [0, 3, 4]] > 0).all()
    common = common_channels(student, target)
    assert common.channels == 3 * anchors
    assert "left out: b, x" in common.note
    assert "left out: y, z" in common.note


def test_a_smaller_class_set_is_kept_whole_on_its_side():
    assert isinstance(common_channels(shape("ab"), shape("xaby")).student, nn.Identity)
    assert isinstance(common_channels(shape("xaby"), shape("ab")).target, nn.Identity)
    assert common_channels(shape("ab"), shape("xaby")).channels == 2


def test_disjoint_classes_are_an_error_that_names_both():
    words = r"3 channels.*target 7.*no class in common.*are a, b, c, .*t, u, v, w, x, \.\.\. \(2 mo"
    with pytest.raises(ValueError, match=words):
        common_channels(shape("abc"), shape("tuvwxyz"))


@pytest.mark.parametrize(("student", "target"), [("abc", ""), ("", "abc"), ("", "")])
def test_without_names_equal_counts_are_taken_as_they_are_and_said_to_be(student, target):
    common = common_channels(
        shape(student, channels=3, anchors=1), shape(target, channels=3, anchors=1)
    )
    assert isinstance(common.student, nn.Identity)
    assert isinstance(common.target, nn.Identity)
    assert common.note == "not known by name: the 3 classes of both in the same order"


def test_without_names_other_counts_are_an_error_that_says_whose():
    with pytest.raises(ValueError, match=r"those of the target are called is not known.*CLASSES"):
        common_channels(shape("abc"), shape(channels=4))
    with pytest.raises(ValueError, match="those of the student and the target are called"):
        common_channels(shape(channels=2), shape(channels=4))
    # Anchors that are not known cannot be told from classes.
    with pytest.raises(ValueError, match="6 logits"):
        common_channels(shape("abc"), shape(channels=6, anchors=0))
    assert common_channels(shape("abc"), shape(channels=3, anchors=0)).name == "-"


# -- anchors per cell -----------------------------------------------------------------------------


@pytest.mark.parametrize(("mine", "theirs"), [(9, 1), (1, 9), (9, 3)])
@pytest.mark.parametrize("how", ["max", "logsumexp"])
def test_other_anchors_become_one_per_cell(mine, theirs, how):
    student, target = shape("abc", mine), shape("abc", theirs)
    s, t = logits(student), logits(target, 1)
    reduce = {"max": lambda x: x.amax(0), "logsumexp": lambda x: x.exp().sum(0).log()}[how]
    maps = [by_hand(x, "abc", "abc", n, reduce) for x, n in ((s, mine), (t, theirs))]
    expected = ((maps[0] - maps[1]) ** 2).mean()
    assert_close(value(L2, student, target, s, t, anchors=how), expected)
    common = common_channels(student, target, how)
    assert (common.channels, common.name) == (3, how)
    assert common.note == f"{mine} and {theirs} anchors per cell become 1 ({how})"
    # One anchor is one already.
    assert isinstance(common.student, nn.Identity) == (mine == 1)
    assert isinstance(common.target, nn.Identity) == (theirs == 1)


def test_the_gradient_goes_to_the_best_anchor():
    student, target = shape("abc", 9), shape("abc")
    s = logits(student).requires_grad_()
    value(L2, student, target, s, logits(target, 1)).backward()
    best = s.detach().view(2, 9, 3, 4, 5).argmax(1, keepdim=True)
    reached = s.grad.view(2, 9, 3, 4, 5) != 0
    assert torch.equal(reached, torch.zeros_like(reached).scatter_(1, best, True))
    soft = logits(student).requires_grad_()
    value(L2, student, target, soft, logits(target, 1), anchors="logsumexp").backward()
    assert (soft.grad != 0).all()


def test_equal_anchors_are_compared_one_by_one():
    common = common_channels(shape("abc", 9), shape("abc", 9))
    assert isinstance(common.student, nn.Identity)
    assert isinstance(common.target, nn.Identity)
    assert (common.channels, common.name, common.note) == (27, "-", "")
    x = torch.rand(1, 27, 2, 2)
    assert common.student(x) is x


def test_other_anchors_and_other_classes():
    student, target = shape("abc", 3), shape("xcb")
    s, t = logits(student), logits(target, 1)
    mine = by_hand(s, "abc", "bc", 3, lambda x: x.amax(0))
    expected = ((mine - by_hand(t, "xcb", "bc")) ** 2).mean()
    assert_close(value(L2, student, target, s, t), expected)
    assert common_channels(student, target).name == "max, by name"


def test_objectness_needs_no_class_names():
    one = ("objectness",)
    assert common_channels(shape(one, 15), shape(one, 3)).channels == 1
    with pytest.raises(ValueError, match="no class in common: the student's are objectness, the"):
        common_channels(shape(one, 3), shape("abc", 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    module = CommonChannels(3, [1, 0], "max")
    x = torch.randn(1, 6, 2, 2).to(dtype)
    assert module(x).dtype == dtype
    assert CommonChannels(3, [], "logsumexp")(x).dtype == torch.float32


def test_the_module_moves_and_saves_nothing():
    module = CommonChannels(1, [1, 0])
    assert not module.state_dict()
    assert not list(module.parameters())
    assert module.to("meta").index.is_meta


# -- what cannot be compared ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "target", "words"),
    [
        (shape(BOX, 9, kind="deltas"), shape(BOX, 1, kind="deltas"), "same anchors per cell"),
        (
            shape(BOX, 1, kind="deltas"),
            shape(("left", "top", "right", "bottom"), 1, kind="deltas"),
            r"coordinates \(dx, dy, dw, dh\) and .*\(left, top, right, bottom\).*box transform",
        ),
        (shape("abcd"), shape(BOX, 1, kind="deltas"), "TAP and SOURCE_TAP of one kind"),
        (
            replace(shape(BOX, 9, kind="deltas"), units=(1.0, 1.0, 1.0, 1.0)),
            replace(shape(BOX, 9, kind="deltas"), units=(10.0, 10.0, 5.0, 5.0)),
            r"other units: .* weights 1, 1, 1, 1, the target's 10, 10, 5, 5\. .*BBOX_REG_WEIGHTS",
        ),
        (shape("abc"), shape(channels=8, kind="feature"), "8 features, which no connector"),
    ],
)
def test_what_stays_an_error(student, target, words):
    with pytest.raises(ValueError, match=words):
        common_channels(student, target)


def test_equal_boxes_and_a_predictor_by_its_path_are_left_alone():
    for student, target in (
        (shape(BOX, 9, kind="deltas"), shape(BOX, 9, kind="deltas")),
        (shape("abc"), shape(channels=3, kind="feature")),
    ):
        common = common_channels(student, target)
        assert isinstance(common.student, nn.Identity)
        assert isinstance(common.target, nn.Identity)


def test_a_recipe_of_the_users_choice_is_taken_at_its_word():
    student, target = shape("abc"), shape("cab")
    s, t = logits(student), logits(target, 1)
    expected = ((s - t) ** 2).mean()  # Identity: the channels as they are
    assert_close(value(L2, student, target, s, t, connector=Identity()), expected)
    term = L2(tap="cls_logits", connector=Conv())
    (row,) = term.wire({"cls_logits": [student]}, {"cls_logits": [shape("ab")]})
    assert (row.connector, row.compared_channels, row.note) == ("conv1x1", 2, "")
    with pytest.raises(ValueError, match="anchors is one of max, logsumexp, but got 'mean'"):
        CWD(anchors="mean")
