"""Regions against a loop over cells, and what a Context says of a batch."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import ImageList

from kd_det.context import Context
from kd_det.regions import Ones, Padding
from tests import toys


def by_cells(sizes, h, w, stride):
    """A cell counts when the pixel that it begins with lies inside of its image."""
    weights = torch.zeros(len(sizes), 1, h, w)
    for n, (height, width) in enumerate(sizes):
        for i in range(h):
            for j in range(w):
                weights[n, 0, i, j] = float(i * stride < height and j * stride < width)
    return weights


SIZES = [
    [(64, 96), (33, 40)],
    [(64, 64), (64, 65), (1, 96)],
    [(31, 17)],
    [(40, 96), (64, 41)],  # neither image covers the canvas
]


@pytest.mark.parametrize("stride", [8, 16, 32, 64])
@pytest.mark.parametrize("sizes", SIZES)
def test_padding_equals_a_loop_over_cells(sizes, stride):
    images = ImageList.from_tensors([torch.ones(3, *size) for size in sizes], 64)
    h, w = (-(-side // stride) for side in images.tensor.shape[-2:])
    target = torch.rand(len(sizes), 2, h, w)
    region = Padding()(SimpleNamespace(image_sizes=sizes), target, target, stride)
    expected = by_cells(sizes, h, w, stride)
    if region is None:
        assert expected.all()
    else:
        assert torch.equal(region, expected)
        assert not expected.all()  # None is cheaper, and is given when it can be
        assert not region.requires_grad


def test_a_cell_with_any_pixel_of_the_image_in_it_counts():
    # Detectron2 pads at the bottom and on the right, so a cell that begins inside has image in it,
    # and one that does not has none.
    sizes = [(33, 40), (64, 96)]
    images = ImageList.from_tensors([torch.ones(3, *size) for size in sizes], 32)
    cells = torch.nn.functional.max_pool2d(images.tensor[:, :1], 16, 16)
    region = Padding()(SimpleNamespace(image_sizes=sizes), cells, cells, 16)
    assert torch.equal(region, cells)


def test_ones_counts_the_padding_too():
    x = torch.rand(1, 2, 4, 4)
    assert Ones()(SimpleNamespace(image_sizes=[(1, 1)]), x, x, 8) is None


def test_sizes_and_ground_truth_of_a_context():
    inputs = toys.batch(((48, 64), (32, 40)))
    context = Context(inputs, "BGR", torch.nn.Identity())
    assert context.image_sizes == [(48, 64), (32, 40)]
    assert context.instances == [x["instances"] for x in inputs]
    del inputs[1]["instances"]
    with pytest.raises(ValueError, match="ground truth"):
        _ = context.instances
