"""OKDCR's formulas: golden values of the transcription, and the package against it."""

import math

import pytest
from torch.testing import assert_close

from kd_det import losses
from kd_det.schedules import Ramp
from tests.parity import okdcr
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
