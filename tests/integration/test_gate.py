"""The gate before a run, and the teacher's AP beside the student's during it."""

import kd_det  # isort: skip  # first, in the spawned processes too

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import DefaultTrainer, hooks
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from kd_det.config import student_config
from kd_det.engine import (
    TeacherGap,
    build_evaluator,
    check_gate,
    check_gates,
    evaluate_teacher,
)
from kd_det.sources import Teacher
from tests import oracle, toys
from tests.distributed.test_ddp import spawned
from tests.oracle import Oracle
from tests.steps import FPN

assert kd_det

VAL, IMAGES = "gate_val", 4


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return oracle.make_dataset(folder, "gate", num_train=4, num_val=IMAGES, image_size=48)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return oracle.save_oracle(tmp_path_factory.mktemp("oracle"))


@pytest.fixture(autouse=True)
def _fresh(json_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    Oracle.reset(json_file)


@pytest.fixture
def cfg(files, tmp_path):
    cfg = toys.distiller_cfg(files, FPN, classes=6)
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # or an untrained student predicts nothing
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("gate_train",), (VAL,)
    cfg.SOLVER.MAX_ITER = 4
    cfg.TEST.EVAL_PERIOD = 2
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    Path(cfg.OUTPUT_DIR).mkdir()
    return cfg


class Trainer(kd_det.TrainerMixin, DefaultTrainer):
    """A user's trainer."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return build_evaluator(cfg, dataset_name)


def metrics(cfg):
    """The rows of metrics.json that have an AP, by iteration."""
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["iteration"]: row for row in rows if any("bbox/AP" in key for key in row)}


def test_the_gap_is_in_metrics_json_and_the_best_checkpoint_is_the_student(cfg, caplog):
    trainer = Trainer(cfg)
    trainer.register_hooks(
        [hooks.BestCheckpointer(cfg.TEST.EVAL_PERIOD, trainer.checkpointer, "bbox/AP")]
    )
    with caplog.at_level(logging.INFO, "kd_det"):
        trainer.train()
    rows = metrics(cfg)
    assert list(rows) == [1, 4]
    for row in rows.values():
        assert row["kd/teacher/bbox/AP"] == pytest.approx(100)
        assert row["kd/teacher/bbox/AP50"] == pytest.approx(100)
        assert row["kd/teacher/gap/bbox/AP"] == pytest.approx(100 - row["bbox/AP"])
        classes = [k for k in row if k.startswith("kd/teacher/gap/bbox/AP-")]
        assert classes
        for key in classes:
            name = key.split("/")[-1]
            assert row[key] == pytest.approx(100 - row[f"bbox/{name}"])
    assert len(Oracle.seen) == IMAGES  # once
    assert caplog.text.count("| class") == 2
    best = torch.load(Path(cfg.OUTPUT_DIR) / "model_best.pth", weights_only=False)
    assert set(best["model"]) == set(build_model(student_config(cfg)).state_dict())


def test_several_test_sets(cfg, json_file, tmp_path):
    def halve(content):
        content["images"] = content["images"][:2]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] <= 2]

    oracle.altered_dataset(json_file, "gate_half", tmp_path, halve)
    cfg.DATASETS.TEST = (VAL, "gate_half")
    cfg.TEST.EVAL_PERIOD = 0
    Trainer(cfg).train()
    (row,) = metrics(cfg).values()
    for name in cfg.DATASETS.TEST:
        teacher, student = row[f"kd/teacher/{name}/bbox/AP"], row[f"{name}/bbox/AP"]
        assert teacher == pytest.approx(100)
        assert row[f"kd/teacher/gap/{name}/bbox/AP"] == pytest.approx(teacher - student)
    assert len(Oracle.seen) == IMAGES + 2


@pytest.mark.parametrize("key", ["KD.EVAL_TEACHER", "KD.ENABLED"])
def test_switched_off(cfg, key):
    cfg.merge_from_list([key, "False"])
    Trainer(cfg).train()
    assert not [k for row in metrics(cfg).values() for k in row if "kd/teacher" in k]
    assert not Oracle.seen


def test_evaluation_alone_never_touches_the_teacher(cfg):
    cfg.merge_from_list(["KD.SOURCES.TEACHER.WEIGHTS", "gone.pth"])
    assert "AP" in Trainer.test(cfg, build_model(cfg))["bbox"]
    assert not Oracle.seen


def standing(cfg):
    """A hook whose trainer stands still."""
    hook = TeacherGap(cfg)
    hook.trainer = SimpleNamespace(
        model=build_model(cfg), storage=EventStorage(0), iter=1, max_iter=4
    )
    hook.before_train()
    return hook


@pytest.fixture
def hook(cfg):
    return standing(cfg)


def results(ap=20.0):
    return {"bbox": {"AP": ap, "AP50": 30.0, "AP-circle": 10.0}}


def scalars(hook):
    return {k: v for k, (v, _) in hook.trainer.storage.latest().items()}


def test_only_a_new_evaluation_is_followed(hook, tmp_path):
    hook.after_step()
    assert not scalars(hook)
    hook.trainer._last_eval_results = results()
    hook.after_train()  # after a failure: the run is not at its end
    assert not scalars(hook)
    hook.after_step()
    assert scalars(hook)["kd/teacher/gap/bbox/AP-circle"] == pytest.approx(90)
    hook.trainer.storage = EventStorage(1)
    hook.after_step()
    assert not scalars(hook)
    hook.trainer.iter = 3
    hook.trainer._last_eval_results = results(60.0)
    shutil.rmtree(tmp_path / "cache")  # a run remembers by itself
    hook.after_train()
    assert scalars(hook)["kd/teacher/gap/bbox/AP"] == pytest.approx(40)
    assert len(Oracle.seen) == IMAGES


def test_a_released_teacher_still_has_an_ap(hook):
    source = hook.trainer.model.wiring.sources["teacher"]
    source.prepare(("features",))
    source.release()
    hook.trainer._last_eval_results = results()
    hook.after_step()
    assert scalars(hook)["kd/teacher/bbox/AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("weights", "evaluation", "sentence"),
    [
        ("gone.pth", results(), "The gap to the teacher 'teacher' on gate_val is left out"),
        ("", {"sem_seg": {"mIoU": 3.0}}, "has no box AP"),
        ("", {}, "has no box AP"),
        ("", None, "has no box AP"),
    ],
)
def test_what_cannot_be_compared_is_left_out(hook, caplog, weights, evaluation, sentence):
    source = hook.trainer.model.wiring.sources["teacher"]
    source._origin._weights = weights or source.weights_file
    for _ in range(2):
        hook.trainer._last_eval_results = None if evaluation is None else dict(evaluation)
        hook._seen = object()
        hook.after_step()
    assert not scalars(hook)
    assert caplog.text.count(sentence) == 1
    assert not Oracle.seen


def gated(cfg, min_ap, images=2):
    cfg.merge_from_list(
        ["KD.SOURCES.TEACHER.MIN_AP", min_ap, "KD.SOURCES.TEACHER.GATE_IMAGES", images]
    )
    return build_model(cfg)


def test_a_good_teacher_passes(cfg, caplog):
    distiller = gated(cfg, 99)
    check_gates(cfg, distiller)
    assert [x["image_id"] for x in Oracle.seen] == [1, 2]
    distiller.prepare()
    assert "has not been checked" not in caplog.text


def test_a_bad_teacher_is_refused(cfg, files):
    Oracle.blind = (1,)
    distiller = gated(cfg, 99)
    with pytest.raises(ValueError, match=r"first 2 images of 'gate_val'") as e:
        check_gates(cfg, distiller)
    for part in (files[1], "INPUT_FORMAT (BGR)", "lower KD.SOURCES.TEACHER.MIN_AP", "is 99"):
        assert part in str(e.value)


def test_a_refused_teacher_trains_nothing(cfg):
    Oracle.blind = (1, 2)
    gated(cfg, 99)
    trainer = Trainer(cfg)
    with pytest.raises(ValueError, match=r"Source 'teacher' has a box AP of 0\.0"):
        trainer.train()
    assert not list(Path(cfg.OUTPUT_DIR).glob("*.pth"))
    assert len(Oracle.seen) == 2


def test_a_random_teacher_is_refused(cfg, tmp_path):
    config, weights = toys.save_teacher(tmp_path / "random", fpn=16, classes=6)
    source = ["KD.SOURCES.TEACHER.CONFIG_FILE", config, "KD.SOURCES.TEACHER.WEIGHTS", weights]
    cfg.merge_from_list(source)
    with pytest.raises(ValueError, match=r"a box AP of [0-9]\.[0-9] on"):
        check_gates(cfg, gated(cfg, 10))


def test_no_gate_runs_nothing(cfg):
    cfg.DATASETS.TEST = ()
    check_gates(cfg, build_model(cfg))
    assert not Oracle.seen


def test_a_gate_needs_a_dataset(cfg):
    distiller = gated(cfg, 99)
    cfg.DATASETS.TEST = ()
    with pytest.raises(ValueError, match=r"DATASETS\.TEST names no dataset"):
        check_gates(cfg, distiller)
    cfg.DATASETS.TEST = ("voc_2007_val",)
    with pytest.raises(ValueError, match="COCO format, but 'voc_2007_val' is of type 'pascal_voc'"):
        check_gates(cfg, distiller)


def measure(rank, files, dataset, kwargs):
    """On each of two processes: the AP, whose images were read, the gap, what a gate says."""
    oracle.make_dataset(Path(dataset), "gate", **kwargs)
    Oracle.reset(str(Path(dataset) / "annotations" / "instances_val.json"))
    Oracle.shift = 3.0
    cfg = toys.distiller_cfg(files, FPN, classes=6)
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD = (VAL,), 2
    teacher = Teacher(config_file=files[0], weights=files[1], min_ap=100.0, gate_images=3)
    found = evaluate_teacher(cfg, teacher, VAL, images=3)
    images = [x["image_id"] for x in Oracle.seen]
    hook = standing(cfg)
    hook.trainer._last_eval_results = results() if rank == 0 else None  # or {}, of Detectron2's own
    hook.after_step()
    refusal = ""
    try:
        check_gate(cfg, teacher, VAL)
    except ValueError as e:
        refusal = e.args[0]
    return found, images, scalars(hook), refusal


@pytest.mark.dist
def test_all_processes_measure_and_refuse_together(files, json_file, tmp_path):
    dataset, kwargs = (
        Path(json_file).parents[1],
        json.loads((Path(json_file).parents[1] / "dataset.json").read_text()),
    )
    del kwargs["format"]
    Oracle.shift = 3.0
    teacher = Teacher(config_file=files[0], weights=files[1])
    alone = evaluate_teacher(toys.toy_cfg(), teacher, VAL, images=3)
    (tmp_path / "cache" / "kd_det").rename(tmp_path / "cache" / "elsewhere")
    first, second = spawned(measure, tmp_path, files, str(dataset), kwargs)
    assert first[0] == second[0] == alone
    assert sorted(first[1] + second[1]) == [1, 2, 3]
    assert first[2]["kd/teacher/gap/bbox/AP"] == first[2]["kd/teacher/bbox/AP"] - 20
    assert not second[2]  # the main process writes
    assert "but KD.SOURCES.TEACHER.MIN_AP is 100" in first[3]
    assert first[3] == second[3]
