"""Consistency and the ensemble of networks: closed forms, gradients, regions, extremes."""

import math

import pytest
import torch
from torch.testing import assert_close

from kd_det.losses import MODES, consistency, ensemble_logits
from kd_det.terms import Consistency
from tests.lone_terms import STRIDES, maps, run, toy_context, toy_student, wired
from tests.unit.test_channel_wise_kl import random_pair

SHAPE = (2, 6, 4, 5)  # two anchors of three classes
EACH = {"classes": 3}


def gradients(loss, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*inputs), inputs)


# -- the distance ---------------------------------------------------------------------------------


def test_the_mean_over_classes_and_the_sum_over_anchors():
    zero = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    other = torch.tensor([math.log(3), -math.log(3), 0, math.log(3)]).double().view(1, 4, 1, 1)
    one_anchor = (0.25 + 0.25 + 0 + 0.25) / 4
    assert_close(float(consistency(zero, other)), one_anchor)
    assert_close(float(consistency(zero, other, classes=2)), 2 * one_anchor)
    # 1/2 against 9/10 and 1/10; 1/2 against 1/4 and 3/4
    apart = float(consistency(zero, other, classes=2, mode="softmax"))
    assert_close(apart, (0.4 + 0.4) / 2 + (0.25 + 0.25) / 2)


@pytest.mark.parametrize("mode", MODES)
def test_it_is_symmetric_and_moves_both(mode):
    a, b = random_pair(SHAPE)
    loss = lambda x, y: consistency(x, y, mode=mode, **EACH)  # noqa: E731
    assert_close(loss(a, b), loss(b, a))
    assert torch.autograd.gradcheck(loss, (a.requires_grad_(), b.requires_grad_()))
    of_a, of_b = gradients(loss, a, b)
    assert_close((of_b, of_a), gradients(loss, b, a))
    if mode == "sigmoid":  # both towards each other
        assert torch.equal(of_a.sign(), (a - b).sign())
        assert torch.equal(of_b.sign(), (b - a).sign())


@pytest.mark.parametrize("mode", MODES)
def test_where_both_agree_it_is_zero_and_flat(mode):
    a, _ = random_pair(SHAPE)
    assert consistency(a, a.clone(), mode=mode, **EACH) == 0
    for grad in gradients(lambda x, y: consistency(x, y, mode=mode, **EACH), a, a):
        assert not grad.any()


def test_a_softmax_does_not_see_a_constant_over_the_classes_of_an_anchor():
    a, _ = random_pair(SHAPE)
    moved = a + torch.tensor([5.0] * 3 + [-2.0] * 3).view(1, 6, 1, 1)
    assert_close(consistency(moved, a, mode="softmax", **EACH), torch.zeros((), dtype=a.dtype))
    assert consistency(moved, a, mode="softmax") > 0.01
    assert consistency(moved, a, **EACH) > 0.01


def test_regions_and_normalizers():
    a, b = random_pair(SHAPE)
    region = torch.zeros(2, 1, 4, 5, dtype=torch.float64)
    region[..., :3, :2] = 1
    a[..., 3:, :] = 1e4
    b[..., 2:] = -1e4
    cropped = consistency(a[..., :3, :2], b[..., :3, :2], **EACH)
    assert_close(consistency(a, b, region=region, **EACH), cropped)
    assert_close(consistency(a, b, region=region, normalizer=8.0, **EACH), 12 * cropped / 8)
    for grad in gradients(lambda x, y: consistency(x, y, region=region, **EACH), a, b):
        assert not (grad * (1 - region)).any()
    value = consistency(a.requires_grad_(), b, region=torch.zeros(2, 1, 4, 5), **EACH)
    assert value == 0
    assert value.requires_grad


# -- the ensemble ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_identical_heads_have_uniform_weights(mode):
    a, b = random_pair(SHAPE)
    mean = (a + b) / 2
    assert_close(ensemble_logits([(a, a), (b, b)], mode=mode, **EACH), mean)
    assert_close(ensemble_logits([(a, None), (b, None)], mode=mode, **EACH), mean)
    assert_close(ensemble_logits([(a, a), (b, None)], mode=mode, **EACH), mean)


@pytest.mark.parametrize("mode", MODES)
def test_weights_sum_to_one(mode):
    mean, gap = random_pair(SHAPE)
    networks = [(mean + k * gap, mean - k * gap) for k in range(4)]  # of one mean each
    assert_close(ensemble_logits(networks, mode=mode, **EACH), mean)


def test_who_agrees_with_itself_counts_more_anchor_by_anchor():
    zero = torch.zeros(1, 4, 1, 1)
    a, b = zero + 1, zero - 1
    apart = torch.tensor([math.log(3), -math.log(3), 0, 0]).view(1, 4, 1, 1)
    # The first network's heads disagree by D = 1/4 at the first anchor alone.
    found = ensemble_logits([(zero, apart), (b, b)], classes=2).flatten()
    w = 1 / (1 + math.exp(0.25))
    mean = torch.tensor([math.log(3), -math.log(3), 0, 0]) / 2
    share = torch.tensor([w, w, 0.5, 0.5])
    assert_close(found, share * mean - (1 - share))
    assert_close(ensemble_logits([(a, None), (b, b)]), zero)


def test_the_ensemble_is_a_constant():
    a, b = (x.requires_grad_() for x in random_pair(SHAPE))
    assert not ensemble_logits([(a, b), (b, None)], **EACH).requires_grad


# -- both -----------------------------------------------------------------------------------------

BOTH = {
    "consistency": consistency,
    "ensemble": lambda a, b, **kw: ensemble_logits([(a, b), (b, None)], **kw),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BOTH)
def test_half_precision_is_computed_in_float32(name, dtype):
    a, b = random_pair(SHAPE, dtype=dtype)
    expected = BOTH[name](a.double(), b.double(), **EACH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = BOTH[name](a, b, **EACH)
    assert value.dtype == torch.float32
    assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_extremes_stay_finite(mode):
    a, b = random_pair(SHAPE, dtype=torch.float32)
    for x, y in ((1e4 * a.sign(), 1e4 * b.sign()), (a * 0 + 1e4, a * 0 - 1e4)):
        value = consistency(x, y, mode=mode, **EACH)
        assert 0 <= value <= 2
        grads = gradients(lambda x, y: consistency(x, y, mode=mode, **EACH), x, y)
        assert all(grad.isfinite().all() for grad in grads)
        assert ensemble_logits([(x, y), (y, y)], mode=mode, **EACH).abs().max() <= 1e4


@pytest.mark.parametrize("name", BOTH)
def test_errors(name):
    a, b = random_pair(SHAPE)
    with pytest.raises(ValueError, match=r"mode is one of softmax, sigmoid, but got 'tanh'"):
        BOTH[name](a, b, mode="tanh")
    with pytest.raises(ValueError, match=r"6 channels.*4 classes each"):
        BOTH[name](a, b, classes=4)


# -- the term -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student():
    return toy_student()


@pytest.mark.parametrize("options", [{}, {"mode": "softmax"}, {"normalizer": "positives"}])
def test_the_term_asks_for_both_sides_and_tells_the_loss_all(student, options):
    context = toy_context(student)
    term = wired(Consistency(**options))
    assert term.moves_target
    sides = [{k: x.requires_grad_() for k, x in maps("cls_logits", i).items()} for i in (0, 1)]
    values = run(term, context, *({"cls_logits": side} for side in sides))
    number = 20.0 if "normalizer" in options else None
    for level, stride in STRIDES.items():
        s, t = (side[level] for side in sides)
        region = term.region(context, s, t, stride)
        mode = options.get("mode", "sigmoid")
        expected = consistency(s, t, mode=mode, region=region, normalizer=number, **EACH)
        assert_close(values[level], expected)
    sum(values.values()).backward()
    for side in sides:
        assert all(x.grad is not None and x.grad.any() for x in side.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Consistency(mode="l1"), "Consistency's mode is one of softmax, sigmoid.*'l1'"),
        (lambda: Consistency(normalizer="images"), "Consistency's normalizer.*'images'"),
        (lambda: Consistency(num_classes=-1), "Consistency needs num_classes >= 0, but got -1"),
        (lambda: wired(Consistency(num_classes=4)), "3 classes per anchor.*NUM_CLASSES says 4"),
    ],
)
def test_errors_of_the_term(make, message):
    with pytest.raises(ValueError, match=message):
        make()
