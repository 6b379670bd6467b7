"""The quickstart: four runs, skipped when there, continued when cut off; and a control."""

import json
from functools import partial

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from kd_det.data.synthetic import make_synthetic_coco
from kd_det.tools import quickstart, runs

CONFIGS_OF = (quickstart.mixed_config_of, quickstart.config_of)


@pytest.fixture
def small(monkeypatch):
    """Four iterations on sixteen images instead of thousands."""
    config_of = quickstart.config_of

    def shrunk(name, output, seed, iterations=None):
        cfg = config_of(name, output, seed, iterations)
        cfg.defrost()
        cfg.SOLVER.MAX_ITER = 4
        cfg.SOLVER.CHECKPOINT_PERIOD = cfg.TEST.EVAL_PERIOD = 2
        cfg.SOLVER.IMS_PER_BATCH = 2
        cfg.freeze()
        return cfg

    monkeypatch.setattr(quickstart, "config_of", shrunk)
    drawn = partial(make_synthetic_coco, num_train=16, num_val=4)
    monkeypatch.setattr(quickstart, "make_synthetic_coco", drawn)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [row["loss_cls"] for row in rows if "loss_cls" in row]


def test_runs_are_skipped_when_there_and_continued_when_cut_off(small, tmp_path, monkeypatch):
    step = runs._Progress.after_step

    def cut_off(self):
        step(self)
        if self.name == "distilled" and self.trainer.iter == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs._Progress, "after_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        quickstart.run_seed(tmp_path, seed=1)
    monkeypatch.setattr(runs._Progress, "after_step", step)
    assert not (tmp_path / "distilled" / "result.json").exists()
    teacher = (tmp_path / "teacher" / "model_final.pth").stat().st_mtime_ns

    results = quickstart.run_seed(tmp_path, seed=1)
    assert list(results) == ["teacher", "student", "student_equal_time", "distilled"]
    assert (tmp_path / "teacher" / "model_final.pth").stat().st_mtime_ns == teacher
    assert "Starting training from iteration 2" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "summary.json").read_text()) == results
    assert set(results["distilled"]) == {
        "AP", "AP50", "AP75", "AR", "parameters", "iterations", "seconds", "seconds_per_iteration"
    }  # fmt: skip
    assert results["distilled"]["parameters"] == results["student"]["parameters"]
    assert (tmp_path / "summary.png").stat().st_size > 10_000

    with pytest.raises(ValueError, match="holds a run of seed 1, but seed 2"):
        quickstart.train("student", tmp_path, seed=2)


def test_both_students_start_from_the_same_weights_and_see_the_same_data(small, tmp_path):
    """Without inheritance their first task loss is one number: same weights, same batch."""
    quickstart.make_synthetic_coco(tmp_path / "data_seed1", seed=1)
    quickstart.register(tmp_path / "data_seed1")
    runs.save_random_teacher(tmp_path, 1, quickstart.config_of)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "random_teacher" / "teacher.pth").rename(tmp_path / "teacher" / "model_final.pth")
    first = {}
    for run in ("student", "distilled"):
        cfg = quickstart.config_of(run, tmp_path, 1)
        cfg.merge_from_list(["KD.STUDENT.INIT_FROM", ""])
        (tmp_path / run).mkdir()
        runs.seed_all_rng(1)
        trainer = runs.Trainer(cfg)
        inputs = next(iter(trainer.data_loader))
        model = trainer.model.train()
        with EventStorage(0):
            first[run] = model(inputs)
    for loss in ("loss_cls", "loss_box_reg"):
        assert torch.equal(first["student"][loss], first["distilled"][loss])


@pytest.mark.slow
def test_a_random_teacher_does_not_help(tmp_path):
    """At the quickstart's scale, some three minutes: what it adds must come from knowledge."""
    quickstart.make_synthetic_coco(tmp_path / "data_seed1", seed=1)
    quickstart.register(tmp_path / "data_seed1")
    runs.save_random_teacher(tmp_path, 1, quickstart.config_of)
    plain = quickstart.train("student", tmp_path, seed=1)
    misled = quickstart.train("random_teacher", tmp_path, seed=1)
    assert misled["AP"] < plain["AP"] + 1


def test_a_teacher_of_another_kind(tmp_path):
    runs.save_random_teacher(tmp_path, 1, quickstart.mixed_config_of)
    for run, weighted in (("random_teacher", True), ("inherited", False)):
        cfg = quickstart.mixed_config_of(run, tmp_path, 1)
        weights = tmp_path / "random_teacher" / "teacher.pth"
        cfg.defrost()
        cfg.KD.SOURCES.TEACHER.WEIGHTS = str(weights)
        model = build_model(cfg)
        assert model.inherit.modules == ("backbone.fpn_output*",)
        rows = [row for rows in model.wiring.rows.values() for row in rows]
        assert [row.target for row in rows] == [f"features.p{i}" for i in (3, 4, 5)] * weighted
    plain, usual = (of("student", tmp_path, 1) for of in CONFIGS_OF)
    plain.defrost()
    assert plain.KD.ENABLED is False
    plain.KD = usual.KD
    assert plain == usual  # the quickstart's own student
    teacher = quickstart.mixed_config_of("teacher", tmp_path, 1)
    usual = quickstart.config_of("teacher", tmp_path, 1)
    assert teacher.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    for node in ("SOLVER", "INPUT", "DATASETS", "DATALOADER"):
        assert teacher[node] == usual[node]
