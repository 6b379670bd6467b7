"""kd_det.losses.channel_wise_kl against the formula in Python's own arithmetic."""

import math

import pytest
import torch

from kd_det.losses import channel_wise_kl
from tests.parity import reference

pytestmark = pytest.mark.parity


def nested(x):
    """(N, C, H, W) as [n][c][i]."""
    return x.flatten(2).tolist()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 4, 5), (3, 2, 7, 1)])
def test_random_maps(shape, tau, masked, weighted):
    g = torch.Generator().manual_seed(math.prod(shape))
    n, c, h, w = shape
    student = 3 * torch.randn(shape, generator=g, dtype=torch.float64)
    teacher = 3 * torch.randn(shape, generator=g, dtype=torch.float64)
    region = channel_weight = None
    if masked:
        region = torch.rand(n, 1, h, w, generator=g, dtype=torch.float64)
        region[:, :, -1, -1] = 0
    if weighted:
        channel_weight = 0.1 + torch.rand(n, c, generator=g, dtype=torch.float64)
    ours = channel_wise_kl(student, teacher, tau=tau, region=region, channel_weight=channel_weight)
    expected = reference.channel_wise_kl(
        nested(student),
        nested(teacher),
        tau,
        region.flatten(1).tolist() if masked else None,
        channel_weight.tolist() if weighted else None,
    )
    assert math.isclose(ours.item(), expected, rel_tol=1e-10, abs_tol=1e-13)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_gradient_is_the_slope_of_the_formula(tau):
    student = reference.golden_map(0.37, 0.10, 0, (1, 2, 6))
    teacher = reference.golden_map(0.23, 0.25, 1, (1, 2, 6))
    s = torch.tensor(student, dtype=torch.float64).view(1, 2, 2, 3).requires_grad_()
    t = torch.tensor(teacher, dtype=torch.float64).view(1, 2, 2, 3)
    channel_wise_kl(s, t, tau=tau).backward()
    step = 1e-5
    for c in range(2):
        for i in range(6):
            values = []
            for sign in (1, -1):
                moved = [[list(row) for row in image] for image in student]
                moved[0][c][i] += sign * step
                values.append(reference.channel_wise_kl(moved, teacher, tau))
            slope = (values[0] - values[1]) / (2 * step)
            assert math.isclose(s.grad.flatten(2)[0, c, i].item(), slope, abs_tol=1e-8)


@pytest.mark.parametrize(("tau", "value"), [(1.0, 0.4232520034233), (4.0, 0.4757841776107)])
def test_the_transcription_itself_equals_the_public_implementations(tau, value):
    # Provenance: TorchDistiller's CriterionCWD and mmrazor's ChannelWiseDivergence, both equal.
    student = reference.golden_map(0.37, 0.10, 0, (2, 3, 20))
    teacher = reference.golden_map(0.23, 0.25, 1, (2, 3, 20))
    assert math.isclose(reference.channel_wise_kl(student, teacher, tau), value, abs_tol=5e-14)
