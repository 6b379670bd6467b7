"""Losses of the published methods against their formulas in Python's own arithmetic."""

import math

import pytest
import torch

from kd_det import losses
from kd_det.terms.non_local import NonLocal
from tests.parity import methods

pytestmark = pytest.mark.parity

SHAPES = [(1, 2, 1, 3), (2, 4, 3, 4)]


def nested(x):
    """(N, C, H, W) as [n][c][i]."""
    return x.flatten(2).tolist()


def per_cell(x):
    """(N, 1, H, W) as [n][i]."""
    return x.flatten(1).tolist()


def maps(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2)]


def regions(shape):
    """No region, a mask, and weights with an image that counts nowhere."""
    n, _, h, w = shape
    mask = torch.ones(n, 1, h, w, dtype=torch.float64)
    mask[..., -1] = 0
    weights = torch.rand(n, 1, h, w, generator=torch.Generator().manual_seed(5)).double()
    weights[-1] *= n == 1
    return [None, mask, weights]


def close(ours, expected):
    assert math.isclose(ours.item(), expected, rel_tol=1e-10, abs_tol=1e-13)


def cases():
    return [
        pytest.param(shape, i, id=f"{'x'.join(map(str, shape))}-region{i}")
        for shape in SHAPES
        for i in range(3)
    ]


def case(shape, i):
    s, t = maps(shape)
    region = regions(shape)[i]
    return s, t, region, None if region is None else per_cell(region)


@pytest.mark.parametrize("over_cells", ["mean", "sum"])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(("shape", "i"), cases())
def test_attention_transfer(shape, i, p, over_cells):
    s, t, region, plain = case(shape, i)
    ours = losses.attention_transfer(s, t, p=p, region=region, over_cells=over_cells)
    close(ours, methods.attention_transfer(nested(s), nested(t), p, plain, over_cells == "sum"))


@pytest.mark.parametrize("cross_entropy", [False, True])
@pytest.mark.parametrize(("mode", "classes"), [("softmax", 0), ("softmax", 2), ("sigmoid", 0)])
@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize(("shape", "i"), cases())
def test_pixel_wise_kl(shape, i, tau, mode, classes, cross_entropy):
    s, t, region, plain = case(shape, i)
    options = {"mode": mode, "tau": tau, "classes": classes, "cross_entropy": cross_entropy}
    cells = methods.pixel_cells(nested(s), nested(t), mode, tau, classes or shape[1], cross_entropy)
    ours = losses.pixel_wise_kl(s, t, region=region, **options)
    close(ours, methods.mean_over_images(cells, plain))
    plain = plain or [[1.0] * len(cells[0])] * len(cells)
    total = sum(
        w * x for ws, xs in zip(plain, cells, strict=True) for w, x in zip(ws, xs, strict=True)
    )
    close(losses.pixel_wise_kl(s, t, region=region, normalizer=7.0, **options), total / 7)


@pytest.mark.parametrize("over_channels", ["mean", "sum"])
@pytest.mark.parametrize(("shape", "i"), cases())
def test_imitation(shape, i, over_channels):
    s, t, region, plain = case(shape, i)
    ours = losses.imitation(s, t, region=region, over_channels=over_channels)
    close(ours, methods.imitation(nested(s), nested(t), plain, over_channels))


@pytest.mark.parametrize(("shape", "i"), cases())
def test_channel_mean(shape, i):
    s, t, region, plain = case(shape, i)
    ours = losses.channel_mean(s, t, region=region)
    close(ours, methods.channel_mean(nested(s), nested(t), plain))


@pytest.mark.parametrize(("shape", "i"), [c for c in cases() if c.values[1] < 2])
def test_pearson_distance(shape, i):
    s, t, region, plain = case(shape, i)
    ours = losses.pearson_distance(s, t, region=region)
    close(ours, methods.pearson_distance(nested(s), nested(t), plain))


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("shape", "i"), cases())
def test_weighted_bce(shape, i, beta):
    s, t, region, plain = case(shape, i)
    cells = methods.weighted_bce_cells(nested(s), nested(t), beta)
    ours = losses.weighted_bce(s, t, beta=beta, region=region)
    close(ours, methods.mean_over_images(cells, plain))


def test_generalized_iou():
    g = torch.Generator().manual_seed(1)
    corner = 10 * torch.rand(2, 30, 2, generator=g, dtype=torch.float64)
    a, b = torch.cat([corner, corner + 8 * torch.rand(2, 30, 2, generator=g).double()], dim=-1)
    ours = losses.generalized_iou(a, b)
    assert ours.min() < 0 < ours.max()  # boxes with and without overlap
    for x, y, value in zip(a.tolist(), b.tolist(), ours, strict=True):
        close(value, methods.generalized_iou(x, y))


@pytest.mark.parametrize(("shape", "i"), cases())
def test_root_of_squares(shape, i):
    s, t, region, plain = case(shape, i)
    close(
        losses.root_of_squares(s, t, region), methods.root_of_squares(nested(s), nested(t), plain)
    )


@pytest.mark.parametrize("masked", [False, True])
def test_non_local_block(masked):
    x = maps((2, 4, 2, 3))[0]
    block = NonLocal(4, 2).double()
    torch.nn.init.normal_(block.out.weight)
    torch.nn.init.normal_(block.out.bias)
    real = regions(x.shape)[1] if masked else None
    modules = {
        name: (conv.weight.flatten(1).tolist(), conv.bias.tolist())
        for name, conv in block.named_children()
    }
    rows = [[1.0] * 6] * 2 if real is None else per_cell(real)
    expected = [methods.non_local(im, modules, w) for im, w in zip(nested(x), rows, strict=True)]
    ours = block(x, real)
    torch.testing.assert_close(ours.flatten(2), torch.tensor(expected, dtype=torch.float64))
