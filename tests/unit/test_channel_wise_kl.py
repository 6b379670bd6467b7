"""Channel-wise KL: golden values, closed forms, invariances, precision, memory."""

import math

import pytest
import torch
from torch.testing import assert_close

from kd_det.losses import channel_wise, channel_wise_kl, standardize

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


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_is_computed_in_float32(dtype, tolerance):
    student, teacher = random_pair(dtype=dtype)
    value, grad = value_and_grad(student, teacher, tau=2.0)
    expected, expected_grad = value_and_grad(student.double(), teacher.double(), tau=2.0)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert_close(value, expected.float())
    assert_close(grad.double(), expected_grad, atol=tolerance * 0.01, rtol=tolerance)


def test_float16_gradients_survive_a_large_map_and_a_loss_scale():
    # The size of a p3 map: q - p is some 1e-4 and N C is 128, and mixed precision brings a loss
    # scale of 65536, which is infinite in float16, only in the backward.
    student, teacher = random_pair((1, 128, 100, 128), dtype=torch.float16, scale=1.0)
    scale = 65536.0
    half = student.clone().requires_grad_()
    (scale * channel_wise_kl(half, teacher)).backward()
    _, expected = value_and_grad(student.float(), teacher.float())
    assert half.grad.isfinite().all()
    error = (half.grad.float() - scale * expected).norm() / (scale * expected).norm()
    assert error < 2e-3


def test_float16_gradients_survive_without_a_loss_scale():
    student = torch.tensor([0.0, 20.0]).half().expand(1, 4096, 1, 2).contiguous()
    _, grad = value_and_grad(student, student.flip(-1))
    assert_close(grad, (student / 10 - 1) / 4096)  # q - p is 1 and -1


def test_float16_gradients_survive_weights_that_pick_few_channels():
    student, teacher = random_pair((1, 256, 32, 32), dtype=torch.float16)
    weight = torch.full((1, 256), 1e-3)
    weight[0, 7] = 1
    half = student.clone().requires_grad_()
    (1024 * channel_wise_kl(half, teacher, channel_weight=weight)).backward()
    _, expected = value_and_grad(student.float(), teacher.float(), channel_weight=weight)
    error = (half.grad.float() / 1024 - expected).norm() / expected.norm()
    assert error < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_finite_at_extreme_logits(dtype, tau):
    student = torch.full((1, 2, 2, 2), -1e4, dtype=dtype)
    student[..., 0, 0] = 1e4
    teacher = student.flip(-1)
    region = torch.tensor([1.0, 1, 0, 1]).view(1, 1, 2, 2)
    for weights in (None, region):
        value, grad = value_and_grad(student, teacher, tau=tau, region=weights)
        assert value.isfinite()
        # All mass is on one cell each: tau^2 KL = tau * gap.
        gap = (student[0, 0, 0, 0] - student[0, 0, 0, 1]).double().item()
        assert_close(value.item(), tau * gap, rtol=1e-4, atol=0)
        assert grad.isfinite().all()
        assert grad.abs().max() > 0


def test_mixed_dtypes_take_the_wider_and_the_gradient_stays_the_students():
    student, teacher = random_pair()
    value, grad = value_and_grad(student.half(), teacher)
    assert (value.dtype, grad.dtype) == (F64, torch.float16)
    value, grad = value_and_grad(student.float(), teacher.half())
    assert (value.dtype, grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    student, teacher = random_pair((2, 4, 8, 8), dtype=torch.float32)
    expected, expected_grad = value_and_grad(student, teacher, tau=3.0)
    with torch.autocast("cpu", dtype=dtype):
        value, grad = value_and_grad(student, teacher, tau=3.0)
        low = channel_wise_kl(student.to(dtype), teacher.to(dtype))
    assert_close(value, expected, atol=0, rtol=0)
    assert_close(grad, expected_grad, atol=0, rtol=0)
    assert low.dtype == torch.float32


# -- memory layout, sizes, blocks -----------------------------------------------------------------


def every_other(x):
    wide = x.repeat_interleave(2, dim=-1)
    return wide[..., ::2]


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": every_other,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout):
    student, teacher = random_pair()
    value, grad = value_and_grad(student, teacher)
    moved = LAYOUTS[layout](student)
    assert not moved.is_contiguous()
    leaf = moved.detach().requires_grad_()
    loss = channel_wise_kl(leaf, LAYOUTS[layout](teacher))
    loss.backward()
    assert_close(loss.detach(), value)
    assert_close(leaf.grad, grad, check_stride=False)


def test_expanded_inputs():
    student, teacher = random_pair((1, 1, 4, 5))
    value, grad = value_and_grad(
        student.expand(2, 3, 4, 5).clone(), teacher.expand(2, 3, 4, 5).clone()
    )
    leaf = student.clone().requires_grad_()
    loss = channel_wise_kl(leaf.expand(2, 3, 4, 5), teacher.expand(2, 3, 4, 5))
    loss.backward()
    assert_close(loss.detach(), value)
    assert_close(leaf.grad, grad.sum((0, 1), keepdim=True))


def test_one_row():
    student, teacher = golden((1, 1, 4, 5))
    p, q = teacher.flatten().softmax(0), student.flatten().softmax(0)
    assert_close(channel_wise_kl(student, teacher), (p * (p / q).log()).sum())


def test_one_cell_has_nothing_to_say():
    value, grad = value_and_grad(*random_pair((2, 3, 1, 1)))
    assert value.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_no_images_give_zero():
    value, grad = value_and_grad(torch.zeros(0, 3, 4, 5), torch.zeros(0, 3, 4, 5))
    assert value.item() == 0
    assert grad.shape == (0, 3, 4, 5)


# A row of this 4 x 5 map is 160 bytes in float64.
@pytest.mark.parametrize(
    ("budget", "blocks"),
    [
        (1, 5 * 7),  # less than a row: one row at a time
        (2 * 160, 5 * 4),  # two channels of one image, the last block smaller
        (6 * 160, 5 * 2),
        (7 * 160, 5),  # one image
        (15 * 160, 3),  # two images, the last block smaller
        (1 << 30, 1),
    ],
)
def test_blocks_do_not_show(monkeypatch, budget, blocks):
    student, teacher = random_pair((5, 7, 4, 5))
    kwargs = {
        "tau": 2.0,
        "region": torch.rand(5, 1, 4, 5, dtype=F64),
        "channel_weight": torch.rand(5, 7, dtype=F64),
    }
    expected = value_and_grad(student, teacher, **kwargs)
    calls = []
    one_block = channel_wise._block
    monkeypatch.setitem(channel_wise._BLOCK_BYTES, "cpu", budget)
    monkeypatch.setattr(channel_wise, "_block", lambda *a: (calls.append(a), one_block(*a))[1])
    found = value_and_grad(student, teacher, **kwargs)
    assert len(calls) == blocks
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_tensor_of_the_students_size_is_saved(dtype):
    student, teacher = random_pair((2, 16, 8, 8), dtype=dtype)
    student.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        channel_wise_kl(student, teacher, tau=2.0, region=torch.ones(2, 1, 8, 8))
    assert sum(x.numel() * x.element_size() for x in saved) == (
        student.numel() * student.element_size()
    )
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        channel_wise_kl(student.detach(), teacher)
    assert not saved


# -- errors ---------------------------------------------------------------------------------------

MAP = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("student", "teacher", "kwargs", "words"),
    [
        (MAP, MAP[:1], {}, r"\(2, 3, 4, 5\) and the teacher's \(1, 3, 4, 5\)"),
        (MAP, MAP[:, :1], {}, r"one shape.*\(2, 1, 4, 5\)"),
        (MAP, MAP[..., :4], {}, "connector or a resize"),
        (MAP[0], MAP[0], {}, r"\(N, C, H, W\)"),
        (MAP, MAP, {"tau": 0}, "tau > 0, but got 0"),
        (MAP, MAP, {"tau": -1.0}, "tau > 0"),
        (MAP, MAP, {"tau": float("nan")}, "tau > 0"),
        (MAP, MAP, {"tau": float("inf")}, "tau > 0"),
        (MAP, MAP, {"region": MAP}, r"\(2, 1, 4, 5\), but got \(2, 3, 4, 5\)"),
        (MAP, MAP, {"region": MAP[:1, :1]}, r"region of shape \(N, 1, H, W\)"),
        (MAP, MAP, {"channel_weight": torch.ones(3)}, r"\(N, C\) = \(2, 3\), but got \(3,\)"),
    ],
)
def test_errors(student, teacher, kwargs, words):
    with pytest.raises(ValueError, match=words):
        channel_wise_kl(student, teacher, **kwargs)


# -- standardisation ------------------------------------------------------------------------------


def test_standardize_gives_zero_mean_and_unit_variance_per_channel():
    x, _ = random_pair()
    y = standardize(10 * x + 5, eps=0.0)
    assert_close(y.mean((0, 2, 3)), torch.zeros(3, dtype=F64), atol=1e-12, rtol=0)
    assert_close(y.var((0, 2, 3), correction=0), torch.ones(3, dtype=F64))
    assert_close(standardize(x, eps=0.0), y)  # scale and shift are what it removes


def test_standardize_takes_its_statistics_from_the_mask():
    x, _ = random_pair()
    mask = torch.zeros(2, 1, 4, 5)
    mask[0, :, :2] = 1
    mask[1, :, :, :3] = 0.5
    x = torch.where(mask > 0, x, x.new_tensor(1e4))
    y = standardize(x, mask)
    valid = (mask > 0).expand_as(x)
    for c in range(3):
        cells = y[:, c][valid[:, c]]
        assert_close(cells.mean().item(), 0.0, atol=1e-10, rtol=0)
        assert_close(cells.var(correction=0).item(), 1.0, atol=1e-5, rtol=0)
    assert_close(standardize(x, torch.ones(2, 1, 4, 5)), standardize(x))
    assert torch.autograd.gradcheck(lambda z: standardize(z, mask), x.clamp(-9, 9).requires_grad_())


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 2, 2)])
def test_standardize_stays_finite_on_a_constant_channel_and_an_empty_mask(mask):
    x = torch.full((1, 2, 2, 2), 3.0, dtype=torch.float16, requires_grad=True)
    y = standardize(x, mask)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
