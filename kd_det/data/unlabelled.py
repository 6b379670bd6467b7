"""Images without labels, to be mixed into a training set and imitated on."""

from __future__ import annotations

import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

__all__ = ["forget_unlabelled", "is_unlabelled", "register_unlabelled"]

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def register_unlabelled(name: str, image_root: str) -> None:
    """Register a folder of images without labels, for ``DATASETS.TRAIN`` beside other datasets.

    Nothing is read yet. Records have no ``annotations``, which Detectron2's filter of images
    without objects would look at: set ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` to False. They are
    marked as ``unlabelled``, which mappers pass on: see `kd_det.labels`.

    Args:
        name: the name; if it stands for unlabelled images already, they are replaced.
        image_root: the folder; of it and the folders in it every image counts.

    Raises:
        ValueError: the name stands for a dataset with labels; when the dataset is loaded: the
            folder is missing or has no images.
    """
    image_root = os.fspath(image_root)
    forget_unlabelled(name)
    if name in DatasetCatalog.list():
        raise ValueError(
            f"The dataset name {name!r} is already taken by a dataset with labels; choose another "
            "name for the images without."
        )
    DatasetCatalog.register(name, lambda: _load(name, image_root))
    # No thing_classes: Detectron2 would count the objects of each.
    MetadataCatalog.get(name).set(image_root=image_root, unlabelled=True)


def is_unlabelled(name: str) -> bool:
    """Whether a name stands for a dataset of `register_unlabelled`."""
    return name in DatasetCatalog.list() and bool(MetadataCatalog.get(name).get("unlabelled"))


def forget_unlabelled(name: str) -> None:
    """Free a name that stands for a dataset of `register_unlabelled`; others are left alone."""
    if is_unlabelled(name):
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


def _load(name: str, image_root: str) -> list[dict[str, Any]]:
    if not PathManager.isdir(image_root):
        raise ValueError(f"The image folder of dataset {name!r} is missing: {image_root}.")
    found = sorted(_images(image_root))
    if not found:
        raise ValueError(
            f"The image folder of dataset {name!r}, {image_root}, has no image "
            f"({', '.join(_EXTENSIONS)})."
        )
    ids = [path.removeprefix(image_root).lstrip("/") for path in found]
    return [
        {"file_name": path, "image_id": i, "unlabelled": True}
        for path, i in zip(found, ids, strict=True)
    ]


def _images(folder: str) -> list[str]:
    found = []
    for entry in PathManager.ls(folder):
        path = os.path.join(folder, entry)
        if PathManager.isdir(path):
            found += _images(path)
        elif entry.lower().endswith(_EXTENSIONS):
            found.append(path)
    return found
