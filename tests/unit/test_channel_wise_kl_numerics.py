"""Channel-wise KL: precision, memory layouts, blocks, saved memory, errors; standardisation."""

import pytest
import torch
from torch.testing import assert_close

from kd_det.losses import channel_wise_eager, channel_wise_kl, standardize
from tests.unit.test_channel_wise_kl import F64, golden, random_pair, value_and_grad

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


# What float32 rounds most: logits far from 0, a shift between the maps, peaks, a map nearly equal.
PAIRS = {
    "noise": lambda s, t: (s, t),
    "logits": lambda s, t: (s - 4.6, 3 * t - 4.6),
    "shifted": lambda s, t: (s + 1000, t),
    "peaked": lambda s, t: (10 * s, 10 * t),
    "close": lambda s, t: (t + 0.2 * s, t),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_float32_is_accurate(kind):
    # Exact in float32, so that both compute the same maps.
    student, teacher = (x.float() for x in PAIRS[kind](*random_pair((2, 16, 40, 30), scale=1.0)))
    for kwargs in ({}, {"tau": 2.0}, {"region": (torch.rand(2, 1, 40, 30) > 0.3).float()}):
        value, grad = value_and_grad(student, teacher, **kwargs)
        exact, exact_grad = value_and_grad(student.double(), teacher.double(), **kwargs)
        assert_close(value.double(), exact, rtol=1e-5, atol=0)
        assert (grad - exact_grad).norm() < 1e-5 * exact_grad.norm()


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
    cut = channel_wise_eager.blocks
    monkeypatch.setitem(channel_wise_eager._BLOCK_BYTES, "cpu", budget)
    monkeypatch.setattr(channel_wise_eager, "_LARGEST_SHARE", 0)  # whatever the number of threads
    monkeypatch.setattr(channel_wise_eager, "blocks", lambda *a: calls.extend(cut(*a)) or cut(*a))
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
