"""Channel-wise KL: golden values, closed forms, gradients, invariances, regions."""

import math

import pytest
import torch
from torch.testing import assert_close

from kd_det.losses import channel_wise_kl

F64 = torch.float64


def golden(shape=(2, 3, 4, 5)):
    """x[k] = sin(a k + o) + b ((k mod 7) - 3) with the (a, b, o) of the published golden values."""
    k = torch.arange(math.prod(shape), dtype=F64)
    student = torch.sin(0.37 * k) + 0.10 * (k % 7 - 3)
    teacher = torch.sin(0.23 * k + 1) + 0.25 * (k % 7 - 3)
    return student.view(shape), teacher.view(shape)


def random_pair(shape=(2, 3, 4, 5), dtype=F64, seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(shape, generator=g, dtype=F64)
    teacher = scale * torch.randn(shape, generator=g, dtype=F64)
    return student.to(dtype), teacher.to(dtype)


def value_and_grad(student, teacher, **kwargs):
    student = student.detach().clone().requires_grad_()
    value = channel_wise_kl(student, teacher, **kwargs)
    (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad


# -- values ---------------------------------------------------------------------------------------


def test_golden_inputs_are_the_published_ones():
    student, teacher = golden()
    assert_close(student.sum().item(), -0.27311827468753, atol=1e-12, rtol=0)
    assert_close(teacher.sum().item(), 6.27060060716345, atol=1e-12, rtol=0)


# Provenance: TorchDistiller CriterionCWD and mmrazor ChannelWiseDivergence, float64, both equal.
@pytest.mark.parametrize(("tau", "value"), [(1.0, 0.4232520034233), (4.0, 0.4757841776107)])
def test_golden_values(tau, value):
    loss = channel_wise_kl(*golden(), tau=tau)
    assert loss.dtype == F64
    assert_close(loss.item(), value, atol=5e-14, rtol=0)


def test_the_divergence_is_teacher_to_student_and_not_symmetric():
    student, teacher = golden()
    assert_close(channel_wise_kl(teacher, student).item(), 0.426573, atol=5e-7, rtol=0)


def test_two_pixels():
    student = torch.tensor([0.0, math.log(3)], dtype=F64).view(1, 1, 1, 2)
    loss = channel_wise_kl(student, student.flip(-1))
    assert_close(loss.item(), 0.5 * math.log(3), atol=1e-14, rtol=0)
    assert_close(loss.item(), 0.549306, atol=5e-7, rtol=0)


def test_high_temperature_limit_is_half_the_variance_of_the_difference():
    student, teacher = golden()
    limit = 0.5 * (student - teacher).flatten(2).var(dim=2, correction=0).mean()
    assert_close(limit.item(), 0.48367, atol=5e-6, rtol=0)
    assert_close(channel_wise_kl(student, teacher, tau=1000.0).item(), 0.48365, atol=5e-6, rtol=0)
    assert_close(channel_wise_kl(student, teacher, tau=1e5), limit, atol=1e-5, rtol=0)


def test_zero_iff_equal_up_to_a_constant_per_row():
    student, _ = golden()
    shift = torch.arange(6, dtype=F64).view(2, 3, 1, 1)
    assert_close(channel_wise_kl(student, student + shift).item(), 0.0, atol=1e-14, rtol=0)
    other = student.clone()
    other[0, 0, 0, 0] += 0.1
    assert channel_wise_kl(student, other) > 1e-6


def test_the_largest_divergence_is_not_cut_off():
    # All of the teacher's mass on one cell, all of the student's on the other: KL = the gap.
    student = torch.tensor([0.0, 50.0]).view(1, 1, 1, 2)
    assert_close(channel_wise_kl(student, student.flip(-1)).item(), 50.0, atol=1e-5, rtol=0)


# -- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.7, 1.0, 4.0])
def test_gradient_closed_form(tau):
    student, teacher = golden()
    _, grad = value_and_grad(student, teacher, tau=tau)
    q = (student / tau).flatten(2).softmax(-1).view_as(student)
    p = (teacher / tau).flatten(2).softmax(-1).view_as(student)
    assert_close(grad, tau / (2 * 3) * (q - p), atol=1e-16, rtol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tau", [0.8, 3.0])
def test_gradcheck(tau, masked, weighted):
    student, teacher = random_pair((2, 2, 3, 2))
    region = channel_weight = None
    if masked:
        region = torch.rand(2, 1, 3, 2, dtype=F64)
        region[0, 0, 0] = 0
    if weighted:
        channel_weight = torch.rand(2, 2, dtype=F64)

    def loss(x):
        return channel_wise_kl(x, teacher, tau=tau, region=region, channel_weight=channel_weight)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


def test_gradient_follows_a_factor_on_the_loss():
    student, teacher = random_pair()
    _, grad = value_and_grad(student, teacher)
    student.requires_grad_()
    (-2.5 * channel_wise_kl(student, teacher)).backward()
    assert_close(student.grad, -2.5 * grad)


def test_the_teacher_receives_no_gradient_even_when_it_could():
    student, teacher = random_pair()
    student.requires_grad_()
    teacher.requires_grad_()
    channel_wise_kl(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_weights_receive_no_gradient():
    student, teacher = random_pair()
    region = torch.ones(2, 1, 4, 5, dtype=F64, requires_grad=True)
    channels = torch.ones(2, 3, dtype=F64, requires_grad=True)
    student.requires_grad_()
    channel_wise_kl(student, teacher, region=region, channel_weight=channels).backward()
    assert region.grad is None
    assert channels.grad is None


def test_only_a_student_with_gradient_gives_a_graph():
    student, teacher = random_pair()
    assert not channel_wise_kl(student, teacher.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not channel_wise_kl(student.requires_grad_(), teacher).requires_grad


def test_two_backward_calls_accumulate():
    student, teacher = random_pair()
    _, once = value_and_grad(student, teacher)
    student.requires_grad_()
    loss = channel_wise_kl(student, teacher)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close(student.grad, 2 * once)


def test_double_backward_is_refused():
    student, teacher = random_pair()
    student.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(channel_wise_kl(student, teacher), student, create_graph=True)


def test_inputs_are_left_as_they_were():
    student, teacher = random_pair(dtype=torch.float32)
    region = torch.rand(2, 1, 4, 5)
    before = [x.clone() for x in (student, teacher, region)]
    value_and_grad(student, teacher, tau=2.0, region=region)
    channel_wise_kl(student, teacher)
    for now, then in zip((student, teacher, region), before, strict=True):
        assert_close(now, then, atol=0, rtol=0)


# -- invariances ----------------------------------------------------------------------------------


def test_a_constant_per_row_changes_nothing():
    student, teacher = random_pair()
    shift = 7 * torch.randn(2, 2, 3, 1, 1, dtype=F64)
    value, grad = value_and_grad(student, teacher, tau=2.0)
    moved, moved_grad = value_and_grad(student + shift[0], teacher + shift[1], tau=2.0)
    assert_close(moved, value)
    assert_close(moved_grad, grad)


def test_a_joint_permutation_of_positions_changes_nothing():
    student, teacher = random_pair()
    order = torch.randperm(20)
    value, grad = value_and_grad(student, teacher)
    shuffled = [x.flatten(2)[..., order].view_as(x) for x in (student, teacher)]
    moved, moved_grad = value_and_grad(*shuffled)
    assert_close(moved, value)
    assert_close(moved_grad.flatten(2), grad.flatten(2)[..., order])
    assert not math.isclose(channel_wise_kl(shuffled[0], teacher), value, rel_tol=1e-3)


@pytest.mark.parametrize("dim", [0, 1])
def test_images_and_channels_are_averaged(dim):
    student, teacher = random_pair()
    doubled = channel_wise_kl(torch.cat([student] * 2, dim), torch.cat([teacher] * 2, dim))
    assert_close(doubled, channel_wise_kl(student, teacher))
    parts = [
        channel_wise_kl(s, t)
        for s, t in zip(student.split(1, dim), teacher.split(1, dim), strict=True)
    ]
    assert_close(torch.stack(parts).mean(), channel_wise_kl(student, teacher))


def test_positions_are_summed_so_tiling_changes_nothing():
    # Each of four copies has a quarter of the mass: the divergence in nats stays.
    student, teacher = random_pair()
    tiled = channel_wise_kl(student.tile(1, 1, 2, 2), teacher.tile(1, 1, 2, 2))
    assert_close(tiled, channel_wise_kl(student, teacher))


def test_scaling_maps_and_temperature_together_scales_the_loss_quadratically():
    student, teacher = random_pair()
    assert_close(
        channel_wise_kl(3 * student, 3 * teacher, tau=6.0),
        9 * channel_wise_kl(student, teacher, tau=2.0),
    )


# -- region and channel weights -------------------------------------------------------------------


@pytest.mark.parametrize("constant", [1.0, 0.25])
def test_a_constant_region_is_no_region(constant):
    student, teacher = random_pair()
    region = torch.full((2, 1, 4, 5), constant, dtype=F64)
    value, grad = value_and_grad(student, teacher, tau=2.0, region=region)
    expected, expected_grad = value_and_grad(student, teacher, tau=2.0)
    assert_close(value, expected)
    assert_close(grad, expected_grad)


def test_region_zero_equals_the_cropped_map():
    student, teacher = random_pair()
    region = torch.zeros(2, 1, 4, 5, dtype=F64)
    region[..., :3, :2] = 1
    # What is left out may hold anything finite.
    student[..., 3:, :] = 1e4
    teacher[..., :, 2:] = -1e4
    value, grad = value_and_grad(student, teacher, tau=2.0, region=region)
    cropped, cropped_grad = value_and_grad(student[..., :3, :2], teacher[..., :3, :2], tau=2.0)
    assert_close(value, cropped)
    assert_close(grad[..., :3, :2], cropped_grad)
    assert_close(grad * (1 - region), torch.zeros_like(grad), atol=0, rtol=0)


def test_an_integer_region_counts_a_cell_twice():
    student, teacher = random_pair((1, 2, 1, 3))
    region = torch.tensor([2.0, 1.0, 1.0]).view(1, 1, 1, 3)
    repeated = [torch.cat([x, x[..., :1]], dim=-1) for x in (student, teacher)]
    assert_close(channel_wise_kl(student, teacher, region=region), channel_wise_kl(*repeated))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64])
def test_an_empty_region_is_exactly_zero_and_attached(dtype):
    student, teacher = random_pair(dtype=dtype)
    region = torch.ones(2, 1, 4, 5)
    region[1] = 0
    value, grad = value_and_grad(student, teacher, region=region)
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))
    assert grad[0].abs().sum() > 0
    assert_close(value, channel_wise_kl(student[:1], teacher[:1]) / 2)  # the mean keeps its N
    nothing, no_grad = value_and_grad(student, teacher, region=torch.zeros_like(region))
    assert nothing.item() == 0
    assert torch.equal(no_grad, torch.zeros_like(no_grad))


def test_equal_channel_weights_are_the_paper():
    student, teacher = random_pair()
    weight = torch.full((2, 3), 0.3, dtype=F64)
    value, grad = value_and_grad(student, teacher, channel_weight=weight)
    expected, expected_grad = value_and_grad(student, teacher)
    assert_close(value, expected)
    assert_close(grad, expected_grad)


def test_one_hot_channel_weights_pick_a_channel_per_image():
    student, teacher = random_pair()
    weight = torch.zeros(2, 3, dtype=F64)
    weight[0, 2] = weight[1, 0] = 5
    picked = [torch.stack([x[0, 2:], x[1, :1]]) for x in (student, teacher)]
    value, grad = value_and_grad(student, teacher, channel_weight=weight)
    assert_close(value, channel_wise_kl(*picked))
    assert torch.equal(grad[0, :2], torch.zeros_like(grad[0, :2]))


def test_channel_weights_of_zero_give_zero():
    student, teacher = random_pair()
    value, grad = value_and_grad(student, teacher, channel_weight=torch.zeros(2, 3))
    assert value.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))
