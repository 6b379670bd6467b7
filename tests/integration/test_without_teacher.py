"""The comparison of what needs no trained teacher: runs, wall-clocks, and words after numbers."""

import csv
import json
from typing import Any

import pytest

from benchmarks import without_teacher
from benchmarks.comparison import Costs, gradient_ratios
from benchmarks.without_teacher import METHODS, Plan, config_of, equal_time
from benchmarks.without_teacher_report import Found, draw, report, write_csv
from kd_det.paths import CONFIGS
from kd_det.tools import runs

TINY = Plan(seeds=(3,), methods=("ema",), iterations=2, images=(8, 4), turns=1)


@pytest.mark.parametrize("name", [m for m in METHODS if m != "augmented"])
def test_a_run_has_the_plain_students_model_data_and_schedule(name, tmp_path):
    cfg, plain = (config_of(x, tmp_path, 3, 40) for x in (name, "student"))
    assert cfg.KD.ENABLED
    assert cfg.MODEL.META_ARCHITECTURE == "Distiller"
    assert cfg.KD.STUDENT.META_ARCHITECTURE == plain.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert not any(source.TYPE == "Teacher" for source in cfg.KD.SOURCES.values())
    for each in (cfg, plain):
        each.defrost()
        each.KD.clear()
        each.OUTPUT_DIR = each.MODEL.META_ARCHITECTURE = ""
    assert cfg == plain


def test_the_controls_of_okdcr_differ_from_it_and_from_each_other_by_one_thing(tmp_path):
    found = {x: config_of(x, tmp_path, 3, 40).KD for x in ("augmented", "two_heads", "okdcr")}
    assert [kd.ENABLED for kd in found.values()] == [False, True, True]
    assert found["augmented"].VIEWS == found["two_heads"].VIEWS == found["okdcr"].VIEWS
    assert found["okdcr"].VIEWS.ENABLED
    assert set(found["two_heads"].SOURCES) == {"STUDENT_2"} < set(found["okdcr"].SOURCES)
    assert not found["two_heads"].TERMS


def test_a_quickstart_config_that_needs_no_teacher_is_a_method():
    """All that stand on the plain student's file, but for those that the quickstart itself runs."""
    files = {
        path.stem
        for path in (CONFIGS / "quickstart").glob("*.yaml")
        if path.read_text().startswith('_BASE_: ["student.yaml", "../KD/')
    }
    assert files <= set(METHODS)
    assert {"ema", "frskd"} <= files


def test_it_runs_once_and_says_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(without_teacher, "equal_time", lambda *_: {"ema": 3})
    found = without_teacher.compare(TINY, tmp_path)
    assert {name: x["iterations"] for name, x in found.results[3].items()} == {
        "student": 2, "ema": 2, "student_3": 3,
    }  # fmt: skip
    assert found.costs.parameters["ema"] == found.costs.parameters["student"] > 5e5
    assert len(found.costs.seconds["ema"]) == 1
    assert "seed 3, ema: AP" in capsys.readouterr().out
    text = report(found).text()
    assert "One seed: no interval, and no ranking." in text
    assert "±" not in text

    monkeypatch.setattr(runs, "Trainer", None)
    assert without_teacher.compare(TINY, tmp_path) == found
    assert capsys.readouterr().out == ""


def test_plain_students_are_given_the_wall_clock_of_a_method_and_little_more():
    ratio = {"a": 1.0, "b": 1.04, "c": 2.1, "d": 2.0, "e": 1.9, "f": 0.9, "g": 1.1001}
    found = equal_time(ratio, 1000, spare=0.06)
    assert found == {"c": 2100, "d": 2100, "e": 1900, "g": 1101, "b": 1101, "a": 1000, "f": 1000}
    for method, iterations in found.items():
        due = 1000 * max(ratio[method], 1)
        assert due <= iterations <= 1.06 * (due + 1)


def test_the_other_networks_last_ap_and_their_gradients_are_read(tmp_path, monkeypatch):
    lines = [
        {"kd/peer/bbox/AP": 1.0, "kd/mean/bbox/AP": 2.0, "kd/logits/grad_ratio": 0.5},
        {"kd/peer/bbox/AP": float("nan"), "kd/mean/bbox/AP": 3.0, "kd/logits/grad_ratio": 1.5},
        {"bbox/AP": 5.0, "kd/mean/bbox/AP50": 9.0, "kd/fpn/grad_ratio": 0.1},
    ]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(without_teacher.quickstart, "measure", lambda cfg, results: {"AP": 4.0})
    cfg = config_of("student", tmp_path, 3, 2).clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(tmp_path)
    assert without_teacher.measure(cfg, {}) == {"AP": 4.0, "AP of peer": 0.0, "AP of mean": 3.0}
    assert gradient_ratios(tmp_path) == {"logits": 1.0, "fpn": 0.1}
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "metrics.json").write_text('{"kd/logits/grad_ratio": 3.0}')
    found = without_teacher.pulls("dml", [tmp_path, tmp_path / "2"])
    assert found == {"logits": 2.0, "fpn": 0.1}


def made(**aps: list[float]) -> Found:
    """Three seeds with these APs, the plain student at 10 and for twice its time at 11."""
    runs = {"student": [10.0] * 3, "student_20": [11.0] * 3, **aps}

    def result(name: str, i: int) -> dict[str, Any]:
        others = {"AP of mean": 12.0, "AP of ensemble": 14.0 + i} if name == "dml" else {}
        return {"AP": runs[name][i], "iterations": 20 if name == "student_20" else 10, **others}

    return Found(
        {seed: {name: result(name, seed - 1) for name in runs} for seed in (1, 2, 3)},
        dict.fromkeys(aps, "student_20"),
        Costs({"student": [1.0, 1.0], **{x: [2.0, 2.0] for x in aps}}, dict.fromkeys(runs, 1000)),
        {"dml": {"logits": 0.5}},
    )


def test_what_is_certain_is_said_at_equal_iterations_and_at_equal_wall_clock(tmp_path):
    found = made(two_heads=[8.0, 8.1, 8.2], dml=[10.5, 10.6, 10.7], okdcr=[9.0, 10.0, 15.0])
    words = report(found).notes
    assert words[0] == (
        "At equal iterations: better than the plain student `dml`; worse `two_heads`; not "
        "distinguishable `okdcr`."
    )
    assert words[1] == (
        "At equal wall-clock: better than the plain student none; worse `two_heads`, `dml`; not "
        "distinguishable `okdcr`."
    )
    assert words[2].startswith("`okdcr` over `two_heads` at equal iterations: +3.2 ± ")
    assert "Of 7 such intervals" in words[3]
    students, networks, terms = report(found).tables
    assert [row[0] for row in students.rows] == [
        "plain", "plain, two heads, two views", "DML, an equal peer", "OKDCR",
    ]  # fmt: skip
    assert students.rows[2] == [
        "DML, an equal peer", "2.00 (2.00-2.00)", "1,000", "10.5 10.6 10.7", "10.6",
        "+0.6 ± 0.2", "20", "11.0", "-0.4 ± 0.2",
    ]  # fmt: skip
    assert networks.rows == [
        ["DML, an equal peer", "10.6 (+0.6 ± 0.2)", "12.0 (+2.0 ± 0.0)", "15.0 (+5.0 ± 2.5)"]
    ]
    assert terms.rows == [["DML, an equal peer", "`logits`", "0.5"]]
    del found.results[2]["dml"]["AP of ensemble"]  # of a seed whose networks detect nothing
    assert report(found).tables[1].rows[0][3] == ""
    found.results[2]["dml"]["AP of ensemble"] = 15.0
    found.results[2]["okdcr"]["diverged"] = "nan"
    assert "Diverged, and counted as 0 AP: okdcr (2)." in report(found).notes

    for each in found.results.values():
        for run in each.values():
            run.update(dict.fromkeys(("AP50", "AP75", "AR", "seconds"), 0.0))
    write_csv(tmp_path / "all.csv", found)
    with open(tmp_path / "all.csv") as f:
        rows = list(csv.DictReader(f))
    assert [r["AP of ensemble"] for r in rows if r["run"] == "dml"] == ["14.0", "15.0", "16.0"]
    assert {r["AP of ensemble"] for r in rows if r["run"] == "student"} == {""}
    draw(tmp_path / "all.png", found)
    assert (tmp_path / "all.png").stat().st_size > 5000
