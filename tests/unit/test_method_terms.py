"""Terms of the published methods: what they tell the loss, what they own, what they refuse."""

import math
from dataclasses import replace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.testing import assert_close

from kd_det import losses, terms
from kd_det.boxes import decode
from kd_det.connectors import Auto, BatchNorm, Conv, Unbridged
from kd_det.context import Context
from kd_det.detectors import TapShape, describe, probe
from kd_det.fields import fields_of
from kd_det.regions import AnchorIoU, Attention, GTBox, Ones, Padding, TeacherScore, TopBoxes
from kd_det.registry import TERMS
from kd_det.schedules import Constant
from kd_det.terms import AT, FGFI, FKD, PI, PKD, ChannelDistillation, FitNet, LogitBoxKD
from tests.toys import toy_cfg, toy_fcos

STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
SIZES = ((64, 96), (50, 70))
KINDS = {"features": "feature", "cls_logits": "logits", "box_deltas": "deltas"}
CHANNELS = {"features": (4, 6), "cls_logits": (6, 6), "box_deltas": (8, 8)}
METHODS = [AT, ChannelDistillation, FGFI, FKD, FitNet, LogitBoxKD, PI, PKD]


def shapes(tap, side):
    kind, channels = KINDS[tap], CHANNELS[tap][side]
    return [TapShape(k, channels, s, "", kind) for k, s in STRIDES.items()]


def maps(tap, side, n=2, canvas=(64, 96)):
    g = torch.Generator().manual_seed(7 * len(tap) + side)
    grids = {k: [math.ceil(x / s) for x in canvas] for k, s in STRIDES.items()}
    return {k: torch.randn(n, CHANNELS[tap][side], *grid, generator=g) for k, grid in grids.items()}


@pytest.fixture(scope="module")
def student():
    model = build_model(toy_cfg(sizes=2)).eval()
    model.loss_normalizer = 20.0
    return model


@pytest.fixture
def context(student):
    inputs = []
    for h, w in SIZES:
        instances = Instances((h, w))
        instances.gt_boxes = Boxes(torch.tensor([[20.0, 12, 58, 40], [2, 2, 18, 20]]))
        inputs.append({"image": torch.zeros(3, h, w), "instances": instances})
    return Context(inputs, "BGR", student)


def wired(term):
    torch.manual_seed(0)
    term.wire(
        {tap: shapes(tap, 0) for tap in term.student_taps()},
        {tap: shapes(tap, 1) for tap in term.source_taps()},
    )
    return term


def run(term, context, student=None, target=None):
    context.student_maps = student or {tap: maps(tap, 0) for tap in term.student_taps()}
    target = target or {tap: maps(tap, 1) for tap in term.source_taps()}
    return term(context.student_maps, target, context, None)


def aligned(term, context):
    student = {tap: maps(tap, 0) for tap in term.student_taps()}
    target = {tap: maps(tap, 1) for tap in term.source_taps()}
    context.student_maps = student
    return list(term.aligned(student, target, context))


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
def test_a_level_is_the_loss_under_the_region(context, method):
    expected = {
        AT: lambda s, t, r: losses.attention_transfer(s, t, p=1, region=r),  # of energies
        ChannelDistillation: lambda s, t, r: losses.channel_mean(s, t, region=r),
        FGFI: lambda s, t, r: losses.imitation(s, t, region=r, over_channels="sum"),
        FKD: None,
        FitNet: lambda s, t, r: losses.imitation(s, t, region=r),
        LogitBoxKD: lambda s, t, r: losses.weighted_bce(s, t, region=r, normalizer=20.0),
        PI: lambda s, t, r: losses.pixel_wise_kl(s, t, region=r),
        PKD: lambda s, t, r: losses.pearson_distance(s, t, region=r),
    }[method]
    if expected is None:
        return
    term = wired(method(box_weight=0.0) if method is LogitBoxKD else method())
    values = run(term, context)
    assert list(values) == list(STRIDES)
    for level, s, t, region in aligned(term, context):
        assert_close(values[level], expected(s, t, region))


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


def test_pixel_wise_options_reach_the_loss(context):
    s, t = maps("cls_logits", 0)["p3"], maps("cls_logits", 1)["p3"]
    for options, same in [
        ({"mode": "sigmoid", "tau": 2.0}, {"mode": "sigmoid", "tau": 2.0}),
        ({"num_classes": 3}, {"classes": 3}),
        ({"cross_entropy": True}, {"cross_entropy": True}),
        ({"normalizer": "positives"}, {"normalizer": 20.0}),
    ]:
        value = run(wired(PI(region=Ones(), **options)), context)["p3"]
        assert_close(value, losses.pixel_wise_kl(s, t, **same))


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


# -- class scores and boxes ------------------------------------------------------------------------


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
    found, expected = (
        run(term, context, None, scaled),
        run(wired(LogitBoxKD()), context, None, given),
    )
    assert_close(found, expected)


def test_a_dense_detector_says_in_which_units_its_deltas_are():
    cfg = toy_cfg()
    cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    assert describe(build_model(cfg)).named_taps()["box_deltas"].units == (10.0, 10.0, 5.0, 5.0)
    assert describe(toy_fcos()).named_taps()["box_deltas"].units == ()


def test_a_detector_that_codes_no_boxes_is_told(context):
    context.student = nn.Identity()
    with pytest.raises(ValueError, match="Identity has no box2box_transform"):
        decode(context, [torch.zeros(1, 4, 2, 2)])


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
