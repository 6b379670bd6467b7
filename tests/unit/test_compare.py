"""``python -m kd_det compare``, on folders written by hand."""

import csv
import json

import pytest
from PIL import Image

from kd_det.__main__ import main
from kd_det.tools.compare import read_groups, summary, table
from kd_det.tools.metrics import RunMetrics, common_score


def write(folder, rows, plan=None, sha="a"):
    """A run of Detectron2's: 4 iterations, logged every 2, evaluated behind the last."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    if plan is not None:
        test = {"toy": {"sha256": sha}}
        record = {"plan": plan, "datasets": {"test": test}}
        (folder / "kd_run.json").write_text(json.dumps(record))
    return folder


def rows(ap, step=0.5, **more):
    return [
        {"iteration": 1, "lr": 0.1, "time": step, "bbox/AP": ap / 2},
        {"iteration": 3, "lr": 0.1, "time": 2 * step},
        {"iteration": 4, "bbox/AP": ap, "bbox/AP50": 2 * ap, "bbox/AP-cat": 1.0, **more},
    ]


CWD = {"fpn": {"type": "CWD", "weight": 5.0}}


@pytest.fixture
def folders(tmp_path):
    write(tmp_path / "plain", rows(10.0), plan={})
    measured = {"kd/teacher/bbox/AP": 40.0, "kd/teacher/gap/bbox/AP": 26.0, "kd/peer/bbox/AP": 3.0}
    write(tmp_path / "distilled", rows(14.0, 0.75, **measured), plan=CWD)
    return tmp_path


def test_a_curve_knows_its_iterations_and_its_time(folders):
    run = RunMetrics.read("plain", folders / "plain")
    assert run.iterations == 4
    assert run.clock == "time"
    # Two steps of 0.5 s, then two of 1 s; the last evaluation stands under the next iteration.
    assert run.curve("bbox/AP") == [(2, 1.0, 5.0), (4, 3.0, 10.0)]


def test_seconds_of_the_trainer_are_better_than_a_median(tmp_path):
    timed = [{**row, "train_seconds": 7.0 * (row["iteration"] + 1)} for row in rows(10.0)[:2]]
    run = RunMetrics.read("x", write(tmp_path / "x", timed))
    assert run.clock == "train_seconds"
    assert run.seconds(4) == pytest.approx(28.0)
    assert run.seconds(1) == pytest.approx(7.0)


def test_a_resumed_run_counts_once_and_a_cut_line_not_at_all(tmp_path):
    folder = write(tmp_path / "x", [*rows(99.0), *rows(10.0)])
    with open(folder / "metrics.json", "a") as f:
        f.write('{"iteration": 5, "bbox/')
    assert RunMetrics.read("x", folder).curve("bbox/AP") == [(2, 1.0, 5.0), (4, 3.0, 10.0)]


def test_a_detector_that_finds_nothing_has_0(tmp_path):
    nothing = [{"iteration": 3, "lr": 0.1, "bbox/AP": float("nan"), "bbox/AP50": float("nan")}]
    run = RunMetrics.read("x", write(tmp_path / "x", nothing))
    assert run.curve("bbox/AP") == [(4, None, 0.0)]
    assert run.final("bbox/AP50") == 0.0


def test_the_command_writes_what_it_prints(folders, capsys):
    out = folders / "out"
    both = [str(folders / name) for name in ("plain", "distilled")]
    assert main(["compare", *both, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["plain", "10.0", "20.0", "10.0", "4", "3", "0.750", "-"] in lines
    assert "distilled 14.0 +4.0 28.0 14.0 4 4 1.125 fpn CWD 5".split() in lines
    assert "median step" in printed
    assert "no comparison" not in printed
    with open(out / "compare.csv", newline="") as f:
        found = list(csv.DictReader(f))
    assert [float(row["bbox/AP"]) for row in found] == [5.0, 10.0, 7.0, 14.0]
    assert json.loads((out / "compare.json").read_text())["distilled"]["mean"] == 14.0
    assert Image.open(out / "compare.png").size[0] > 500


def test_seeds_have_a_mean_and_an_interval(tmp_path):
    for seed, ap in enumerate((10.0, 12.0, 11.0)):
        write(tmp_path / f"plain_{seed}", rows(ap), plan={}, sha=str(seed))
        write(tmp_path / f"kd_{seed}", rows(ap + 5), plan=CWD, sha=str(seed))
    groups = read_groups([f"plain={tmp_path}/plain_*", f"kd={tmp_path}/kd_*"])
    assert list(map(len, groups.values())) == [3, 3]
    # Standard deviation 1, t of two degrees of freedom 4.303.
    half = summary(groups, "bbox/AP")["kd"]["half_interval"]
    assert half == pytest.approx(4.303 / 3**0.5)
    line = table(groups, "bbox/AP").splitlines()[-1]
    assert line.split()[:6] == ["kd", "3", "16.0", "±", "2.5", "+5.0"]


def test_folders_of_one_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        write(tmp_path / parent / "output", rows(10.0))
    folders = [str(tmp_path / parent / "output") for parent in ("a", "b")]
    assert list(read_groups(folders)) == ["a/output", "b/output"]


@pytest.mark.parametrize("name", ["lr=0.1", "a,lr=0.1,wd=1e-4"])
def test_folders_may_have_an_equals_sign(tmp_path, name):
    folder = str(write(tmp_path / name / "out=1", rows(10.0)))
    other = write(tmp_path / "other", rows(10.0))
    assert list(read_groups([folder, str(other)])) == ["out=1", "other"]
    (run,) = read_groups([f"fast={folder}"])["fast"]
    assert str(run.folder) == folder


def test_other_test_data_are_named(folders, capsys):
    write(folders / "other", rows(50.0), plan={}, sha="b")
    main(["compare", str(folders / "plain"), str(folders / "other"), "--output", str(folders)])
    assert "other and plain were not evaluated on the same annotations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gone"], "There is no gone/metrics.json"),
        (["empty"], "has no line of a training"),
        (["young"], "young/metrics.json has no evaluation"),
        (["plain", "--score", "bbox/APP"], "not every run has it. Did you mean"),
        (["plain", "pixels"], "no score in common: plain has bbox/AP; pixels has sem_seg/mIoU"),
    ],
)
def test_mistakes_end_in_a_sentence(folders, monkeypatch, capsys, words, says):
    monkeypatch.chdir(folders)
    write(folders / "empty", [])
    write(folders / "young", [{"iteration": 3, "lr": 0.1}])
    write(folders / "pixels", [{"iteration": 3, "lr": 0.1, "sem_seg/mIoU": 3.0}])
    with pytest.raises(SystemExit) as e:
        main(["compare", *words, "--output", "out"])
    assert e.value.code == 2
    assert says in capsys.readouterr().err


def test_what_all_have_is_compared(tmp_path):
    both = write(tmp_path / "both", rows(10.0, **{"segm/AP": 8.0, "kd/t/gap/bbox/AP": 1.0}))
    masks = write(tmp_path / "masks", [{"iteration": 3, "segm/AP": 9.0, "bbox/APs": 1.0}])
    runs = [RunMetrics.read(f.name, f) for f in (both, masks)]
    assert common_score(runs[:1]) == "bbox/AP"
    assert common_score(runs) == "segm/AP"
    assert common_score(runs[1:], "bbox/APs") == "bbox/APs"
