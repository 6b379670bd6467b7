"""Distances between predictions: against definitions from textbooks, gradients, types, no rows."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.testing import assert_close

from kd_det.losses import bernoulli_kl, delta_gap, softmax_kl

TAUS = [0.5, 1.0, 4.0]


def logits(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("tau", TAUS)
def test_softmax_kl_is_the_divergence_of_two_categoricals(tau):
    s, t = logits(5, 4), logits(5, 4, seed=1)
    p, q = (Categorical(logits=x / tau) for x in (t, s))
    assert_close(softmax_kl(s, t, tau=tau), tau**2 * kl_divergence(p, q))
    assert not torch.allclose(kl_divergence(p, q), kl_divergence(q, p))


@pytest.mark.parametrize("tau", TAUS)
def test_bernoulli_kl_is_the_divergence_of_two_bernoullis(tau):
    s, t = logits(5, 4), logits(5, 4, seed=1)
    p, q = (Bernoulli(logits=x / tau) for x in (t, s))
    assert_close(bernoulli_kl(s, t, tau=tau), tau**2 * kl_divergence(p, q))


@pytest.mark.parametrize(
    ("loss", "to_probability"),
    [(softmax_kl, lambda x: x.softmax(-1)), (bernoulli_kl, torch.sigmoid)],
)
@pytest.mark.parametrize("tau", TAUS)
def test_the_gradient_is_tau_times_the_difference_of_probabilities(loss, to_probability, tau):
    s, t = logits(5, 4).requires_grad_(), logits(5, 4, seed=1).requires_grad_()
    loss(s, t, tau=tau).sum().backward()
    assert_close(s.grad, tau * (to_probability(s / tau) - to_probability(t / tau)).detach())
    assert t.grad is None


@pytest.mark.parametrize("loss", [softmax_kl, bernoulli_kl, delta_gap])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_sides_are_zero_without_a_pull_in_every_type(loss, dtype):
    x = logits(3, 4, dtype=dtype)
    s = x.clone().requires_grad_()
    value = loss(s, x)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.count_nonzero(value) == 0
    value.sum().backward()
    assert float(s.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("loss", [softmax_kl, bernoulli_kl])
def test_logits_far_out_are_finite(loss):
    s = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
    value = loss(s, -s.detach()).sum()
    value.backward()
    assert math.isfinite(value.detach())
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("loss", [softmax_kl, bernoulli_kl, delta_gap])
def test_no_rows_are_an_attached_nothing(loss):
    s = torch.zeros(0, 4, requires_grad=True)
    value = loss(s, torch.zeros(0, 4)).sum()
    assert value == 0
    value.backward()
    assert s.grad.shape == (0, 4)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_delta_gap_by_hand(beta):
    s, t = torch.tensor([1.0, 0.25, -2.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    expected = {0.0: 1 + 0.25 + 3, 0.5: (1 - 0.25) + 0.5 * 0.25**2 / 0.5 + (3 - 0.25)}[beta]
    assert_close(delta_gap(s, t, beta=beta), torch.tensor(expected))


def test_delta_gap_brings_the_teacher_into_the_students_units():
    ratio = (2.0, 2.0, 0.5, 1 / 3)
    t = logits(3, 2, 4)
    assert_close(
        delta_gap(t * torch.tensor(ratio, dtype=t.dtype), t, ratio=ratio).sum(), 0.0 * t[0, 0, 0]
    )
    maps = logits(2, 3, 4, 5, 6)  # (N, A, 4, H, W)
    moved = maps * torch.tensor(ratio, dtype=maps.dtype).view(4, 1, 1)
    found = delta_gap(moved + 1, maps, ratio=ratio, dim=-3)
    assert_close(found, torch.full((2, 3, 5, 6), 4.0, dtype=torch.float64))


def test_delta_gap_of_one_delta_for_all_classes():
    s, t = logits(3, 1, 4), logits(3, 5, 4, seed=1)
    assert_close(delta_gap(s, t), delta_gap(s.expand(3, 5, 4), t))
