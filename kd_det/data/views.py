"""Two photometric views of every image, with one geometry and one set of labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

__all__ = ["PhotometricViews", "photometric_views"]

_LUMINANCE = {"RGB": (0.299, 0.587, 0.114), "BGR": (0.114, 0.587, 0.299)}


class PhotometricViews:
    """
    Goes around a mapper of Detectron2: what it returns, with a second view of its image.

        build_detection_train_loader(cfg, mapper=PhotometricViews(DatasetMapper(cfg, True)))

    The mapper reads, flips, resizes and crops once. Of its pixels two views are drawn, alike and
    independently: ``image`` becomes the first, and the second comes beside it as ``view_2``, of the
    same shape, dtype and channel order. A position is thus the same place in both, and the labels,
    which are not touched, hold for both. What a plain detector trains on is the first view.

    A view is ``b image``, blended with its mean over pixels and channels to contrast ``c``, and
    with its luminance to saturation ``s``: what Detectron2's `RandomBrightness`, `RandomContrast`
    and `RandomSaturation` make of a float image in this order, as one sum in a third of their time.
    Each of b, c, s is uniform in ``1 -+ strength``, drawn anew for every image and view as they
    draw it, from NumPy's global state: the seeds of Detectron2's workers and an exact resume hold
    for the views too. A uint8 image is rounded, and clipped to [0, 255], once at the end.

    Reconstruction: OKDCR (Zhang et al. 2021) transforms every image twice, in classification, where
    a crop or a flip may differ; here the cells of two maps must show the same place. 0.4 is the
    strength of colour jitter in MoCo v2 and Unbiased Teacher, which compare two views of an image
    as well; the hue, blur and greyscale that these add are left out.

    Args:
        mapper: from a record of a dataset to an element of Detectron2's batched inputs, whose
            ``image`` is (C, H, W); or ``None`` where elements come mapped.
        brightness: strength in [0, 1]; 0 is without, and draws nothing. All three 0: both views
            are the mapper's image itself.
        contrast: the same.
        saturation: the same; for images of three channels.
        input_format: channel order of the mapper's images, ``INPUT.FORMAT``, by which luminance
            is 0.299 R + 0.587 G + 0.114 B. (`RandomSaturation` takes every image for RGB.)

    Raises:
        ValueError: if a strength is outside of [0, 1], or saturation is asked of other channels.
    """

    def __init__(
        self,
        mapper: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
        *,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        input_format: str = "BGR",
    ) -> None:
        strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, strength in strengths.items():
            if not 0 <= strength <= 1:
                raise ValueError(
                    f"The strength of a view's {name} is {strength}, but 1 -+ strength is a factor "
                    "on pixels: it lies in [0, 1], where 0 changes nothing."
                )
        if saturation and input_format not in _LUMINANCE:
            raise ValueError(
                f"The saturation of images in the format '{input_format}' cannot be changed, only "
                "of 'BGR' and 'RGB': set the saturation of the views (KD.VIEWS.SATURATION) to 0."
            )
        self.mapper = mapper
        self.input_format = input_format
        self.strengths = tuple(strengths.values())

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """
        Two views of one record.

        Returns:
            The mapper's element with its first view as ``image`` and the second as ``view_2``; as
            it is where the mapper gave a ``view_2`` of its own, or ``None`` to leave it out.
        """
        element = record if self.mapper is None else self.mapper(record)
        if element is None or "view_2" in element:
            return element
        image = element["image"]
        return {**element, "image": self._view(image), "view_2": self._view(image)}

    def _view(self, image: Tensor) -> Tensor:
        if not any(self.strengths):
            return image
        b, c, s = (_factor(x) for x in self.strengths)
        pixels = image.float()
        # Three blends, one after the other, are one sum: the luminance of an image that is blended
        # with its mean is its luminance blended with that mean.
        view = b * c * s * pixels + b * (1 - c) * pixels.mean()
        if s != 1:
            weights = pixels.new_tensor(_LUMINANCE[self.input_format])
            view += b * c * (1 - s) * torch.tensordot(weights, pixels, 1)  # (H, W)
        if not image.is_floating_point():
            view = view.round_().clamp_(0, 255)
        return view.to(image.dtype)


def _factor(strength: float) -> float:
    # Not of a generator: Detectron2 seeds the global state of every worker.
    return float(np.random.uniform(1 - strength, 1 + strength)) if strength else 1.0  # noqa: NPY002


def photometric_views(cfg: CfgNode) -> PhotometricViews | None:
    """What ``KD.VIEWS`` asks to be made of mapped images, or ``None``."""
    if "KD" not in cfg or not cfg.KD.VIEWS.ENABLED:
        return None
    strengths = {k.lower(): v for k, v in cfg.KD.VIEWS.items() if k != "ENABLED"}
    return PhotometricViews(input_format=cfg.INPUT.FORMAT, **strengths)
