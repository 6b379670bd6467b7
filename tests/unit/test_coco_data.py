"""Registration of COCO-format datasets, and every sentence of the early checks."""

import copy
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from kd_det.data.coco import check_coco, check_datasets, check_same_classes, register_coco

Content = dict[str, Any]


def good() -> Content:
    """A small annotation file with what real ones have: id gaps, a crowd, an empty image."""
    return {
        "images": [
            {"id": 7, "file_name": "a.jpg", "height": 50, "width": 100},
            {"id": 9, "file_name": "sub/b.jpg", "height": 50, "width": 100},
            {"id": 12, "file_name": "empty.jpg", "height": 50, "width": 100},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 100.9, 50.9], "iscrowd": 0},
            {"id": 5, "image_id": 9, "category_id": 1, "bbox": [-0.9, 10, 20, 5], "iscrowd": 0},
            {"id": 6, "image_id": 9, "category_id": 1, "bbox": [1, 1, 99, 49], "iscrowd": 1},
        ],
        "categories": [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}],
    }


def write(folder: Path, content: Any, name: str = "instances.json") -> tuple[str, str]:
    images = folder / "images"
    (images / "sub").mkdir(parents=True, exist_ok=True)
    for file in ("a.jpg", "sub/b.jpg", "empty.jpg"):
        (images / file).touch()
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path), str(images)


@pytest.fixture
def catalogs() -> Iterator[None]:
    """Forget what the test registers."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def test_good_content_passes(tmp_path: Path) -> None:
    assert check_coco("pets", *write(tmp_path, good())) == ["cat", "dog"]  # in order of the ids


def put(*path: Any) -> Callable[[Content], None]:
    """A change: the last of ``path`` becomes the value at the place that the others lead to."""
    *keys, last, value = path

    def change(content: Content) -> None:
        place: Any = content
        for key in keys:
            place = place[key]
        place[last] = value

    return change


def drop(*path: Any) -> Callable[[Content], None]:
    *keys, last = path

    def change(content: Content) -> None:
        place: Any = content
        for key in keys:
            place = place[key]
        del place[last]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("images"), r"has no list 'images' \(found: annotations, categories\); it is not in"),
        (drop("annotations"), r"has no list 'annotations' \(found: categories, images\)"),
        (drop("categories"), r"has no list 'categories'"),
        (put("images", {}), r"has no list 'images'"),
        (put("images", []), r"the split is empty, the list 'images' has no entries\."),
        (put("annotations", []), r"the split is empty, the list 'annotations' has no entries\."),
        (put("categories", []), r"'categories' has no entries, so there is no class"),
        (drop("images", 1, "width"), r"entry 1 of 'images' lacks width; every entry needs id"),
        (drop("annotations", 2, "bbox"), r"entry 2 of 'annotations' lacks bbox;"),
        (put("annotations", 0, 5), r"entry 0 of 'annotations' lacks bbox, category_id, id, image"),
        (put("images", 2, "id", 7), r"two entries of 'images' have the id 7;"),
        (put("annotations", 1, "id", 1), r"two entries of 'annotations' have the id 1;"),
        (put("categories", 1, "id", 3), r"two entries of 'categories' have the id 3;"),
        (put("categories", 1, "name", "dog"), r"two categories are called 'dog';"),
        (put("images", 1, "file_name", "b.jpg"), r"1 of 3 images are not in .*, the first is b\.j"),
        (put("images", 1, "file_name", "no/b.jpg"), r"the first is no/b\.jpg; check the image fol"),
        (put("annotations", 1, "image_id", 8), r"annotation 5 belongs to image 8, which the list"),
        (put("annotations", 1, "category_id", 2), r"annotation 5 has category 2, which the list"),
        (
            put("annotations", 0, "bbox", [1, 2, 3]),
            r"the box of annotation 1 is \[1, 2, 3\]; it mu",
        ),
        (put("annotations", 0, "bbox", None), r"the box of annotation 1 is None; it must be four"),
        (put("annotations", 0, "bbox", [0, 0, "9", 9]), r"the box of annotation 1 is \[0, 0, '9'"),
        (put("annotations", 0, "bbox", [0, 0, float("nan"), 9]), r"it must be four finite numbers"),
        (
            put("annotations", 0, "bbox", [90, 40, -80, 5]),
            r"1 of 3 boxes have a negative width or height, the first is \[90, 40, -80, 5\] of "
            r"annotation 1 in image 7 \(100 x 50\);",
        ),
        (
            put("annotations", 0, "bbox", [9, 9, 0, 5]),
            r"1 of 3 boxes have zero width or height, the first is \[9, 9, 0, 5\] of annotation 1",
        ),
        (
            put("annotations", 0, "bbox", [60, 10, 41.1, 5]),
            r"1 of 3 boxes lie more than 1 px outside their image, the first is "
            r"\[60, 10, 41\.1, 5\] of annotation 1 in image 7 \(100 x 50\);",
        ),
        (put("annotations", 0, "bbox", [0, 20, 9, 31.1]), r"more than 1 px outside"),
        (put("annotations", 0, "bbox", [-1.1, 0, 9, 9]), r"more than 1 px outside"),
        (put("annotations", 0, "bbox", [0, -1.1, 9, 9]), r"more than 1 px outside"),
    ],
)
def test_every_problem_has_its_sentence(
    tmp_path: Path, change: Callable[[Content], None], message: str
) -> None:
    content = good()
    change(content)
    json_file, images = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        check_coco("pets", json_file, images)
    assert "'pets'" in str(error.value)
    assert json_file in str(error.value) or images in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', r"pets.*instances\.json, is not JSON: "),
        (
            "[1, 2]",
            r"holds a list, not an object with the lists images, annotations and categories",
        ),
        ("{}", r"has no list 'images' \(found: nothing\)"),
    ],
)
def test_files_that_are_no_coco(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_coco("pets", *write(tmp_path, text))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    json_file, images = write(tmp_path, good())
    with pytest.raises(
        ValueError, match=r"annotation file of dataset 'pets' is missing: .*no\.json"
    ):
        check_coco("pets", str(tmp_path / "no.json"), images)
    with pytest.raises(ValueError, match=r"image folder of dataset 'pets' is missing: .*nowhere"):
        check_coco("pets", json_file, str(tmp_path / "nowhere"))


def test_a_few_boxes_of_zero_size_are_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = good()
    more = [copy.deepcopy(content["annotations"][1]) | {"id": 100 + i} for i in range(1000)]
    more[10]["bbox"] = [5, 5, 0, 5]
    content["annotations"] += more
    with caplog.at_level(logging.WARNING, "kd_det"):
        check_coco("pets", *write(tmp_path, content))
    assert "1 of 1003 boxes have zero width or height and are not used" in caplog.text


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1, "name": "cat"}], r"different classes: only 'a' has 'dog';"),
        (
            [{"id": 1, "name": "cat"}, {"id": 2, "name": "Dog"}],
            r"only 'a' has 'dog' and only 'b' has 'Dog';",
        ),
        (
            [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
            r"the names are the same but in another order, class 0 is 'cat' and 'dog';",
        ),
        (
            [{"id": i, "name": f"c{i}"} for i in range(8)],
            r"only 'b' has 'c0', 'c1', 'c2', 'c3', 'c4' and 3 more;",
        ),
    ],
)
def test_classes_that_differ(tmp_path: Path, categories: list[Content], message: str) -> None:
    json_file, _ = write(tmp_path, good(), "a.json")
    other, _ = write(tmp_path, {**good(), "categories": categories}, "b.json")
    with pytest.raises(ValueError, match=message):
        check_same_classes("a", json_file, "b", other)


def test_same_classes_with_other_ids_pass(tmp_path: Path) -> None:
    json_file, _ = write(tmp_path, good(), "a.json")
    categories = [{"id": 50, "name": "dog"}, {"id": 40, "name": "cat"}]
    other, _ = write(tmp_path, {**good(), "categories": categories}, "b.json")
    check_same_classes("a", json_file, "b", other)


@pytest.mark.usefixtures("catalogs")
class TestRegistration:
    def test_loads_and_is_idempotent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        json_file, images = write(tmp_path, good())
        register_coco("pets", json_file, images)
        register_coco("pets", json_file, images)
        monkeypatch.chdir(tmp_path)
        register_coco("pets", "instances.json", "images")  # the same files, named otherwise
        dicts = DatasetCatalog.get("pets")
        assert [os.path.basename(d["file_name"]) for d in dicts] == ["a.jpg", "b.jpg", "empty.jpg"]
        assert MetadataCatalog.get("pets").thing_classes == ["cat", "dog"]

    @pytest.mark.parametrize("other", ["json", "images"])
    def test_taken_by_other_files(self, tmp_path: Path, other: str) -> None:
        json_file, images = write(tmp_path, good())
        register_coco("pets", json_file, images)
        paths = (json_file + "2", images) if other == "json" else (json_file, images + "2")
        with pytest.raises(
            ValueError, match=r"'pets' is already registered with .*instances\.json"
        ):
            register_coco("pets", *paths)
        assert MetadataCatalog.get("pets").json_file == json_file

    def test_taken_by_another_kind(self, tmp_path: Path) -> None:
        DatasetCatalog.register("mine", list)
        with pytest.raises(
            ValueError, match=r"'mine' is already taken by a dataset that is not in"
        ):
            register_coco("mine", *write(tmp_path, good()))
        with pytest.raises(ValueError, match="'coco_2017_train' is already registered with"):
            register_coco("coco_2017_train", *write(tmp_path, good()))

    def test_check_datasets(self, tmp_path: Path) -> None:
        json_file, images = write(tmp_path, good())
        register_coco_instances("pets_train", {}, json_file, images)
        register_coco("pets_val", json_file, images)
        DatasetCatalog.register("mine", list)
        assert check_datasets(["pets_train", "mine"], ["pets_val"]) == ["cat", "dog"]
        assert check_datasets(["mine"], []) is None

    def test_check_datasets_compares_the_classes(self, tmp_path: Path) -> None:
        register_coco("pets_train", *write(tmp_path, good()))
        other = {**good(), "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "cow"}]}
        register_coco("pets_val", *write(tmp_path, other, "val.json"))
        with pytest.raises(
            ValueError, match=r"only 'pets_train' has 'dog' and only 'pets_val' has"
        ):
            check_datasets(["pets_train"], ["pets_val"])

    def test_only_a_test_split_may_lack_annotations(self, tmp_path: Path) -> None:
        register_coco("pets_train", *write(tmp_path, good()))
        content = good()
        del content["annotations"]
        register_coco("pets_test", *write(tmp_path, content, "test.json"))
        assert check_datasets(["pets_train"], ["pets_test"]) == ["cat", "dog"]
        with pytest.raises(ValueError, match=r"'pets_test', .*has no list 'annotations'"):
            check_datasets(["pets_test"], [])

    def test_unregistered_names(self) -> None:
        with pytest.raises(
            ValueError, match=r"'pets' is not registered; .* under KD\.DATASETS\.pets"
        ):
            check_datasets(["pets"], [])


def test_built_in_names_resolve_to_files() -> None:
    """Detectron2's own COCO entries are seen as COCO; what is missing is said with its path."""
    json_file = MetadataCatalog.get("coco_2017_val").json_file
    if os.path.exists(json_file):
        assert len(check_datasets(["coco_2017_train"], ["coco_2017_val"]) or []) == 80
    else:
        with pytest.raises(
            ValueError, match=r"'coco_2017_val' is missing: .*instances_val2017\.json"
        ):
            check_datasets([], ["coco_2017_val"])
