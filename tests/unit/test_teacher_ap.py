"""What a teacher scores: by its own mapper, by names, on its images, and once."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog

from kd_det.data.synthetic import CLASSES
from kd_det.engine import evaluate_teacher
from kd_det.engine.teacher_ap import check_gate, match_classes
from kd_det.engine.teacher_gap import gap
from kd_det.sources import Teacher
from tests import oracle, toys
from tests.oracle import Oracle
from tests.steps import exactly, rng_unchanged

VAL = "teacher_ap_val"


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return oracle.make_dataset(folder, "teacher_ap", num_train=1, num_val=8, image_size=48)


@pytest.fixture(autouse=True)
def _fresh(json_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    Oracle.reset(json_file)


@pytest.fixture
def files(tmp_path):
    return oracle.save_oracle(tmp_path / "oracle")


@pytest.fixture
def cfg():
    return toys.toy_cfg(classes=6)


def oracle_teacher(files, **kwargs):
    return Teacher(config_file=files[0], weights=files[1], **kwargs)


def trained_on(names, tmp_path, json_file, dataset="teacher_ap_other"):
    """The files of an oracle whose classes are ``names``, and the dataset that says so."""

    def renumber(content):
        content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]

    oracle.altered_dataset(json_file, dataset, tmp_path, renumber)
    Oracle.order = tuple(names)
    folder = tmp_path / "trained_on"
    return oracle.save_oracle(folder, trained_on=(dataset,), classes=len(names))


def test_who_finds_everything_has_100(cfg, files):
    results = evaluate_teacher(cfg, oracle_teacher(files), VAL)
    assert results["bbox/AP"] == pytest.approx(100)
    assert len(Oracle.seen) == 8
    assert results["bbox/AP-circle"] == pytest.approx(100)


def test_who_finds_nothing_has_0(cfg, files):
    Oracle.blind = tuple(range(1, 9))
    results = evaluate_teacher(cfg, oracle_teacher(files), VAL)
    assert set(results.values()) == {0.0}
    assert "bbox/AP-circle" in results


def test_only_the_first_images_are_read_and_scored(cfg, files, json_file, tmp_path):
    def cut(content):
        content["images"] = [i for i in content["images"] if i["id"] <= 4]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] <= 4]

    oracle.altered_dataset(json_file, "teacher_ap_cut", tmp_path, cut)
    Oracle.shift = 3.0
    first = evaluate_teacher(cfg, oracle_teacher(files), VAL, images=4)
    assert [x["image_id"] for x in Oracle.seen] == [1, 2, 3, 4]
    assert 10 < first["bbox/AP"] < 90
    assert first == evaluate_teacher(cfg, oracle_teacher(files), "teacher_ap_cut")
    assert first != evaluate_teacher(cfg, oracle_teacher(files), VAL)


def test_classes_are_matched_by_name(cfg, files, json_file, tmp_path):
    Oracle.shift, Oracle.missed = 3.0, ("circle",)
    expected = evaluate_teacher(cfg, oracle_teacher(files), VAL)
    order = CLASSES[2:] + CLASSES[:2]
    permuted = trained_on(order, tmp_path, json_file)
    assert evaluate_teacher(cfg, oracle_teacher(permuted), VAL) == expected
    # Under no name they are taken in the dataset's order, which is not this teacher's.
    nameless = oracle.save_oracle(tmp_path / "nameless", seed=2)
    assert evaluate_teacher(cfg, oracle_teacher(nameless), VAL)["bbox/AP"] < expected["bbox/AP"] / 2


def test_the_cache_knows_what_the_classes_were_taken_for(cfg, json_file, tmp_path):
    unnamed = oracle.save_oracle(tmp_path / "oracle", trained_on=("teacher_ap_late",))
    evaluate_teacher(cfg, oracle_teacher(unnamed), VAL, images=1)
    trained_on(CLASSES[::-1], tmp_path, json_file, "teacher_ap_late")  # registers it
    results = evaluate_teacher(cfg, oracle_teacher(unnamed), VAL, images=1)
    assert results["bbox/AP"] == pytest.approx(100)
    assert len(Oracle.seen) == 2


def test_classes_of_one_side_count_for_nothing(cfg, json_file, tmp_path):
    two = trained_on(("ring", "hexagon", "star"), tmp_path, json_file)
    results = evaluate_teacher(cfg, oracle_teacher(two), VAL)
    assert results["bbox/AP"] == pytest.approx(100)
    assert {k for k in results if k.startswith("bbox/AP-")} == {"bbox/AP-ring", "bbox/AP-star"}


def test_class_names_of_a_dataset_that_was_not_loaded_are_read(json_file, tmp_path):
    files = trained_on(("b", "a"), tmp_path, json_file, "teacher_ap_unloaded")
    assert MetadataCatalog.get("teacher_ap_unloaded").get("thing_classes") is None
    assert oracle_teacher(files).class_names == ["b", "a"]
    elsewhere = oracle.save_oracle(tmp_path / "elsewhere", trained_on=("not_registered_here",))
    assert oracle_teacher(elsewhere).class_names is None
    assert "not_registered_here" not in MetadataCatalog.list()


def test_match_classes():
    assert match_classes(["b", "x", "a"], 3, ["a", "b"], "data") == [1, -1, 0]
    assert match_classes(None, 2, ["a", "b"], "data") == [0, 1]
    # Names that are not as many as the model's classes are of another model.
    assert match_classes(["b", "a", "c"], 2, ["a", "b"], "data") == [0, 1]
    with pytest.raises(ValueError, match="no class in common"):
        match_classes(["x", "y"], 2, ["a", "b"], "data")
    with pytest.raises(ValueError, match="3 classes and the dataset 'data' has 2"):
        match_classes(None, 3, ["a", "b"], "data")


def test_the_teacher_has_its_own_mapper(cfg, files, tmp_path):
    def image_of(teacher):
        Oracle.seen.clear()
        evaluate_teacher(cfg, teacher, VAL, images=1)
        return Oracle.seen[0]["image"]

    cfg.INPUT.MIN_SIZE_TEST = 32  # the student's
    bgr = image_of(oracle_teacher(files))
    assert bgr.shape == (3, 64, 64)  # the size in the teacher's file
    rgb = image_of(oracle_teacher(files, input_format="RGB"))
    exactly(rgb, bgr.flip(0))
    text = Path(files[0]).read_text()
    Path(files[0]).write_text(text.replace("FORMAT: BGR", "FORMAT: RGB"))
    exactly(image_of(oracle_teacher(files)), rgb)
    given = Teacher(model=oracle_teacher(files).detector(), input_format="RGB")
    small = image_of(given)
    assert small.shape == (3, 32, 32)  # a model has no test-time sizes: the student's
    assert (small.float().mean((1, 2)) - rgb.float().mean((1, 2))).abs().max() < 2


def test_lazy_configs(tmp_path):
    (tmp_path / "lazy.py").write_text(
        "from detectron2.config import LazyCall as L\n"
        "from detectron2.data import DatasetMapper, get_detection_dataset_dicts\n"
        "from detectron2.data import transforms as T\n"
        "from detectron2.modeling.meta_arch.retinanet import RetinaNet\n"
        "from omegaconf import OmegaConf\n"
        "dataloader = OmegaConf.create()\n"
        "dataloader.train = dict(\n"
        "    dataset=L(get_detection_dataset_dicts)(names='coco_2017_train'),\n"
        "    mapper=dict(image_format='RGB'),\n"
        ")\n"
        "dataloader.test = dict(mapper=L(DatasetMapper)(\n"
        "    is_train=False,\n"
        "    augmentations=[L(T.ResizeShortestEdge)(short_edge_length=96, max_size=200)],\n"
        "    image_format='${...train.mapper.image_format}',\n"
        "))\n"
        "model = L(RetinaNet)()\n"
    )
    lazy = Teacher(config_file=str(tmp_path / "lazy.py"))
    mapper = lazy.test_mapper()
    assert mapper.image_format == "RGB"
    assert "short_edge_length=(96, 96)" in str(mapper.augmentations)
    assert lazy.class_names[0] == "person"
    assert "RetinaNet" in lazy._origin.recipe
    assert "0x" not in lazy._origin.recipe
    other = Teacher(config_file=str(tmp_path / "lazy.py"), input_format="BGR")
    assert other.test_mapper().image_format == "BGR"


def test_the_second_call_runs_nothing(cfg, files, caplog):
    with caplog.at_level(logging.INFO, "kd_det"):
        first = evaluate_teacher(cfg, oracle_teacher(files), VAL, images=3)
        again = evaluate_teacher(cfg, oracle_teacher(files), VAL, images=3, name="big")
    assert again == first
    assert len(Oracle.seen) == 3
    assert "Teacher 'teacher': AP 100.0 on the first 3 images of teacher_ap_val\n" in caplog.text
    assert "Teacher 'big': AP 100.0 on the first 3 images of teacher_ap_val (cached)" in caplog.text


def _other_weights(files, tmp_path):
    return oracle.save_oracle(tmp_path / "oracle", seed=5)


def _other_config(files, tmp_path):
    text = Path(files[0]).read_text()
    Path(files[0]).write_text(text.replace("MIN_SIZE_TEST: 64", "MIN_SIZE_TEST: 80"))
    return files


@pytest.mark.parametrize("change", [_other_weights, _other_config])
def test_another_teacher_is_another_entry(cfg, files, tmp_path, change):
    evaluate_teacher(cfg, oracle_teacher(files), VAL, images=1)
    evaluate_teacher(cfg, oracle_teacher(change(files, tmp_path)), VAL, images=1)
    assert len(Oracle.seen) == 2


def test_so_are_other_annotations_another_order_and_another_model(cfg, files, json_file, tmp_path):
    def move(content):
        content["annotations"][0]["bbox"][0] += 5

    for step, change in enumerate([len, move], start=1):  # len changes nothing
        oracle.altered_dataset(json_file, "teacher_ap_moved", tmp_path, change)
        evaluate_teacher(cfg, oracle_teacher(files), "teacher_ap_moved", images=1)
        assert len(Oracle.seen) == step
    evaluate_teacher(cfg, oracle_teacher(files, input_format="RGB"), VAL, images=1)
    assert len(Oracle.seen) == 3
    model = oracle_teacher(files).detector()
    for threshold in (0.05, 0.5, 0.5):
        model.test_score_thresh = threshold
        evaluate_teacher(cfg, Teacher(model=model), VAL, images=1)
    assert len(Oracle.seen) == 5


@pytest.mark.parametrize("content", ["", '{"bbox/AP": ', "[1]", '{"bbox/AP": "x"}'])
def test_a_damaged_cache_is_computed_again(cfg, files, tmp_path, content):
    first = evaluate_teacher(cfg, oracle_teacher(files), VAL, images=1)
    (entry,) = (tmp_path / "cache" / "kd_det").iterdir()
    entry.write_text(content)
    assert evaluate_teacher(cfg, oracle_teacher(files), VAL, images=1) == first
    assert len(Oracle.seen) == 2
    assert json.loads(entry.read_text()) == first
    assert list(entry.parent.iterdir()) == [entry]


def test_an_unwritable_cache_is_a_log_line(cfg, files, tmp_path, caplog):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kd_det").write_text("a file where the folder would be")
    with caplog.at_level(logging.INFO, "kd_det"):
        results = evaluate_teacher(cfg, oracle_teacher(files), VAL, images=1)
    assert results["bbox/AP"] == pytest.approx(100)
    assert "not kept" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(cfg, files, monkeypatch, tmp_path):
    Oracle.shift = 3.0
    expected = evaluate_teacher(cfg, oracle_teacher(files), VAL)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "another"))
    moved = oracle_teacher(files, precision="float16").to("cuda")
    moved.prepare(("features",))
    assert moved.detector().device.type == "cuda"
    assert evaluate_teacher(cfg, moved, VAL) == expected
    assert len(Oracle.seen) == 16


def test_no_random_state_is_changed(cfg, files):
    with rng_unchanged():
        evaluate_teacher(cfg, oracle_teacher(files), VAL, images=2)
    assert Oracle.seen


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("teacher_ap_nowhere", None, "no such dataset is registered"),
        ("voc_2007_val", None, "of type 'pascal_voc'"),
        ("teacher_ap_missing", "remove", r"teacher_ap_missing\.json is missing"),
        ("teacher_ap_bare", lambda c: c.pop("annotations"), "no annotated box"),
        ("teacher_ap_empty", lambda c: c["annotations"].clear(), "no annotated box"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(
    cfg, files, json_file, tmp_path, name, change, sentence
):
    if change is not None:
        path = oracle.altered_dataset(
            json_file, name, tmp_path, change if callable(change) else len
        )
        if change == "remove":
            os.remove(path)
    with pytest.raises(ValueError, match=sentence):
        evaluate_teacher(cfg, oracle_teacher(files), name, images=2)


def test_the_gate_of_a_plain_loop(files):
    good = oracle_teacher(files, min_ap=30.0, gate_images=2)
    check_gate(None, good, VAL)
    assert good.ap_checked
    assert len(Oracle.seen) == 2
    Oracle.blind = (1, 2, 3)
    bad = oracle_teacher(files, min_ap=30.0, gate_images=3)
    with pytest.raises(
        ValueError, match=r"Source 'big' has a box AP of 0\.0 on the first 3 images"
    ):
        check_gate(None, bad, VAL, name="big")
    assert not bad.ap_checked


def test_a_minimum_that_nobody_checks_is_no_secret(files, caplog):
    with caplog.at_level(logging.WARNING, "kd_det"):
        oracle_teacher(files).prepare(("features",))
        assert not caplog.text
        teacher = oracle_teacher(files, min_ap=30.0)
        teacher.prepare(("features",))
        teacher.prepare(("features",))
    assert caplog.text.count("MIN_AP 30 has not been checked: kd_det.TrainerMixin") == 1


@pytest.mark.parametrize("wrong", [-1.0, 101.0, float("nan"), float("inf")])
def test_min_ap_is_in_points(files, wrong):
    with pytest.raises(ValueError, match="between 0 and 100"):
        oracle_teacher(files, min_ap=wrong)


def test_gate_images_are_some(files):
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        oracle_teacher(files, gate_images=0)


def test_the_detector_is_what_its_file_says(files):
    teacher = oracle_teacher(files, precision="bfloat16")
    teacher.prepare(("features",))
    model = teacher.detector()
    exactly(dict(model.state_dict()), torch.load(files[1])["model"])
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model is not teacher.detector()
    teacher.release()
    exactly(dict(teacher.detector().state_dict()), dict(model.state_dict()))


def test_a_detector_that_changed_since_is_refused(files, tmp_path):
    teacher = oracle_teacher(files)
    teacher.prepare(("features",))
    oracle.save_oracle(tmp_path / "oracle", seed=5)
    with pytest.raises(ValueError, match="have changed since this run read them"):
        teacher.detector()


def test_the_number_of_classes():
    for arch in ("RetinaNet", "GeneralizedRCNN"):
        model = toys.build_model(toys.toy_cfg(arch=arch, classes=4))
        assert Teacher(model=model).num_classes == 4
    assert Teacher(model=toys.toy_fcos(classes=5)).num_classes == 5


def test_gap_arithmetic():
    nan = float("nan")
    student = {"bbox/AP": 20.0, "bbox/AP50": 40.0, "bbox/AP-a": 10.0, "bbox/AP-b": 30.0}
    teacher = {"bbox/AP": 35.0, "bbox/AP50": 50.0, "bbox/AP-a": 45.0, "bbox/AP-b": 25.0}
    assert gap(student, teacher) == {"bbox/AP": 15.0, "bbox/AP-a": 35.0, "bbox/AP-b": -5.0}
    # A class without ground truth counts on neither side, one that the teacher lacks is left out.
    assert gap({**student, "bbox/AP-c": nan}, teacher) == gap(student, teacher)
    lacks = {"bbox/AP": 45.0, "bbox/AP-a": 45.0}
    assert gap(student, lacks) == {"bbox/AP": 35.0, "bbox/AP-a": 35.0}
    assert gap({"bbox/AP": 20.0}, {"bbox/AP": 50.0}) == {"bbox/AP": 30.0}
    assert gap({"bbox/AP": nan}, teacher) == {}
