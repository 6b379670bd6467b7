"""The synthetic dataset: deterministic, disjoint, and its boxes are what is drawn."""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_det.data import synthetic
from kd_det.data.synthetic import CLASSES, Scene, draw_scene, make_synthetic_coco

SMALL = {"num_train": 12, "num_val": 8, "image_size": 64}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic") / "data"
    make_synthetic_coco(root, seed=3, **SMALL)
    return root


def load(root: Path, split: str) -> dict:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def pixels(root: Path, split: str) -> dict[str, bytes]:
    return {p.name: np.asarray(Image.open(p)).tobytes() for p in sorted((root / split).iterdir())}


def scenes(count: int, **kwargs: int) -> list[Scene]:
    return [draw_scene(np.random.default_rng([7, i]), **kwargs) for i in range(count)]


def test_layout(dataset: Path) -> None:
    assert sorted(p.name for p in dataset.iterdir()) == [
        "annotations",
        "dataset.json",
        "train",
        "val",
    ]
    for split, count in (("train", 12), ("val", 8)):
        content = load(dataset, split)
        assert [c["name"] for c in content["categories"]] == list(CLASSES)
        assert len(content["images"]) == count
        assert {i["file_name"] for i in content["images"]} == set(pixels(dataset, split))
        for image in content["images"]:
            with Image.open(dataset / split / image["file_name"]) as file:
                assert (file.width, file.height) == (image["width"], image["height"]) == (64, 64)
                assert file.mode == "RGB"
        assert {a["image_id"] for a in content["annotations"]} == {
            i["id"] for i in content["images"]
        }


def test_same_seed_same_data(dataset: Path, tmp_path: Path) -> None:
    np.random.seed(99)  # noqa: NPY002  # the global generators must not matter
    make_synthetic_coco(tmp_path / "again", seed=3, **SMALL)
    for split in ("train", "val"):
        assert pixels(tmp_path / "again", split) == pixels(dataset, split)
        assert load(tmp_path / "again", split) == load(dataset, split)


def test_other_seed_other_data(dataset: Path, tmp_path: Path) -> None:
    make_synthetic_coco(tmp_path / "other", seed=4, **SMALL)
    for split in ("train", "val"):
        mine, other = pixels(dataset, split), pixels(tmp_path / "other", split)
        assert not set(mine.values()) & set(other.values())


def test_images_do_not_depend_on_the_counts(dataset: Path, tmp_path: Path) -> None:
    make_synthetic_coco(tmp_path / "fewer", seed=3, num_train=5, num_val=3, image_size=64)
    for split in ("train", "val"):
        fewer, all_of_them = pixels(tmp_path / "fewer", split), pixels(dataset, split)
        assert fewer == {name: all_of_them[name] for name in fewer}


def test_splits_are_disjoint(dataset: Path) -> None:
    train, val = pixels(dataset, "train"), pixels(dataset, "val")
    assert len({*train.values(), *val.values()}) == len(train) + len(val)


def test_boxes_are_tight_around_the_drawn_masks() -> None:
    for scene in scenes(30):
        for box, mask, area in zip(scene.boxes, scene.masks, scene.areas, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            corners = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]])
            # Thin tips cover less than half of their pixels, so the box may reach further out by
            # a few of them; it is never inside the mask by more than a part of a pixel.
            outwards = (tight - corners) * [1, 1, -1, -1]
            assert (outwards > -1).all()
            assert (outwards < 3).all()
            assert np.median(np.abs(outwards)) < 1
            assert area == pytest.approx(mask.sum(), rel=0.15, abs=6)


def test_a_box_is_what_can_be_seen() -> None:
    """The object is where the annotation says: painted differently from a picture without it."""
    owner = np.zeros((30, 30), np.uint8)
    owner[6:18, 3:15] = 1
    owner[9:21, 9:24] = 2  # covers the corner of the first
    boxes, areas, masks = synthetic._truth(owner, 2)
    assert boxes.tolist() == [[1, 2, 4, 4], [3, 3, 5, 4]]
    assert areas.tolist() == [(12 * 12 - 6 * 9) / 9, 20.0]
    assert masks[1].sum() == 20
    assert not (masks[0] & masks[1]).any()


def test_the_image_shows_the_objects() -> None:
    """Within a mask the colour differs from its surroundings: the truth belongs to this image."""
    contrasts = []
    for scene in scenes(40, max_objects=1):
        mask = scene.masks[0]
        x, y, w, h = (round(v) for v in scene.boxes[0])
        around = np.zeros_like(mask)
        around[max(y - 2, 0) : y + h + 2, max(x - 2, 0) : x + w + 2] = True
        image = scene.image.astype(np.float64)
        contrasts.append(np.linalg.norm(image[mask].mean(0) - image[around & ~mask].mean(0)))
    shifted = np.roll(scenes(1, max_objects=1)[0].masks[0], 40, 1)
    assert not (shifted & scenes(1, max_objects=1)[0].masks[0]).all()
    assert np.median(contrasts) > 80
    assert np.mean(np.array(contrasts) > 40) > 0.9


@pytest.mark.parametrize("size", [33, 64, 96, 128])
def test_boxes_are_inside_and_not_tiny(size: int) -> None:
    for scene in scenes(25, image_size=size):
        assert scene.image.shape == (size, size, 3)
        assert len(scene.labels) == len(scene.boxes) == len(scene.areas) >= 1
        assert (scene.boxes[:, :2] >= 0).all()
        assert (scene.boxes[:, :2] + scene.boxes[:, 2:] <= size).all()
        assert (scene.areas >= synthetic._MIN_VISIBLE_AREA * (size / 96) ** 2 - 1e-9).all()


def test_every_class_and_every_count_occurs() -> None:
    drawn = scenes(120, max_objects=4)
    assert {label for s in drawn for label in s.labels} == set(range(len(CLASSES)))
    assert {len(s.labels) for s in drawn} == {1, 2, 3, 4}


def test_classes_look_different() -> None:
    """The share of the box that a shape fills tells rings, stars and squares apart."""
    fill: dict[int, list[float]] = {}
    for scene in scenes(150, max_objects=1):
        area = scene.boxes[0, 2] * scene.boxes[0, 3]
        fill.setdefault(scene.labels[0], []).append(scene.areas[0] / area)
    medians = {CLASSES[k]: np.median(v) for k, v in fill.items()}
    assert medians["star"] < medians["cross"] < medians["circle"]
    assert medians["ring"] < medians["circle"] - 0.1


def test_segmentation_is_the_mask(dataset: Path) -> None:
    for annotation in load(dataset, "val")["annotations"]:
        code = annotation["segmentation"]
        mask = coco_mask.decode({"size": code["size"], "counts": code["counts"].encode()})
        assert mask.shape == (64, 64)
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.2, abs=6)
        x, y, w, h = annotation["bbox"]
        rows, columns = np.nonzero(mask)
        assert columns.min() >= x - 1
        assert columns.max() < x + w + 1
        assert rows.min() >= y - 1
        assert rows.max() < y + h + 1


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 1.0), (40.0, 0.0)])
def test_truth_as_prediction_scores_one(dataset: Path, shift: float, expected: float) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(dataset / "annotations" / "instances_val.json"))
        predictions = [
            {
                "image_id": a["image_id"],
                "category_id": a["category_id"],
                "bbox": [a["bbox"][0] + shift, *a["bbox"][1:]],
                "score": 0.9,
            }
            for a in truth.dataset["annotations"]
        ]
        for kind in ("bbox", "segm") if shift == 0 else ("bbox",):
            if kind == "segm":
                for p, a in zip(predictions, truth.dataset["annotations"], strict=True):
                    p["segmentation"] = a["segmentation"]
            evaluation = COCOeval(truth, truth.loadRes(predictions), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert evaluation.stats[0] == pytest.approx(expected, abs=0.05 if shift else 1e-9)


def test_second_call_changes_nothing(dataset: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*")}
    make_synthetic_coco(dataset, seed=3, **SMALL)
    assert {p: p.stat().st_mtime_ns for p in dataset.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, r"other parameters \(seed is 3 there and 5 here\)"),
        ({"num_val": 9}, r"num_val is 8 there and 9 here"),
        ({"seed": -1}, r"seed is -1; it must be at least 0\."),
        ({"num_train": 0}, r"num_train is 0; it must be at least 1\."),
        ({"image_size": 31}, r"image_size is 31; it must be at least 32\."),
        ({"max_objects": 0}, r"max_objects is 0; it must be at least 1\."),
    ],
)
def test_wrong_parameters_are_named(dataset: Path, change: dict[str, int], message: str) -> None:
    before = sorted(dataset.rglob("*"))
    with pytest.raises(ValueError, match=message):
        make_synthetic_coco(dataset, **{"seed": 3, **SMALL, **change})
    assert sorted(dataset.rglob("*")) == before


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"mine is not empty and has no dataset\.json"):
        make_synthetic_coco(tmp_path / "mine", **SMALL)
    with pytest.raises(ValueError, match=r"but .*thesis\.txt is a file"):
        make_synthetic_coco(tmp_path / "mine" / "thesis.txt", **SMALL)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_an_interrupted_call_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def failing(*args: object, **kwargs: object) -> Scene:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw_scene(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(synthetic, "draw_scene", failing)
    with pytest.raises(KeyboardInterrupt):
        make_synthetic_coco(tmp_path / "data", **SMALL)
    assert os.listdir(tmp_path) == []
