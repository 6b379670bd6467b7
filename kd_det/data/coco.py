"""COCO-format datasets: registration by (name, json, image folder) and early checks.

Detectron2 reads a dataset when the training starts and then trains on what it could make sense of.
These checks read the same files before anything is built and say in one sentence what is wrong, in
which file, and what to do. They cost one more parse of the annotation file (10 to 20 s for COCO's
118 000 training images and 860 000 boxes) plus a few seconds of plain loops; nothing opens an
image.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

__all__ = ["check_coco", "check_datasets", "check_same_classes", "register_coco"]

logger = logging.getLogger(__name__)

# Pixels by which a box may leave its image: annotation tools round.
_SLACK = 1.0
# Detectron2 drops boxes of zero width or height, and COCO's own training split has two of them.
# More than this share is no longer an accident.
_ZERO_SIZE_SHARE = 0.001
_KINDS: dict[str, tuple[type, ...]] = {
    "categories.id": (int,),
    "id": (int, str),
    "image_id": (int, str),
    "category_id": (int,),
    "file_name": (str,),
    "name": (str,),
    "height": (int, float),
    "width": (int, float),
}


def register_coco(
    name: str, json_file: str, image_root: str, *, instead_of: tuple[str, str] | None = None
) -> None:
    """Register a COCO-format dataset under a name, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Nothing is read yet; ``check_coco`` does that. Registering the same three again does nothing.

    Args:
        name: the name, not yet taken.
        json_file: the annotation file.
        image_root: the folder that the ``file_name`` fields of the annotation file are relative to.
        instead_of: the (annotation file, image folder) that the name may stand for until now.

    Raises:
        ValueError: the name stands for other files, or for a dataset of another kind.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    if name not in DatasetCatalog.list():
        register_coco_instances(name, {}, json_file, image_root)
        return
    taken = _coco_paths(name)
    if taken is None:
        raise ValueError(
            f"The dataset name {name!r} is already taken by a dataset that is not in COCO format; "
            "choose another name."
        )
    if [_absolute(p) for p in taken] == [_absolute(p) for p in (json_file, image_root)]:
        return
    if taken == instead_of:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)
        register_coco_instances(name, {}, json_file, image_root)
    else:
        raise ValueError(
            f"The dataset name {name!r} is already registered with {taken[0]} and images in "
            f"{taken[1]}, not with {json_file} and {image_root}; choose another name."
        )


def check_coco(name: str, json_file: str, image_root: str) -> list[str]:
    """Check a COCO-format dataset: its files, its structure, its boxes.

    Args:
        name: what the dataset is called in the messages.
        json_file: the annotation file.
        image_root: the folder with the images.

    Returns:
        The class names in Detectron2's order (by category id).

    Raises:
        ValueError: one sentence for the first problem found: a file or folder is missing; the file
            is no COCO annotation file; the split is empty; images, categories or annotations share
            an id; listed images are not in the folder; an annotation names an unknown image or
            category; boxes are malformed, of negative size, of zero size (more than one in a
            thousand; fewer are logged, Detectron2 drops them) or more than 1 px outside their
            image.
    """
    content = _read(name, json_file)
    _check_content(name, json_file, image_root, content)
    return _class_names(content)


def check_same_classes(train_name: str, train_json: str, test_name: str, test_json: str) -> None:
    """Check that two COCO-format datasets have the same classes in the same order.

    Detectron2 numbers classes by the order of the category ids of each dataset, so the same names
    in another order mean other classes.

    Args:
        train_name: what the first dataset is called in the messages.
        train_json: its annotation file.
        test_name: what the second dataset is called in the messages.
        test_json: its annotation file.

    Raises:
        ValueError: a file cannot be read, or the class names differ.
    """
    train = _class_names(_read(train_name, train_json))
    test = _class_names(_read(test_name, test_json))
    _compare_classes(train_name, train, test_name, test)


def check_datasets(train_names: Sequence[str], test_names: Sequence[str]) -> list[str] | None:
    """Check every registered COCO-format dataset of a run, and that all have the same classes.

    Datasets of other kinds (LVIS, Pascal VOC, own loaders) are left alone. A test split without an
    ``annotations`` list, such as COCO's test-dev, is accepted.

    Args:
        train_names: ``DATASETS.TRAIN``.
        test_names: ``DATASETS.TEST``.

    Returns:
        The class names, or None when none of the datasets is in COCO format.

    Raises:
        ValueError: a name is not registered, or what ``check_coco`` and ``check_same_classes``
            raise.
    """
    registered = DatasetCatalog.list()
    first: tuple[str, list[str]] | None = None
    for name in dict.fromkeys([*train_names, *test_names]):
        if name not in registered:
            raise ValueError(
                f"The dataset {name!r} is not registered; name a built-in dataset or give its "
                f"annotation file and image folder under KD.DATASETS.{name}."
            )
        paths = _coco_paths(name)
        if paths is None:
            continue
        content = _read(name, paths[0])
        if name not in train_names:
            content.setdefault("annotations", None)
        _check_content(name, paths[0], paths[1], content)
        classes = _class_names(content)
        if first is None:
            first = (name, classes)
        else:
            _compare_classes(*first, name, classes)
    return None if first is None else first[1]


def _coco_paths(name: str) -> tuple[str, str] | None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco":
        return None
    paths = metadata.get("json_file"), metadata.get("image_root")
    return None if None in paths else (os.fspath(paths[0]), os.fspath(paths[1]))


def _absolute(path: str) -> str:
    # A prefix such as s3:// is for the path manager, not for the working directory.
    return path if "://" in path else os.path.abspath(path)


def _read(name: str, json_file: str) -> dict[str, Any]:
    """The parsed annotation file, if it is one; it may lack ``annotations`` only."""
    if not PathManager.isfile(json_file):
        raise ValueError(
            f"The annotation file of dataset {name!r} is missing: {json_file} (working directory "
            f"{os.getcwd()}; built-in datasets are looked up under the environment variable "
            "DETECTRON2_DATASETS)."
        )
    try:
        with PathManager.open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise ValueError(
            f"The annotation file of dataset {name!r}, {json_file}, is not JSON: {error}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"The annotation file of dataset {name!r}, {json_file}, holds a "
            f"{type(content).__name__}, not an object with the lists images, annotations and "
            "categories; convert it to COCO format."
        )
    for key, fields in (
        ("images", ("id", "file_name", "height", "width")),
        ("categories", ("id", "name")),
    ):
        _check_records(name, json_file, content, key, fields)
    return content


def _check_records(
    name: str, json_file: str, content: dict[str, Any], key: str, fields: Sequence[str]
) -> None:
    records = content.get(key)
    if not isinstance(records, list):
        found = ", ".join(sorted(map(str, content))[:10]) or "nothing"
        raise ValueError(
            f"The annotation file of dataset {name!r}, {json_file}, has no list {key!r} (found: "
            f"{found}); it is not in COCO format, convert it."
        )
    wanted = set(fields)
    for i, record in enumerate(records):
        if not isinstance(record, dict) or not wanted <= record.keys():
            missing = sorted(wanted - record.keys()) if isinstance(record, dict) else sorted(wanted)
            raise ValueError(
                f"In dataset {name!r}, {json_file}: entry {i} of {key!r} lacks "
                f"{', '.join(missing)}; every entry needs {', '.join(fields)}."
            )
        for field in fields:
            kinds = _KINDS.get(f"{key}.{field}", _KINDS.get(field, (object,)))
            if not isinstance(record[field], kinds):
                raise ValueError(
                    f"In dataset {name!r}, {json_file}: entry {i} of {key!r} has the {field} "
                    f"{record[field]!r}; it must be a {' or '.join(k.__name__ for k in kinds)}."
                )
    repeated = _first_repeated(r["id"] for r in records)
    if repeated is not None:
        raise ValueError(
            f"In dataset {name!r}, {json_file}: two entries of {key!r} have the id {repeated}; "
            "make the ids unique."
        )


def _check_content(name: str, json_file: str, image_root: str, content: dict[str, Any]) -> None:
    where = f"In dataset {name!r}, {json_file}"
    images, categories = content["images"], content["categories"]
    if not images:
        raise ValueError(f"{where}: the split is empty, the list 'images' has no entries.")
    if not categories:
        raise ValueError(
            f"{where}: the list 'categories' has no entries, so there is no class to detect."
        )
    repeated = _first_repeated(c["name"] for c in categories)
    if repeated is not None:
        raise ValueError(f"{where}: two categories are called {repeated!r}; make the names unique.")
    _check_files(name, image_root, [i["file_name"] for i in images])
    if "annotations" in content and content["annotations"] is None:
        return  # a test split without ground truth
    _check_records(
        name, json_file, content, "annotations", ("id", "image_id", "category_id", "bbox")
    )
    if not content["annotations"]:
        raise ValueError(f"{where}: the split is empty, the list 'annotations' has no entries.")
    _check_boxes(where, content)


def _check_files(name: str, image_root: str, file_names: Iterable[str]) -> None:
    if not PathManager.isdir(image_root):
        raise ValueError(
            f"The image folder of dataset {name!r} is missing: {image_root} (working directory "
            f"{os.getcwd()})."
        )
    # One listing per folder: asking for each of 118 000 files takes minutes on a network disk.
    present: dict[str, set[str]] = {}
    missing: list[str] = []
    count = 0
    for file_name in file_names:
        count += 1
        folder, base = os.path.split(file_name)
        if folder not in present:
            path = os.path.join(image_root, folder)
            present[folder] = set(PathManager.ls(path)) if PathManager.isdir(path) else set()
        if base not in present[folder]:
            missing.append(file_name)
    if missing:
        raise ValueError(
            f"In dataset {name!r}, {len(missing)} of {count} images are not in {image_root}, the "
            f"first is {missing[0]}; check the image folder, which the file names are relative to."
        )


def _check_boxes(where: str, content: dict[str, Any]) -> None:
    sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
    classes = {c["id"] for c in content["categories"]}
    outside: list[str] = []
    negative: list[str] = []
    zero: list[str] = []
    for annotation in content["annotations"]:
        size = sizes.get(annotation["image_id"])
        if size is None:
            raise ValueError(
                f"{where}: annotation {annotation['id']} belongs to image "
                f"{annotation['image_id']}, which the list 'images' does not have; add the image "
                "or drop the annotation."
            )
        if annotation["category_id"] not in classes:
            raise ValueError(
                f"{where}: annotation {annotation['id']} has category {annotation['category_id']}, "
                "which the list 'categories' does not have; add the category or drop the "
                "annotation."
            )
        box = annotation["bbox"]
        try:
            x, y, w, h = box
            finite = math.isfinite(x + y + w + h)
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise ValueError(
                f"{where}: the box of annotation {annotation['id']} is {box!r}; it must be four "
                "finite numbers, x, y, width and height in pixels."
            )
        if w < 0 or h < 0:
            negative.append(_example(annotation, size))
        elif w == 0 or h == 0:
            zero.append(_example(annotation, size))
        elif x < -_SLACK or y < -_SLACK or x + w > size[0] + _SLACK or y + h > size[1] + _SLACK:
            outside.append(_example(annotation, size))
    total = len(content["annotations"])
    if negative:
        raise ValueError(
            f"{where}: {len(negative)} of {total} boxes have a negative width or height, the first "
            f"is {negative[0]}; boxes are x, y, width, height."
        )
    if outside:
        raise ValueError(
            f"{where}: {len(outside)} of {total} boxes lie more than {_SLACK:g} px outside their "
            f"image, the first is {outside[0]}; boxes are x, y, width, height in pixels, not "
            "corners or fractions of the image."
        )
    if len(zero) > _ZERO_SIZE_SHARE * total:
        raise ValueError(
            f"{where}: {len(zero)} of {total} boxes have zero width or height, the first is "
            f"{zero[0]}; drop them or give them a size in pixels."
        )
    if zero:
        logger.warning(
            "%s: %d of %d boxes have zero width or height and are not used, the first is %s.",
            where, len(zero), total, zero[0],
        )  # fmt: skip


def _example(annotation: dict[str, Any], size: tuple[int, int]) -> str:
    return (
        f"{annotation['bbox']} of annotation {annotation['id']} in image {annotation['image_id']} "
        f"({size[0]} x {size[1]})"
    )


def _first_repeated(values: Iterable[Any]) -> Any:
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _class_names(content: dict[str, Any]) -> list[str]:
    return [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]


def _compare_classes(
    first_name: str, first: list[str], second_name: str, second: list[str]
) -> None:
    if first == second:
        return
    message = f"The datasets {first_name!r} and {second_name!r} have different classes: "
    only_first, only_second = _difference(first, second), _difference(second, first)
    details = [
        f"only {name!r} has {names}"
        for name, names in ((first_name, only_first), (second_name, only_second))
        if names
    ]
    if not details:
        i = next(i for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
        details = [
            f"the names are the same but in another order, class {i} is {first[i]!r} and "
            f"{second[i]!r}"
        ]
    raise ValueError(
        message
        + " and ".join(details)
        + "; the categories, sorted by id, must have the same names in both files."
    )


def _difference(first: list[str], second: list[str]) -> str:
    extra = [name for name in first if name not in second]
    shown = ", ".join(map(repr, extra[:5]))
    return f"{shown} and {len(extra) - 5} more" if len(extra) > 5 else shown
