"""Channel-wise KL of a pyramid in one call, and under torch.compile."""

import pytest
import torch
from torch.testing import assert_close

from kd_det.losses import channel_wise_kl, channel_wise_kl_levels
from tests.unit.test_channel_wise_kl import random_pair

SIZES = (8, 4, 1)


def pyramid(dtype=torch.float64):
    pairs = [random_pair((2, 3, size, size), dtype, seed=size) for size in SIZES]
    return [s for s, _ in pairs], [t for _, t in pairs]


def leaves(students):
    return [x.clone().requires_grad_() for x in students]


def test_it_is_every_level_by_itself():
    students, teachers = pyramid()
    regions = [None, (torch.rand(2, 1, 4, 4) > 0.3).double(), None]
    weights = [torch.rand(2, 3), None, torch.rand(2, 3)]
    factors = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    together, alone = leaves(students), leaves(students)
    values = channel_wise_kl_levels(
        together, teachers, tau=2.0, regions=regions, channel_weights=weights
    )
    expected = [
        channel_wise_kl(s, t, tau=2.0, region=r, channel_weight=w)
        for s, t, r, w in zip(alone, teachers, regions, weights, strict=True)
    ]
    assert_close(values, torch.stack(expected))
    (values * factors).sum().backward()
    sum(f * x for f, x in zip(factors, expected, strict=True)).backward()
    for one, other in zip(together, alone, strict=True):
        assert_close(one.grad, other.grad)


def test_only_who_asks_gets_a_gradient():
    students, teachers = pyramid()
    some = leaves(students)
    some[1].requires_grad_(False)
    channel_wise_kl_levels(some, teachers).sum().backward()
    everyone = leaves(students)
    channel_wise_kl_levels(everyone, teachers).sum().backward()
    assert some[1].grad is None
    assert_close(some[0].grad, everyone[0].grad)
    assert_close(some[2].grad, everyone[2].grad)


def test_one_map_twice_gets_both_gradients():
    student, teacher = random_pair()
    leaf, single = leaves([student, student])
    channel_wise_kl_levels([leaf, leaf], [teacher, 2 * teacher]).sum().backward()
    (channel_wise_kl(single, teacher) + channel_wise_kl(single, 2 * teacher)).backward()
    assert_close(leaf.grad, single.grad)


def test_a_level_that_is_not_used_gets_zero():
    students, teachers = pyramid()
    some = leaves(students)
    channel_wise_kl_levels(some, teachers)[0].backward()
    assert some[0].grad.abs().sum() > 0
    assert torch.equal(some[1].grad, torch.zeros_like(some[1]))


def test_two_backward_calls_accumulate():
    students, teachers = pyramid()
    some, others = leaves(students), leaves(students)
    values = channel_wise_kl_levels(some, teachers)
    values[0].backward(retain_graph=True)
    (2 * values.sum()).backward()
    other = channel_wise_kl_levels(others, teachers)
    (other * torch.tensor([3.0, 2.0, 2.0])).sum().backward()
    for one, two in zip(some, others, strict=True):
        assert_close(one.grad, two.grad)


def test_a_float64_level_makes_all_values_float64():
    students, teachers = pyramid(torch.float32)
    assert channel_wise_kl_levels(students, teachers).dtype == torch.float32
    teachers[1] = teachers[1].double()
    assert channel_wise_kl_levels(students, teachers).dtype == torch.float64


@pytest.mark.parametrize(
    ("counts", "words"),
    [((2, 3), "3, 2 and 2 for 2"), ((0, 0), "at least one, but got 0, 0 and 0 for 0")],
)
def test_errors(counts, words):
    students, teachers = pyramid()
    with pytest.raises(ValueError, match=words):
        channel_wise_kl_levels(students[: counts[0]], teachers[: counts[1]])


# Dynamo leaves the call out of its graph; what is before and after it is compiled.
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_under_torch_compile(backend):
    students, teachers = pyramid(torch.float32)

    def loss(students, teachers):
        doubled = [2 * x for x in students]
        return 3 * (channel_wise_kl_levels(doubled, teachers, tau=2.0).square()).sum()

    plain, compiled = leaves(students), leaves(students)
    expected = loss(plain, teachers)
    expected.backward()
    torch._dynamo.reset()
    function = torch.compile(loss, backend=backend)
    for _ in range(2):  # the second call runs what the first has compiled
        for x in compiled:
            x.grad = None
        value = function(compiled, teachers)
        value.backward()
        assert_close(value, expected)
        for one, other in zip(compiled, plain, strict=True):
            assert_close(one.grad, other.grad)
