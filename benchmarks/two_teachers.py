"""
``python -m benchmarks.two_teachers``: one student from two teachers of disjoint classes, no labels.

Draws the quickstart's dataset, trains a teacher on the annotations of three classes and another on
those of the other three, and then a student of all six on the bare images: each class of it is told
what it is by its own teacher. AP is that of all six classes, of which a teacher has none on three.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from tabulate import tabulate

from kd_det.config import add_kd_config
from kd_det.data.synthetic import CLASSES, make_synthetic_coco
from kd_det.paths import CONFIGS
from kd_det.tools import runs

DATASET = "kd_det_two_teachers"
HALVES = {"round": ("circle", "star", "ring"), "edged": ("square", "triangle", "cross")}
STUDENT = "two_teachers"


def split(data: Path) -> None:
    """Beside the annotation files of all classes those of each half; the images stay the same."""
    for part in ("train", "val"):
        folder = data / "annotations"
        content = json.loads((folder / f"instances_{part}.json").read_text())
        for half, names in HALVES.items():
            ours = [c for c in content["categories"] if c["name"] in names]
            ids = {c["id"] for c in ours}
            kept = [a for a in content["annotations"] if a["category_id"] in ids]
            less = {**content, "categories": ours, "annotations": kept}
            (folder / f"instances_{part}_{half}.json").write_text(json.dumps(less))


def datasets(data: Path) -> dict[str, dict[str, str]]:
    """``KD.DATASETS``: images without labels, the test set, and train and test sets by halves."""
    found = {f"{DATASET}_images": {"IMAGES": str(data / "train")}}
    for part in ("train", "val"):
        for half in ("", *(f"_{name}" for name in HALVES)):
            json_file = data / "annotations" / f"instances_{part}{half}.json"
            found[f"{DATASET}_{part}{half}"] = {"JSON": str(json_file), "IMAGES": str(data / part)}
    return found


def config_of(name: str, output: Path, seed: int, iterations: int | None = None) -> CfgNode:
    """The config of one run, see `kd_det.tools.runs.ConfigOf`; a teacher is called by its half."""
    cfg = get_cfg()
    add_kd_config(cfg)
    file = "half_teacher" if name in HALVES else name
    cfg.merge_from_file(str(CONFIGS / "quickstart" / f"{file}.yaml"))
    sets = datasets((output / f"data_seed{seed}").absolute())
    cfg.merge_from_other_cfg(CfgNode({"KD": {"DATASETS": sets}}))
    if name in HALVES:
        cfg.DATASETS.TRAIN = (f"{DATASET}_train_{name}",)
        cfg.DATASETS.TEST = (f"{DATASET}_val_{name}",)
    else:
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
        for half in HALVES:
            weights = (output / half / "model_final.pth").absolute()
            cfg.merge_from_list([f"KD.SOURCES.{half.upper()}.WEIGHTS", str(weights)])
    cfg.MODEL.DEVICE = "cpu"
    cfg.KD.EVAL_TEACHER = False
    cfg.OUTPUT_DIR = str(output / name)
    cfg.SEED = seed
    if iterations is not None:
        cfg.SOLVER.MAX_ITER = iterations
    cfg.TEST.EVAL_PERIOD = cfg.SOLVER.MAX_ITER
    cfg.SOLVER.CHECKPOINT_PERIOD = 100
    cfg.freeze()
    return cfg


def measure(cfg: CfgNode, results: dict[str, Any]) -> dict[str, float]:
    """AP of each class, 0 for those that the detector does not have, and their mean."""
    found = {name: results["bbox"].get(f"AP-{name}", 0.0) for name in CLASSES}
    found = {name: 0.0 if math.isnan(ap) else ap for name, ap in found.items()}
    return {"AP": sum(found.values()) / len(CLASSES), **found}


def compare(output: Path, seed: int, iterations: int | None = None) -> dict[str, dict[str, Any]]:
    """
    The two teachers and the student; what is there already is skipped.

    Args:
        output: a folder of this seed's own.
        seed: of data, weights and data order.
        iterations: of every run, instead of those of the configs.

    Returns:
        Results by name of the run.
    """
    data = output / f"data_seed{seed}"
    make_synthetic_coco(data, seed=seed)
    split(data)
    with runs.quiet(output / "log.txt"):
        return {
            name: runs.train(name, output, seed, config_of, measure, iterations)
            for name in (*HALVES, STUDENT)
        }


def main() -> None:
    """Parse the options, run, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="output/two_teachers", metavar="DIR")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    args = parser.parse_args()
    began = time.perf_counter()
    results = compare(Path(args.output), args.seed)
    rows = [[n, r["AP"], *(r[c] for c in CLASSES), r["iterations"]] for n, r in results.items()]
    print(tabulate(rows, ["run", "AP", *CLASSES, "iterations"], tablefmt="github", floatfmt=".1f"))
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
