"""OKDCR's formulas: golden values of the transcription, and the package against it."""

import math

import pytest
import torch
from torch.testing import assert_close

from kd_det import losses
from kd_det.schedules import Ramp
from tests.parity import methods, okdcr
from tests.unit.test_channel_wise_kl import golden

pytestmark = pytest.mark.parity

TWO = [[[2.0, -1.0, 0.0], [1.0, 0.0, -1.0]], [[-1.0, 3.0, 1.0], [0.0, -2.0, 2.0]]]
THREE = [*TWO, [[1.0, 1.0, -3.0], [1.0, 1.0, -3.0]]]  # the third agrees with itself
GOLDEN = [  # weights, ensemble, intra and inter, imitation at tau 3; NumPy gave the same
    (
        TWO, "softmax", [0.606385947059, 0.393614052941],
        [0.7127718941179, -0.106385947059, 0.2872281058821],
        (0.7024369980944, 1.0698008356879), 3.6648013012018,
    ),
    (
        TWO, "sigmoid", [0.550024794408, 0.449975205592],
        [0.6000495888159, -0.050024794408, 0.3999504111841],
        (0.608674646462, 0.916752751302), 2.9376561562618,
    ),
    (
        THREE, "softmax", [0.3579330993919, 0.2323396487282, 0.4097272518799],
        [0.8304570766036, 0.3469305265481, -1.0596388322434],
        (0.7024369980944, 2.4308086809687), 5.8473754313411,
    ),
    (
        THREE, "sigmoid", [0.3284785291699, 0.2687282377059, 0.4027932331243],
        [0.7611469080261, 0.3729180873923, -0.9695266073989],
        (0.608674646462, 2.4369376717006), 5.162480323286,
    ),
]  # fmt: skip
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize(("z", "mode", "weights", "ensemble", "consistency", "imitation"), GOLDEN)
def test_golden_values_of_the_transcription(z, mode, weights, ensemble, consistency, imitation):
    assert_close(okdcr.weights(z, mode), weights, **EXACT)
    assert_close(okdcr.ensemble(z, mode), ensemble, **EXACT)
    assert_close(okdcr.consistency(z, mode), consistency, **EXACT)
    assert_close(okdcr.imitation(z, mode), imitation, **EXACT)


def test_the_transcription_by_hand():
    z = [[[0.0], [math.log(3)]], [[0.0], [0.0]]]  # probabilities 1/2 and 3/4; 1/2 twice
    assert_close(okdcr.consistency(z, "sigmoid"), (0.25, 0.25), **EXACT)
    w = 1 / (1 + math.exp(0.25))
    assert_close(okdcr.weights(z, "sigmoid"), [w, 1 - w], **EXACT)
    assert_close(okdcr.ensemble(z, "sigmoid"), [w * math.log(3) / 2], **EXACT)


def test_the_ramp():
    for step in range(0, 101, 10):
        assert_close(Ramp()(step / 100, 100), okdcr.ramp(step, 100))
    assert okdcr.ramp(79, 100) < 1 == okdcr.ramp(80, 100)


def test_mutual_learning_is_the_divergence_in_both_directions():
    one, other = golden()
    assert_close(float(losses.pixel_wise_kl(one, other)), 0.3031850552683, rtol=0, atol=1e-12)
    assert_close(float(losses.pixel_wise_kl(other, one)), 0.3079787, rtol=0, atol=5e-8)
    assert losses.pixel_wise_kl(one, one) == 0  # identical peers


# -- the package ----------------------------------------------------------------------------------

HEADS = [(k, j) for k in range(3) for j in range(2)]
PEERS, IMAGES, ANCHORS, CLASSES, GRID = 3, 2, 2, 3, (2, 3)


def logits():
    """``[k][j]`` (N, A K, H, W) of every head."""
    g = torch.Generator().manual_seed(0)
    shape = (PEERS, 2, IMAGES, ANCHORS * CLASSES, *GRID)
    return 2 * torch.randn(shape, generator=g, dtype=torch.float64)


def sample(z, n, i, a):
    """``[k][j][c]`` of an anchor of a cell."""
    return z.flatten(4)[:, :, n, a * CLASSES : (a + 1) * CLASSES, i].tolist()


def cells(z, value):
    """``[n][i]``: what is found of a sample, summed over anchors."""
    places = range(z[0, 0, 0, 0].numel())
    return [
        [sum(value(sample(z, n, i, a)) for a in range(ANCHORS)) for i in places]
        for n in range(IMAGES)
    ]


def weights_of_cells(kind):
    if kind == "all":
        return None
    region = torch.rand(IMAGES, 1, *GRID, generator=torch.Generator().manual_seed(1)).double()
    region[0, ..., -1] = 0
    if kind == "empty":
        region[1] = 0
    return region


@pytest.mark.parametrize("kind", ["all", "weights", "empty"])
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_consistency_is_the_transcription(mode, kind):
    z, region = logits(), weights_of_cells(kind)
    plain = None if region is None else region.flatten(1).tolist()
    pairs = [(a, b) for a in HEADS for b in HEADS if a < b and (a[0] == b[0] or a[1] == b[1])]
    for wanted, same in enumerate((True, False)):  # intra, inter
        expected = cells(z, lambda x, wanted=wanted: okdcr.consistency(x, mode)[wanted])
        given = [(z[a], z[b]) for a, b in pairs if (a[0] == b[0]) == same]
        options = {"mode": mode, "classes": CLASSES, "region": region}
        found = sum(losses.consistency(a, b, **options) for a, b in given)
        assert_close(float(found), methods.mean_over_images(expected, plain), **EXACT)
        total = sum(
            w * x
            for ws, xs in zip(plain or [[1.0] * len(expected[0])] * IMAGES, expected, strict=True)
            for w, x in zip(ws, xs, strict=True)
        )
        found = sum(losses.consistency(a, b, normalizer=7.0, **options) for a, b in given)
        assert_close(float(found), total / 7, **EXACT)


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_the_ensemble_and_its_imitation_are_the_transcription(mode):
    z = logits()
    found = losses.ensemble_logits([(a, b) for a, b in z], mode=mode, classes=CLASSES)
    for n in range(IMAGES):
        for i in range(found[0, 0].numel()):
            for a in range(ANCHORS):
                ours = found.flatten(2)[n, a * CLASSES : (a + 1) * CLASSES, i]
                assert_close(ours.tolist(), okdcr.ensemble(sample(z, n, i, a), mode), **EXACT)
    ours = sum(
        losses.pixel_wise_kl(z[head], found, mode=mode, tau=3.0, classes=CLASSES) for head in HEADS
    )
    expected = methods.mean_over_images(cells(z, lambda x: okdcr.imitation(x, mode)), None)
    assert_close(float(ours), expected, **EXACT)


@pytest.mark.parametrize(("z", "mode", "_", "ensemble", "consistency", "imitation"), GOLDEN)
def test_golden_values_of_the_package(z, mode, _, ensemble, consistency, imitation):
    x = torch.tensor(z, dtype=torch.float64)[:, :, None, :, None, None]  # one cell, one anchor
    found = losses.ensemble_logits([(a, b) for a, b in x], mode=mode)
    assert_close(found.flatten().tolist(), ensemble, **EXACT)
    intra = sum(losses.consistency(a, b, mode=mode) for a, b in x)
    assert_close(float(intra), consistency[0], **EXACT)
    heads = [head for peer in x for head in peer]
    taught = sum(losses.pixel_wise_kl(head, found, mode=mode, tau=3.0) for head in heads)
    assert_close(float(taught), imitation, **EXACT)
