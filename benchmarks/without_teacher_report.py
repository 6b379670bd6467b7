"""Tables, CSV and chart of what is learnt without a teacher, see `benchmarks.without_teacher`."""

import csv
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison import Costs
from benchmarks.gains import Bars, Gain, by_sign, caution, draw_bars, paired
from benchmarks.report import Report, Table
from benchmarks.turns import ratios, spread

PLAIN = "student"
METHODS = {
    "augmented": "plain, augmented images",
    "two_heads": "plain, two heads, two views",
    "ema": "EMA",
    "frskd": "FRSKD",
    "dml": "DML, an equal peer",
    "dml_mixed": "DML, a thinner peer",
    "okdcr": "OKDCR",
}
"""By name of the run, what it is."""
CONTROLS = {"two_heads": "augmented", "okdcr": "two_heads"}
"""By method, the one that it adds to: heads to two photometric views, imitation to heads."""
NETWORKS = "AP of "
"""Before the name of a network, or ``mean`` or ``ensemble`` of all, in a run's result."""


@dataclass(frozen=True)
class Found:
    """
    A comparison.

    Attributes:
        results: by seed and by name of the run what `kd_det.tools.runs.train` found.
        equal_time: by method, in the order of the table, the plain run for its wall-clock.
        costs: of a step of each method and of the plain student.
        pulls: by method and term the gradient over the task's, medians over runs and seeds.
    """

    results: Mapping[int, Mapping[str, Mapping[str, Any]]]
    equal_time: Mapping[str, str]
    costs: Costs
    pulls: Mapping[str, Mapping[str, float]]

    def ap(self, run: str, of: str = "") -> list[float]:
        """By seed, of the student or of what `NETWORKS` names; empty where a run has not all."""
        key = NETWORKS + of if of else "AP"
        runs = [each[run] for each in self.results.values()]
        return [x[key] for x in runs] if all(key in x for x in runs) else []

    def iterations(self, run: str) -> int:
        """Of its schedule."""
        return next(iter(self.results.values()))[run]["iterations"]

    def gain(self, run: str, over: str, of: str = "") -> Gain:
        """Of a run, or another network of it, over that of the student of another."""
        return paired(self.ap(run, of), self.ap(over))


def report(found: Found) -> Report:
    """Tables, and what they say in words."""
    seeds, methods = list(found.results), list(found.equal_time)
    tables = [_students(found)]
    if any(found.ap(m, "mean") for m in methods):
        tables.append(_networks(found))
    tables.append(_terms(found))
    notes = []
    for where, over in (
        ("At equal iterations", dict.fromkeys(methods, PLAIN)),
        ("At equal wall-clock", found.equal_time),
    ):
        if len(seeds) > 1:
            of = by_sign({m: found.gain(m, over[m]) for m in methods})
            notes.append(
                f"{where}: better than the plain student {of[1]}; worse {of[-1]}; not "
                f"distinguishable {of[0]}."
            )
    held = [
        f"`{m}` over `{control}` at equal iterations: {found.gain(m, control).text()}."
        for m, control in CONTROLS.items()
        if m in methods and control in methods
    ]
    notes += held
    if diverged := [
        f"{r} ({s})" for s in seeds for r, x in found.results[s].items() if "diverged" in x
    ]:
        notes.append(f"Diverged, and counted as 0 AP: {', '.join(diverged)}.")
    if len(seeds) == 1:
        notes.append("One seed: no interval, and no ranking.")
    else:
        notes.append(caution(2 * len(methods) + len(held)))
    samples = {"results": found.results, "costs": found.costs._asdict(), "grad_ratios": found.pulls}
    return Report(tables, samples, notes)


def _students(found: Found) -> Table:
    of_seeds = "AP of seeds " + ", ".join(map(str, found.results))
    headers = ["", "step / plain's", "parameters that train", of_seeds, "mean"]
    headers += ["over plain", "plain's iterations for its wall-clock", "their AP", "over these"]
    n = found.iterations(PLAIN)
    rows = [["plain", "1", f"{found.costs.parameters[PLAIN]:,}", *_aps(found, PLAIN), *[""] * 4]]
    for method, same in found.equal_time.items():
        rows.append(
            [
                METHODS[method],
                spread(ratios(found.costs.seconds, method, PLAIN)).text(),
                f"{found.costs.parameters[method]:,}",
                *_aps(found, method),
                found.gain(method, PLAIN).text(),
                f"{found.iterations(same):,}",
                f"{statistics.mean(found.ap(same)):.1f}",
                found.gain(method, same).text(),
            ]
        )
    return Table(f"The student after {n:,} iterations", headers, rows)


def _aps(found: Found, run: str) -> list[str]:
    aps = found.ap(run)
    return [" ".join(f"{x:.1f}" for x in aps), f"{statistics.mean(aps):.1f}"]


def _networks(found: Found) -> Table:
    """Of the methods with peers."""
    rows = []
    for method in found.equal_time:
        if found.ap(method, "mean"):
            cells = [
                f"{statistics.mean(found.ap(method, of)):.1f} "
                f"({found.gain(method, PLAIN, of).text()})"
                if found.ap(method, of)
                else ""
                for of in ("", "mean", "ensemble")
            ]
            rows.append([METHODS[method], *cells])
    headers = ["", "student", "mean of all networks", "their ensemble"]
    return Table(
        "Networks that learn together: AP, and over plain at equal iterations", headers, rows
    )


def _terms(found: Found) -> Table:
    rows = [
        [METHODS[method], f"`{term}`", f"{pull:.2g}"]
        for method, terms in found.pulls.items()
        for term, pull in terms.items()
    ]
    return Table("How hard terms pull", ["", "term", "gradient / the task's"], rows)


def write_csv(path: Path, found: Found) -> None:
    """One line per run."""
    columns = ["iterations", "AP", "AP50", "AP75", "AR"]
    runs = [run for each in found.results.values() for run in each.values()]
    others = sorted({key for run in runs for key in run if key.startswith(NETWORKS)})
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["seed", "run", *columns, *others, "seconds"])
        for seed, each in found.results.items():
            for run, result in each.items():
                cells = [result.get(column, "") for column in (*columns, *others)]
                writer.writerow([seed, run, *cells, result["seconds"]])


def draw(path: Path, found: Found) -> None:
    """A bar per method and per plain student of its wall-clock, a dot per seed."""
    methods = list(found.equal_time)
    bars = [
        Bars("student", "tab:red", [found.ap(m) for m in methods]),
        Bars(
            "plain, same wall-clock", "tab:cyan", [found.ap(x) for x in found.equal_time.values()]
        ),
        Bars("ensemble", "tab:pink", [found.ap(m, "ensemble") for m in methods]),
    ]
    lines = {"plain": ("tab:blue", statistics.mean(found.ap(PLAIN)))}
    rows = [METHODS[m] for m in methods]
    draw_bars(path, rows, [b for b in bars if any(b.values)], lines)
