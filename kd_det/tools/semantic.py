"""
``python -m kd_det quickstart --task semantic``: the comparison of the quickstart for class maps.

CWD at home: semantic segmentation, class maps, tau 4 and weight 3 as in the paper. Nothing is
inherited, so that the one term is all that the distilled student has beside the plain one.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.axes import Axes
from pycocotools import mask as coco_mask

from kd_det.data.synthetic import make_synthetic_coco
from kd_det.data.synthetic_masks import (
    make_synthetic_masks,
    register_synthetic_masks,
)
from kd_det.tools import runs
from kd_det.tools.report import Style, write_report

DATASET = "kd_det_synthetic_masks"
SCORE = "mIoU"
CONTROLS: runs.Controls = {runs.RANDOM_TEACHER: []}


def run_seed(output: Path, seed: int, controls: bool = False) -> dict[str, dict[str, Any]]:
    """
    All runs of one seed, and their report.

    Args:
        output: a folder of this seed's own.
        seed: of data, weights and data order.
        controls: also run `CONTROLS`.

    Returns:
        The results by run, in the order of the table.
    """
    data = output / f"data_seed{seed}"
    make_synthetic_coco(data, seed=seed)
    make_synthetic_masks(data)
    register(data)
    with runs.quiet(output / "log.txt"):
        names = tuple(CONTROLS) if controls else ()
        results = runs.compare(output, seed, config_of, measure, names)
    write_report(output, results, STYLE)
    return results


def register(data: Path) -> None:
    """Register the dataset in a folder; another one of this process, a seed's say, makes room."""
    for split in ("train", "val"):
        name = f"{DATASET}_{split}"
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_synthetic_masks(name, data, split)


def config_of(name: str, output: Path, seed: int, iterations: int | None = None) -> CfgNode:
    """See `kd_det.tools.runs.run_config`."""
    files = "quickstart/semantic_{}.yaml"
    return runs.run_config(files, name, output, seed, iterations, CONTROLS)


def measure(cfg: CfgNode, results: dict[str, Any]) -> dict[str, float]:
    """In percent, of SemSegEvaluator: mIoU, and mean and overall accuracy of the pixels."""
    return {key: float(results["sem_seg"][key]) for key in ("mIoU", "mACC", "pACC")}


def _draw_pixels(
    ax: Axes, run: Path, folder: Path, image: dict[str, Any], truth: dict[str, Any]
) -> None:
    """Predicted classes in colour; outlines of the ground truth."""
    found = json.loads((run / "inference" / "sem_seg_predictions.json").read_text())
    pixels = np.zeros((image["height"], image["width"]))
    for segment in found:
        if Path(segment["file_name"]).name == image["file_name"]:
            pixels[coco_mask.decode(segment["segmentation"]) > 0] = segment["category_id"]
    shown = np.ma.masked_equal(pixels, 0)
    ax.imshow(shown, cmap="tab10", vmin=0, vmax=9, alpha=0.6, interpolation="nearest")
    for shape in truth["annotations"]:
        if shape["image_id"] == image["id"]:
            outline = coco_mask.decode(shape["segmentation"])
            ax.contour(outline, [0.5], colors="white", linewidths=1, linestyles="--")


STYLE = Style(
    score=SCORE,
    scalar="sem_seg/mIoU",
    losses=("loss_sem_seg",),
    note="colours: predicted classes,\nground truth dashed",
    predictions=_draw_pixels,
)
"""Class maps."""
