"""The quickstart's table and picture."""

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib

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
}
_TASK_LOSSES = ("loss_cls", "loss_box_reg")
_MIN_SCORE = 0.4


def write_report(output: Path, results: dict[str, dict[str, Any]]) -> str:
    """
    Write ``summary.json``, ``summary.csv`` and ``summary.png`` into a quickstart's folder.

    Args:
        output: the folder with one folder per run.
        results: by run, in the order of the table.

    Returns:
        The table.
    """
    columns = list(next(iter(results.values())))
    (output / "summary.json").write_text(json.dumps(results, indent=2) + "\n")
    with open(output / "summary.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["run", *columns])
        writer.writerows([name, *result.values()] for name, result in results.items())
    _draw(output, list(results))
    rows = [[name, *result.values()] for name, result in results.items()]
    formats = ("", ".1f", ".1f", ".1f", ".1f", ",", "", ".0f", ".3f")
    return tabulate(rows, headers=["run", *columns], floatfmt=formats, intfmt=",")


def _draw(output: Path, names: list[str]) -> None:
    figure, axes = plt.subplots(3, 4, figsize=(15, 11), height_ratios=(1.3, 1, 1))
    curves = {name: _metrics(output / name / "metrics.json") for name in names}
    for column, (title, x, y) in enumerate(
        [
            ("task loss (cls + box)", "iteration", "loss"),
            ("AP", "iteration", "bbox/AP"),
            ("AP", "train_seconds", "bbox/AP"),
        ]
    ):
        ax = axes[0][column]
        for name in names:
            points = [(row[x], row[y]) for row in curves[name] if x in row and y in row]
            if points:
                marker = "o" if y == "bbox/AP" else ""
                ax.plot(*zip(*points, strict=True), color=_COLORS[name], label=name, marker=marker)
        ax.set_title(title)
        ax.set_xlabel("seconds of training" if x == "train_seconds" else x)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].legend()
    axes[0][3].axis("off")
    text = f"rows below: the plain\nand the distilled student;\ndetections above {_MIN_SCORE},\n"
    axes[0][3].text(0, 0.5, text + "ground truth dashed", fontsize=12)
    truth = json.loads(next(output.glob("data_seed*/annotations/instances_val.json")).read_text())
    folder = next(output.glob("data_seed*/val"))
    for row, name in ((1, "student"), (2, "distilled")):
        for ax, image in zip(axes[row], truth["images"][:4], strict=True):
            _draw_detections(ax, output / name, folder, image, truth)
        axes[row][0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(output / "summary.png", dpi=75)
    plt.close(figure)


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of Detectron2's metrics.json, the last one of each iteration, with the task loss."""
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if all(key in row for key in _TASK_LOSSES):
            row["loss"] = sum(row[key] for key in _TASK_LOSSES)
        rows[row["iteration"]] = {**rows.get(row["iteration"], {}), **row}
    return [rows[i] for i in sorted(rows)]


def _draw_detections(
    ax: Axes, run: Path, folder: Path, image: dict[str, Any], truth: dict[str, Any]
) -> None:
    names = {c["id"]: c["name"] for c in truth["categories"]}
    ax.imshow(Image.open(folder / image["file_name"]), interpolation="nearest")
    for a in truth["annotations"]:
        if a["image_id"] == image["id"]:
            ax.add_patch(_box(a["bbox"], edgecolor="white", linestyle="--"))
    detections = json.loads((run / "inference" / "coco_instances_results.json").read_text())
    for d in detections:
        if d["image_id"] == image["id"] and d["score"] >= _MIN_SCORE:
            ax.add_patch(_box(d["bbox"], edgecolor="yellow"))
            label = f"{names[d['category_id']]} {d['score']:.2f}"
            ax.text(d["bbox"][0], d["bbox"][1], label, color="yellow", fontsize=8)
    ax.set_xticks([])
    ax.set_yticks([])


def _box(bbox: list[float], **style: Any) -> Rectangle:
    x, y, w, h = bbox
    return Rectangle((x, y), w, h, fill=False, **style)
