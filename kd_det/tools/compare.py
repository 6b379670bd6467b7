"""``python -m kd_det compare``: runs side by side, in a table and over iterations and time."""

import argparse
import csv
import glob
import json
import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from tabulate import tabulate

from kd_det.tools.metrics import CLOCKS, RunMetrics, common_score
from kd_det.tools.options import add_command, made_folder
from kd_det.tools.report import half_interval

Groups = dict[str, list[RunMetrics]]
"""Runs by name; those of one name are seeds of one experiment."""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "compare",
        "put runs side by side: a table, and AP against iterations and wall-clock",
        takes="output folders of Detectron2 trainings, distilled or not, the plain one first: "
        "metrics.json for the numbers, kd_run.json, if there, for the names of the terms.",
        gives="a table on the terminal, and compare.csv (every evaluation), compare.json and "
        "compare.png in --output. Wall-clock is that of training steps; evaluation is not counted.",
        example="output/plain output/distilled --output output/compared",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]DIR",
        help="a run's folder, called NAME (default: as the folder is). Several of one NAME are "
        "seeds of one experiment: their mean is shown, with a 95 %% interval. DIR may be a pattern "
        "in quotes: 'plain=output/plain_seed*'",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the files")
    parser.add_argument(
        "--score",
        default="",
        metavar="KEY",
        help="scalar of metrics.json to compare (default: the first that all runs have of bbox/AP, "
        "segm/AP, sem_seg/mIoU, others)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read, print, write."""
    groups = read_groups(args.runs)
    runs = [r for group in groups.values() for r in group]
    score = common_score(runs, args.score)
    output = made_folder(Path(args.output))
    write_csv(output / "compare.csv", groups, score)
    (output / "compare.json").write_text(json.dumps(summary(groups, score), indent=2) + "\n")
    draw(output / "compare.png", groups, score)
    print(table(groups, score))
    for note in notes(groups):
        print(f"\n{note}")
    print(f"\nTable and curves: {output}/compare.csv, .json, .png")


def read_groups(words: list[str]) -> Groups:
    """
    The runs that the command line names.

    Args:
        words: ``DIR`` or ``NAME=DIR``, where ``DIR`` may be a pattern. Folders of one last name
            (``a/output``, ``b/output``) are called by what tells them apart.

    Raises:
        FileNotFoundError: if a folder is none of a training.
    """
    named: list[tuple[str, Path]] = []
    unnamed = []
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or os.path.isdir(word) or os.sep in name:  # folders have such names, too
            name, equals, folder = "", "", word
        found = sorted(glob.glob(folder)) or [folder]
        named += [(name, Path(f)) for f in found]
        unnamed += [] if equals else [Path(f) for f in found]
    groups: Groups = {}
    for name, path in named:
        known = name or _short(path, unnamed)
        groups.setdefault(known, []).append(RunMetrics.read(known, path))
    return groups


def _short(folder: Path, among: list[Path]) -> str:
    """As much of the end of a path as no other of them ends with."""
    parts = folder.resolve().parts
    others = [p.resolve().parts for p in among if p.resolve() != folder.resolve()]
    n = next(n for n in range(1, len(parts) + 1) if parts[-n:] not in [o[-n:] for o in others])
    return "/".join(parts[-n:])


def summary(groups: Groups, score: str) -> dict[str, Any]:
    """
    All that the table and the curves are made of.

    Args:
        groups: runs by name.
        score: of `common_score`.

    Returns:
        By name: mean and half of the 95 % interval of the last scores (``None`` of one run), means
        of what else the table shows, and each run's curve.
    """
    result = {}
    for name, runs in groups.items():
        last = [r.curve(score)[-1][2] for r in runs]
        result[name] = {
            "score": score,
            "mean": float(np.mean(last)),
            "half_interval": half_interval(last) if len(last) > 1 else None,
            **{key: _mean([r.final(score + key) for r in runs]) for key in ("50", "75")},
            "best": _mean([max(point[2] for point in r.curve(score)) for r in runs]),
            "iterations": _mean([r.iterations for r in runs]),
            "seconds": _mean([r.seconds(r.iterations) for r in runs]),
            "terms": runs[0].terms,
            "runs": [
                {"folder": str(r.folder), "clock": r.clock, "curve": r.curve(score)} for r in runs
            ],
        }
    return result


def table(groups: Groups, score: str) -> str:
    """One line per name; gains are over the first one."""
    found = summary(groups, score)
    first = next(iter(found.values()))["mean"]
    short = score.split("/")[-1]
    rows: list[list[Any]] = []
    for name, s in found.items():
        interval = "" if s["half_interval"] is None else f" ± {s['half_interval']:.1f}"
        per_step = None if s["seconds"] is None else s["seconds"] / s["iterations"]
        rows.append(
            [
                name,
                len(groups[name]),
                f"{s['mean']:.1f}{interval}",
                f"{s['mean'] - first:+.1f}" if rows else "",
                *(_shown(s[key], ".1f") for key in ("50", "75", "best")),
                _shown(s["iterations"], ",.0f"),
                _shown(s["seconds"], ",.0f"),
                _shown(per_step, ".3f"),
                s["terms"] or "-",
            ]
        )
    headers = [
        "run",
        "seeds",
        short,
        f"over {next(iter(found))}",
        f"{short}50",
        f"{short}75",
        "best",
    ]
    headers += ["iterations", "seconds", "s/iteration", "distilled"]
    empty = [i for i in (4, 5) if all(row[i] == "-" for row in rows)]
    if all(row[1] == 1 for row in rows):
        empty.append(1)
    kept = [i for i in range(len(headers)) if i not in empty]
    return tabulate(
        [[row[i] for i in kept] for row in rows],
        headers=[headers[i] for i in kept],
        disable_numparse=True,
        colalign=["left" if headers[i] in ("run", "distilled") else "right" for i in kept],
    )


def notes(groups: Groups) -> list[str]:
    """What to know of the numbers."""
    runs = [r for group in groups.values() for r in group]
    found = []
    for clock, meaning in CLOCKS.items():
        names = dict.fromkeys(r.name for r in runs if r.clock == clock)
        found += [f"Seconds of {', '.join(names)}: {meaning}."] * bool(names)
    found += [f"{r.folder} says nothing of time." for r in runs if not r.clock]
    # Seeds may bring data of their own; then every experiment has the same ones.
    data = {name: sorted({r.test_data for r in group}) for name, group in groups.items()}
    known = {name: tests for name, tests in data.items() if all(map(any, tests))}
    other = [name for name, tests in known.items() if tests != next(iter(known.values()))]
    if other:
        found.append(
            f"{', '.join(other)} and {next(iter(known))} were not evaluated on the same "
            "annotations (kd_run.json has their SHA-256): their scores are no comparison."
        )
    return found


def write_csv(path: Path, groups: Groups, score: str) -> None:
    """One line per evaluation of every run."""
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["run", "folder", "iteration", "seconds", score])
        for name, runs in groups.items():
            for r in runs:
                writer.writerows([name, r.folder, *point] for point in r.curve(score))


def draw(path: Path, groups: Groups, score: str) -> None:
    """The score over iterations and over wall-clock; seeds thin, their mean thick."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    longest = max(r.seconds(r.iterations) or 0 for runs in groups.values() for r in runs)
    unit, scale = "seconds", 1
    if longest > 300:
        unit, scale = ("minutes", 60) if longest < 7200 else ("hours", 3600)
    for i, (name, runs) in enumerate(groups.items()):
        color = f"C{i % 10}"
        curves = [r.curve(score) for r in runs]
        _draw_curves(axes[0], curves, 0, 1, color, name)
        _draw_curves(axes[1], curves, 1, scale, color, name)
    for runs in groups.values():
        for source, value in runs[0].sources(score).items():
            label = f"{source} of {runs[0].name}"
            axes[0].axhline(value, color="0.6", linestyle="--", label=label)
            axes[1].axhline(value, color="0.6", linestyle="--")
    axes[0].set_xlabel("iterations")
    axes[1].set_xlabel(f"{unit} of training steps")
    axes[0].set_ylabel(score)
    axes[0].legend()
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.set_ylim(bottom=0)
        ax.set_xlim(left=0)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_curves(ax: Axes, curves: list[Any], x: int, scale: float, color: str, name: str) -> None:
    """Each run's, and where there are several the mean over the evaluations that all have."""
    several = len(curves) > 1
    for curve in curves:
        if curve[0][x] is not None:
            points = [(p[x] / scale, p[2]) for p in curve]
            label = None if several else name
            thin = {"alpha": 0.35, "linewidth": 1.0} if several else {"marker": "o"}
            ax.plot(*zip(*points, strict=True), color=color, label=label, **thin)
    if several:
        shared = sorted(set.intersection(*({p[0] for p in curve} for curve in curves)))
        means = [
            np.mean([next((p[x], p[2]) for p in c if p[0] == at) for c in curves], axis=0)
            for at in shared
            if all(c[0][x] is not None for c in curves)
        ]
        if means:
            found = np.array(means) / (scale, 1)  # (evaluations, 2)
            ax.plot(found[:, 0], found[:, 1], color=color, label=name, marker="o", linewidth=2)


def _mean(values: list[Any]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
