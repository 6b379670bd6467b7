"""Masks of the synthetic dataset: they agree with its boxes; and semantic datasets of a user's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from PIL import Image

from kd_det.data import (
    make_synthetic_coco,
    make_synthetic_masks,
    register_sem_seg,
    register_synthetic_masks,
    synthetic_masks,
)
from kd_det.data.synthetic import CLASSES
from kd_det.data.synthetic_masks import IGNORE, STUFF_CLASSES, pixel_classes

NAME = "masks_of_a_test"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("masks") / "data"
    make_synthetic_coco(root, seed=3, num_train=30, num_val=8)
    make_synthetic_masks(root)
    return root


@pytest.fixture(autouse=True)
def _forget():
    yield
    if NAME in DatasetCatalog:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def pixels(root: Path, split: str) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)) for p in sorted((root / "masks" / split).iterdir())}


def test_every_image_has_a_mask_of_its_size(dataset):
    for split, count in (("train", 30), ("val", 8)):
        found = pixels(dataset, split)
        assert list(found) == sorted(p.name for p in (dataset / split).iterdir())
        assert len(found) == count
        assert {(x.shape, x.dtype) for x in found.values()} == {((64, 64), np.dtype(np.uint8))}


def test_every_box_has_pixels_of_its_class_and_no_class_is_outside_of_its_boxes(dataset):
    for split in ("train", "val"):
        content = json.loads((dataset / "annotations" / f"instances_{split}.json").read_text())
        found = pixels(dataset, split)
        for image in content["images"]:
            mask = found[image["file_name"]]
            covered = np.zeros((len(STUFF_CLASSES), 64, 64), bool)
            for a in content["annotations"]:
                if a["image_id"] != image["id"]:
                    continue
                x, y, w, h = a["bbox"]
                box = np.s_[int(y) : int(np.ceil(y + h)), int(x) : int(np.ceil(x + w))]
                label = STUFF_CLASSES.index(CLASSES[a["category_id"] - 1])
                # Most of the area: pixels that are covered to a half or less are not its own.
                assert (mask[box] == label).sum() > 0.5 * a["area"]
                covered[label][box] = True
            for label in range(1, len(STUFF_CLASSES)):
                assert not ((mask == label) & ~covered[label]).any()
            assert set(np.unique(mask)) <= {*range(len(STUFF_CLASSES)), IGNORE}


def test_all_classes_occur(dataset):
    found = np.unique(np.stack(list(pixels(dataset, "train").values())))
    assert found.tolist() == [*range(len(STUFF_CLASSES)), IGNORE]


def test_background_beside_a_shape_is_ignored_and_nothing_else():
    masks = np.zeros((2, 5, 6), bool)
    masks[0, 1:3, 1:3] = True
    masks[1, 2:4, 3] = True
    expected = [
        [0, 255, 255, 0, 0, 0],
        [255, 3, 3, 255, 0, 0],
        [255, 3, 3, 1, 255, 0],
        [0, 255, 255, 1, 255, 0],
        [0, 0, 0, 255, 0, 0],
    ]
    assert pixel_classes([2, 0], masks).tolist() == expected
    assert not pixel_classes([], masks[:0]).any()


def test_masks_are_made_once_and_whole(dataset, tmp_path, monkeypatch):
    make_synthetic_coco(tmp_path / "data", seed=3, num_train=2, num_val=1)
    write = synthetic_masks._write_split
    splits = []

    def cut_off(folder, annotations):
        write(folder, annotations)
        splits.append(folder)
        if len(splits) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(synthetic_masks, "_write_split", cut_off)
    with pytest.raises(KeyboardInterrupt):
        make_synthetic_masks(tmp_path / "data")
    left = {p.name for p in (tmp_path / "data").iterdir()}
    assert left == {"annotations", "dataset.json", "train", "val"}
    monkeypatch.setattr(synthetic_masks, "_write_split", write)
    make_synthetic_masks(tmp_path / "data")
    file = tmp_path / "data" / "masks" / "train" / "000000.png"
    before = file.stat().st_mtime_ns
    make_synthetic_masks(tmp_path / "data")
    assert file.stat().st_mtime_ns == before
    # As every image does, its mask depends on (seed, split, index) alone.
    same = dataset / "masks" / "train" / "000000.png"
    assert file.read_bytes() == same.read_bytes()


def test_the_registered_split_is_what_detectron2_wants(dataset):
    register_synthetic_masks(NAME, dataset, "val")
    records = DatasetCatalog.get(NAME)
    assert len(records) == 8
    for record in records:
        assert Path(record["file_name"]).name == Path(record["sem_seg_file_name"]).name
        assert Path(record["sem_seg_file_name"]).parent == dataset / "masks" / "val"
    metadata = MetadataCatalog.get(NAME)
    assert metadata.stuff_classes == ["background", *CLASSES]
    assert (metadata.ignore_label, metadata.evaluator_type) == (255, "sem_seg")
    assert metadata.json_file.endswith("instances_val.json")
    with pytest.raises(ValueError, match="already taken"):
        register_synthetic_masks(NAME, dataset, "train")


def test_ignored_pixels_are_not_scored(tmp_path):
    """Wherever a pixel is 255, any prediction is as good."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    truth = np.array([[0, 1], [1, 255]], np.uint8)
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "images" / "a.jpg")
    Image.fromarray(truth).save(tmp_path / "masks" / "a.png")
    register_sem_seg(NAME, str(tmp_path / "images"), str(tmp_path / "masks"), ["no", "yes"])
    evaluator = SemSegEvaluator(NAME, distributed=False)
    image = {"file_name": str(tmp_path / "images" / "a.jpg")}
    for last in (0, 1):
        scores = F.one_hot(torch.tensor([[0, 1], [1, last]])).permute(2, 0, 1)
        evaluator.reset()
        evaluator.process([image], [{"sem_seg": scores}])
        assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)


@pytest.mark.parametrize("missing", ["mask", "image", "folder", "all"])
def test_a_folder_that_does_not_fit_says_so(dataset, tmp_path, missing):
    shutil.copytree(dataset / "val", tmp_path / "images")
    shutil.copytree(dataset / "masks" / "val", tmp_path / "masks")
    says = {
        "mask": r"1 of 8 images .* have no mask in .*'000003\.'",
        "image": r"1 masks have no image; the first of them is '000003\.'",
        "folder": r"A folder of dataset 'masks_of_a_test' is missing: .*masks",
        "all": r"has no \.png files",
    }
    if missing in ("mask", "image"):
        (tmp_path / f"{missing}s" / "000003.png").unlink()
    else:
        shutil.rmtree(tmp_path / "masks")
    if missing == "all":
        (tmp_path / "masks").mkdir()
    folders = str(tmp_path / "images"), str(tmp_path / "masks")
    register_sem_seg(NAME, *folders, STUFF_CLASSES, image_ext="png")
    with pytest.raises(ValueError, match=says[missing]):
        DatasetCatalog.get(NAME)


def test_one_missing_on_each_side_is_not_paired_by_order(dataset, tmp_path):
    shutil.copytree(dataset / "val", tmp_path / "images")
    shutil.copytree(dataset / "masks" / "val", tmp_path / "masks")
    (tmp_path / "images" / "000001.png").unlink()
    (tmp_path / "masks" / "000005.png").unlink()
    folders = str(tmp_path / "images"), str(tmp_path / "masks")
    register_sem_seg(NAME, *folders, STUFF_CLASSES, image_ext="png")
    with pytest.raises(ValueError, match="the first of them is '000001"):
        DatasetCatalog.get(NAME)
