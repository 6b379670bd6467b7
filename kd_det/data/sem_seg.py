"""Semantic segmentation datasets: registration by (name, image folder, mask folder, classes)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg
from detectron2.utils.file_io import PathManager

__all__ = ["register_sem_seg"]


def register_sem_seg(
    name: str,
    image_root: str,
    mask_root: str,
    classes: Sequence[str],
    *,
    ignore_label: int = 255,
    image_ext: str = "jpg",
    json_file: str = "",
) -> None:
    """Register images with one PNG of class indices each, for ``DATASETS.TRAIN`` and ``TEST``.

    Nothing is read yet. Image and mask have the same file name but for the extension. Evaluated by
    Detectron2's SemSegEvaluator.

    Args:
        name: the name, not yet taken.
        image_root: the folder of the images.
        mask_root: the folder of the masks: 8-bit, one channel, of class indices.
        classes: names by index; where most pixels are of no class in particular, the background is
            one of them.
        ignore_label: pixels of this value are neither learnt nor scored. It has to be
            ``MODEL.SEM_SEG_HEAD.IGNORE_VALUE`` too.
        image_ext: how the file names of the images end.
        json_file: annotation file that the masks come from, if there is one: the record of a run
            identifies the dataset by it.

    Raises:
        ValueError: the name is taken; when the dataset is loaded: a folder is missing or empty, or
            an image has no mask.
    """
    if name in DatasetCatalog.list():
        raise ValueError(f"The dataset name {name!r} is already taken; choose another name.")
    image_root, mask_root = os.fspath(image_root), os.fspath(mask_root)
    DatasetCatalog.register(name, lambda: _load(name, image_root, mask_root, image_ext))
    metadata = MetadataCatalog.get(name)
    metadata.set(
        image_root=image_root,
        sem_seg_root=mask_root,
        stuff_classes=list(classes),
        ignore_label=ignore_label,
        evaluator_type="sem_seg",
    )
    if json_file:
        metadata.set(json_file=os.fspath(json_file))


def _load(name: str, image_root: str, mask_root: str, image_ext: str) -> list[dict[str, Any]]:
    images, masks = _stems(name, image_root, image_ext), _stems(name, mask_root, "png")
    if images != masks:  # Detectron2 takes what both have, or, for as many of both, goes by order
        raise ValueError(
            f"In dataset {name!r}, {len(images - masks)} of {len(images)} images in {image_root} "
            f"have no mask in {mask_root}, and {len(masks - images)} masks have no image; the "
            f"first of them is {min(images ^ masks)!r}: give both the same file name."
        )
    records: list[dict[str, Any]] = load_sem_seg(mask_root, image_root, "png", image_ext)
    return records


def _stems(name: str, folder: str, ext: str) -> set[str]:
    if not PathManager.isdir(folder):
        raise ValueError(f"A folder of dataset {name!r} is missing: {folder}.")
    found = {f.removesuffix(ext) for f in PathManager.ls(folder) if f.endswith(ext)}
    if not found:
        raise ValueError(f"A folder of dataset {name!r} has no .{ext} files: {folder}.")
    return found
