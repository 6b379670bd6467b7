"""
Seven detectors teach seven: every pair distils what is natural to it, with its connectors frozen.

The student's gradient is not zero, and over 20 steps on one batch, the task loss off, every term
falls. Classes, their order, anchors per cell, channels, levels, strides and padding differ.
"""

import copy
from functools import cache

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from torch import nn

from kd_det import Distiller, Teacher, terms
from kd_det.detectors import describe
from tests.steps import step
from tests.toys import batch, randomize_norms, toy_cfg, toy_fcos, with_pixels

STEPS = 20
PREDICTORS = ("cls_score.weight", "objectness_logits.weight", "predictor.weight")
LOGITS = ("cls_logits", "rpn_logits", "sem_seg_logits")
STUDENT, TEACHER = 0, 1  # seeds


def retinanet() -> nn.Module:
    """Nine anchors per cell."""
    return build_model(toy_cfg(sizes=3, ratios=(0.5, 1.0, 2.0)))


def regnet() -> nn.Module:
    """A RetinaNet that no YAML builds, padded to 64, with P6 and P7 made from P5."""
    params = {"depth": 8, "w_a": 8.0, "w_0": 8, "w_m": 2.0, "group_width": 8, "norm": "BN"}
    bottom_up = RegNet(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=ResBottleneckBlock,
        out_features=["s2", "s3", "s4"],
        **params,
    )
    top = LastLevelP6P7(12, 12, in_feature="p5")
    levels = [f"p{i}" for i in range(3, 8)]
    head = RetinaNetHead(
        input_shape=[ShapeSpec(channels=12)] * 5,
        num_classes=2,
        num_anchors=1,
        conv_dims=[12],
    )
    return RetinaNet(
        backbone=FPN(bottom_up, ["s2", "s3", "s4"], 12, top_block=top),
        head=head,
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[16 * 2**i] for i in range(5)],
            aspect_ratios=[1.0],
            strides=[2**i for i in range(3, 8)],
        ),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        num_classes=2,
        head_in_features=levels,
        pixel_mean=[127.5] * 3,
        pixel_std=[64.0] * 3,
        input_format="RGB",
    )


def rcnn_cfg() -> CfgNode:
    cfg = toy_cfg(arch="GeneralizedRCNN", fpn=12, ratios=(0.5, 1.0, 2.0))
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 64
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 16
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    return cfg


def cascade() -> nn.Module:
    cfg = rcnn_cfg()
    cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    return build_model(cfg)


def c4() -> nn.Module:
    """One level, not padded; six anchors per cell in its RPN."""
    cfg = rcnn_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 4
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 32]]
    return build_model(cfg)


# A detector more is a line here, and a row and a column below.
BUILDERS = {
    "RetinaNet": (retinanet, "abc"),
    "FCOS": (lambda: toy_fcos(classes=4), "cxba"),
    "RegNet": (regnet, "bc"),
    "Faster": (lambda: build_model(rcnn_cfg()), "abc"),
    "Cascade": (cascade, "abc"),
    "C4": (c4, "abc"),
    "Semantic": (lambda: build_model(toy_cfg(arch="SemanticSegmentor")), "_abc"),
}

# Rows are students, columns teachers: falls, on how many levels of features + of logits (of class
# logits between dense detectors, of the RPN's between two-stage ones, of class maps); or words of
# an error. Of P6 and P7 those pair that are made in one way; a C4 detector has P4's stride alone.
EXPECTED = """
student     RetinaNet  FCOS  RegNet  Faster  Cascade  C4   Semantic
RetinaNet   5+5        5+5   3+5     3       3        1    3
FCOS        5+5        5+5   3+5     3       3        1    3
RegNet      3+5        3+5   5+5     3       3        1    3
Faster      3          3     3       5+5     5+5      1+1  4
Cascade     3          3     3       5+5     5+5      1+1  4
C4          1          1     1       1+1     1+1      1+1  1
Semantic    3          3     3       4       4        1    4+1
"""
HEADER, *ROWS = (line.split() for line in EXPECTED.strip().splitlines())
CELLS = [
    (row[0], teacher, result)
    for row in ROWS
    for teacher, result in zip(HEADER[1:], row[1:], strict=True)
]


@cache
def built(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = BUILDERS[kind][0]()
    randomize_norms(model)
    for name, p in model.named_parameters():  # a fresh predictor says the same everywhere
        if seed == TEACHER and name.endswith(PREDICTORS):
            nn.init.normal_(p, std=0.3)
    return model


def common_logits(student: nn.Module, teacher: nn.Module) -> str | None:
    names = [describe(model).presets() for model in (student, teacher)]
    return next((n for n in LOGITS if all(n in x for x in names)), None)


def distiller(student: str, teacher: str) -> Distiller:
    models = copy.deepcopy(built(student, STUDENT)), built(teacher, TEACHER)
    logits = common_logits(*models)
    model = Distiller(
        student=models[0],
        sources={"teacher": Teacher(model=models[1], classes=tuple(BUILDERS[teacher][1]))},
        terms={
            "features": terms.CWD(tap="features"),
            **({"logits": terms.CWD(tap=logits)} if logits else {}),
        },
        classes=tuple(BUILDERS[student][1]),
    )
    model.terms.requires_grad_(False)
    return model


def test_every_cell_is_expected():
    assert [row[0] for row in ROWS] == HEADER[1:] == list(BUILDERS)
    assert len(CELLS) >= 36
    assert sum(not result[0].isdigit() for *_, result in CELLS) <= 10


@pytest.mark.parametrize(("student", "teacher", "result"), CELLS)
def test_pair(student: str, teacher: str, result: str) -> None:
    model = distiller(student, teacher)
    assert "+".join(str(len(rows)) for rows in model.wiring.rows.values()) == result
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=0.01)
    inputs = with_pixels(batch())
    curve = []
    for iteration in range(STEPS + 1):
        losses = {k: v for k, v in step(model, iteration, inputs).items() if "loss_kd" in k}
        curve.append({k: float(v.detach()) for k, v in losses.items()})
        optimizer.zero_grad()
        for name, loss in losses.items():
            if iteration == 0:  # each of them reaches the student
                found = torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True)
                assert any(g is not None and torch.count_nonzero(g) for g in found), name
        sum(losses.values()).backward()
        optimizer.step()
    for name, first in curve[0].items():
        assert 0 < curve[-1][name] < 0.9 * first, (name, [c[name] for c in curve])
