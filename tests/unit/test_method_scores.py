"""PI and LogitBoxKD: the classes of an anchor, what a box counts, in what units it is coded."""

from dataclasses import replace

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.testing import assert_close

from kd_det import losses
from kd_det.boxes import decode
from kd_det.detectors import TapShape, describe, probe
from kd_det.regions import Ones
from kd_det.terms import PI, LogitBoxKD
from tests.lone_terms import maps, run, shapes, toy_context, toy_student, wired
from tests.parity import methods
from tests.toys import toy_cfg, toy_fcos


@pytest.fixture(scope="module")
def student():
    return toy_student()


@pytest.fixture
def context(student):
    return toy_context(student)


# -- PI: the classes of an anchor -----------------------------------------------------------------


def level(names, anchors=1, kind="logits"):
    """A level whose classes are called by letters: "abc" has three."""
    return TapShape("p3", max(anchors, 1) * len(names), 8, "", kind, 1, anchors, tuple(names))


def logits(shape, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, shape.channels, 4, 5, generator=g, dtype=torch.float64)


def pixel_wise(student, target, **options):
    """The value of a term of these two levels, and their maps."""
    s, t = logits(student, 0), logits(target, 1)
    term = PI(region=Ones(), **options)
    term.wire({"cls_logits": [student]}, {"cls_logits": [target]})
    maps = {"cls_logits": {"p3": s}}, {"cls_logits": {"p3": t}}
    return float(term(*maps, toy_context(nn.Identity()), None)["p3"]), s, t


def nested(x, names, keep, anchors):
    """[n][c][i] of the kept classes, anchor by anchor; where ``anchors`` become 1, of the best."""
    rows = []
    for image in x.flatten(2).tolist():
        groups = [image[a : a + len(names)] for a in range(0, len(image), len(names))]
        if anchors == 1:
            groups = [[list(map(max, zip(*k, strict=True))) for k in zip(*groups, strict=True)]]
        rows.append([group[names.index(c)] for group in groups for c in keep])
    return rows


@pytest.mark.parametrize(
    ("student", "target", "keep", "anchors"),
    [
        (level("abc", 9), level("abc", 9), "abc", 9),
        (level("abc", 9), level("cab", 9), "abc", 9),
        (level("abc", 9), level("cxa", 9), "ac", 9),
        (level("abc", 9), level("dcba", 1), "abc", 1),
        (level("abc", 1), level("xcay", 9), "ac", 1),
    ],
)
def test_a_softmax_is_over_the_classes_that_an_anchor_of_both_sides_has(
    student, target, keep, anchors
):
    value, s, t = pixel_wise(student, target, tau=2.0)
    theirs = nested(t, target.names, keep, anchors)
    mine = nested(s, student.names, keep, anchors)
    cells = methods.pixel_cells(mine, theirs, "softmax", 2.0, len(keep), False)
    assert value == pytest.approx(methods.mean_over_images(cells, None), rel=1e-10)


def test_the_number_of_classes_is_for_taps_that_do_not_tell():
    silent = level("abcabc", 0, "feature")  # a module path: two anchors of three, or one of six
    for asked, classes in ((0, 6), (3, 3)):
        value, s, t = pixel_wise(silent, silent, num_classes=asked)
        assert value == pytest.approx(float(losses.pixel_wise_kl(s, t, classes=classes)))
    told = pixel_wise(level("abc", 2), level("abc", 2))[0]
    assert pixel_wise(level("abc", 2), silent)[0] == told  # one side that tells is enough
    assert pixel_wise(silent, level("abc", 2))[0] == told
    assert pixel_wise(level("abc", 2), level("abc", 2), num_classes=3)[0] == told


@pytest.mark.parametrize(
    ("student", "target", "options", "message"),
    [
        ("abc", "abc", {"num_classes": 4}, "p3 .* 3 classes per anchor .* NUM_CLASSES says 4"),
        ("abc", "cxa", {"num_classes": 3}, "2 classes per anchor in common"),
        ("ab", "bx", {}, 'one class per anchor.*MODE: "sigmoid"'),
        ("abcdef", "", {"num_classes": 4}, "6 channels.*4 classes each: set NUM_CLASSES"),
    ],
)
def test_a_softmax_over_other_classes_is_an_error(student, target, options, message):
    sides = level(student, 2), level(target or student, 2)
    if not target:
        sides = [level(student, 0, "feature")] * 2
    with pytest.raises(ValueError, match=message):
        pixel_wise(*sides, **options)
    assert pixel_wise(*sides, mode="sigmoid")[0] > 0


def test_pixel_wise_options_reach_the_loss(context):
    s, t = maps("cls_logits", 0)["p3"], maps("cls_logits", 1)["p3"]
    for options, same in [
        ({"mode": "sigmoid", "tau": 2.0}, {"mode": "sigmoid", "tau": 2.0}),
        ({"cross_entropy": True}, {"classes": 3, "cross_entropy": True}),
        ({"normalizer": "positives"}, {"classes": 3, "normalizer": 20.0}),
    ]:
        value = run(wired(PI(region=Ones(), **options)), context)["p3"]
        assert_close(value, losses.pixel_wise_kl(s, t, **same))


# -- LogitBoxKD ------------------------------------------------------------------------------------


def test_boxes_count_by_the_gap_of_the_scores_or_the_teachers(context):
    s = {tap: maps(tap, 0) for tap in ("cls_logits", "box_deltas")}
    t = {tap: maps(tap, 1) for tap in ("cls_logits", "box_deltas")}
    q, p = (x["cls_logits"]["p3"].sigmoid().unflatten(1, (2, 3)) for x in (s, t))
    ours, theirs = (decode(context, list(x["box_deltas"].values()))[0] for x in (s, t))
    apart = 1 - losses.generalized_iou(ours, theirs, dim=2)  # (N, A, H, W)
    for score, v in (("gap", (q - p).abs()), ("teacher", p)):
        box = (v.amax(2) * apart).sum() / 20
        values = run(wired(LogitBoxKD(region=Ones(), box_score=score, box_weight=4.0)), context)
        scores = losses.weighted_bce(s["cls_logits"]["p3"], t["cls_logits"]["p3"], normalizer=20)
        assert_close(values["p3"], scores + 4 * box)
    mean = run(wired(LogitBoxKD(region=Ones(), normalizer="cells", box_score="teacher")), context)
    scores = losses.weighted_bce(s["cls_logits"]["p3"], t["cls_logits"]["p3"])
    assert_close(mean["p3"], scores + 4 * box * 20 / (2 * 8 * 12))


def test_boxes_pull_at_the_students_deltas_alone(context):
    term = wired(LogitBoxKD(beta=0.0))
    student = {tap: maps(tap, 0) for tap in term.student_taps()}
    target = {tap: maps(tap, 1) for tap in term.source_taps()}
    for x in (*student["box_deltas"].values(), *target["box_deltas"].values()):
        x.requires_grad_()
    sum(run(term, context, student, target).values()).backward()
    assert all(x.grad.any() for x in student["box_deltas"].values())
    assert all(x.grad is None for x in target["box_deltas"].values())
    again = run(term, context, {**student, "box_deltas": target["box_deltas"]}, target)
    same = run(wired(LogitBoxKD(beta=0.0, box_weight=0.0)), context, student, target)
    assert_close(again, same)  # equal boxes add nothing
    assert torch.isfinite(sum(run(term, context, *_times(1e4, student, target)).values()))


def _times(factor, *sides):
    return [
        {tap: {k: factor * x.detach() for k, x in levels.items()} for tap, levels in side.items()}
        for side in sides
    ]


def test_a_level_left_out_is_left_out_of_the_boxes_too(context):
    every, some = run(wired(LogitBoxKD()), context), wired(LogitBoxKD(levels=("p5", "p3")))
    values = run(some, context)
    assert list(values) == ["p5", "p3"]
    for level, value in values.items():
        assert_close(value, every[level])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 4}, r"level p3 of tap 'box_deltas'.* 8 channels.* 4 at .*BOX_WEIGHT: 0"),
        ({"stride": 4}, r"stride 8 .* stride 4; .*same anchors"),
        ({"level": "p33"}, r"no level p3 on both sides.*LEVELS, or set BOX_WEIGHT: 0"),
    ],
)
def test_other_anchors_are_an_error_that_says_what_to_do(change, message):
    first, *others = shapes("box_deltas", 1)
    target = {
        "cls_logits": shapes("cls_logits", 1),
        "box_deltas": [replace(first, **change), *others],
    }
    student = {tap: shapes(tap, 0) for tap in ("cls_logits", "box_deltas")}
    with pytest.raises(ValueError, match=message):
        LogitBoxKD().wire(student, target)
    LogitBoxKD(box_weight=0.0).wire(student, target)


def test_boxes_of_another_coding_are_an_error_though_as_many():
    student, target = (
        probe(model, [describe(model).tap(tap) for tap in ("cls_logits", "box_deltas")])
        for model in (build_model(toy_cfg(sizes=1)), toy_fcos())
    )
    message = r"level p3 of tap 'box_deltas'.* dx, dy, dw, dh .* left, top, right, bottom.*alike"
    with pytest.raises(ValueError, match=message):
        LogitBoxKD().wire(student, target)
    LogitBoxKD(box_weight=0.0).wire(student, target)


def test_boxes_of_other_units_are_the_same_boxes(context):
    student, target = (
        {tap: shapes(tap, side) for tap in ("cls_logits", "box_deltas")} for side in (0, 1)
    )
    units = {"student": (1.0, 1.0, 1.0, 1.0), "target": (10.0, 10.0, 5.0, 5.0)}
    student["box_deltas"] = [replace(x, units=units["student"]) for x in student["box_deltas"]]
    target["box_deltas"] = [replace(x, units=units["target"]) for x in target["box_deltas"]]
    term = LogitBoxKD()
    term.wire(student, target)
    given = {tap: maps(tap, 1) for tap in term.source_taps()}
    factors = torch.tensor(units["target"]).repeat(2)[:, None, None]
    scaled = {**given, "box_deltas": {k: factors * x for k, x in given["box_deltas"].items()}}
    expected = run(wired(LogitBoxKD()), context, None, given)
    assert_close(run(term, context, None, scaled), expected)


def test_a_dense_detector_says_in_which_units_its_deltas_are():
    cfg = toy_cfg()
    cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    assert describe(build_model(cfg)).named_taps()["box_deltas"].units == (10.0, 10.0, 5.0, 5.0)
    assert describe(toy_fcos()).named_taps()["box_deltas"].units == ()


def test_a_detector_that_codes_no_boxes_is_told(context):
    context.student = nn.Identity()
    with pytest.raises(ValueError, match="Identity has no box2box_transform"):
        decode(context, [torch.zeros(1, 4, 2, 2)])
