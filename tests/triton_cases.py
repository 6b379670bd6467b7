"""
The Triton kernel of channel-wise KL against plain PyTorch in float64. tests/unit/test_cwd_triton.py
runs this file in Triton's interpreter; `pytest tests/triton_cases.py` on a GPU runs the real thing.
"""

import os

import pytest
import torch
from torch.testing import assert_close

from kd_det.losses import channel_wise_kl
from tests.unit.test_channel_wise_kl import F64, golden, random_pair, value_and_grad

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)


def triton(student, teacher, **kwargs):
    """Value and gradient by the kernel, and in float64 of the same numbers."""
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    found = value_and_grad(student.to(DEVICE), teacher.to(DEVICE), backend="triton", **moved)
    return [x.cpu() for x in found], value_and_grad(student.double(), teacher.double(), **kwargs)


def check(student, teacher, grad_tolerance=1e-5, **kwargs):
    (value, grad), (expected, expected_grad) = triton(student, teacher, **kwargs)
    assert (value.dtype, grad.dtype) == (torch.float32, student.dtype)
    assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    error = (grad.double() - expected_grad).norm()
    assert error <= grad_tolerance * expected_grad.norm() + 1e-12


# Of one block (a power of two, and less), of two, of one position, of one row.
SHAPES = [(2, 3, 4, 8), (2, 3, 4, 5), (1, 2, 65, 64), (2, 2, 1, 1), (1, 1, 3, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_values_and_gradients(shape, tau):
    check(*random_pair(shape, torch.float32), tau=tau)


@pytest.mark.parametrize(("tau", "value"), [(1.0, 0.4232520034233), (4.0, 0.4757841776107)])
def test_golden_values(tau, value):
    (found, _), _ = triton(*(x.float() for x in golden()), tau=tau)
    assert_close(found.item(), value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_regions_and_channel_weights(shape):
    n, c, h, w = shape
    region = torch.rand(n, 1, h, w)
    region[..., 1:3] = 0
    weight = torch.rand(n, c) + 0.1
    student, teacher = random_pair(shape, torch.float32)
    student[..., 1:3] = 1e4  # of no weight
    check(student, teacher, region=region, tau=2.0)
    check(student, teacher, channel_weight=weight)
    check(student, teacher, region=region, channel_weight=weight)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 65, 64)])
def test_an_empty_region_is_exactly_zero(shape):
    region = torch.ones(shape[0], 1, *shape[2:])
    region[1] = 0
    (value, grad), (expected, _) = triton(*random_pair(shape, torch.float32), region=region)
    assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_half_precision_is_computed_in_float32(shape, dtype, tolerance):
    check(*random_pair(shape, dtype), tolerance)


def test_mixed_dtypes():
    student, teacher = random_pair(dtype=torch.float32)
    check(student, teacher.half())
    check(student.bfloat16(), teacher, 8e-3)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_finite_at_extreme_logits(tau):
    student = torch.full((1, 2, 2, 2), -1e4)
    student[..., 0, 0] = 1e4
    check(student, student.flip(-1), tau=tau)


@pytest.mark.parametrize("which", [0, 1])
def test_memory_layout_does_not_matter(which):
    pair = list(random_pair(dtype=torch.float32))
    pair[which] = pair[which].contiguous(memory_format=torch.channels_last)
    check(*pair)
    pair[which] = pair[which].transpose(2, 3).contiguous().transpose(2, 3)
    check(*pair)


def test_without_gradient_and_without_images():
    student, teacher = (x.to(DEVICE) for x in random_pair(dtype=torch.float32))
    value = channel_wise_kl(student, teacher, backend="triton")
    assert_close(value, channel_wise_kl(student, teacher))
    assert not value.requires_grad
    assert channel_wise_kl(student[:0], teacher[:0], backend="triton") == 0


def test_float64_is_refused():
    with pytest.raises(ValueError, match="computes in float32, but a map is float64"):
        channel_wise_kl(*(x.to(DEVICE) for x in random_pair(dtype=F64)), backend="triton")
