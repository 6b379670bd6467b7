"""A test of the tests of regions and decoded boxes: see `tests.unit.test_method_mutants`."""

import pytest

from tests.parity import test_regions_parity as by_loops
from tests.unit import test_region_kinds as kinds
from tests.unit.test_method_mutants import must_fail


def on_boxes(check, *args):
    """A test against loops, with the context that pytest would give it."""
    return lambda: check(by_loops.context.__wrapped__(by_loops.student.__wrapped__()), *args)


def of_kind(check, *args):
    return lambda: check(kinds.student.__wrapped__(), *args)


MUTANTS = {
    "boxes: coordinates of anchors mixed up": (
        "boxes.py", "unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2)",
        "unflatten(1, (4, -1)).permute(0, 3, 4, 2, 1)", on_boxes(by_loops.test_decoded_boxes),
    ),
    "boxes by the size of the image": (
        "regions/boxes.py", "torch.arange(grid[0], device=boxes.device) * stride",
        "torch.arange(grid[0], device=boxes.device) * 50 / grid[0]",
        of_kind(kinds.test_boxes_are_placed_by_the_stride_and_not_by_the_image),
    ),
    "inclusive borders": (
        "regions/boxes.py", "(y0 < y + stride) & (y < y1)", "(y0 < y + stride) & (y <= y1)",
        on_boxes(by_loops.test_ground_truth_boxes, "p3", False),
    ),
    "rows and columns swapped": (
        "regions/boxes.py", "x0, y0, x1, y1 = boxes", "y0, x0, y1, x1 = boxes",
        on_boxes(by_loops.test_ground_truth_boxes, "p3", False),
    ),
    "the largest box decides": (
        "regions/gt_box.py", "torch.where(inside, share, 0.0).amax(1, keepdim=True)",
        "(torch.where(inside, share, 2.0).amin(1, keepdim=True) % 2)",
        of_kind(kinds.test_every_box_weighs_the_same_per_area),
    ),
    "best anchor of the level": (
        "regions/anchor_iou.py", "best.amax(1, keepdim=True)", "best[:, :1]",
        on_boxes(by_loops.test_anchor_overlap, 0.5, True),
    ),
    "anchors of the padding": (
        "regions/anchor_iou.py", "pairwise_iou(Boxes(boxes), anchors) * mine",
        "pairwise_iou(Boxes(boxes), anchors)", on_boxes(by_loops.test_anchor_overlap, 0.1, True),
    ),
    "every level where one was asked for": (
        "regions/anchor_iou.py", "if not self.every_level:", "if False:",
        on_boxes(by_loops.test_anchor_overlap, 0.5, False),
    ),
    "scores of the padding": (
        "regions/teacher_score.py", "score if cells is None else score * cells", "score",
        on_boxes(by_loops.test_teacher_score, "p3"),
    ),
    "scores of another level": (
        "regions/teacher_score.py", "min(covering, key", "max(covering, key",
        on_boxes(by_loops.test_teacher_score, "p4"),
    ),
    "attention of one side": (
        "regions/attention.py", "+ self._attention(target, cells)) / 2",
        "+ self._attention(student, cells)) / 2", on_boxes(by_loops.test_attention, "p3", 0.5),
    ),
    "attention sums to 1": (
        "regions/attention.py", "* cells * inside", "* cells",
        on_boxes(by_loops.test_attention, "p3", 0.5),
    ),
    "proposals weigh by their size": (
        "regions/top_boxes.py", "counts(rows, columns, 1 / areas(rows, columns))",
        "counts(rows, columns)", of_kind(kinds.test_every_proposal_weighs_the_same),
    ),
    "the worst proposals": (
        "regions/top_boxes.py", "every.topk(", "(-every).topk(", on_boxes(by_loops.test_top_boxes),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_fails_its_test(monkeypatch, name):
    must_fail(monkeypatch, MUTANTS[name])
