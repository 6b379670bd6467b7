"""Regions: what they promise beside the formula that tests/parity holds them to."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch.testing import assert_close

from kd_det.context import Context
from kd_det.losses import imitation
from kd_det.regions import AnchorIoU, Attention, GTBox, Padding, Region, TeacherScore, TopBoxes
from kd_det.regions.boxes import counts, ground_truth, spans
from kd_det.registry import REGIONS
from tests.toys import toy_cfg, toy_fcos
from tests.waits import counted

STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
PARTS = {
    "GTBox": GTBox(),
    "GTBox per area": GTBox(per_area=True),
    "AnchorIoU": AnchorIoU(),
    "AnchorIoU own level": AnchorIoU(every_level=False),
    "TeacherScore": TeacherScore(),
    "Attention": Attention(),
    "TopBoxes": TopBoxes(k=5),
}
GROUND_TRUTH = [name for name in PARTS if name.startswith(("GT", "Anchor"))]


@pytest.fixture(scope="module")
def student():
    return build_model(toy_cfg()).eval()


def maps(n, canvas, channels, seed=0):
    g = torch.Generator().manual_seed(seed)
    grids = {k: [math.ceil(side / s) for side in canvas] for k, s in STRIDES.items()}
    return {k: torch.randn(n, channels, *grid, generator=g) for k, grid in grids.items()}


def a_step(student, sizes, boxes):
    """A context and feature maps (student's, target's) of images on one padded canvas."""
    inputs = []
    for (h, w), rows in zip(sizes, boxes, strict=True):
        instances = Instances((h, w))
        instances.gt_boxes = Boxes(torch.tensor(rows, dtype=torch.float32).view(-1, 4))
        inputs.append({"image": torch.zeros(3, h, w), "instances": instances})
    canvas = [math.ceil(max(side) / 32) * 32 for side in zip(*sizes, strict=True)]
    n = len(sizes)
    predictions = {"cls_logits": maps(n, canvas, 3, 2), "box_deltas": maps(n, canvas, 4, 3)}
    context = Context(inputs, "BGR", student, predictions)
    return context.with_targets(predictions), maps(n, canvas, 4, 0), maps(n, canvas, 4, 1)


BOX = [20.0, 12.0, 58.0, 40.0]


@pytest.mark.parametrize("name", PARTS)
def test_shape_sign_and_no_gradient(student, name):
    context, s, t = a_step(student, [(64, 96), (50, 70)], [[BOX], [BOX, [1, 1, 9, 9]]])
    for level, stride in STRIDES.items():
        region = PARTS[name](context, s[level].requires_grad_(), t[level], stride)
        assert region.shape == (2, 1, *t[level].shape[-2:])
        assert region.min() >= 0
        assert region.isfinite().all()
        assert not region.requires_grad


@pytest.mark.parametrize("name", PARTS)
def test_the_host_waits_for_nothing(student, name, monkeypatch):
    context, s, t = a_step(student, [(64, 96), (50, 70)], [[BOX], [BOX, [1, 1, 9, 9]]])
    with counted(monkeypatch) as ops:
        for level, stride in STRIDES.items():
            PARTS[name](context, s[level], t[level], stride)
    assert ops.names
    assert not ops.fetched


@pytest.mark.parametrize("name", PARTS)
def test_padded_cells_do_not_count(student, name):
    context, s, t = a_step(student, [(64, 96), (33, 40)], [[BOX], [[4, 4, 39, 32]]])
    for level, stride in STRIDES.items():
        cells = Padding()(context, s[level], t[level], stride)
        region = PARTS[name](context, s[level], t[level], stride)
        if cells is not None:
            assert not (region * (cells == 0)).any()


@pytest.mark.parametrize("name", [n for n in PARTS if n != "TopBoxes"])
def test_an_image_has_the_region_that_it_has_alone(student, name):
    # Scores of the maps' padding are those of other cells, so only what lies in the image is equal.
    together, s, t = a_step(student, [(128, 160), (64, 96)], [[BOX], [BOX]])
    alone = Context(together.inputs[1:], "BGR", student)
    for level, stride in STRIDES.items():
        h, w = math.ceil(64 / stride), math.ceil(96 / stride)
        crop = [x[1:, :, :h, :w] for x in (s[level], t[level])]
        scores = {k: x[1:, :, : math.ceil(64 / STRIDES[k]), : math.ceil(96 / STRIDES[k])]
                  for k, x in together.target_maps["cls_logits"].items()}  # fmt: skip
        found = PARTS[name](together, s[level], t[level], stride)[1:, :, :h, :w]
        if name == "TeacherScore" and level == "p7":
            continue  # both p6 and p7 of so small an image are one row
        expected = PARTS[name](alone.with_targets({"cls_logits": scores}), *crop, stride)
        assert_close(found, expected)


@pytest.mark.parametrize("name", GROUND_TRUTH)
def test_without_boxes_nothing_counts_and_the_loss_is_an_attached_zero(student, name):
    context, s, t = a_step(student, [(64, 96), (64, 64)], [[], []])
    for level, stride in STRIDES.items():
        x = s[level].requires_grad_()
        region = PARTS[name](context, x, t[level], stride)
        assert not region.any()
        value = 1e6 * imitation(x, t[level], region=region)
        assert value.item() == 0
        value.backward()
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_an_empty_box_counts_nowhere(student):
    context, s, t = a_step(student, [(64, 96)], [[[20, 20, 20, 40], [30, 30, 50, 30]]])
    assert not GTBox()(context, s["p3"], t["p3"], 8).any()
    assert not AnchorIoU()(context, s["p3"], t["p3"], 8).any()


def test_boxes_are_placed_by_the_stride_and_not_by_the_image(student):
    # 40 of 50 pixels are 6.4 of 8 rows, but lie in row 5.
    context, _, t = a_step(student, [(64, 64), (50, 50)], [[], [[40, 40, 48, 48]]])
    region = GTBox()(context, t["p3"], t["p3"], 8)
    assert region.nonzero().tolist() == [[1, 0, 5, 5]]


def test_a_small_object_keeps_a_cell_on_every_level(student):
    context, _, t = a_step(student, [(128, 128)], [[[33, 33, 36, 35]]])
    for level, stride in STRIDES.items():
        assert GTBox()(context, t[level], t[level], stride).sum() == 1


def test_every_box_weighs_the_same_per_area(student):
    apart = [[0, 0, 16, 16], [32, 32, 96, 64]]
    context, _, t = a_step(student, [(64, 96)], [apart])
    region = GTBox(per_area=True)(context, t["p3"], t["p3"], 8)
    assert_close(region[0, 0, :2, :2].sum(), torch.tensor(1.0))
    assert_close(region[0, 0, 4:, 4:].sum(), torch.tensor(1.0))
    context, _, t = a_step(student, [(64, 96)], [[*apart, [0, 0, 96, 64]]])
    again = GTBox(per_area=True)(context, t["p3"], t["p3"], 8)
    assert_close(again[region > 0], region[region > 0])  # the smallest box decides
    assert_close(again[region == 0], torch.full_like(again[region == 0], 1 / 96))


def test_a_box_that_is_an_anchor(student):
    maps = [torch.empty(1, 1, math.ceil(64 / s), math.ceil(96 / s)) for s in STRIDES.values()]
    anchor = student.anchor_generator(maps)[0].tensor[3 * 12 + 4]  # p3, cell (3, 4), 16 x 16
    context, s, t = a_step(student, [(64, 96)], [[anchor.tolist()]])
    region = AnchorIoU(psi=0.5)(context, s["p3"], t["p3"], 8)
    assert region[0, 0, 3, 4] == 1
    # A shift by one cell of half the size: IoU 1/3 along an axis, 1/7 along both.
    assert region.sum() == 1
    region = AnchorIoU(psi=0.3)(context, s["p3"], t["p3"], 8)
    assert sorted(region[0, 0].nonzero().tolist()) == [[2, 4], [3, 3], [3, 4], [3, 5], [4, 4]]
    # The best overlap is that of any level: the p4 anchor of 32 x 32 has a quarter.
    assert not AnchorIoU(psi=0.5)(context, s["p4"], t["p4"], 16).any()
    assert AnchorIoU(psi=0.2)(context, s["p4"], t["p4"], 16).any()
    assert not AnchorIoU(psi=0.2, every_level=False)(context, s["p4"], t["p4"], 16).any()


def test_overlaps_are_computed_once_per_step(student, monkeypatch):
    calls = []
    real = AnchorIoU._levels
    monkeypatch.setattr(AnchorIoU, "_levels", lambda *a: calls.append(1) or real(*a))
    context, s, t = a_step(student, [(64, 96)], [[BOX]])
    for level, stride in STRIDES.items():
        AnchorIoU()(context, s[level], t[level], stride)
    AnchorIoU(psi=0.25)(context, s["p3"], t["p3"], 8)
    assert len(calls) == 2


def test_anchors_of_an_fcos_serve_too():
    context, s, t = a_step(toy_fcos(), [(64, 96)], [[BOX]])
    # One square anchor of the stride's size per cell: that of p5 fits best.
    assert AnchorIoU()(context, s["p5"], t["p5"], 32).any()
    assert not AnchorIoU()(context, s["p3"], t["p3"], 8).any()


def test_a_student_without_anchors_or_without_such_a_level_is_told(student):
    context, s, t = a_step(student, [(64, 96)], [[BOX]])
    with pytest.raises(ValueError, match=r"strides 8, 16, 32, 64, 128, and none .* stride 4"):
        AnchorIoU()(context, s["p3"], t["p3"], 4)
    context.student = torch.nn.Identity()
    context._made.clear()
    with pytest.raises(ValueError, match=r"Identity has no anchors\. Choose another REGION"):
        AnchorIoU()(context, s["p3"], t["p3"], 8)


def test_scores_are_taken_from_the_level_on_the_same_grid(student):
    context, _, t = a_step(student, [(128, 192)], [[BOX]])
    logits = context.target_maps["cls_logits"]
    cropped = t["p4"][..., :-1, :-1]  # the student's padding reaches less far
    region = TeacherScore()(context, cropped, cropped, 16)
    assert_close(region, logits["p4"][..., :-1, :-1].amax(1, keepdim=True).sigmoid())
    beyond = torch.zeros(1, 4, 64, 64)
    with pytest.raises(ValueError, match=r"64 x 64.*'cls_logits'.*16 x 24, 8 x 12"):
        TeacherScore()(context, beyond, beyond, 8)


def test_every_proposal_weighs_the_same(student):
    context, _, t = a_step(student, [(64, 96), (64, 96)], [[], []])
    region = TopBoxes(k=5)(context, t["p3"], t["p3"], 8)
    boxes = TopBoxes(k=5)._boxes(context)
    real = ((boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])).sum(1)
    assert_close(region.sum((1, 2, 3)), real.float())
    assert context.once(("top boxes", 5), lambda: None) is not None  # shared by the levels


def test_sums_of_boxes_are_exact_under_autocast():
    boxes = torch.tensor([[[0.0, 0, 64, 64]] * 300])  # more than bfloat16 counts
    rows, columns = spans(boxes, (8, 8), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(counts(rows, columns), torch.full((1, 1, 8, 8), 300.0))


def test_ground_truth_is_uploaded_once_as_one_tensor(student):
    context, _, _ = a_step(student, [(64, 96), (64, 64), (9, 9)], [[BOX], [BOX, BOX], []])
    boxes = ground_truth(context, torch.device("cpu"))
    assert boxes.shape == (3, 2, 4)
    assert_close(boxes[0], torch.tensor([BOX, [0.0] * 4]))
    assert not boxes[2].any()
    assert ground_truth(context, torch.device("cpu")) is boxes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AnchorIoU(psi=1.0), r"psi in \[0, 1\), but got 1.0"),
        (lambda: Attention(tau=0.0), "tau > 0, but got 0.0"),
        (lambda: TopBoxes(k=0), "k >= 1, but got 0"),
    ],
)
def test_wrong_options_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_registry_holds_them_all():
    assert {type(part).__name__ for part in PARTS.values()} <= {name for name, _ in REGIONS}
    assert all(issubclass(cls, Region) for _, cls in REGIONS)


def test_positives_are_the_students_own_normaliser(student, monkeypatch):
    monkeypatch.setattr(student, "loss_normalizer", 12.5, raising=False)
    assert Context([], "BGR", student).positives == 12.5
    with pytest.raises(ValueError, match=r'Identity does not keep.*NORMALIZER: "cells"'):
        _ = Context([], "BGR", torch.nn.Identity()).positives
