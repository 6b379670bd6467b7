"""From batched inputs to the tensor that a backbone is given, as the models themselves do it."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from torch import nn
from torch.testing import assert_close

from kd_det.detectors.images import image_tensor, size_divisibility
from tests import toys
from tests.architectures import needs_vit

INPUTS = toys.batch(((60, 64), (50, 40)))


def plain(**attributes: object) -> nn.Module:
    """A model without ``preprocess_image``."""
    model = nn.Conv2d(3, 1, 1)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def statistics() -> dict[str, torch.Tensor]:
    return {"pixel_mean": torch.full((3, 1, 1), 7.0), "pixel_std": torch.full((3, 1, 1), 2.0)}


def test_a_model_that_can_does_it_itself() -> None:
    model = build_model(toys.toy_cfg())
    assert_close(image_tensor(model, INPUTS), model.preprocess_image(INPUTS).tensor)
    more = plain(preprocess_image=lambda x: (ImageList(torch.ones(2, 3, 4, 4), []), "sizes"))
    assert_close(image_tensor(more, INPUTS), torch.ones(2, 3, 4, 4))


def test_what_a_forward_does_inside() -> None:
    like = build_model(toys.toy_cfg())
    inline = plain(pixel_mean=like.pixel_mean, pixel_std=like.pixel_std, backbone=like.backbone)
    assert_close(image_tensor(inline, INPUTS), like.preprocess_image(INPUTS).tensor, rtol=0, atol=0)
    x = image_tensor(plain(**statistics()), INPUTS)
    assert x.shape == (2, 3, 60, 64)
    assert_close(x[1, :, :50, :40], (INPUTS[1]["image"] - 7.0) / 2.0)
    assert float(x[1, :, 50:].abs().max()) == float(x[1, ..., 40:].abs().max()) == 0


@pytest.mark.parametrize(("own", "shape"), [(48, (96, 96)), (-1, (64, 64)), (None, (64, 64))])
def test_a_models_own_divisor_comes_first(own: int | None, shape: tuple[int, int]) -> None:
    model = plain(size_divisibility=own, backbone=SimpleNamespace(size_divisibility=32))
    assert size_divisibility(model) == (own if own == 48 else 32)
    assert image_tensor(model, INPUTS).shape[-2:] == shape


@needs_vit
def test_a_square_canvas() -> None:
    model = plain(backbone=SimpleNamespace(padding_constraints={"square_size": 96}))
    assert image_tensor(model, INPUTS).shape == (2, 3, 96, 96)
