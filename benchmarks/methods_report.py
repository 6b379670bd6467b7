"""Tables, CSV and chart of a comparison of methods, see `benchmarks.methods`."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gains import Bars, Gain, by_sign, caution, draw_bars, listed, paired
from benchmarks.report import Report, Table
from benchmarks.turns import Samples, ratios, spread

TEACHER, PLAIN, EQUAL_TIME = "teacher", "student", "student_equal_time"
INHERITED, RANDOM = "inherited", "random_teacher"
CONTROLS = {
    TEACHER: "teacher",
    PLAIN: "plain",
    EQUAL_TIME: "plain, for the wall-clock of the dearest method",
    INHERITED: "inherited, no method",
    RANDOM: "CWD and inheritance from a random teacher",
}
BALANCED = "_balanced"
"""Behind a method's name: the run at the common gradient ratio."""
_LINES = {PLAIN: "tab:blue", EQUAL_TIME: "tab:cyan", INHERITED: "tab:green"}


@dataclass(frozen=True)
class Found:
    """
    A comparison.

    Attributes:
        results: by seed and by name of the run what `kd_det.tools.runs.train` found.
        methods: in the order of the table.
        weights: published and balanced, by method.
        pulls: median gradient ratio over the published and over the balanced runs, by method.
        steps: seconds of steps that took turns, by method and of the plain student.
        ratio: that the balanced weights aim at.
    """

    results: Mapping[int, Mapping[str, Mapping[str, Any]]]
    methods: Sequence[str]
    weights: Mapping[str, Sequence[float]]
    pulls: Mapping[str, Sequence[float]]
    steps: Samples
    ratio: float

    def ap(self, run: str) -> list[float]:
        """By seed."""
        return [each[run]["AP"] for each in self.results.values()]


def gain(found: Found, run: str, over: str) -> Gain:
    """AP of one run over that of another."""
    return paired(found.ap(run), found.ap(over))


def report(found: Found) -> Report:
    """Tables of the controls and of the methods, and what they say in words."""
    seeds = list(found.results)
    rows = []
    for run, what in CONTROLS.items():
        each = " ".join(f"{ap:.1f}" for ap in found.ap(run))
        length = f"{found.results[seeds[0]][run]['iterations']:,}"
        over = "" if run in (TEACHER, PLAIN) else gain(found, run, PLAIN).text()
        rows.append([what, length, each, f"{statistics.mean(found.ap(run)):.1f}", over])
    of_seeds = "AP of seeds " + ", ".join(map(str, seeds))
    controls = Table("Controls", ["", "iterations", of_seeds, "mean", "over plain"], rows)
    rows = []
    for method in found.methods:
        row = [f"`{method}`", spread(ratios(found.steps, method, PLAIN)).text()]
        for column, run in enumerate((method, method + BALANCED)):
            row += [f"{found.weights[method][column]:.3g}", f"{found.pulls[method][column]:.2g}"]
            row += [f"{statistics.mean(found.ap(run)):.1f}", gain(found, run, INHERITED).text()]
        rows.append(row)
    headers = ["method", "step / plain's", "published weight", "ratio", "AP", "over inherited"]
    headers += [f"weight for ratio {found.ratio:g}", "ratio", "AP", "over inherited"]
    table = Table("Methods: all inherit, and add one term", headers, rows)
    notes = [
        _conclusion(found, "At the published weights", ""),
        _conclusion(found, f"At the weights for ratio {found.ratio:g}", BALANCED),
    ]
    if diverged := [
        f"{r} ({s})" for s in seeds for r, x in found.results[s].items() if "diverged" in x
    ]:
        notes.append(f"Diverged, and counted as 0 AP: {', '.join(diverged)}.")
    if len(seeds) == 1:
        notes.append("One seed and a reduced schedule: this is no ranking.")
    else:
        notes.append(caution(2 * len(found.methods)))
    samples = {
        "results": found.results,
        "weights": found.weights,
        "grad_ratios": found.pulls,
        "step_seconds": found.steps,
    }
    return Report([controls, table], samples, notes)


def _conclusion(found: Found, where: str, suffix: str) -> str:
    if len(found.results) == 1:
        best = max(found.methods, key=lambda method: found.ap(method + suffix)[0])
        return f"{where} the highest AP of this seed is that of `{best}`."
    of = by_sign({m: gain(found, m + suffix, INHERITED) for m in found.methods})
    faster = [m for m in found.methods if gain(found, m + suffix, EQUAL_TIME).sign > 0]
    return (
        f"{where}: better than inheriting alone {of[1]}; worse {of[-1]}; not distinguishable "
        f"{of[0]}. Better than the plain student for the wall-clock of the dearest method: "
        f"{listed(faster)}."
    )


def write_csv(path: Path, found: Found) -> None:
    """One line per run."""
    columns = ["AP", "AP50", "AP75", "AR", "iterations", "seconds"]
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["seed", "run", "weight", "grad_ratio", *columns])
        for seed, each in found.results.items():
            for run, result in each.items():
                method, balanced = run.removesuffix(BALANCED), run.endswith(BALANCED)
                of_method: list[Any] = ["", ""]
                if method in found.methods:
                    of_method = [x[method][balanced] for x in (found.weights, found.pulls)]
                writer.writerow([seed, run, *of_method, *(result[column] for column in columns)])


def draw(path: Path, found: Found) -> None:
    """A bar per method and weight, a dot per seed, and lines for the controls."""
    columns = (
        ("published weight", "tab:red", ""),
        (f"ratio {found.ratio:g}", "tab:pink", BALANCED),
    )
    bars = [
        Bars(label, color, [found.ap(method + suffix) for method in found.methods])
        for label, color, suffix in columns
    ]
    lines = {
        CONTROLS[run]: (color, statistics.mean(found.ap(run))) for run, color in _LINES.items()
    }
    draw_bars(path, found.methods, bars, lines)
