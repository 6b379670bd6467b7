"""Terms of the published methods: what they tell the loss, what they own, what they refuse."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kd_det import losses, terms
from kd_det.connectors import Auto, BatchNorm, Conv, Unbridged
from kd_det.context import Context
from kd_det.fields import fields_of
from kd_det.regions import AnchorIoU, Attention, GTBox, Ones, Padding, TeacherScore, TopBoxes
from kd_det.registry import TERMS
from kd_det.schedules import Constant
from kd_det.terms import (
    AT,
    FGFI,
    FKD,
    PI,
    PKD,
    ChannelDistillation,
    Consistency,
    FitNet,
    LogitBoxKD,
)
from tests.lone_terms import (
    STRIDES,
    aligned,
    maps,
    run,
    shapes,
    toy_context,
    toy_student,
    wired,
)
from tests.waits import counted

METHODS = [AT, ChannelDistillation, Consistency, FGFI, FKD, FitNet, LogitBoxKD, PI, PKD]


@pytest.fixture(scope="module")
def student():
    return toy_student()


@pytest.fixture
def context(student):
    return toy_context(student)


# -- what all have in common -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_may_run_in_inference_mode_where_the_term_says_so(context, method):
    assert method.saves_target == (method is FKD)  # its module on the teacher's side trains
    if method is FKD:
        return
    for region in (Padding(), AnchorIoU(), TeacherScore(), Attention(), GTBox(), TopBoxes(k=3)):
        term = wired(method(region=region))
        with torch.inference_mode():
            target = {tap: maps(tap, 1) for tap in term.source_taps()}
        student = {tap: maps(tap, 0) for tap in term.student_taps()}
        for x in student[term.tap].values():
            x.requires_grad_()
        sum(run(term, context, student, target).values()).backward()
        # One cell in all is a constant to standardisation.
        assert all(student[term.tap][k].grad.isfinite().all() for k in STRIDES)
        assert student[term.tap]["p3"].grad.any()


@pytest.mark.parametrize("method", METHODS)
def test_the_host_waits_for_nothing(context, method, monkeypatch):
    term = wired(method())
    student = {tap: maps(tap, 0) for tap in term.student_taps()}
    student[term.tap]["p3"].requires_grad_()
    with counted(monkeypatch) as ops:
        sum(run(term, context, student).values()).backward()
    assert ops.names
    assert not ops.fetched


@pytest.mark.parametrize("method", METHODS)
def test_a_level_is_the_loss_of_its_maps_under_the_region(context, method):
    loss = {
        AT: losses.attention_transfer,
        ChannelDistillation: losses.channel_mean,
        Consistency: lambda s, t, region: losses.consistency(s, t, classes=3, region=region),
        FGFI: lambda s, t, region: losses.imitation(s, t, region=region, over_channels="sum"),
        FKD: lambda s, t, region: 7e-5 * losses.root_of_squares(s, t, region),
        FitNet: losses.imitation,
        LogitBoxKD: lambda s, t, region: losses.weighted_bce(s, t, region=region, normalizer=20.0),
        PI: lambda s, t, region: losses.pixel_wise_kl(s, t, classes=3, region=region),
        PKD: losses.pearson_distance,
    }[method]
    first = {"channel_weight": 0.0, "spatial_weight": 0.0, "non_local_weight": 0.0}
    options = {LogitBoxKD: {"box_weight": 0.0}, FKD: first}.get(method, {})
    term = wired(method(**options))
    values = run(term, context)
    assert list(values) == list(STRIDES)
    for level, stride in STRIDES.items():
        s = term.connectors[level](maps(term.tap, 0)[level])
        t = maps(term.tap, 1)[level]
        assert_close(values[level], loss(s, t, region=term.region(context, s, t, stride)))


@pytest.mark.parametrize("method", METHODS)
def test_a_region_that_names_taps_is_given_them(context, method):
    term = method(region=TeacherScore())
    assert "cls_logits" in term.source_taps()
    assert term.source_taps().count("cls_logits") == 1
    assert all(v.isfinite() for v in run(wired(term), context).values())
    term = method(region=TopBoxes())
    assert set(term.student_taps()) >= {"cls_logits", "box_deltas"}


@pytest.mark.parametrize("method", METHODS)
def test_float32_under_autocast(context, method):
    term = wired(method())
    plain = run(term, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = run(term, context)
    for level, value in values.items():
        assert value.dtype == torch.float32
        assert_close(value, plain[level], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_is_a_field_with_a_default(method):
    fields = fields_of(method)
    assert {"TAP", "LEVELS", "LEVEL_WEIGHTS", "CONNECTOR", "REGION", "WEIGHT"} <= set(fields)
    term = method()
    for name in fields:
        assert hasattr(term, name.lower()), name


def test_what_is_published_is_the_default():
    fgfi = FGFI()
    assert (fgfi.weight, fgfi.region.psi, fgfi.schedule.start_iter) == (0.01, 0.5, 400)
    assert (fgfi.connector.kernel, fgfi.connector.relu, fgfi.connector.norm) == (3, True, False)
    assert fgfi.schedule(0.0, 1000) == 0
    assert fgfi.schedule(0.4, 1000) == 1
    fkd = FKD()
    weights = (fkd.feature_weight, fkd.channel_weight, fkd.spatial_weight, fkd.non_local_weight)
    assert weights == (7e-5, 4e-3, 4e-3, 7e-5)
    assert (fkd.region.tau, fkd.connector.kernel) == (0.5, 1)
    pixel = PI()
    assert (pixel.tap, pixel.mode, pixel.tau, pixel.normalizer) == (
        "cls_logits", "softmax", 1.0, "cells",
    )  # fmt: skip
    assert (AT().p, type(AT().connector)) == (2.0, Unbridged)
    both = LogitBoxKD()
    assert (both.beta, both.box_weight, both.box_score, both.normalizer) == (
        1.0, 4.0, "gap", "positives",
    )  # fmt: skip
    channel = ChannelDistillation().connector
    assert (channel.kernel, channel.norm, channel.relu) == (1, True, True)
    assert type(PKD().connector) is Auto
    assert type(FitNet().connector) is Conv


def test_all_are_registered_and_public():
    assert {m.__name__ for m in METHODS} <= {name for name, _ in TERMS}
    assert {m.__name__ for m in METHODS} <= set(terms.__all__)


# -- one by one ------------------------------------------------------------------------------------


def test_attention_transfer_takes_other_channels_as_they_are(context):
    term = wired(AT())
    assert not list(term.parameters())
    s, t = maps("features", 0), maps("features", 1)
    value = run(wired(AT(region=Ones())), context)["p3"]
    assert_close(value, losses.attention_transfer(s["p3"], t["p3"]))
    summed = run(wired(AT(region=Ones(), over_cells="sum", p=1.0)), context)["p3"]
    assert_close(summed, losses.attention_transfer(s["p3"], t["p3"], p=1, over_cells="sum"))
    assert all(x.shape[1] == 1 for _, *pair, _ in aligned(term, context) for x in pair)


def test_where_features_are_imitated_is_the_regions_business(context):
    for region in (Padding(), GTBox(), TopBoxes(k=4), TeacherScore()):
        term = wired(FitNet(region=region))
        values = run(term, context)
        for level, s, t, weights in aligned(term, context):
            assert weights is None or 0 < weights.sum() < weights.numel() or level in ("p6", "p7")
            assert_close(values[level], losses.imitation(s, t, region=weights))


def test_fine_grained_imitation_is_its_region_times_the_channels(context):
    term = wired(FGFI())
    plain = wired(FitNet(connector=FGFI().connector, region=AnchorIoU()))
    plain.load_state_dict(term.state_dict())
    for level, value in run(term, context).items():
        assert_close(value, 6 * run(plain, context)[level])


def test_channel_means_of_a_connector_with_batch_norm(context):
    term = wired(ChannelDistillation(region=Ones()))
    conv, norm, relu = term.connectors["p3"]
    assert (type(conv), type(norm), type(relu)) == (nn.Conv2d, BatchNorm, nn.ReLU)
    row = term.wire({"features": shapes("features", 0)}, {"features": shapes("features", 1)})[0]
    assert (row.connector, row.parameters) == ("conv1x1+BN+ReLU", 4 * 6 + 6 + 6)


def test_batch_norm_of_a_connector_is_that_of_pytorch_without_memory():
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3).train()
    for m in (ours, theirs):
        m.load_state_dict({"weight": torch.rand(3), "bias": torch.rand(3)}, strict=False)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = 5 + 3 * torch.randn(2, 3, 4, 5)
    for mode in (True, False):
        assert_close(ours.train(mode)(x), theirs(x))
    assert sorted(ours.state_dict()) == ["bias", "weight"]  # nothing that processes disagree on
    assert_close(ours(x[:1, :, :1, :1]).flatten(), ours.bias)  # one value per channel: no error


def test_fkd_is_its_four_parts(context):
    term = wired(FKD())
    nn.init.normal_(term.target_blocks["p4"].out.weight)
    nn.init.normal_(term.student_blocks["p4"].out.weight)
    level, s, t, region = aligned(term, context)[1]
    raw, cells = maps("features", 0)["p4"], Padding()(context, t, t, 16)
    feature = losses.root_of_squares(s, t, region)
    pooled = [(x * cells).sum((2, 3)) / cells.sum((2, 3)) for x in (raw, t)]
    channel = losses.root_of_squares(term.channels[level](pooled[0]), pooled[1])
    mean = [x.mean(1, keepdim=True) * cells for x in (raw, t)]
    spatial = losses.root_of_squares(term.spatial[level](mean[0]), mean[1], cells)
    blocks = [term.student_blocks[level](raw, cells), term.target_blocks[level](t, cells)]
    relation = losses.root_of_squares(term.bridges[level](blocks[0]), blocks[1], cells)
    expected = 7e-5 * feature + 4e-3 * channel + 4e-3 * spatial + 7e-5 * relation
    assert_close(run(term, context)["p4"], expected)


def test_fkd_trains_a_module_on_the_teachers_side_and_nothing_is_idle(context):
    term = wired(FKD())
    sum(run(term, context).values()).backward()
    without = [n for n, p in term.named_parameters() if p.grad is None]
    assert not without
    assert term.target_blocks["p3"].out.weight.grad.any()
    rows = term.wire({"features": shapes("features", 0)}, {"features": shapes("features", 1)})
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in term.parameters())
    beside = wired(FKD(non_local_weight=0.0))
    assert not beside.target_blocks
    sum(run(beside, context).values()).backward()
    assert all(p.grad is not None for p in beside.parameters())


def test_fkd_does_not_see_the_padding(student):
    """An image in a larger canvas has the value that it has alone."""
    term = wired(FKD())
    nn.init.normal_(term.student_blocks["p3"].out.weight)
    alone = Context([{"image": torch.zeros(3, 64, 64)}], "BGR", student)
    s, t = maps("features", 0, n=1), maps("features", 1, n=1)
    padded = run(term, alone, {"features": s}, {"features": t})
    crop = [{k: v[..., : math.ceil(64 / STRIDES[k])] for k, v in x.items()} for x in (s, t)]
    cropped = run(term, alone, {"features": crop[0]}, {"features": crop[1]})
    assert_close(padded, cropped)


def test_fkd_at_agreement_has_a_finite_gradient(context):
    term = wired(FKD(connector=Auto(), channel_weight=0.0, spatial_weight=0.0))
    s, t, region = torch.ones(2, 6, 8, 12), torch.ones(2, 6, 8, 12), torch.ones(2, 1, 8, 12)
    term.compare(s.requires_grad_(), t, region).backward()
    assert torch.equal(s.grad, torch.zeros_like(s))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AT(p=0.5), "p >= 1, but got 0.5"),
        (lambda: AT(over_cells="max"), "mean or sum, but got 'max'"),
        (lambda: PI(tau=0.0), "tau > 0, but got 0.0"),
        (lambda: PI(mode="tanh"), "softmax, sigmoid, but got 'tanh'"),
        (lambda: PI(num_classes=-1), "num_classes >= 0, but got -1"),
        (lambda: PI(normalizer="boxes"), "PI's normalizer .* cells, positives, but got 'boxes'"),
        (lambda: FKD(spatial_weight=-1.0), r"weights >= 0, .* -1\.0"),
        (lambda: LogitBoxKD(beta=0.5), "beta >= 1, but got 0.5"),
        (lambda: LogitBoxKD(box_weight=-1.0), r"box_weight >= 0, but got -1\.0"),
        (lambda: LogitBoxKD(box_score="iou"), "gap, teacher, but got 'iou'"),
        (lambda: LogitBoxKD(normalizer="sum"), "LogitBoxKD's normalizer .* but got 'sum'"),
    ],
)
def test_wrong_options_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_schedule_of_fine_grained_imitation_can_be_replaced():
    assert FGFI(schedule=Constant()).schedule(0.0, None) == 1
