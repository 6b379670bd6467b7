"""The ensemble of dense detectors: one of them, twins, a mean by hand, and misfits."""

import copy

import pytest
import torch
from detectron2.modeling import build_model

from kd_det.detectors import describe
from kd_det.engine.ensemble import EnsembleModel
from tests import toys

INPUTS = toys.batch(((128, 128), (100, 120)))  # with padding
for x in INPUTS:
    x["height"], x["width"] = 200, 260  # rescaled


def retinanet(seed=0, **kwargs):
    cfg = toys.toy_cfg(**kwargs)
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(seed)
    return sane(build_model(cfg))


def fcos(seed=0):
    torch.manual_seed(seed)
    model = sane(toys.toy_fcos())
    model.test_score_thresh = 0.0
    return model


def sane(model):
    """With logits and deltas of size one: the features of an untrained FPN are in the thousands."""
    with torch.no_grad():
        for name in ("cls_score", "bbox_pred"):
            getattr(model.head, name).weight.normal_(0, 0.001)
    return model.eval()


BUILDERS = {"RetinaNet": retinanet, "FCOS": fcos}


@torch.no_grad()
def predicted(model):
    return [x["instances"].get_fields() for x in model.eval()(INPUTS)]


def same(found, expected):
    assert len(found) == len(expected) == 2
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine["scores"]) > 5
        assert torch.equal(mine["pred_boxes"].tensor, theirs["pred_boxes"].tensor)
        assert torch.equal(mine["scores"], theirs["scores"])
        assert torch.equal(mine["pred_classes"], theirs["pred_classes"])


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_one_member_or_equal_ones_predict_as_it_does(build):
    model = build()
    expected = predicted(model)
    same(predicted(EnsembleModel({"student": model})), expected)
    same(predicted(EnsembleModel({"student": model, "peer": copy.deepcopy(model)})), expected)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_raw_outputs_are_averaged(build, monkeypatch):
    members = {"student": build(0), "peer": build(1), "third": build(2)}
    with torch.no_grad():
        outputs = [describe(m).dense_predictions(INPUTS)[2] for m in members.values()]
    model = copy.deepcopy(members["student"])
    mean = [
        [(a + b + c) / 3 for a, b, c in zip(*maps, strict=True)]
        for maps in zip(*outputs, strict=True)
    ]
    monkeypatch.setattr(model.head, "forward", lambda _: mean)
    expected = predicted(model)
    for mine, theirs in zip(predicted(EnsembleModel(members)), expected, strict=True):
        torch.testing.assert_close(mine["pred_boxes"].tensor, theirs["pred_boxes"].tensor)
        torch.testing.assert_close(mine["scores"], theirs["scores"])
    alone = predicted(members["student"])[0]["scores"]
    assert not torch.allclose(alone[:5], expected[0]["scores"][:5], rtol=1e-3)


def test_a_member_of_the_other_channel_order_sees_its_own():
    model = retinanet()
    model.input_format = "BGR"
    other = copy.deepcopy(model)
    other.input_format = "RGB"
    with torch.no_grad():  # RGB weights that see what the BGR ones see
        other.pixel_mean.copy_(model.pixel_mean.flip(0))
        stem = other.backbone.bottom_up.stem.conv1.weight
        stem.copy_(stem.flip(1))
    for x, y in zip(
        predicted(EnsembleModel({"a": model, "b": other})), predicted(model), strict=True
    ):
        torch.testing.assert_close(x["scores"], y["scores"])


def without_p7():
    cfg = toys.toy_cfg()
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = cfg.MODEL.ANCHOR_GENERATOR.SIZES[:4]
    return build_model(cfg)


def with_weights(*weights):
    model = retinanet()
    model.box2box_transform.weights = weights
    return model


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: retinanet(classes=4), "cls_logits have 3 channels .* and 4 channels"),
        (lambda: retinanet(sizes=2), "1 anchors.* and .*2 anchors"),
        (lambda: retinanet(sizes=2, ratios=(0.5,)), "cannot be averaged: their cls_logits"),
        (lambda: retinanet(ratios=(0.5,)), "their anchors have other sizes"),
        (lambda: with_weights(10.0, 10.0, 5.0, 5.0), r"box_deltas .* in units of \(10.0, 10.0"),
        (without_p7, "their cls_logits have 5 and 4 levels"),
        (fcos, "box_deltas have .*dx, dy, dw, dh.* and .*left, top"),
        (
            lambda: build_model(toys.toy_cfg(arch="GeneralizedRCNN")),
            "'peer' cannot be a member of an ensemble: GeneralizedRCNN has no dense head",
        ),
    ],
)
def test_other_outputs_cannot_be_averaged(other, says):
    with pytest.raises(ValueError, match=says):
        EnsembleModel({"student": retinanet(), "peer": other()})


def test_another_padding_cannot_be_averaged():
    padded = retinanet()
    padded.backbone._size_divisibility = 128
    ensemble = EnsembleModel({"student": retinanet(), "peer": padded})
    with pytest.raises(ValueError, match=r"their heads give maps of 1 x 3 x 8 x 8, .* 1 x 3 x 16"):
        ensemble(toys.batch(((64, 64),)))


def test_it_has_no_losses_and_gives_the_members_mode_back():
    model = retinanet()
    assert not EnsembleModel({"student": model}).training
    with pytest.raises(RuntimeError, match="has no losses"):
        EnsembleModel({"student": model.train()})(INPUTS)
    with pytest.raises(ValueError, match="at least one member"):
        EnsembleModel({})
