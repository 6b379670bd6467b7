"""Pairing levels by stride and origin, and bringing two maps to one grid."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torch.testing import assert_close

from kd_det.detectors import TapShape, describe, probe
from kd_det.pairing import Pair, on_one_grid, pair_levels
from tests import toys


def levels(**strides):
    return [TapShape(level, 8, stride) for level, stride in strides.items()]


def names(pairs):
    return [(pair.student.level, pair.target.level) for pair in pairs]


PYRAMID = levels(p3=8, p4=16, p5=32)


def features(model):
    tap = describe(model).tap("features")
    return probe(model, [tap])["features"]


@pytest.fixture(scope="module")
def retinanet():
    return features(build_model(toys.toy_cfg()))


@pytest.fixture(scope="module")
def rcnn():
    return features(build_model(toys.toy_cfg(arch="GeneralizedRCNN")))


# -- levels ---------------------------------------------------------------------------------------


def test_levels_of_one_stride_are_a_pair_whatever_their_names():
    target = levels(c2=4, c3=8, c4=16)
    assert names(pair_levels(PYRAMID, target)) == [("p3", "c3"), ("p4", "c4")]


def test_one_name_goes_first_among_equal_strides():
    student = levels(a=8, b=8)
    assert names(pair_levels(student, levels(b=8, a=8))) == [("a", "a"), ("b", "b")]


def test_all_levels_of_one_architecture(retinanet):
    found = names(pair_levels(retinanet, retinanet))
    assert found == [(f"p{i}", f"p{i}") for i in range(3, 8)]


def test_across_architectures_only_the_pyramid_proper_is_paired(retinanet, rcnn):
    assert [s.stride for s in rcnn] == [4, 8, 16, 32, 64]
    assert names(pair_levels(retinanet, rcnn)) == [(f"p{i}", f"p{i}") for i in range(3, 6)]
    assert names(pair_levels(rcnn, retinanet)) == [(f"p{i}", f"p{i}") for i in range(3, 6)]


def test_naming_levels_overrides_the_origin(retinanet, rcnn):
    assert names(pair_levels(retinanet, rcnn, ("p5", "p6"))) == [("p5", "p5"), ("p6", "p6")]


def test_named_levels_keep_their_order_and_count_once():
    # Level weights are given in the order of the names.
    assert names(pair_levels(PYRAMID, PYRAMID, ("p5", "p3", "p5"))) == [("p5", "p5"), ("p3", "p3")]


def test_one_level_each_is_a_pair_whatever_the_strides():
    student, target = levels(res4=16), levels(res3=8)
    assert names(pair_levels(student, target)) == [("res4", "res3")]
    assert names(pair_levels(student, target, ("res4",))) == [("res4", "res3")]


@pytest.mark.parametrize(
    ("student", "target", "asked", "words"),
    [
        (PYRAMID, PYRAMID, ("p33",), r"no level 'p33'\. Did you mean 'p3'"),
        (PYRAMID, PYRAMID, ("p3", "q"), "student's levels are p3, p4, p5"),
        (
            PYRAMID,
            levels(p3=8, p4=16),
            ("p5",),
            r"p5 \(stride 32\) has no partner.*p3 \(stride 8\)",
        ),
        (PYRAMID, levels(x=64, y=128), (), r"no level of the student.*p4 \(stride 16\)"),
        (levels(res4=16), levels(res3=8), ("res5",), "no level 'res5'"),
    ],
)
def test_errors(student, target, asked, words):
    with pytest.raises(ValueError, match=words):
        pair_levels(student, target, asked)


# -- one grid -------------------------------------------------------------------------------------


def pair(student, target):
    return Pair(TapShape("s", 1, student), TapShape("t", 1, target))


def test_equal_grids_are_left_alone():
    s, t = torch.rand(1, 2, 4, 5), torch.rand(1, 3, 4, 5)
    on_grid = on_one_grid(s, t, pair(8, 8))
    assert torch.equal(on_grid[0], s)
    assert torch.equal(on_grid[1], t)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(on_grid, (s, t), strict=True))


def test_at_one_stride_the_common_part_is_kept_not_resized():
    s, t = torch.rand(1, 2, 6, 4), torch.rand(1, 2, 5, 7)
    a, b = on_one_grid(s, t, pair(8, 8))
    assert torch.equal(a, s[..., :5, :4])
    assert torch.equal(b, t[..., :5, :4])


@pytest.mark.parametrize(("student", "target"), [(16, 8), (8, 16), (32, 8)])
def test_at_other_strides_the_student_comes_to_the_targets_grid(student, target):
    s = torch.rand(1, 2, 64 // student, 96 // student)
    t = torch.rand(1, 2, 64 // target, 96 // target)
    a, b = on_one_grid(s, t, pair(student, target))
    assert torch.equal(b, t)
    expected = F.interpolate(s, size=t.shape[-2:], mode="bilinear", align_corners=False)
    assert_close(a, expected)


@pytest.mark.parametrize(("student", "target"), [(16, 8), (8, 16), (8, 8)])
@pytest.mark.parametrize("student_pads_more", [False, True])
def test_a_pixel_stays_where_it_is_when_the_two_pad_differently(student, target, student_pads_more):
    # Both maps hold the coordinate of their cells' centres, so they must agree on the common grid.
    def centres(stride, height, width):
        y = (torch.arange(height // stride) + 0.5) * stride
        x = (torch.arange(width // stride) + 0.5) * stride
        return torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]

    sizes = [(64, 96), (96, 128)]
    s = centres(student, *sizes[student_pads_more])
    t = centres(target, *sizes[not student_pads_more])
    a, b = on_one_grid(s, t, pair(student, target))
    assert a.shape == b.shape == (1, 2, 64 // target, 96 // target)
    # The half cell at the border is clamped by bilinear interpolation.
    assert_close(a[..., 1:-1, 1:-1], b[..., 1:-1, 1:-1])


def test_grids_that_strides_do_not_divide():
    # A C4 detector does not pad to a multiple: 65 pixels are 9 cells of 8 and 5 cells of 16.
    a, b = on_one_grid(torch.rand(1, 1, 5, 5), torch.rand(1, 1, 9, 9), pair(16, 8))
    assert a.shape == b.shape == (1, 1, 9, 9)
    a, b = on_one_grid(torch.rand(1, 1, 9, 9), torch.rand(1, 1, 5, 5), pair(8, 16))
    assert a.shape == b.shape == (1, 1, 5, 5)


def test_gradients_reach_the_student_through_a_resize():
    s = torch.rand(1, 1, 2, 2, requires_grad=True)
    a, _ = on_one_grid(s, torch.rand(1, 1, 4, 4), pair(16, 8))
    a.sum().backward()
    assert_close(s.grad, torch.full_like(s, 4.0))
