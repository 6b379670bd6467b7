"""Regions against loops over cells, boxes and anchors."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from kd_det.boxes import decode
from kd_det.context import Context
from kd_det.regions import AnchorIoU, Attention, GTBox, Padding, TeacherScore, TopBoxes
from tests.parity import methods
from tests.toys import toy_cfg

pytestmark = pytest.mark.parity

CANVAS = (128, 192)
SIZES = ((128, 160), (97, 192), (64, 64))
STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
BOXES = [
    # On a cell's border, across cells, smaller than a cell, beyond the border of the image.
    [[16.0, 8, 64, 40], [70.0, 50, 121, 97], [33.0, 33, 36, 35], [140.0, 40, 160, 70]],
    [[-5.0, 20.0, 191.9, 96.5]],
    [],
]


@pytest.fixture(scope="module")
def student():
    return build_model(toy_cfg(sizes=2, ratios=(0.5, 1.0))).eval()


@pytest.fixture
def context(student):
    inputs = []
    for (h, w), boxes in zip(SIZES, BOXES, strict=True):
        instances = Instances((h, w))
        instances.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
        inputs.append({"image": torch.zeros(3, h, w), "instances": instances})
    return Context(inputs, "BGR", student)


def grid(level):
    return tuple(math.ceil(side / STRIDES[level]) for side in CANVAS)


def target(level, channels=4, seed=0):
    g = torch.Generator().manual_seed(10 * seed + STRIDES[level])  # no two levels alike
    return torch.randn(3, channels, *grid(level), generator=g, dtype=torch.float64)


def by_cells(level, value):
    h, w = grid(level)
    return torch.tensor([[[value(n, i, j) for j in range(w)] for i in range(h)] for n in range(3)])[
        :, None
    ].float()


def inside(n, i, j, stride):
    return i * stride < SIZES[n][0] and j * stride < SIZES[n][1]


def in_box(box, i, j, stride):
    """Whether the open cell and the open box meet."""
    x0, y0, x1, y1 = box
    return x0 < (j + 1) * stride and x1 > j * stride and y0 < (i + 1) * stride and y1 > i * stride


def number_of_cells(box, level):
    h, w = grid(level)
    return sum(in_box(box, i, j, STRIDES[level]) for i in range(h) for j in range(w))


@pytest.mark.parametrize("per_area", [False, True])
@pytest.mark.parametrize("level", STRIDES)
def test_ground_truth_boxes(context, level, per_area):
    def value(n, i, j):
        hit = [b for b in BOXES[n] if in_box(b, i, j, STRIDES[level])]
        if not per_area:
            return float(bool(hit))
        return max((1 / number_of_cells(b, level) for b in hit), default=0.0)

    x = target(level)
    region = GTBox(per_area=per_area)(context, x, x, STRIDES[level])
    torch.testing.assert_close(region, by_cells(level, value))
    assert region[:2].any()
    assert not region[2].any()


def anchors_by_cell(context):
    """``[level][i][j]``: the anchors of a cell, out of Detectron2's own generator."""
    generator = context.student.anchor_generator
    maps = [torch.empty(1, 1, *grid(level)) for level in STRIDES]
    cells = {}
    for level, boxes in zip(STRIDES, generator(maps), strict=True):
        h, w = grid(level)
        cells[level] = boxes.tensor.view(h, w, -1, 4).tolist()
    return cells


@pytest.mark.parametrize("every_level", [True, False])
@pytest.mark.parametrize("psi", [0.1, 0.5, 0.8])
def test_anchor_overlap(context, psi, every_level):
    cells = anchors_by_cell(context)
    marked = {level: set() for level in STRIDES}
    for n, boxes in enumerate(BOXES):
        for box in boxes:
            overlap = {
                (level, i, j): max(methods.iou(a, box) for a in anchors)
                for level, rows in cells.items()
                for i, row in enumerate(rows)
                for j, anchors in enumerate(row)
                if inside(n, i, j, STRIDES[level])
            }
            best = max(overlap, key=overlap.get)
            for (level, i, j), value in overlap.items():
                if value > psi * overlap[best] and (every_level or level == best[0]):
                    marked[level].add((n, i, j))
    for level, stride in STRIDES.items():
        x = target(level)
        region = AnchorIoU(psi=psi, every_level=every_level)(context, x, x, stride)
        assert torch.equal(region, by_cells(level, lambda *c, m=marked[level]: float(c in m)))
    assert sum(bool(m) for m in marked.values()) > 1  # more than one level is marked


@pytest.mark.parametrize("level", STRIDES)
def test_teacher_score(context, level):
    logits = {k: target(k, channels=6, seed=2) for k in STRIDES}
    x = target(level)
    context = context.with_targets({"cls_logits": logits})
    region = TeacherScore()(context, x, x, STRIDES[level])

    def value(n, i, j):
        if not inside(n, i, j, STRIDES[level]):
            return 0.0
        return max(methods.sigmoid(row[i][j]) for row in logits[level][n].tolist())

    torch.testing.assert_close(region, by_cells(level, value))


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("level", STRIDES)
def test_attention(context, level, tau):
    s, t = target(level, seed=3), target(level, seed=4)
    region = Attention(tau=tau)(context, s, t, STRIDES[level])
    cells = Padding()(context, s, t, STRIDES[level])
    real = [[1.0] * s[0, 0].numel()] * 3 if cells is None else cells.flatten(1).tolist()
    sides = [methods.attention(x.flatten(2).tolist(), tau, real) for x in (s, t)]
    for n in range(3):
        mean = [(a + b) / 2 for a, b in zip(sides[0][n], sides[1][n], strict=True)]
        torch.testing.assert_close(region[n].flatten().tolist(), mean)
        assert math.isclose(region[n].sum().item(), sum(real[n]), rel_tol=1e-9)


def test_top_boxes(context):
    anchors = anchors_by_cell(context)
    logits = {k: target(k, channels=4 * 3, seed=5).float() for k in STRIDES}
    deltas = {k: target(k, channels=4 * 4, seed=6).float() / 2 for k in STRIDES}
    context.student_maps = {"cls_logits": logits, "box_deltas": deltas}
    k = 7
    chosen = []
    for n, (height, width) in enumerate(SIZES):
        found = []
        for level in STRIDES:
            scores, moves = logits[level][n].tolist(), deltas[level][n].tolist()
            for i, row in enumerate(anchors[level]):
                for j, cell in enumerate(row):
                    for a, anchor in enumerate(cell):
                        score = max(scores[3 * a + c][i][j] for c in range(3))
                        box = methods.decode(anchor, [moves[4 * a + d][i][j] for d in range(4)])
                        found.append((score, box))
        found.sort(key=lambda x: -x[0])
        chosen.append(
            [
                [min(max(v, 0.0), side) for v, side in zip(b, (width, height) * 2, strict=True)]
                for _, b in found[:k]
            ]
        )
    for level, stride in STRIDES.items():

        def value(n, i, j, level=level, stride=stride):
            hit = [b for b in chosen[n] if b[0] < b[2] and b[1] < b[3]]
            hit = [b for b in hit if in_box(b, i, j, stride)]
            return sum(1 / number_of_cells(b, level) for b in hit)

        x = target(level)
        region = TopBoxes(k=k)(context, x, x, stride)
        torch.testing.assert_close(region, by_cells(level, value), rtol=1e-5, atol=1e-5)


def test_decoded_boxes(context):
    anchors = anchors_by_cell(context)
    deltas = [target(k, channels=4 * 4, seed=6).float() for k in STRIDES]
    for level, x, boxes in zip(STRIDES, deltas, decode(context, deltas), strict=True):
        h, w = grid(level)
        assert boxes.shape == (3, 4, 4, h, w)
        n, a, i, j = 1, 2, h - 1, w - 1
        expected = methods.decode(anchors[level][i][j][a], x[n, 4 * a : 4 * a + 4, i, j].tolist())
        torch.testing.assert_close(boxes[n, a, :, i, j].tolist(), expected, rtol=1e-5, atol=1e-3)
