"""Two photometric views of every image, with one geometry and one set of labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import Tensor

__all__ = ["PhotometricViews", "photometric_views"]


class PhotometricViews:
    """
    Goes around a mapper of Detectron2: what it returns, with a second view of its image.

        build_detection_train_loader(cfg, mapper=PhotometricViews(DatasetMapper(cfg, True)))

    The mapper reads, flips, resizes and crops once. Of its pixels two views are drawn, alike and
    independently: ``image`` becomes the first, and the second comes beside it as ``view_2``, of the
    same shape, dtype and channel order. A position is thus the same place in both, and the labels,
    which are not touched, hold for both. What a plain detector trains on is the first view.

    A view is ``image * b``, then contrast ``c`` (blended with its mean over pixels and channels),
    then saturation ``s`` (blended with its luminance), by Detectron2's `RandomBrightness`,
    `RandomContrast` and `RandomSaturation`. Each of b, c, s is uniform in ``1 -+ strength``, drawn
    anew for every image and view from NumPy's global state, as all of Detectron2's augmentations
    are: the seeds of its workers and an exact resume hold for the views too. In between values are
    float32; those of a uint8 image are rounded, and clipped to [0, 255], once at the end, where
    each of Detectron2's transforms would clip and cut off.

    Reconstruction: OKDCR (Zhang et al. 2021) transforms every image twice, but as CIFAR images
    are, by crops and flips, after which cells of two maps would not show the same place. 0.4 is
    the strength of colour jitter in MoCo v2 and in Unbiased Teacher, where two views of one image
    are compared as well; hue, blur and greyscale, which these add, are left out.

    Args:
        mapper: from a record of a dataset to an element of Detectron2's batched inputs, whose
            ``image`` is (C, H, W); or ``None`` where elements come mapped.
        brightness: strength in [0, 1]; 0 is without, and draws nothing. All three 0: both views
            are the mapper's image itself.
        contrast: the same.
        saturation: the same; for images of three channels.
        input_format: channel order of the mapper's images, ``INPUT.FORMAT``: Detectron2 computes
            the luminance (0.299 R + 0.587 G + 0.114 B) of RGB, so BGR is turned around for it.

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
        kinds = {
            "brightness": (T.RandomBrightness, brightness),
            "contrast": (T.RandomContrast, contrast),
            "saturation": (T.RandomSaturation, saturation),
        }
        for name, (_, strength) in kinds.items():
            if not 0 <= strength <= 1:
                raise ValueError(
                    f"The strength of a view's {name} is {strength}, but 1 -+ strength is a factor "
                    "on pixels: it lies in [0, 1], where 0 changes nothing."
                )
        if saturation and input_format not in ("BGR", "RGB"):
            raise ValueError(
                f"The saturation of images in the format '{input_format}' cannot be changed, only "
                "of 'BGR' and 'RGB': set the saturation of the views (KD.VIEWS.SATURATION) to 0."
            )
        self.mapper = mapper
        self.input_format = input_format
        self.augmentations = [kind(1 - x, 1 + x) for kind, x in kinds.values() if x]

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
        if not self.augmentations:
            return image
        pixels = image.permute(1, 2, 0).numpy().astype(np.float32)  # (H, W, C)
        if self.input_format == "BGR":
            pixels = pixels[..., ::-1]
        for augmentation in self.augmentations:
            pixels = augmentation.get_transform(pixels).apply_image(pixels)
        if self.input_format == "BGR":
            pixels = pixels[..., ::-1]
        view = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if not image.is_floating_point():
            view = view.round().clamp(0, 255)
        return view.to(image.dtype)


def photometric_views(cfg: CfgNode) -> PhotometricViews | None:
    """What ``KD.VIEWS`` asks to be made of mapped images, or ``None``."""
    if "KD" not in cfg or not cfg.KD.VIEWS.ENABLED:
        return None
    strengths = {k.lower(): v for k, v in cfg.KD.VIEWS.items() if k != "ENABLED"}
    return PhotometricViews(input_format=cfg.INPUT.FORMAT, **strengths)
