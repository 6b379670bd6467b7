"""BoxHead and RPN on plain tensors, against transcriptions of their formulas box by box."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from kd_det.detectors import TapShape
from kd_det.terms import CWD, RPN, BoxHead
from kd_det.terms.levelwise import LevelwiseTerm

STAGES = ("stage0", "stage1", "stage2")
PLAIN, CASCADE = (10.0, 10.0, 5.0, 5.0), (30.0, 30.0, 15.0, 15.0)


def random(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=g, dtype=torch.float64)


# -- the box head ---------------------------------------------------------------------------------


def shapes(classes=3, stages=1, agnostic=False, units=PLAIN, activation="softmax", called=""):
    """``called``: a letter per class, its name."""
    names = STAGES[:stages]
    classes = len(called) or classes
    columns = 4 if agnostic else 4 * classes
    return {
        "roi_scores": [
            TapShape(
                n,
                classes + 1,
                0,
                kind="roi_scores",
                activation=activation,
                names=tuple(called),
            )
            for n in names
        ],
        "roi_deltas": [TapShape(n, columns, 0, kind="roi_deltas", units=units) for n in names],
    }


def said(found, rows=6, seed=0):
    """Random rows for every tap of `shapes`."""
    return {
        tap: {s.level: random(rows, s.channels, seed=seed + i) for i, s in enumerate(of)}
        for tap, of in found.items()
    }


def values(term, ours, theirs, student, target):
    term.wire(ours, theirs)
    return term(student, target, None, None)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("agnostic", [(False, False), (True, True), (True, False), (False, True)])
def test_box_head_in_closed_form(activation, tau, agnostic):
    ours = shapes(agnostic=agnostic[0], activation=activation)
    theirs = shapes(agnostic=agnostic[1], activation=activation, units=CASCADE)
    student, target = said(ours), said(theirs, seed=9)
    found = values(BoxHead(tau=tau), ours, theirs, student, target)
    s, t = (x["roi_scores"]["stage0"] for x in (student, target))
    ds, dt = (x["roi_deltas"]["stage0"] for x in (student, target))
    scores = deltas = 0.0
    for r in range(6):
        if activation == "softmax":
            p, q = (x[r].div(tau).softmax(0).tolist() for x in (t, s))
            scores += tau**2 * kl(p, q)
            weight = t[r].softmax(0).tolist()[:3]
        else:
            p, q = (x[r, :3].div(tau).sigmoid().tolist() for x in (t, s))
            scores += tau**2 * sum(kl((a, 1 - a), (b, 1 - b)) for a, b in zip(p, q, strict=True))
            weight = t[r, :3].sigmoid().tolist()
        for k in range(3):
            mine = ds[r] if agnostic[0] else ds[r, 4 * k : 4 * k + 4]
            other = dt[r] if agnostic[1] else dt[r, 4 * k : 4 * k + 4]
            deltas += weight[k] * sum(
                abs(float(a) - float(b) / 3) for a, b in zip(mine, other, strict=True)
            )
    assert list(found) == ["scores.stage0", "deltas.stage0"]
    assert_close(float(found["scores.stage0"]), scores / 6, rtol=1e-9, atol=0)
    assert_close(float(found["deltas.stage0"]), deltas / 6, rtol=1e-9, atol=0)


def test_the_teachers_foreground_and_not_the_students_weighs_the_deltas():
    ours = shapes()
    student, target = said(ours), said(ours, seed=9)
    target["roi_scores"]["stage0"][:, :3] = -1000.0  # all background
    found = values(BoxHead(), ours, ours, student, target)
    assert float(found["deltas.stage0"]) == 0
    assert float(found["scores.stage0"]) > 0


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_equal_sides_are_zero_and_so_are_no_proposals(rows):
    ours = shapes(stages=3, agnostic=True)
    student = said(ours, rows)
    target = {tap: {n: x.clone() for n, x in of.items()} for tap, of in student.items()}
    leaves = [x.requires_grad_() for of in student.values() for x in of.values()]
    found = values(BoxHead(), ours, ours, student, target)
    assert list(found) == [f"{part}.{n}" for part in ("scores", "deltas") for n in STAGES]
    assert all(float(x) == 0 for x in found.values())
    sum(found.values()).backward()
    assert all(x.grad is not None for x in leaves)
    assert all(float(x.grad.abs().sum()) < 1e-12 for x in leaves)


def test_more_proposals_are_a_mean_and_stages_a_sum():
    ours = shapes(stages=2)
    student, target = said(ours), said(ours, seed=9)
    once = values(BoxHead(), ours, ours, student, target)
    twice = [
        {tap: {n: torch.cat([x, x]) for n, x in of.items()} for tap, of in side.items()}
        for side in (student, target)
    ]
    assert_close(values(BoxHead(), ours, ours, *twice), once)
    assert len({float(x) for x in once.values()}) == 4


@pytest.mark.parametrize(("mine", "other"), [(1, 3), (3, 1), (2, 3)])
def test_stages_are_paired_from_the_first_on(mine, other):
    ours, theirs = (shapes(stages=n, agnostic=True) for n in (mine, other))
    student, target = said(ours), said(theirs, seed=9)
    term = BoxHead()
    rows = term.wire(ours, theirs)
    common = STAGES[: min(mine, other)]
    assert [(r.tap, r.level, r.target) for r in rows[: len(common)]] == [
        ("roi_scores", n, f"roi_scores.{n}") for n in common
    ]
    found = term(student, target, None, None)
    assert list(found) == [f"{part}.{n}" for part in ("scores", "deltas") for n in common]
    alone = BoxHead()
    first = {tap: of[:1] for tap, of in ours.items()}
    for name, value in values(alone, first, first, student, target).items():
        assert_close(found[name], value)


def test_deltas_can_be_left_out_or_weighed():
    ours = shapes()
    student, target = said(ours), said(ours, seed=9)
    term = BoxHead(delta_weight=0)
    assert term.student_taps() == term.source_taps() == ("roi_scores",)
    assert list(values(term, ours, ours, student, target)) == ["scores.stage0"]
    term = BoxHead(delta_weight=0.25)
    assert [term.level_weight(x) for x in ("scores.stage0", "deltas.stage0")] == [1, 0.25]


def test_a_smooth_start_is_asked_for():
    ours = shapes(agnostic=True)
    student, target = said(ours), said(ours, seed=9)
    hard = values(BoxHead(), ours, ours, student, target)["deltas.stage0"]
    soft = values(BoxHead(beta=1.0), ours, ours, student, target)["deltas.stage0"]
    assert 0 < float(soft) < float(hard)


def test_other_classes_without_names_are_an_error():
    message = r"stage0, beside the background: the student has 3 channels and the target 5.*called"
    with pytest.raises(ValueError, match=message):
        BoxHead().wire(shapes(classes=3), shapes(classes=5))
    with pytest.raises(ValueError, match=r"no class in common: the student's are a, b.* x, y"):
        BoxHead().wire(shapes(called="ab"), shapes(called="xy"))


def test_equal_classes_are_taken_as_they_are():
    for called in ("", "abc"):
        term = BoxHead()
        rows = term.wire(shapes(called=called), shapes(called=called))
        assert term.classes is None
        assert bool(rows[0].note) is not bool(called)  # taken at its word where unnamed


def test_other_classes_are_matched_by_name():
    ours, theirs = shapes(called="aob"), shapes(called="xbyza")
    student, target = said(ours), said(theirs, seed=9)
    found = values(BoxHead(), ours, theirs, student, target)
    two = shapes(classes=2)
    picked = [
        {
            "roi_scores": {"stage0": x["roi_scores"]["stage0"][:, [*of, -1]]},
            "roi_deltas": {
                "stage0": torch.cat(
                    [x["roi_deltas"]["stage0"][:, 4 * k : 4 * k + 4] for k in of], dim=1
                )
            },
        }
        for x, of in ((student, (0, 2)), (target, (4, 1)))
    ]
    assert_close(found, values(BoxHead(), two, two, *picked))


def test_softmax_and_sigmoid_do_not_meet():
    with pytest.raises(ValueError, match=r"student's scores go through a softmax.* a sigmoid"):
        BoxHead().wire(shapes(), shapes(activation="sigmoid"))


@pytest.mark.parametrize("cls", [BoxHead, RPN])
@pytest.mark.parametrize(
    "value", [{"tau": 0.0}, {"tau": math.inf}, {"delta_weight": -1.0}, {"beta": -0.1}]
)
def test_values_out_of_range_are_named(cls, value):
    ((name, number),) = value.items()
    with pytest.raises(ValueError, match=rf"{cls.__name__} needs .*{name}.*{number}"):
        cls(**value)


class Blind(LevelwiseTerm):
    pass


@pytest.mark.parametrize("side", ["student", "source"])
@pytest.mark.parametrize("cls", [CWD, Blind])
def test_terms_that_compare_maps_refuse_rows(cls, side):
    maps = {"features": [TapShape("p3", 8, 8)]}
    taps = {"student": ("roi_scores", "features"), "source": ("features", "roi_scores")}[side]
    term = cls(tap=taps[0], source_tap=taps[1])
    with pytest.raises(ValueError, match=r"'roi_scores' gives a row per region.*TYPE: BoxHead"):
        term.wire(shapes() | maps, shapes() | maps)


# -- the RPN --------------------------------------------------------------------------------------

GRIDS = {"p2": (4, 6), "p3": (2, 3)}


def rpn_shapes(anchors=3, units=(1.0, 1.0, 1.0, 1.0), strides=(4, 8)):
    levels = list(zip(GRIDS, strides, strict=True))
    return {
        "rpn_logits": [TapShape(n, anchors, s, kind="logits") for n, s in levels],
        "rpn_deltas": [TapShape(n, 4 * anchors, s, kind="deltas", units=units) for n, s in levels],
    }


def rpn_said(found, seed=0):
    return {
        tap: {s.level: random(2, s.channels, *GRIDS[s.level], seed=seed + s.stride) for s in of}
        for tap, of in found.items()
    }


def images(*sizes):
    return SimpleNamespace(image_sizes=list(sizes))


WHOLE = images((16, 24), (16, 24))


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("sizes", [((16, 24), (16, 24)), ((16, 24), (9, 13))])
def test_rpn_in_closed_form(tau, sizes):
    ours, theirs = rpn_shapes(), rpn_shapes(units=(1.0, 1.0, 2.0, 2.0))
    student, target = rpn_said(ours), rpn_said(theirs, seed=50)
    term = RPN(tau=tau)
    term.wire(ours, theirs)
    found = term(student, target, images(*sizes), None)
    expected = dict.fromkeys(found, 0.0)
    for n, (height, width) in enumerate(sizes):
        parts = []
        for level, stride in (("p2", 4), ("p3", 8)):
            for a in range(3):
                for y in range(math.ceil(height / stride)):
                    for x in range(math.ceil(width / stride)):
                        s, t = (z["rpn_logits"][level][n, a, y, x] for z in (student, target))
                        ds, dt = (
                            z["rpn_deltas"][level][n, 4 * a : 4 * a + 4, y, x].tolist()
                            for z in (student, target)
                        )
                        p, q = (float(torch.sigmoid(z / tau)) for z in (t, s))
                        gap = sum(
                            abs(i - j / u) for i, j, u in zip(ds, dt, (1, 1, 2, 2), strict=True)
                        )
                        parts.append(
                            (level, float(t.sigmoid()), tau**2 * kl((p, 1 - p), (q, 1 - q)), gap)
                        )
        yes = max(1, sum(p for _, p, _, _ in parts))
        no = max(1, sum(1 - p for _, p, _, _ in parts))
        sure = max(1, sum(p for _, p, _, _ in parts if p >= 0.5))
        for level, p, divergence, gap in parts:
            expected[f"logits.{level}"] += (p / yes + (1 - p) / no) * divergence / 2 / 2
            expected[f"deltas.{level}"] += (p if p >= 0.5 else 0) * gap / sure / 2
    assert sorted(found) == ["deltas.p2", "deltas.p3", "logits.p2", "logits.p3"]
    assert_close({k: float(v) for k, v in found.items()}, expected, rtol=1e-9, atol=0)


def test_equal_rpns_are_zero_without_a_pull():
    ours = rpn_shapes()
    student = rpn_said(ours)
    target = {tap: {n: x.clone() for n, x in of.items()} for tap, of in student.items()}
    leaves = [x.requires_grad_() for of in student.values() for x in of.values()]
    term = RPN()
    term.wire(ours, ours)
    found = term(student, target, WHOLE, None)
    assert all(float(x) == 0 for x in found.values())
    sum(found.values()).backward()
    assert all(float(x.grad.abs().sum()) < 1e-12 for x in leaves)


def test_without_objects_no_delta_counts_and_the_zero_is_attached():
    ours = rpn_shapes()
    student, target = rpn_said(ours), rpn_said(ours, seed=50)
    target["rpn_logits"] = {n: x - 100 for n, x in target["rpn_logits"].items()}
    leaves = [x.requires_grad_() for x in student["rpn_deltas"].values()]
    term = RPN()
    term.wire(ours, ours)
    found = term(student, target, WHOLE, None)
    assert float(found["deltas.p2"]) == float(found["deltas.p3"]) == 0
    assert float(found["logits.p2"]) > 0
    sum(found.values()).backward()
    assert all(torch.count_nonzero(x.grad) == 0 for x in leaves)


def test_values_of_a_batch_are_means_over_its_images():
    ours = rpn_shapes()
    student, target = rpn_said(ours), rpn_said(ours, seed=50)
    term = RPN()
    term.wire(ours, ours)
    both = term(student, target, WHOLE, None)

    def image(n):
        sides = [
            {tap: {k: x[n : n + 1] for k, x in of.items()} for tap, of in side.items()}
            for side in (student, target)
        ]
        return term(*sides, images((16, 24)), None)

    alone = [image(n) for n in (0, 1)]
    assert_close(both, {k: (alone[0][k] + alone[1][k]) / 2 for k in both})


def test_rpns_at_another_scale_meet_at_the_students_pixels():
    ours, theirs = rpn_shapes(), rpn_shapes(strides=(8, 16))
    term = RPN()
    rows = term.wire(ours, theirs)
    assert [(r.tap, r.level, r.target, r.stride) for r in rows] == [
        ("rpn_logits", "p3", "rpn_logits.p2", 8),
        ("rpn_deltas", "p3", "rpn_deltas.p2", 8),
    ]
    assert term.target_level("logits.p3") == "p2"
    found = term(rpn_said(ours), rpn_said(theirs, seed=50), WHOLE, None)  # cropped to 2 x 3
    assert sorted(found) == ["deltas.p3", "logits.p3"]


def test_other_anchors_or_places_are_errors():
    with pytest.raises(ValueError, match=r"level p2: .* has 3 anchors per cell .* source 9"):
        RPN().wire(rpn_shapes(), rpn_shapes(anchors=9))
    ours, theirs = (
        {tap: of[:1] for tap, of in rpn_shapes(strides=s).items()} for s in ((4, 8), (16, 32))
    )
    with pytest.raises(ValueError, match=r"covers 4 pixels and one of the source's level p2 16"):
        RPN().wire(ours, theirs)


def test_min_objectness_is_a_probability():
    with pytest.raises(ValueError, match=r"min_objectness between 0 and 1.* min_objectness 1.5"):
        RPN(min_objectness=1.5)
