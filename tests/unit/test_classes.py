"""Classes by name: where the names come from, and how two sets of them are matched."""

import json

import pytest
from detectron2.data import MetadataCatalog

from kd_det.classes import class_names, dataset_classes, listed, match_names, unknown


@pytest.fixture
def dataset(tmp_path):
    name = "classes_of_a_test"
    path = tmp_path / "annotations.json"
    categories = [{"id": 7, "name": "b"}, {"id": 2, "name": "a"}]
    path.write_text(json.dumps({"categories": categories}))
    MetadataCatalog.get(name).set(json_file=str(path))
    yield name
    MetadataCatalog.remove(name)


def test_names_are_those_of_the_metadata():
    assert dataset_classes("coco_2017_train")[:2] == ["person", "bicycle"]
    assert "grass" in dataset_classes("coco_2017_val_panoptic_separated", "stuff_classes")
    assert dataset_classes("coco_2017_train", "stuff_classes") is None


def test_names_of_a_dataset_that_was_not_loaded_are_read_in_the_order_of_ids(dataset):
    assert dataset_classes(dataset) == ["a", "b"]
    assert MetadataCatalog.get(dataset).get("thing_classes") is None


@pytest.mark.parametrize("content", ["{}", "[1]", "{", '{"categories": [{"id": 1}]}'])
def test_a_malformed_file_tells_nothing(dataset, content):
    with open(MetadataCatalog.get(dataset).json_file, "w") as f:
        f.write(content)
    assert dataset_classes(dataset) is None


def test_a_dataset_that_is_not_registered_stays_so():
    assert dataset_classes("nowhere") is None
    assert "nowhere" not in MetadataCatalog.list()
    assert dataset_classes("") is None


def test_the_names_of_a_dataset_count_where_they_are_as_many_as_the_classes(dataset):
    assert class_names(dataset)("thing_classes", 2) == ["a", "b"]
    assert class_names(dataset)("thing_classes", 3) is None
    assert class_names("")("thing_classes", 2) is None
    assert class_names(())("thing_classes", 2) is None
    assert unknown("thing_classes", 2) is None


def test_given_names_must_be_as_many_as_the_classes():
    assert class_names(["x", "y"])("stuff_classes", 2) == ("x", "y")
    with pytest.raises(ValueError, match=r"3 CLASSES are named \(x, y, z\), but.* has 2"):
        class_names(["x", "y", "z"])("thing_classes", 2)


def test_match_names():
    assert match_names(["b", "x", "a"], ["a", "b"]) == [1, -1, 0]
    assert match_names(["a"], ["b", "a", "a"]) == [1]  # the first of two
    assert match_names([], ["a"]) == []


def test_listed():
    assert listed("abc") == "a, b, c"
    assert listed("abcdefg", 2) == "a, b, ... (5 more)"
