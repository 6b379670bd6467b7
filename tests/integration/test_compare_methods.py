"""The comparison of methods: all are in it, it resumes, and its words follow its numbers."""

import csv
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode

from benchmarks import comparison, methods
from benchmarks.comparison import Task
from benchmarks.methods import METHODS, Plan, config_of
from benchmarks.methods_report import Found, draw, gain, report, write_csv
from kd_det.paths import CONFIGS
from kd_det.tools import runs

TINY = Plan(
    seeds=(3,), methods=("cwd", "fgfi"), teacher=2, students=20, images=(8, 4), turns=1
)  # fmt: skip
RUNS = {
    "teacher", "student", "student_equal_time", "inherited", "random_teacher",
    "cwd", "fgfi", "cwd_balanced", "fgfi_balanced",
}  # fmt: skip


def test_every_method_with_a_config_is_in_it():
    files = {path.stem for path in (CONFIGS / "COCO-Detection").glob("retinanet_R_50_*1x_*R_101*")}
    names = {name.removeprefix("retinanet_R_50_FPN_1x_") for name in files}
    assert set(METHODS.values()) <= names
    # CWD of two taps at once, with inheritance, and from other teachers: no methods of their own.
    assert names - set(METHODS.values()) == {
        "cwd_R_101", "cwd_R_101_inherit", "cwd_mask_R_101_LSJ",
    }  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_run_differs_from_the_inherited_one_by_its_term_alone(name, tmp_path):
    cfg, control = (config_of(x, tmp_path, 3, 500) for x in (name, "inherited"))
    assert not control.KD.TERMS
    (term,) = (x for x in cfg.KD.TERMS.values() if x.ENABLED)
    published = CfgNode.load_yaml_with_base(str(CONFIGS / f"KD/{METHODS[name]}.yaml"))
    (said,) = (x for x in published["KD"]["TERMS"].values() if x.get("ENABLED", True))
    assert said["TYPE"] == term.TYPE
    assert said.get("WEIGHT", 1.0) == term.WEIGHT
    assert term.get("LEVELS", []) in ([], ["p3", "p4", "p5"])
    assert term.SCHEDULE.get("START_ITER", 0) <= 50
    (tmp_path / "factors.json").write_text(json.dumps({name: 0.25}))
    balanced = config_of(f"{name}_balanced", tmp_path / "seed_3", 3, 500)
    (other,) = (x for x in balanced.KD.TERMS.values() if x.ENABLED)
    assert other.WEIGHT == 0.25 * term.WEIGHT
    for each in (cfg, control, balanced):
        each.defrost()
        each.OUTPUT_DIR = ""
        each.KD.TERMS.clear()
    assert cfg == control
    assert cfg.KD.STUDENT.INIT_FROM == "TEACHER"
    assert balanced.SOLVER == cfg.SOLVER


def test_the_random_teacher_is_one_and_the_plain_students_have_none(tmp_path):
    random = config_of("random_teacher", tmp_path, 3, 500)
    assert "random_teacher" in random.KD.SOURCES.TEACHER.WEIGHTS
    assert [x.TYPE for x in random.KD.TERMS.values() if x.ENABLED] == ["CWD"]
    for name in ("student", "student_equal_time"):
        assert not config_of(name, tmp_path, 3, 500).KD.ENABLED


def test_it_goes_on_where_it_was_cut_off_and_says_what_it_found(tmp_path, monkeypatch, capsys):
    def small(*args: Any) -> CfgNode:
        cfg = config_of(*args).clone()
        cfg.defrost()
        cfg.SOLVER.IMS_PER_BATCH = 2
        return cfg

    monkeypatch.setattr(methods, "config_of", small)
    step = runs._Progress.after_step

    def cut_off(self):
        step(self)
        if self.name == "fgfi" and self.trainer.iter == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs._Progress, "after_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        methods.compare(TINY, tmp_path)
    monkeypatch.setattr(runs._Progress, "after_step", step)
    folder = tmp_path / "seed_3"
    assert not (folder / "fgfi" / "result.json").exists()
    before = (folder / "cwd" / "model_final.pth").stat().st_mtime_ns
    found = methods.compare(TINY, tmp_path)
    assert (folder / "cwd" / "model_final.pth").stat().st_mtime_ns == before
    assert set(found.results[3]) == RUNS
    assert "seed 3, fgfi_balanced: AP" in capsys.readouterr().out

    factor = json.loads((tmp_path / "factors.json").read_text())["cwd"]
    assert found.weights["cwd"] == [5.0, pytest.approx(5.0 * factor)]
    assert found.pulls["cwd"][0] == pytest.approx(1 / factor)
    assert found.pulls["cwd"][1] == pytest.approx(1, rel=0.7)  # after a few steps from scratch
    iterations = {name: x["iterations"] for name, x in found.results[3].items()}
    assert iterations["teacher"] == 2
    assert iterations["student_equal_time"] >= iterations["cwd_balanced"] == 20

    # A second time there is nothing to train.
    monkeypatch.setattr(runs, "Trainer", None)
    assert methods.compare(TINY, tmp_path) == found
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"another plan \(students 20 there, 21 here\).*--output"):
        methods.compare(replace(TINY, students=21), tmp_path)

    text = report(found).text()
    assert "One seed and a reduced schedule: this is no ranking." in text
    assert "±" not in text
    write_csv(tmp_path / "all.csv", found)
    draw(tmp_path / "all.png", found)
    with open(tmp_path / "all.csv") as f:
        rows = list(csv.DictReader(f))
    assert {row["run"] for row in rows} == RUNS
    assert [row["weight"] for row in rows if row["run"] == "fgfi"] == ["0.01"]
    assert (tmp_path / "all.png").stat().st_size > 5000


def test_a_run_that_diverges_counts_nothing_and_the_others_go_on(tmp_path, monkeypatch):
    def diverge(*args: object) -> None:
        raise FloatingPointError("loss_kd_fkd is nan")

    monkeypatch.setattr(runs, "train", diverge)
    (tmp_path / "seed_3" / "fkd").mkdir(parents=True)
    result = methods.work(Task("fkd", 3, 20), tmp_path)
    assert (result["AP"], result["diverged"]) == (0.0, "loss_kd_fkd is nan")
    assert json.loads((tmp_path / "seed_3" / "fkd" / "result.json").read_text()) == result


def test_a_method_without_a_gradient_is_run_at_its_own_weight(tmp_path):
    """A run that diverged at once, say: the comparison runs to its end all the same."""
    rows = [{"iteration": 19}, {"iteration": 39, "kd/fpn/grad_ratio": 0.5}]
    for name, lines in (("early", rows[:1]), ("later", rows)):
        (tmp_path / name).mkdir()
        text = "\n".join(map(json.dumps, lines))
        (tmp_path / name / "metrics.json").write_text(text)
    early, later = (methods.gradient_ratio(tmp_path / name) for name in ("early", "later"))
    assert math.isnan(early)
    assert later == 0.5
    plan = replace(TINY, ratio=2.0)
    assert [methods._factor(plan, x) for x in (early, later, 0.0)] == [1.0, 4.0, 1.0]
    assert comparison.median([early, later, 1.5]) == 1.0


def test_runs_of_two_processes_are_those_of_one(tmp_path):
    plan = replace(TINY, seeds=(3, 4))
    tasks = [Task("teacher", seed, 2) for seed in plan.seeds]
    comparison.make_data(tmp_path, plan.seeds, plan.images)
    found = dict(comparison.each(tasks, tmp_path, 2, methods.work))
    assert sorted(found, key=lambda task: task.seed) == tasks
    for task, result in found.items():
        assert (
            json.loads((tmp_path / f"seed_{task.seed}/teacher/result.json").read_text()) == result
        )
    assert os.path.getsize(tmp_path / "seed_4" / "logs" / "teacher.txt")


def made(**aps: list[float]) -> Found:
    """Three seeds with these APs; controls at 10 and the dearest method twice as dear as plain."""
    seeds = (1, 2, 3)
    controls = {x: [10.0] * 3 for x in RUNS if not x.startswith(("cwd", "fgfi"))} | aps
    results = {
        seed: {
            run: {"AP": each[i], "iterations": 5, **dict.fromkeys(("AP50", "AP75", "AR"), 0.0)}
            for run, each in controls.items()
        }
        for i, seed in enumerate(seeds)
    }
    names = [x for x in aps if not x.endswith("_balanced")]
    pairs = {x: [1.0, 2.0] for x in names}
    steps = {"student": [1.0, 1.0], **{x: [2.0, 2.0] for x in names}}
    return Found(results, names, pairs, pairs, steps, 1.0)


def test_a_gain_is_paired_and_its_interval_is_students():
    found = made(cwd=[11.0, 12.0, 13.0], cwd_balanced=[0.0, 10.0, 20.0])
    mean, half = gain(found, "cwd", "inherited")
    assert mean == 2
    assert half == pytest.approx(4.303 / 3**0.5)  # standard deviation 1, two degrees of freedom
    assert gain(found, "cwd_balanced", "cwd").mean == -2


def test_what_is_certain_is_said_and_what_is_not_too(tmp_path: Path):
    found = made(
        cwd=[12.0, 12.1, 12.2], cwd_balanced=[8.0, 8.1, 8.2],
        fgfi=[9.0, 10.0, 14.0], fgfi_balanced=[10.0, 10.1, 10.0],
    )  # fmt: skip
    for run in ("student", "student_equal_time"):
        for each in found.results.values():
            each[run]["AP"] = 11.0
    words = report(found).notes
    assert words[0] == (
        "At the published weights: better than inheriting alone `cwd`; worse none; not "
        "distinguishable `fgfi`. Better than the plain student for the wall-clock of the dearest "
        "method: `cwd`."
    )
    assert words[1].startswith(
        "At the weights for ratio 1: better than inheriting alone none; worse `cwd`; not "
        "distinguishable `fgfi`. "
    )
    assert "Of 4 such intervals" in words[-1]
    row = report(found).tables[1].rows[0]
    assert row[:2] == ["`cwd`", "2.00 (2.00-2.00)"]
    assert row[5] == "+2.1 ± 0.2"
    assert row[-1] == "-1.9 ± 0.2"
    found.results[2]["fgfi"]["diverged"] = "nan"
    assert "Diverged, and counted as 0 AP: fgfi (2)." in report(found).notes
