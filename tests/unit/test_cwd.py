"""The CWD term and the level-wise base: connectors, regions, weights of levels and channels."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kd_det.connectors import Conv, Identity
from kd_det.detectors import TapShape
from kd_det.losses import channel_wise_kl, standardize
from kd_det.regions import Ones, Padding, Region
from kd_det.terms import CWD, LevelwiseTerm, Term

STRIDES = {"p3": 8, "p4": 16, "p5": 32}
CANVAS = (64, 96)


def shapes(channels, kind="feature", strides=STRIDES):
    return [TapShape(level, channels, stride, "", kind) for level, stride in strides.items()]


def maps(channels, seed, strides=STRIDES, n=2):
    g = torch.Generator().manual_seed(seed)
    height, width = CANVAS
    return {
        level: torch.randn(n, channels, height // stride, width // stride, generator=g)
        for level, stride in strides.items()
    }


def context(sizes=(CANVAS, CANVAS)):
    return SimpleNamespace(image_sizes=list(sizes))


def wired(student=4, target=4, kind="feature", tap="features", **kwargs):
    term = CWD(tap=tap, **kwargs)
    source_tap = kwargs.get("source_tap") or tap
    term.wire({tap: shapes(student, kind)}, {source_tap: shapes(target, kind)})
    return term


def run(term, student, target, where=None):
    return term({term.tap: student}, {term.source_tap: target}, where or context(), None)


S, T = maps(4, 0), maps(4, 1)


def test_every_level_counts():
    values = run(wired(region=Ones()), S, T)
    assert list(values) == list(STRIDES)
    for level, value in values.items():
        assert_close(value, channel_wise_kl(S[level], T[level]))


def test_options_reach_the_loss():
    values = run(wired(region=Ones(), tau=4.0), S, T)
    assert_close(values["p3"], channel_wise_kl(S["p3"], T["p3"], tau=4.0))
    values = run(wired(region=Ones(), standardize=True), S, T)
    assert_close(values["p3"], channel_wise_kl(standardize(S["p3"]), standardize(T["p3"])))


def test_the_levels_are_one_node():
    student = {level: x.clone().requires_grad_() for level, x in S.items()}
    values = run(wired(region=Ones()), student, T)
    # value <- unbind of the vector <- the loss
    (node,) = {value.grad_fn.next_functions[0][0] for value in values.values()}
    assert "ChannelWiseKL" in type(node).__name__


def test_the_backend_reaches_the_loss():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="backend 'triton' needs maps on a CUDA device"):
        run(wired(backend="triton"), S, T)


def test_named_levels_and_their_weights():
    term = wired(levels=("p5", "p3"), level_weights=(3.0, 0.5))
    assert list(run(term, S, T)) == ["p5", "p3"]
    assert [term.level_weight(level) for level in ("p5", "p3")] == [3.0, 0.5]
    assert wired().level_weight("p4") == 1.0


def test_the_source_may_be_tapped_elsewhere():
    term = wired(source_tap="refined")
    assert (term.student_taps(), term.source_taps()) == (("features",), ("refined",))
    assert len(run(term, S, T)) == 3


def test_the_plan_has_a_row_per_level():
    term = CWD(connector=Conv(kernel=3, relu=True), region=Ones())
    rows = term.wire({"features": shapes(4)}, {"features": shapes(6)})
    assert [row.level for row in rows] == list(STRIDES)
    row = rows[1]
    assert (row.tap, row.target, row.stride) == ("features", "features.p4", 16)
    assert (row.student_channels, row.target_channels) == (4, 6)
    assert (row.connector, row.region, row.loss) == ("conv3x3+ReLU", "Ones", "CWD")
    assert row.parameters == 4 * 6 * 9 + 6
    assert sum(r.parameters for r in rows) == sum(p.numel() for p in term.parameters())
    (row, *_) = CWD().wire({"features": shapes(4)}, {"features": shapes(4)})
    assert (row.connector, row.parameters) == ("-", 0)


# -- connectors -----------------------------------------------------------------------------------


def test_connectors_come_where_channels_differ_and_learn():
    term = wired(student=4, target=6)
    assert sorted(term.state_dict()) == sorted(
        f"connectors.{level}.{x}" for level in STRIDES for x in ("weight", "bias")
    )
    target = maps(6, 1)
    values = run(term, S, target)
    expected = channel_wise_kl(term.connectors["p3"](S["p3"]), target["p3"])
    assert_close(values["p3"], expected)
    sum(values.values()).backward()
    assert all(p.grad.abs().sum() > 0 for n, p in term.named_parameters() if "weight" in n)
    # CWD ignores a constant per channel, so a connector's bias learns nothing from it.
    assert all(p.grad.abs().max() < 1e-6 for n, p in term.named_parameters() if "bias" in n)
    assert not list(wired().parameters())


def test_the_student_is_reached_through_a_frozen_connector():
    term = wired(student=4, target=6).requires_grad_(False)
    student = {level: x.clone().requires_grad_() for level, x in S.items()}
    sum(run(term, student, maps(6, 1)).values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in student.values())


@pytest.mark.parametrize("kind", ["logits", "deltas"])
def test_no_connector_translates_channels_with_a_meaning(kind):
    assert isinstance(wired(kind=kind).connectors["p3"], nn.Identity)
    with pytest.raises(ValueError, match=r"level p3 of tap 'cls_logits'.*same [a-z ]* here"):
        wired(student=4, target=6, kind=kind, tap="cls_logits")
    # One side with a meaning is enough.
    with pytest.raises(ValueError, match="no connector can translate"):
        CWD().wire({"features": shapes(4)}, {"features": shapes(6, kind)})


def test_a_connector_of_the_users_choice_is_taken_at_its_word():
    assert isinstance(wired(connector=Conv()).connectors["p3"], nn.Conv2d)
    assert isinstance(wired(kind="logits", connector=Conv()).connectors["p3"], nn.Conv2d)
    with pytest.raises(ValueError, match=r"level p3 of tap 'features'.*Identity bridges none"):
        wired(student=4, target=6, connector=Identity())


# -- regions --------------------------------------------------------------------------------------


def test_padding_is_left_out_and_can_be_left_in():
    small = context([CANVAS, (30, 40)])
    masked = run(wired(), S, T, small)["p3"]
    crops = [channel_wise_kl(S["p3"][:1], T["p3"][:1])]
    crops.append(channel_wise_kl(S["p3"][1:, :, :4, :5], T["p3"][1:, :, :4, :5]))
    assert_close(masked, torch.stack(crops).mean())
    assert_close(run(wired(region=Ones()), S, T, small)["p3"], channel_wise_kl(S["p3"], T["p3"]))


def test_padding_is_left_out_of_the_statistics_too():
    small = context([CANVAS, (30, 40)])
    student = {level: x.clone() for level, x in S.items()}
    before = run(wired(standardize=True), student, T, small)["p3"]
    student["p3"][1, :, 4:] = 1e4
    assert_close(run(wired(standardize=True), student, T, small)["p3"], before)


class Recording(Region):
    """Remembers what it was asked, and counts every cell."""

    def __init__(self):
        self.asked = []

    def __call__(self, context, student, target, stride):
        self.asked.append((tuple(student.shape), tuple(target.shape), stride))


def test_a_region_sees_both_maps_on_the_targets_grid():
    region = Recording()
    term = CWD(tap="res4", source_tap="res3", region=region)
    term.wire({"res4": shapes(4, strides={"res4": 16})}, {"res3": shapes(6, strides={"res3": 8})})
    values = run(term, maps(4, 0, {"res4": 16}), maps(6, 1, {"res3": 8}))
    assert list(values) == ["res4"]
    assert region.asked == [((2, 6, 8, 12), (2, 6, 8, 12), 8)]


# -- channel weights ------------------------------------------------------------------------------


def test_channels_count_by_the_teachers_largest_probability():
    term = wired(channel_weight="teacher_max_prob", region=Ones())
    value = run(term, S, T)["p4"]
    weight = torch.sigmoid(T["p4"]).amax((2, 3))
    rows = torch.stack(
        [
            torch.stack(
                [
                    channel_wise_kl(S["p4"][n, c][None, None], T["p4"][n, c][None, None])
                    for c in range(4)
                ]
            )
            for n in range(2)
        ]
    )  # (N, C)
    assert_close(value, ((rows * weight).sum(1) / weight.sum(1)).mean())


def test_a_probability_in_the_padding_does_not_count():
    small = context([CANVAS, (30, 40)])
    target = {level: x.clone() for level, x in T.items()}
    term = wired(channel_weight="teacher_max_prob")
    before = run(term, S, target, small)["p3"]
    target["p3"][1, 0, 4:] = 50
    assert_close(run(term, S, target, small)["p3"], before)
    target["p3"][1, 0, 0, 0] = 50
    assert run(term, S, target, small)["p3"] != before


@pytest.mark.parametrize(
    "options", [{}, {"channel_weight": "teacher_max_prob"}, {"standardize": True}]
)
def test_a_batch_without_a_valid_cell_is_zero_and_attached(options):
    class Nowhere(Region):
        def __call__(self, context, student, target, stride):
            return torch.zeros_like(target[:, :1])

    student = {level: x.clone().requires_grad_() for level, x in S.items()}
    values = run(wired(region=Nowhere(), **options), student, T)
    total = sum(values.values())
    assert total.item() == 0
    total.backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in student.values())


# -- mismatch and arguments -----------------------------------------------------------------------


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_student_and_teacher_may_differ_in_precision(precision):
    low = {level: x.to(precision) for level, x in T.items()}
    value = run(wired(), S, low)["p3"]
    assert value.dtype == torch.float32
    assert_close(value, channel_wise_kl(S["p3"], low["p3"].float()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CWD(tau=0.0), "tau > 0, but got 0"),
        (lambda: CWD(tau=float("inf")), "tau > 0"),
        (lambda: CWD(channel_weight="max"), "one of none, teacher_max_prob, but got 'max'"),
        (lambda: CWD(backend="cuda"), "one of auto, eager, triton, but got 'cuda'"),
        (lambda: CWD(weight=-1.0), "CWD needs a finite weight >= 0, but got -1"),
        (lambda: CWD(weight=float("nan")), "finite weight"),
        (
            lambda: CWD(level_weights=(1.0, -1.0)),
            r"level_weights are finite and >= 0.*\(1.0, -1.0\)",
        ),
        (lambda: wired(level_weights=(1.0, 1.0)), r"2 LEVEL_WEIGHTS for 3 levels \(p3, p4, p5\)"),
        (lambda: wired(levels=("p33",)), "Did you mean 'p3'"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_defaults_are_the_papers_but_for_the_padding():
    term = CWD()
    assert (term.tau, term.weight, term.channel_weight, term.standardize) == (1, 1, "none", False)
    assert (term.tap, term.source_tap, term.levels, term.level_weights) == (
        "features",
        "features",
        (),
        (),
    )
    assert isinstance(term.region, Padding)
    assert issubclass(CWD, LevelwiseTerm)
    assert issubclass(LevelwiseTerm, Term)
