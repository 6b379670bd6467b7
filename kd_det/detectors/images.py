"""From Detectron2's batched inputs to the tensor that a detector's backbone is given."""

from itertools import chain
from typing import Any

from detectron2.structures import ImageList
from torch import Tensor


def image_tensor(model: Any, inputs: list[dict[str, Any]]) -> Tensor:
    """
    The images of a batch as ``(N, 3, H, W)``, normalised and padded as the model does it itself.

    By its ``preprocess_image`` if it has one. Else, as `SemanticSegmentor` and most projects do
    inside of their forward: ``(image - pixel_mean) / pixel_std``, padded at the bottom and on the
    right as the model's or its backbone's ``size_divisibility`` and ``padding_constraints`` ask. A
    model without ``pixel_mean`` is a plain network: the values stay what they are, 0 to 255.

    Args:
        model: the detector.
        inputs: each with ``image``, ``(3, H, W)`` in the model's channel order.
    """
    if hasattr(model, "preprocess_image"):
        images = model.preprocess_image(inputs)
        # Some projects return what they need of the images' sizes beside them.
        images = images[0] if isinstance(images, tuple) else images
        return images.tensor
    device = next(chain(model.parameters(), model.buffers())).device
    tensors = [x["image"].to(device).float() for x in inputs]
    if hasattr(model, "pixel_mean"):
        tensors = [(x - model.pixel_mean) / model.pixel_std for x in tensors]
    backbone = getattr(model, "backbone", None)
    constraints = getattr(backbone, "padding_constraints", None)
    return ImageList.from_tensors(
        tensors,
        size_divisibility(model),
        # 0.6 has neither the property nor the argument.
        **({"padding_constraints": constraints} if constraints else {}),
    ).tensor


def size_divisibility(model: Any) -> int:
    """What divides the padded height and width; 0 when nothing has to."""
    own = int(getattr(model, "size_divisibility", 0) or 0)
    if own > 0:  # -1 in the model's own place says: as the backbone wants
        return own
    return int(getattr(getattr(model, "backbone", None), "size_divisibility", 0))
