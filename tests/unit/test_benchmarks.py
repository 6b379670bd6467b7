"""The benchmarks' harness, and that each of them runs, at sizes that say nothing."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import benchmarks.__main__ as everything
from benchmarks import (
    NAMES,
    command,
    loss,
    method_cost,
    models,
    scaling,
    step,
    teacher,
    time_to_accuracy,
)
from benchmarks.command import Options
from benchmarks.memory import measure_memory
from benchmarks.methods import METHODS
from benchmarks.report import DOCS, Report, Table, write_docs
from benchmarks.turns import ratios, seconds, spread, take_turns
from kd_det.losses.buffers import GRADIENTS

CPU = torch.device("cpu")
TINY = loss.Case("maps", 3, 2, (64, 96))


@pytest.fixture
def options(tmp_path):
    return Options(CPU, repeats=2, short=True, output=tmp_path)


def test_variants_take_turns_and_the_warm_up_does_not_count():
    calls = []
    samples = take_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        3,
        CPU,
        before=lambda: calls.append("-"),
    )
    assert "".join(calls) == "-a-b-b-a-a-b-b-a"
    assert {name: len(found) for name, found in samples.items()} == {"a": 3, "b": 3}


def test_a_call_is_timed():
    began = torch.ones(300, 300)
    assert 0 < seconds(lambda: began @ began, CPU) < 60


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_call_is_timed_on_the_device():
    x = torch.ones(4096, 4096, device="cuda")
    device = x.device
    assert seconds(lambda: [x @ x for _ in range(20)], device) > 5 * seconds(lambda: x @ x, device)
    found = measure_memory(lambda: (x + 1).sum() + 1, device)
    assert 2**26 <= found.peak < 2**27
    assert found.held < 2**20


def test_quartiles_and_ratios_are_formed_within_a_repetition():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)
    assert spread([7.0]) == (7, 7, 7)
    assert spread([0.001, 0.002, 0.003]).text(1, 1e3) == "2.0 (1.5-2.5)"
    samples = {"a": [1.0, 10.0], "b": [2.0, 20.0], "kd": [3.0, 60.0]}
    assert ratios(samples, "kd", "a") == [3, 6]
    assert ratios(samples, "kd", "a", "b") == [1, 2]


def test_memory_is_what_was_allocated_at_once_and_what_is_left():
    x = torch.ones(1000)
    found = measure_memory(lambda: (x + 1).exp() * 2, CPU)
    assert 8000 <= found.peak < 8100  # two at once, and a few bytes of a scalar
    assert found.held == 4000  # the result
    assert measure_memory(lambda: (x + 1).sum(), CPU).held == 4
    assert measure_memory(lambda: x, CPU) == (0, 0)


def test_memory_that_is_kept_between_steps_counts():
    x = torch.ones(1 << 20)
    assert GRADIENTS.empty_like(x).nbytes == 4 << 20  # borrowed, and given back at once
    kept = GRADIENTS.free_bytes
    assert kept >= 4 << 20
    assert measure_memory(lambda: GRADIENTS.empty_like(x), CPU).held == 4 << 20
    GRADIENTS.empty_like(x)
    assert GRADIENTS.free_bytes == kept


def test_all_forms_of_the_loss_are_held_to_one_value():
    students, teachers = loss.make_maps(TINY, CPU)
    forms = {"a": loss.three_tensors, "b": loss.kl_div, "c": loss.ours}
    loss.check_agreement(forms, students, teachers)
    forms["c"] = lambda s, t: loss.ours(s, t) * 1.01
    with pytest.raises(RuntimeError, match=r"'c' gives .* where 'a' gives"):
        loss.check_agreement(forms, students, teachers)
    forms["c"] = lambda s, t: loss.ours([x.detach() for x in s], t) + 0 * sum(x.sum() for x in s)
    with pytest.raises(RuntimeError, match="of the gradient 1"):
        loss.check_agreement(forms, students, teachers)


def test_the_loss(options, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    too_large = TINY._replace(batch=10**9)
    report = loss.run(options, [TINY, too_large])
    (table,) = report.tables
    assert [row[0] for row in table.rows] == [
        loss.BASE, "log_softmax + kl_div", loss.OURS, f"{loss.OURS}, padding left out", loss.FLOOR
    ]  # fmt: skip
    assert table.rows[0][2] == "1.00 (1.00-1.00)"
    assert "compiled form is left out, OSError: no compiler" in report.notes[0]
    assert "batch 1000000000, float32: left out, needs about" in report.notes[1]
    memory = report.samples[table.title]["memory"]
    saved = {name: each["saved_bytes"] / each["copy_bytes"] for name, each in memory.items()}
    assert saved[loss.BASE] > 1.9
    assert saved[loss.OURS] < 1.3


def test_the_teacher(options):
    means = tuple(name for name in teacher.MEANS if "compiled" not in name)
    taps = {"both": (teacher.HEAD, means), "one": (teacher.FEATURES, ())}
    size = teacher.Size("quickstart/teacher.yaml", 1, (64, 64), tables=taps)
    report = teacher.run(options, size)
    times, *distances, features_only = report.tables[:5]
    assert times.rows[0][0] == "stock, to the same depth"
    assert [table.title.split(": ")[1].split()[0] for table in distances] == list(teacher.HEAD)
    assert features_only.rows[-1][0] == teacher.WHOLE
    found = report.samples["both, 1 images of 64x64: cls_logits"]
    assert all(x == 0 for x in found["kd_det, all means off"]["plain"].values())
    folded = found["+ BatchNorm folded"]["plain"]
    assert all(0 < x < 1e-4 for x in folded.values())
    assert not any("half" in name for name in found)  # other maps


def test_inference_mode_is_where_the_row_says_so():
    model = models.build_random(models.read_config("quickstart/teacher.yaml", CPU)).eval()
    inputs = models.make_batch(1, 64, 64, classes=2)
    for name, inference in (("+ channels_last", False), ("+ inference mode (the default)", True)):
        run = teacher._teacher(model, teacher.MEANS[name], teacher.FEATURES, inputs)
        assert run()["features"]["p3"].is_inference() is inference


def test_the_step(options):
    report = step.run(options, [step.QUICKSTART._replace(images=(2, 64, 64))])
    (found,) = report.samples.values()
    assert {len(each) for each in found["seconds"].values()} == {2}
    for i, whole in enumerate(found["seconds"][step.KD]):
        parts = found["parts"]
        assert parts["sources"][i] > 0
        assert parts["terms"][i] > 0
        assert sum(each[i] for each in parts.values()) == pytest.approx(whole)
    assert all(peak > 0 for peak in found["peak_bytes"].values())


def test_the_parts_of_a_step_are_those_of_the_last_rounds(monkeypatch):
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr(step, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Part(torch.nn.Module):
        def forward(self, ticks):
            clock.now += ticks

    one, two = Part(), Part()
    with step.Stopwatches({"both": [one, two], "one": [one]}, CPU) as watches:
        for ticks in (1, 10, 100):
            one(ticks)
            two(2 * ticks)
    one(1000)  # no longer watched
    assert watches.seconds(last=2) == {"both": [30, 300], "one": [10, 100]}


def test_both_students_of_a_step_learn_the_same_task():
    plain, kd = step.learners(step.QUICKSTART._replace(images=(1, 64, 64)), CPU)
    assert type(plain.model).__name__ == "RetinaNet"
    assert type(kd.model.student).__name__ == "RetinaNet"
    assert kd.inputs is plain.inputs
    assert set(kd.model.terms) == {"fpn", "logits"}
    moved = [p for group in kd.optimizer.param_groups for p in group["params"]]
    assert len(moved) == len(list(kd.model.parameters()))


def test_the_methods_terms(options):
    report = method_cost.run(options, method_cost.Size(1, 64, 96))
    (table,) = report.tables
    assert [row[0] for row in table.rows] == [f"`{method}`" for method in METHODS]
    by_method = {row[0].strip("`"): row for row in table.rows}
    assert by_method["cwd"][2] == "1.00 (1.00-1.00)"
    assert by_method["cwd"][4:] == ["features", "0"]
    assert by_method["logit_box"][4] == "cls_logits, box_deltas"
    assert by_method["fitnet"][5] == f"{5 * (256 * 256 + 256):,}"  # a 1x1 convolution per level
    # The gradients alone are that large.
    cells = sum(math.ceil(64 / s) * math.ceil(96 / s) for s in (8, 16, 32, 64))
    assert report.samples["peak_bytes"]["cwd"] >= 4 * 256 * cells


def test_growth(options):
    base = scaling.Point(image=64, batch=1, channels=4)
    report = scaling.run(options, {"batch": (1, 2, 4), "levels": (1, 5)}, (1, 3), base)
    growth, terms = report.tables
    assert [row[0] for row in growth.rows] == [
        "batch", "levels", "image, batch and channels together"
    ]  # fmt: skip
    # A tap that three terms share is recorded once, by one run of the teacher.
    assert [row[0] for row in terms.rows] == ["1", "3"]
    assert [row[-2:] for row in terms.rows] == [["1", "1"], ["1", "1"]]
    assert len(scaling.with_terms(3, CPU).model.terms) == 3


def test_the_exponent_is_the_slope_and_its_interval_covers_noise():
    sizes = [1e3, 1e4, 1e5, 1e6, 1e7]
    slope, half = scaling.exponent(sizes, [3 * n**1.5 for n in sizes])
    assert slope == pytest.approx(1.5)
    assert half == pytest.approx(0, abs=1e-6)
    # Residuals -1/3, 2/3, -1/3 around slope 0: an error of sqrt(1/3) with one degree of freedom.
    slope, half = scaling.exponent([1, math.e, math.e**2], [1, math.e, 1])
    assert (slope, half) == (pytest.approx(0, abs=1e-12), pytest.approx(12.706 * 3**-0.5))
    assert scaling.exponent([1, 2], [1, 2]) == (pytest.approx(1), math.inf)
    with pytest.raises(ValueError, match="two sizes"):
        scaling.exponent([2, 2], [1, 1])


def test_as_good_from_is_where_no_later_evaluation_is_below():
    curve = [(10, 1.0, 5.0), (20, 2.0, 3.0), (30, 3.0, 6.0), (40, 4.0, 7.0)]
    assert time_to_accuracy.reach(curve, 4.0) == (30, 3.0)
    assert time_to_accuracy.reach(curve, 3.0) == (10, 1.0)
    assert time_to_accuracy.reach(curve, 7.1) is None


def test_time_to_accuracy(options):
    plan = time_to_accuracy.Plan(
        seeds=(3,), teacher=2, students=2, evaluations=2, budgets=(0.5,), images=(8, 4),
        step_pairs=1,
    )  # fmt: skip
    report = time_to_accuracy.run(options, plan)
    found = report.samples["3"]
    assert [point[0] for point in found["distilled"]["curve"]] == [1, 2]
    assert found["plain"]["seconds"] > 0
    assert set(found["ap_within_budget"]) == {0.5}
    assert found["ratio"] == pytest.approx(found["reached_at"] / 2 * found["step_ratio"])
    assert "float32" in found["teacher_ap_by_precision"]
    assert report.tables[0].rows[0][0] == "3"


def test_a_run_is_printed_and_written_as_json_and_into_the_docs(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- loss cpu -->\nold\n<!-- /loss cpu -->\nafter\n")

    def run(options):
        assert (options.repeats, options.short, options.device) == (5, True, CPU)
        return Report([Table("title", ["a"], [[r"\1 cell"]])], {"x": [1.0]}, ["a note"])

    argv = ["--short", "--output", str(tmp_path / "out"), "--docs", str(page)]
    command.main("loss", run, "doc", argv)
    assert r"\1 cell" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "loss.json").read_text())
    threads = torch.get_num_threads()
    expected = f"python -m benchmarks.loss --device cpu --threads {threads} --repeats 5 --short"
    assert record["command"] == expected
    assert record["samples"] == {"x": [1.0]}
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == threads
    assert record["machine"]["cpu"]
    assert record["argv"] == argv
    text = page.read_text()
    assert text.startswith(f"before\n<!-- loss cpu -->\n`{expected}`: ")
    assert text.endswith("Short version: smaller than what the full one measures.\n"
                         "<!-- /loss cpu -->\nafter\n")  # fmt: skip
    assert "old" not in text
    assert str(tmp_path) not in text

    page.write_text("no place for it")
    with pytest.raises(ValueError, match="0 sections between <!-- loss cpu -->"):
        command.main("loss", run, "doc", argv)


def test_the_options_are_checked():
    with pytest.raises(SystemExit, match="--repeats >= 1, but got 0"):
        command.main("loss", loss.run, "", ["--repeats", "0"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="torch finds no GPU"):
            command.main("loss", loss.run, "", ["--device", "cuda"])


def test_the_docs_have_a_place_for_every_benchmark(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(DOCS.read_text())
    for name in NAMES:
        write_docs(page, name, "command", Report(notes=[f"of {name}"]), CPU)
        assert f"<!-- /{name} cuda -->" in page.read_text()
    assert page.read_text().count("of ") >= len(NAMES)


def test_all_of_them_run_one_after_the_other(monkeypatch, capsys):
    commands = []

    def run(words, check):
        commands.append(words)
        return SimpleNamespace(returncode=int("benchmarks.step" in words))

    monkeypatch.setattr(everything.subprocess, "run", run)
    assert everything.main(["--short"]) == 1
    assert [words[-2:] for words in commands] == [[f"benchmarks.{n}", "--short"] for n in NAMES]
    assert all(words[0] == sys.executable for words in commands)
    assert "Failed: step" in capsys.readouterr().err
    assert everything.main(["loss", "--repeats", "3"]) == 0
    assert commands[-1][-3:] == ["benchmarks.loss", "--repeats", "3"]
    with pytest.raises(SystemExit):
        everything.main(["losses"])
