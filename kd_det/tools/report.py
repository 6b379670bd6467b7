"""The table and picture of a comparison."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from tabulate import tabulate

_COLORS = {
    "teacher": "0.6",
    "student": "tab:blue",
    "student_equal_time": "tab:cyan",
    "distilled": "tab:red",
    "inherited": "tab:green",
    "random_teacher": "tab:brown",
}
_MIN_SCORE = 0.4
_FORMATS = {
    "parameters": ",",
    "iterations": ",.0f",
    "seconds": ".0f",
    "seconds_per_iteration": ".3f",
}


@dataclass(frozen=True)
class Style:
    """
    What is shown of a task.

    Attributes:
        score: the column of the table by which runs are compared.
        scalar: its name in metrics.json.
        losses: the student's own.
        note: how to read the pictures of predictions.
        predictions: draws those of a run for one image: axes, folder of the run, folder of the
            images, entry of the image in the annotation file, annotation file.
    """

    score: str
    scalar: str
    losses: tuple[str, ...]
    note: str
    predictions: Callable[[Axes, Path, Path, dict[str, Any], dict[str, Any]], None]


def write_report(
    output: Path, results: dict[str, dict[str, Any]], style: Style | None = None
) -> None:
    """
    Write ``summary.json``, ``summary.csv`` and ``summary.png`` into a comparison's folder.

    Args:
        output: the folder with one folder per run.
        results: by run, in the order of the table.
        style: of the task; boxes by default.
    """
    columns = list(next(iter(results.values())))
    (output / "summary.json").write_text(json.dumps(results, indent=2) + "\n")
    with open(output / "summary.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["run", *columns])
        writer.writerows([name, *result.values()] for name, result in results.items())
    _draw(output, list(results), style or DETECTION)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as text, one line per run."""
    columns = list(next(iter(results.values())))
    rows = [[name, *result.values()] for name, result in results.items()]
    formats = ["", *(_FORMATS.get(column, ".1f") for column in columns)]
    return tabulate(rows, headers=["run", *columns], floatfmt=formats, intfmt=",")


def write_means(
    output: Path, by_seed: dict[int, dict[str, dict[str, Any]]], score: str = "AP"
) -> dict[str, dict[str, float]]:
    """
    Write ``seeds.json`` (every result) and ``seeds.md``: for each run the mean score, and the mean
    of the paired difference to the distilled student with a 95 % interval (Student's t over seeds).

    Args:
        output: the folder with one folder per seed.
        by_seed: the results by run.
        score: the column that counts.

    Returns:
        The means by run.
    """
    (output / "seeds.json").write_text(json.dumps(by_seed, indent=2) + "\n")
    seeds = list(by_seed)
    runs = list(by_seed[seeds[0]])
    means = {
        run: {
            key: float(np.mean([by_seed[seed][run][key] for seed in seeds]))
            for key in by_seed[seeds[0]][run]
        }
        for run in runs
    }
    rows = []
    for run in runs:
        found = [by_seed[seed][run][score] for seed in seeds]
        best = [by_seed[seed]["distilled"][score] for seed in seeds]
        gains = [distilled - other for distilled, other in zip(best, found, strict=True)]
        mean, half = float(np.mean(gains)), half_interval(gains)
        gap = "" if run in ("teacher", "distilled") else f"{mean:+.1f} ± {half:.1f}"
        each = " ".join(f"{value:.1f}" for value in found)
        row = means[run]
        rows.append([run, each, row[score], gap, round(row["iterations"])])
    headers = ["run", f"{score} of seeds {seeds}", "mean", "distilled gains", "iterations"]
    text = tabulate(rows, headers, "github", floatfmt=("", "", ".1f", "", ""), intfmt=",")
    (output / "seeds.md").write_text(text + "\n")
    return means


def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of a mean; quantiles of Student's t for up to 10 values."""
    t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    n = len(values)
    return t[min(n - 2, len(t) - 1)] * float(np.std(values, ddof=1)) / n**0.5


def _draw(output: Path, names: list[str], style: Style) -> None:
    figure, axes = plt.subplots(3, 4, figsize=(15, 11), height_ratios=(1.3, 1, 1))
    curves = {name: _metrics(output / name / "metrics.json", style.losses) for name in names}
    own = " + ".join(loss.removeprefix("loss_") for loss in style.losses)
    for column, (title, x, y) in enumerate(
        [
            (f"task loss ({own})", "iteration", "loss"),
            (style.score, "iteration", style.scalar),
            (style.score, "train_seconds", style.scalar),
        ]
    ):
        ax = axes[0][column]
        for name in names:
            points = [(row[x], row[y]) for row in curves[name] if x in row and y in row]
            if points:
                marker = "o" if y == style.scalar else ""
                ax.plot(*zip(*points, strict=True), color=_COLORS[name], label=name, marker=marker)
        ax.set_title(title)
        ax.set_xlabel("seconds of training" if x == "train_seconds" else x)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].legend()
    axes[0][3].axis("off")
    text = "rows below: the plain\nand the distilled student;\n" + style.note
    axes[0][3].text(0, 0.5, text, fontsize=12)
    truth = json.loads(next(output.glob("data_seed*/annotations/instances_val.json")).read_text())
    folder = next(output.glob("data_seed*/val"))
    for row, name in ((1, "student"), (2, "distilled")):
        for ax, image in zip(axes[row], truth["images"][:4], strict=True):
            ax.imshow(Image.open(folder / image["file_name"]), interpolation="nearest")
            style.predictions(ax, output / name, folder, image, truth)
            ax.set_xticks([])
            ax.set_yticks([])
        axes[row][0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(output / "summary.png", dpi=75)
    plt.close(figure)


def _metrics(path: Path, losses: tuple[str, ...]) -> list[dict[str, Any]]:
    """
    Detectron2's metrics.json, one row per iteration, with the task loss and the seconds of
    training (which are written at other iterations than AP is).
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if all(key in row for key in losses):
            row["loss"] = sum(row[key] for key in losses)
        rows[row["iteration"]] = {**rows.get(row["iteration"], {}), **row}
    timed = [(i, rows[i]["train_seconds"]) for i in sorted(rows) if "train_seconds" in rows[i]]
    for iteration, row in rows.items():
        if timed:
            at, seconds = np.array(timed).T  # (2, number of timed rows)
            row["train_seconds"] = float(np.interp(iteration, at, seconds))
    return [rows[i] for i in sorted(rows)]


def _draw_detections(
    ax: Axes, run: Path, folder: Path, image: dict[str, Any], truth: dict[str, Any]
) -> None:
    names = {c["id"]: c["name"] for c in truth["categories"]}
    for a in truth["annotations"]:
        if a["image_id"] == image["id"]:
            ax.add_patch(_box(a["bbox"], edgecolor="white", linestyle="--"))
    detections = json.loads((run / "inference" / "coco_instances_results.json").read_text())
    for d in detections:
        if d["image_id"] == image["id"] and d["score"] >= _MIN_SCORE:
            ax.add_patch(_box(d["bbox"], edgecolor="yellow"))
            label = f"{names[d['category_id']]} {d['score']:.2f}"
            ax.text(d["bbox"][0], d["bbox"][1], label, color="yellow", fontsize=8)


def _box(bbox: list[float], **style: Any) -> Rectangle:
    x, y, w, h = bbox
    return Rectangle((x, y), w, h, fill=False, **style)


DETECTION = Style(
    score="AP",
    scalar="bbox/AP",
    losses=("loss_cls", "loss_box_reg"),
    note=f"detections above {_MIN_SCORE},\nground truth dashed",
    predictions=_draw_detections,
)
"""Boxes."""
