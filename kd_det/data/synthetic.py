"""A small synthetic detection dataset in COCO format, drawn by our own code.

Every image shows one to a few geometric shapes (the classes) of varied size, colour, rotation and
stretch, partly covered by each other and by thin bars, over a smooth background with distractor
strokes and blobs, under pixel noise. It exists so that a newcomer can train, evaluate and distil
detectors on two CPU cores without a download.

What is annotated is what can be seen: a box is the tight box of the *visible* part of a shape (as
in COCO), measured on the supersampled drawing, so its corners are fractions of a pixel; ``area`` is
the visible area in pixels and ``segmentation`` the visible mask as run-length code
(``INPUT.MASK_FORMAT: bitmask`` in Detectron2). Each image comes from its own generator, seeded by
(seed, split, index): image 7 of a split is the same however many images are made, and no two splits
share an image.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

__all__ = ["CLASSES", "Scene", "draw_scene", "make_synthetic_coco"]

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring")

# Raised whenever the drawing changes, so that a folder made by older code is not taken for a new
# one.
_FORMAT = 1
# The entropy of a split; never renumber, or every published number moves.
_SPLITS = {"train": 0, "val": 1}

_SUPERSAMPLING = 3
_MIN_VISIBLE_FRACTION = 0.6
_MIN_VISIBLE_AREA = 30.0  # square pixels, in an image of 96 x 96

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """One drawn image and its ground truth.

    Attributes:
        image: H x W x 3, uint8, RGB.
        labels: the class index of each object, into ``CLASSES``.
        boxes: n x 4, float64, (x, y, width, height) in pixels of the image, tight around the
            visible part.
        areas: n, float64, visible area in square pixels.
        masks: n x H x W, bool; a pixel belongs to the object that is seen in more than half of it.
    """

    image: NDArray[np.uint8]
    labels: list[int]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    masks: NDArray[np.bool_]


def make_synthetic_coco(
    root: str | Path,
    *,
    seed: int = 0,
    num_train: int = 3000,
    num_val: int = 200,
    image_size: int = 64,
    max_objects: int = 4,
) -> None:
    """Write the dataset to a folder, or do nothing when the same dataset is already there.

    The folder gets ``{train,val}/*.png``, ``annotations/instances_{train,val}.json`` and
    ``dataset.json`` (the parameters). It is filled under another name and renamed when complete, so
    that it is never seen half-written. Every image has at least one box. The same parameters and
    library versions give the same pixels and annotations.

    Args:
        root: the folder to make; its parents are created.
        seed: entropy of all images, >= 0.
        num_train: images in the training split, >= 1.
        num_val: images in the validation split, >= 1.
        image_size: height and width in pixels, >= 32; shapes grow with it.
        max_objects: most shapes in one image, >= 1.

    Raises:
        ValueError: a parameter is out of range, or ``root`` holds something else.
    """
    root = Path(root)
    parameters = {
        "format": _FORMAT,
        "seed": seed,
        "num_train": num_train,
        "num_val": num_val,
        "image_size": image_size,
        "max_objects": max_objects,
    }
    least = {"seed": 0, "num_train": 1, "num_val": 1, "image_size": 32, "max_objects": 1}
    for name, low in least.items():
        if parameters[name] < low:
            raise ValueError(
                f"make_synthetic_coco: {name} is {parameters[name]}; it must be at least {low}."
            )
    if _is_there(root, parameters):
        return

    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = root.with_name(f".{root.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        (unfinished / "annotations").mkdir(parents=True)
        for split, count in (("train", num_train), ("val", num_val)):
            _write_split(unfinished, split, count, seed, image_size, max_objects)
        (unfinished / "dataset.json").write_text(json.dumps(parameters, indent=2) + "\n")
        try:
            os.rename(unfinished, root)
        except OSError:
            # Another process may have finished the same dataset meanwhile; anything else is an
            # error.
            if not _is_there(root, parameters):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    logging.getLogger(__name__).info(
        "Drew %d training and %d validation images into %s.", num_train, num_val, root
    )


def _is_there(root: Path, parameters: dict[str, int]) -> bool:
    if not root.exists():
        return False
    if not root.is_dir():
        raise ValueError(
            f"The synthetic dataset goes into a folder, but {root} is a file; name another folder."
        )
    record = root / "dataset.json"
    if not record.exists():
        if any(root.iterdir()):
            raise ValueError(
                f"{root} is not empty and has no dataset.json, so it is not a synthetic dataset; "
                "name another folder or remove this one."
            )
        return False
    found = json.loads(record.read_text())
    differing = sorted(
        k for k in parameters.keys() | found.keys() if parameters.get(k) != found.get(k)
    )
    if differing:
        details = ", ".join(
            f"{k} is {found.get(k)} there and {parameters.get(k)} here" for k in differing
        )
        raise ValueError(
            f"{root} holds a synthetic dataset with other parameters ({details}); "
            "name another folder or remove this one."
        )
    return True


def _write_split(
    root: Path, split: str, count: int, seed: int, image_size: int, max_objects: int
) -> None:
    (root / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng([seed, _SPLITS[split], index])
        scene = draw_scene(rng, image_size=image_size, max_objects=max_objects)
        name = f"{index:06d}.png"
        Image.fromarray(scene.image).save(root / split / name, compress_level=1)
        images.append(
            {"id": index + 1, "file_name": name, "height": image_size, "width": image_size}
        )
        for label, box, area, mask in zip(
            scene.labels, scene.boxes, scene.areas, scene.masks, strict=True
        ):
            code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": [round(float(v), 3) for v in box],
                    "area": round(float(area), 3),
                    "iscrowd": 0,
                    "segmentation": {
                        "size": code["size"],
                        "counts": code["counts"].decode("ascii"),
                    },
                }
            )
    content = {
        "info": {"description": f"kd_det synthetic shapes, {split}, seed {seed}"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)
        ],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def draw_scene(rng: np.random.Generator, *, image_size: int = 64, max_objects: int = 4) -> Scene:
    """Draw one image.

    Args:
        rng: the only source of randomness.
        image_size: height and width in pixels.
        max_objects: most shapes; the number is uniform in 1..max_objects, less those that found no
            room.

    Returns:
        The image with at least one object. Of every object at least 60 % of what lies inside the
        image is visible, and at least 30 square pixels (at ``image_size`` 96; the bound grows with
        the image's area).
    """
    size = image_size * _SUPERSAMPLING
    canvas = _background(rng, size)
    # Which object is seen at each point: 0 is none, i + 1 the i-th.
    owner = np.zeros((size, size), np.uint8)
    least_area = _MIN_VISIBLE_AREA * (size / 96) ** 2
    drawn_areas = [0]  # by owner number
    labels: list[int] = []

    def paint(mask: NDArray[np.bool_], number: int) -> bool:
        """Cover ``owner`` where the mask is, unless that hides too much of what is there."""
        covered = np.where(mask, np.uint8(number), owner)
        visible = np.bincount(covered.ravel(), minlength=len(drawn_areas))
        for i, drawn in enumerate(drawn_areas[1:], start=1):
            if visible[i] < max(_MIN_VISIBLE_FRACTION * drawn, least_area):
                return False
        owner[:] = covered
        return True

    wanted = int(rng.integers(1, max_objects + 1))
    for _ in range(4 * wanted):
        if len(labels) == wanted:
            break
        label = int(rng.integers(len(CLASSES)))
        # Log-uniform radius: as many small shapes as large ones.
        radius = size * math.exp(rng.uniform(math.log(0.15), math.log(0.30)))
        centre = rng.uniform(0.75 * radius, size - 0.75 * radius, 2)
        mask = _shape_mask(rng, CLASSES[label], centre, radius, size)
        drawn_areas.append(int(mask.sum()))
        if drawn_areas[-1] < least_area or not paint(mask, len(labels) + 1):
            drawn_areas.pop()
            continue
        labels.append(label)
        _fill(rng, canvas, mask)

    for _ in range(int(rng.integers(0, 3))):
        mask = _stroke_mask(rng, size)
        if paint(mask, 0):
            _fill(rng, canvas, mask)

    image = np.asarray(Image.fromarray(canvas).reduce(_SUPERSAMPLING), np.float32)
    image += rng.normal(0.0, rng.uniform(2.0, 8.0), image.shape).astype(np.float32)
    return Scene(
        np.clip(np.rint(image), 0, 255).astype(np.uint8), labels, *_truth(owner, len(labels))
    )


def _truth(
    owner: NDArray[np.uint8], count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes, areas and masks, in pixels of the final image, of the objects numbered 1..count."""
    factor = _SUPERSAMPLING
    out = owner.shape[0] // factor
    boxes, areas, masks = (
        np.zeros((count, 4)),
        np.zeros(count),
        np.zeros((count, out, out), np.bool_),
    )
    for i in range(count):
        seen = owner == i + 1
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        top, left = rows[0], columns[0]
        boxes[i] = (left, top, columns[-1] + 1 - left, rows[-1] + 1 - top)
        areas[i] = seen.sum()
        masks[i] = seen.reshape(out, factor, out, factor).sum((1, 3)) * 2 > factor**2
    return boxes / factor, areas / factor**2, masks


def _outline(name: str) -> tuple[Points, Points | None]:
    """The outline of a class within the unit circle, and the outline of its hole if it has one."""

    def polar(count: int, radii: tuple[float, ...] = (1.0,), start: float = 0.0) -> Points:
        angles = start + np.arange(count) * (2 * math.pi / count)
        r = np.resize(np.asarray(radii), count)
        return np.stack([r * np.cos(angles), r * np.sin(angles)], 1)

    if name == "circle":
        return polar(60), None
    if name == "ring":
        return polar(60), 0.55 * polar(60)
    if name == "square":
        return polar(4, start=math.pi / 4), None
    if name == "triangle":
        return polar(3, start=-math.pi / 2), None
    if name == "hexagon":
        return polar(6), None
    if name == "star":
        return polar(10, (1.0, 0.42), -math.pi / 2), None
    if name == "cross":
        a, b = 0.3, 0.95
        arm = np.array([(b, -a), (b, a), (a, a)])
        turn = np.array([(0.0, 1.0), (-1.0, 0.0)])  # a quarter turn, for row vectors
        return np.concatenate([arm @ np.linalg.matrix_power(turn, k) for k in range(4)]), None
    if name == "halfmoon":
        angles = np.linspace(0.0, math.pi, 31)
        return np.stack([np.cos(angles), np.sin(angles) - 0.4], 1), None
    raise AssertionError(name)


def _shape_mask(
    rng: np.random.Generator, name: str, centre: Points, radius: float, size: int
) -> NDArray[np.bool_]:
    angle = rng.uniform(-0.5, 0.5)
    stretch = math.exp(rng.uniform(-0.18, 0.18))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    # Stretched before it is turned; the larger half-axis stays `radius`.
    place = np.diag([stretch, 1.0]) @ turn * (radius / max(stretch, 1.0))
    plane = Image.new("L", (size, size))
    draw = ImageDraw.Draw(plane)
    outer, hole = _outline(name)
    draw.polygon([tuple(p) for p in (outer @ place + centre).tolist()], fill=1)
    if hole is not None:
        draw.polygon([tuple(p) for p in (hole @ place + centre).tolist()], fill=0)
    return np.asarray(plane, np.bool_)


def _stroke_mask(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """A thin bar across a part of the image: the usual thing that hides a part of a shape."""
    plane = Image.new("L", (size, size))
    start, angle = rng.uniform(0, size, 2), rng.uniform(0, 2 * math.pi)
    end = start + size * rng.uniform(0.2, 0.7) * np.array([math.cos(angle), math.sin(angle)])
    width = max(1, round(size * rng.uniform(0.01, 0.03)))
    ImageDraw.Draw(plane).line([*start.tolist(), *end.tolist()], fill=1, width=width)
    return np.asarray(plane, np.bool_)


def _fill(rng: np.random.Generator, canvas: NDArray[np.uint8], mask: NDArray[np.bool_]) -> None:
    """Colour the masked pixels, unlike what they cover and shaded along one direction."""
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        return
    below = canvas[rows[::16], columns[::16]].mean(0)
    colour = rng.uniform(0, 255, 3)
    for _ in range(20):
        # Some shapes are faint, none is invisible.
        if np.linalg.norm(colour - below) >= 120:
            break
        colour = rng.uniform(0, 255, 3)
    slope = rng.normal(0.0, 1.0, 2)
    along = slope[0] * rows + slope[1] * columns
    shade = (along - along.mean()) / max(float(np.ptp(along)), 1.0) * rng.uniform(0.0, 70.0)
    for channel in range(3):
        canvas[rows, columns, channel] = np.clip(colour[channel] + shade, 0, 255)


def _background(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """Smooth colours, with blobs and strokes that belong to no class."""
    cells = int(rng.integers(2, 7))
    middle, spread = rng.uniform(50, 205, 3), rng.uniform(10, 50)
    coarse = np.clip(middle + rng.normal(0, spread, (cells, cells, 3)), 0, 255).astype(np.uint8)
    plane = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(plane)
    for _ in range(int(rng.integers(1, 6))):
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        start = rng.uniform(0, size, 2)
        if rng.random() < 0.5:
            # A blob: a random star-shaped polygon, too irregular for any class.
            count = int(rng.integers(5, 10))
            angles = np.sort(rng.uniform(0, 2 * math.pi, count))
            radii = size * rng.uniform(0.015, 0.06) * rng.uniform(0.4, 1.6, count)
            points = start + np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
            draw.polygon([tuple(p) for p in points.tolist()], fill=colour)
        else:
            # A stroke: a random walk of a few straight pieces.
            steps = rng.normal(0, 0.12 * size, (int(rng.integers(1, 5)), 2))
            points = np.concatenate([start[None], start + np.cumsum(steps, 0)])
            width = max(1, round(size * rng.uniform(0.005, 0.025)))
            draw.line([tuple(p) for p in points.tolist()], fill=colour, width=width, joint="curve")
    return np.array(plane, np.uint8)
