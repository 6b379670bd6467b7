"""The synthetic dataset for semantic segmentation: for every image the class of each pixel.

The masks are made from the dataset's own annotations, so boxes and pixels say the same: class 0 is
the background, class i + 1 is ``CLASSES[i]``. A pixel belongs to the shape that is seen in more
than half of it. Background pixels that touch a shape, of which it may fill up to a half, are
``IGNORE``: they have no right answer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from kd_det.data.sem_seg import register_sem_seg
from kd_det.data.synthetic import CLASSES

__all__ = [
    "IGNORE",
    "STUFF_CLASSES",
    "make_synthetic_masks",
    "pixel_classes",
    "register_synthetic_masks",
]

STUFF_CLASSES = ("background", *CLASSES)
IGNORE = 255

_FOLDER = "masks"


def make_synthetic_masks(root: str | Path) -> None:
    """Write ``masks/{train,val}/*.png`` into a folder of `make_synthetic_coco`, if not there yet.

    The folder is filled under another name and renamed when complete.

    Args:
        root: the dataset's folder.
    """
    root = Path(root)
    if (root / _FOLDER).is_dir():
        return
    unfinished = root / f".{_FOLDER}.{os.getpid()}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for annotations in sorted((root / "annotations").glob("instances_*.json")):
            split = annotations.stem.removeprefix("instances_")
            (unfinished / split).mkdir(parents=True)
            _write_split(unfinished / split, annotations)
        try:
            os.rename(unfinished, root / _FOLDER)
        except OSError:
            if not (root / _FOLDER).is_dir():  # another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_split(folder: Path, annotations: Path) -> None:
    content = json.loads(annotations.read_text())
    shapes = defaultdict(list)
    for shape in content["annotations"]:
        shapes[shape["image_id"]].append(shape)
    for image in content["images"]:
        found = shapes[image["id"]]
        masks = np.zeros((len(found), image["height"], image["width"]), np.bool_)
        for mask, shape in zip(masks, found, strict=True):
            mask[:] = coco_mask.decode(shape["segmentation"])
        pixels = pixel_classes([shape["category_id"] - 1 for shape in found], masks)
        Image.fromarray(pixels).save(folder / image["file_name"])


def pixel_classes(labels: Sequence[int], masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The class of each pixel.

    Args:
        labels: n, into ``CLASSES``.
        masks: n x H x W, disjoint.

    Returns:
        H x W, into ``STUFF_CLASSES``, or ``IGNORE``.
    """
    pixels = np.zeros(masks.shape[1:], np.uint8)
    for label, mask in zip(labels, masks, strict=True):
        pixels[mask] = label + 1
    shape = np.pad(pixels > 0, 1)
    touched = shape[:-2, 1:-1] | shape[2:, 1:-1] | shape[1:-1, :-2] | shape[1:-1, 2:]
    pixels[touched & (pixels == 0)] = IGNORE
    return pixels


def register_synthetic_masks(name: str, root: str | Path, split: str) -> None:
    """Register one split of a folder that `make_synthetic_masks` filled.

    Args:
        name: the name, not yet taken.
        root: the dataset's folder.
        split: ``train`` or ``val``.

    Raises:
        ValueError: the name is taken.
    """
    root = Path(root)
    register_sem_seg(
        name,
        str(root / split),
        str(root / _FOLDER / split),
        STUFF_CLASSES,
        ignore_label=IGNORE,
        image_ext="png",
        json_file=str(root / "annotations" / f"instances_{split}.json"),
    )
