"""Terms alone: wired to shapes and run on maps of noise, without a Distiller or a teacher."""

import math

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from kd_det.context import Context
from kd_det.detectors import TapShape
from tests.toys import toy_cfg

STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
SIZES = ((64, 96), (50, 70))
KINDS = {"features": "feature", "cls_logits": "logits", "box_deltas": "deltas"}
CHANNELS = {"features": (4, 6), "cls_logits": (6, 6), "box_deltas": (8, 8)}
ANCHORS = {"features": 0, "cls_logits": 2, "box_deltas": 2}


def shapes(tap, side):
    kind, channels = KINDS[tap], CHANNELS[tap][side]
    return [TapShape(k, channels, s, "", kind, 1, ANCHORS[tap]) for k, s in STRIDES.items()]


def maps(tap, side, n=2, canvas=(64, 96)):
    g = torch.Generator().manual_seed(7 * len(tap) + side)
    grids = {k: [math.ceil(x / s) for x in canvas] for k, s in STRIDES.items()}
    return {k: torch.randn(n, CHANNELS[tap][side], *grid, generator=g) for k, grid in grids.items()}


def toy_student():
    model = build_model(toy_cfg(sizes=2)).eval()
    model.loss_normalizer = 20.0
    return model


def toy_context(student):
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
