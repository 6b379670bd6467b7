"""Connectors: recipes that are sized from real channel counts."""

import pytest
import torch
from torch import nn

from kd_det.connectors import Auto, Connector, Conv, Identity
from kd_det.registry import CONNECTORS

X = torch.rand(2, 4, 5, 3)


@pytest.mark.parametrize("recipe", [Auto(), Identity()])
def test_nothing_where_the_channels_agree(recipe):
    module = recipe(4, 4)
    assert isinstance(module, nn.Identity)
    assert module(X) is X


def test_auto_is_a_1x1_convolution_where_they_differ():
    module = Auto()(4, 6)
    assert isinstance(module, nn.Conv2d)
    assert module.kernel_size == (1, 1)
    assert module(X).shape == (2, 6, 5, 3)


def test_identity_bridges_nothing():
    with pytest.raises(ValueError, match="student has 4 channels and the target 6"):
        Identity()(4, 6)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize(("inside", "outside"), [(4, 6), (4, 4)])
def test_conv_is_always_there_and_keeps_the_grid(kernel, inside, outside):
    module = Conv(kernel=kernel)(inside, outside)
    assert module(X).shape == (2, outside, 5, 3)
    assert torch.equal(module.bias, torch.zeros(outside))
    # kaiming_uniform_(a=1): uniform within sqrt(3 / fan_in), as Detectron2's FPN laterals.
    bound = (3 / (inside * kernel**2)) ** 0.5
    assert 0.5 * bound < module.weight.abs().max() <= bound
    assert sum(p.requires_grad for p in module.parameters()) == 2


def test_relu():
    module = Conv(relu=True)(4, 6)
    assert module(X - 5).min() == 0
    assert Conv()(4, 6)(X - 5).min() < 0


@pytest.mark.parametrize("kernel", [0, 2, -1])
def test_kernels_are_odd(kernel):
    with pytest.raises(ValueError, match=f"odd kernel >= 1, but got {kernel}"):
        Conv(kernel=kernel)


def test_every_call_builds_a_module_of_its_own():
    recipe = Conv()
    assert recipe(4, 4) is not recipe(4, 4)


def test_the_registry_holds_recipes():
    assert {name for name, _ in CONNECTORS} >= {"Auto", "Conv", "Identity"}
    assert all(issubclass(cls, Connector) for _, cls in CONNECTORS)
