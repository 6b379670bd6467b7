"""The commands behind ``python -m kd_det``, and the table and picture of the quickstart."""

import csv
import json
from pathlib import Path

import pytest
from detectron2.modeling import build_model

from kd_det.__main__ import argument_parser, main
from kd_det.tools import report
from kd_det.tools.quickstart import check, config_of
from kd_det.tools.report import table, write_means, write_report
from kd_det.tools.runs import RUNS
from kd_det.tools.taps import tap_table
from tests.toys import save_teacher, toy_cfg


def test_taps_lists_presets_with_channels_strides_and_calls(tmp_path, capsys):
    config, _ = save_teacher(tmp_path)
    assert main(["taps", "--config-file", config]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["features", "p3", "8", "8", "1", "feature", "-"] in lines
    assert ["cls_logits", "p7", "3", "128", "5", "logits", "-"] in lines
    assert "p7 8 128 1 feature LastLevelP6P7 on bottom-up".split() in [x[1:] for x in lines]
    assert ["res4", "res4", "16", "16", "1", "feature", "-"] in lines


def test_taps_lists_module_paths_and_the_calls_of_shared_ones():
    table = tap_table(build_model(toy_cfg()), all_modules=True)
    lines = [line.split() for line in table.splitlines()]
    # The tower is called once per level: five maps, one per call.
    assert [line[1:5] for line in lines if line[0] == "head.cls_subnet"] == [
        [str(i), "8", str(8 * 2**i), "5"] for i in range(5)
    ]


def test_bad_input_ends_in_a_sentence(capsys):
    with pytest.raises(SystemExit) as e:
        main(["taps", "--config-file", "no/such.yaml"])
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("kd_det: taps: there is no config file 'no/such.yaml'")
    assert "Traceback" not in said


def test_the_page_of_commands_says_what_help_says():
    page = (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text()
    (commands,) = argument_parser()._subparsers._group_actions
    for name, parser in commands.choices.items():
        assert f"`{name}`" in page
        _, _, said = parser.format_help().partition("\n\n")  # the usage is laid out as Python likes
        block = page.partition(f"    $ python -m kd_det {name} --help\n")[2]
        assert "".join(block.split()).startswith("".join(f"{parser.format_usage()}{said}".split()))


def test_both_students_share_one_config_but_for_kd(tmp_path):
    plain = config_of("student", tmp_path, seed=1)
    distilled = config_of("distilled", tmp_path, seed=1)
    assert distilled.KD.ENABLED
    assert not plain.KD.ENABLED
    for cfg in (plain, distilled):
        cfg.defrost()
        cfg.OUTPUT_DIR = ""
        del cfg["KD"]
    assert plain == distilled


RESULT = {
    "AP": 10.0,
    "AP50": 20.0,
    "AP75": 8.0,
    "AR": 30.0,
    "parameters": 1000,
    "iterations": 100,
    "seconds": 12.0,
    "seconds_per_iteration": 0.12,
}


@pytest.mark.parametrize(
    ("teacher", "plain", "equal_time", "distilled", "holds"),
    [
        (50, 10, 12, 15, True),
        (49.9, 10, 12, 15, False),
        (50, 10.1, 12, 15, False),
        (50, 10, 12.1, 15, False),
    ],
)
def test_check_holds_the_quickstart_to_its_promise(teacher, plain, equal_time, distilled, holds):
    found = dict(zip(RUNS, (teacher, plain, equal_time, distilled), strict=True))
    results = {name: {**RESULT, "AP": ap} for name, ap in found.items()}
    if holds:
        check(results)
    else:
        with pytest.raises(ValueError, match="Expected a teacher of >= 50 AP"):
            check(results)


def test_report_writes_table_csv_json_and_picture(tmp_path):
    image = {"id": 1, "file_name": "a.png", "width": 8, "height": 8}
    truth = {
        "images": [image] * 4,
        "annotations": [{"image_id": 1, "bbox": [1, 1, 4, 4], "category_id": 1}],
        "categories": [{"id": 1, "name": "circle"}],
    }
    data = tmp_path / "data_seed1"
    (data / "annotations").mkdir(parents=True)
    (data / "annotations" / "instances_val.json").write_text(json.dumps(truth))
    (data / "val").mkdir()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(data / "val" / "a.png")
    for name in RUNS:
        (tmp_path / name / "inference").mkdir(parents=True)
        rows = [
            {"iteration": 19, "loss_cls": 1.0, "loss_box_reg": 0.5, "train_seconds": 2.0},
            {"iteration": 19, "bbox/AP": 5.0},
        ]
        (tmp_path / name / "metrics.json").write_text("\n".join(json.dumps(r) for r in rows))
        found = [{"image_id": 1, "bbox": [1, 1, 4, 4], "category_id": 1, "score": 0.9}]
        (tmp_path / name / "inference" / "coco_instances_results.json").write_text(
            json.dumps(found)
        )
    results = {name: dict(RESULT) for name in RUNS}
    write_report(tmp_path, results)
    assert json.loads((tmp_path / "summary.json").read_text()) == results
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["run"] for row in rows] == list(RUNS)
    assert float(rows[0]["AP"]) == 10.0
    assert all(name in table(results) for name in RUNS)
    assert Image.open(tmp_path / "summary.png").size[0] > 500


def test_means_over_seeds_come_with_paired_intervals(tmp_path):
    aps = {1: (10.0, 15.0), 2: (12.0, 19.0), 3: (11.0, 17.0)}
    by_seed = {
        seed: {"student": {**RESULT, "AP": plain}, "distilled": {**RESULT, "AP": distilled}}
        for seed, (plain, distilled) in aps.items()
    }
    means = write_means(tmp_path, by_seed)
    assert means["distilled"]["AP"] == pytest.approx(17.0)
    # Gains 5, 7, 6: mean 6, standard deviation 1, t of two degrees of freedom 4.303.
    assert f"+6.0 ± {4.303 / 3**0.5:.1f}" in (tmp_path / "seeds.md").read_text()
    assert set(json.loads((tmp_path / "seeds.json").read_text())) == {"1", "2", "3"}


def test_ap_is_placed_in_time_though_seconds_are_written_elsewhere(tmp_path):
    rows = [
        {"iteration": 19, "train_seconds": 2.0},
        {"iteration": 39, "train_seconds": 4.0},
        {"iteration": 29, "bbox/AP": 5.0},
    ]
    path = tmp_path / "metrics.json"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    found = {
        row["iteration"]: row["train_seconds"]
        for row in report._metrics(path, report.DETECTION.losses)
    }
    assert found == {19: 2.0, 29: 3.0, 39: 4.0}
