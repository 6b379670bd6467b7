"""Classes by name: what a detector's are called, and which of them another detector has too."""

import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

ClassNames = Callable[[str, int], Sequence[str] | None]
"""
From a field of a dataset's metadata (``"thing_classes"``, ``"stuff_classes"``) and the number of
classes that a detector has to what they are called, in its order; ``None`` where that is unknown.
"""


def unknown(field: str, count: int) -> None:
    """The `ClassNames` of a detector of which nothing is known."""


def class_names(classes: str | Sequence[str]) -> ClassNames:
    """
    Names as a user gives them.

    Args:
        classes: the names themselves, or the name of a dataset, whose metadata are asked once they
            are needed. Nothing is known of an empty one, of a dataset that is not registered, or
            where the dataset has another number of classes than the detector.

    Returns:
        The function; it raises ValueError where names were given, but not as many as there are
        classes.
    """
    if isinstance(classes, str):
        return lambda field, count: _of(dataset_classes(classes, field), count)
    return lambda field, count: _checked(tuple(classes), count)


def dataset_classes(dataset: str, field: str = "thing_classes") -> list[str] | None:
    """
    A dataset's classes in Detectron2's order; ``None`` if it is not registered here, or does not
    say.

    Args:
        dataset: its registered name.
        field: of its metadata.
    """
    if dataset not in MetadataCatalog.list():  # get() would make a new one
        return None
    metadata = MetadataCatalog.get(dataset)
    names, json_file = metadata.get(field), metadata.get("json_file")
    if names is None and field == "thing_classes" and json_file and PathManager.isfile(json_file):
        # Detectron2 learns them when it loads the dataset; so does this, in the same order.
        path = PathManager.get_local_path(json_file)
        names = _annotated_classes(path, os.stat(path).st_mtime)
    return None if names is None else list(names)


def match_names(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """
    For each of their names the position of the same name among ours, -1 where there is none.

    Names are compared letter by letter; of a name that we have twice the first counts.
    """
    positions = {name: i for i, name in reversed(list(enumerate(ours)))}
    return [positions.get(name, -1) for name in theirs]


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, for a sentence."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f", ... ({rest} more)" if rest > 0 else "")


@lru_cache(maxsize=8)
def _annotated_classes(path: str, changed: float) -> tuple[str, ...] | None:
    try:
        with open(path, encoding="utf-8") as f:
            categories = json.load(f)["categories"]
        return tuple(c["name"] for c in sorted(categories, key=lambda c: c["id"]))
    except (ValueError, KeyError, TypeError):  # who loads the dataset will say what is wrong
        return None


def _of(names: Sequence[str] | None, count: int) -> Sequence[str] | None:
    return names if names is not None and len(names) == count else None


def _checked(names: Sequence[str], count: int) -> Sequence[str] | None:
    if names and len(names) != count:
        raise ValueError(
            f"{len(names)} CLASSES are named ({listed(names)}), but the detector has {count}: name "
            "each of them, in its own order"
        )
    return names or None
