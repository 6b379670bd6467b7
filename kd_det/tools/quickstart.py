"""
``python -m kd_det quickstart``: the main job on synthetic data, from nothing to a table.

Four runs of one recipe, see `kd_det.tools.runs`: a teacher, the plain and the distilled student,
and the plain student for the wall-clock of the distilled run, because distilling costs time that
the plain student could have trained.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_det.data.coco import register_coco
from kd_det.data.synthetic import make_synthetic_coco
from kd_det.tools import runs, semantic
from kd_det.tools.report import table, write_means, write_report
from kd_det.tools.runs import RANDOM_TEACHER

DATASET = "kd_det_synthetic"
CONTROLS = {
    # The head start alone: the teacher's head and FPN outputs, and no term.
    "inherited": ["KD.TERMS.FPN.WEIGHT", 0, "KD.TERMS.LOGITS.WEIGHT", 0],
    RANDOM_TEACHER: [],
}
MIXED_CONTROLS = {**CONTROLS, "inherited": ["KD.TERMS.FPN.WEIGHT", 0]}


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "quickstart",
        help="train a teacher, a plain and a distilled student on synthetic data, and compare",
        description="Generates a synthetic dataset, trains a teacher, the plain student and the "
        "distilled student on it, evaluates each, and writes summary.json, .csv and .png. What is "
        "there already is skipped, what was interrupted continues.",
    )
    parser.add_argument(
        "--task",
        choices=("detection", "mixed", "semantic"),
        default="detection",
        help="boxes with a RetinaNet; the same, taught by a Faster R-CNN (docs/mixed_pairs.md); or "
        "class maps with a SemanticSegmentor (docs/semantic.md)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="default: output/quickstart, or output/<task>"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="of data, weights and order; several: a folder each and a table of means (default 1)",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="also: a teacher with random weights, and inheritance without distillation where the "
        "distilled student inherits",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail unless the teacher reaches 50 AP and the distilled student beats the plain one "
        "by 5 AP at equal iterations and by 3 AP at equal wall-clock",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run what is missing and print the table."""
    began = time.perf_counter()
    if args.check and args.task != "detection":
        raise ValueError(f"--check is of the detection task: of {args.task} nothing is promised.")
    if args.task == "semantic":
        of_seed, score, folder = semantic.run_seed, semantic.SCORE, "semantic"
    elif args.task == "mixed":
        of_seed, score, folder = partial(run_seed, of_run=mixed_config_of), "AP", "mixed"
    else:
        of_seed, score, folder = run_seed, "AP", "quickstart"
    output = Path(args.output or f"output/{folder}")
    if len(args.seeds) == 1:
        results = of_seed(output, args.seeds[0], args.controls)
    else:
        by_seed = {
            seed: of_seed(output / f"seed_{seed}", seed, args.controls) for seed in args.seeds
        }
        results = write_means(output, by_seed, score)
    print(table(results))
    print(f"\n{time.perf_counter() - began:.0f} s in all. Tables, curves, pictures: {output}/")
    if args.check:
        check(results)


def run_seed(
    output: Path, seed: int, controls: bool = False, of_run: runs.ConfigOf | None = None
) -> dict[str, dict[str, Any]]:
    """
    All runs of one seed, and their report.

    Args:
        output: a folder of this seed's own.
        seed: of data, weights and data order.
        controls: also run `CONTROLS`.
        of_run: the config of each run; `config_of` by default.

    Returns:
        The results by run, in the order of the table.
    """
    make_synthetic_coco(output / f"data_seed{seed}", seed=seed)
    register(output / f"data_seed{seed}")
    with runs.quiet(output / "log.txt"):
        names = tuple(CONTROLS) if controls else ()
        results = runs.compare(output, seed, of_run or config_of, measure, names)
    write_report(output, results)
    return results


def register(data: Path) -> None:
    """Register the dataset in a folder; another one of this process, a seed's say, makes room."""
    for split in ("train", "val"):
        name = f"{DATASET}_{split}"
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        annotations = data / "annotations" / f"instances_{split}.json"
        register_coco(name, str(annotations), str(data / split))


def check(results: dict[str, dict[str, Any]]) -> None:
    """
    Hold a quickstart to its promise.

    Raises:
        ValueError: if the teacher is weak or the distilled student does not win clearly.
    """
    ap = {name: result["AP"] for name, result in results.items()}
    gain, gain_in_time = (ap["distilled"] - ap[n] for n in ("student", "student_equal_time"))
    if ap["teacher"] < 50 or gain < 5 or gain_in_time < 3:
        raise ValueError(
            "Expected a teacher of >= 50 AP and gains of >= 5 AP at equal iterations and >= 3 AP "
            f"at equal wall-clock, but got {ap['teacher']:.1f}, {gain:.1f} and {gain_in_time:.1f}."
        )


def config_of(name: str, output: Path, seed: int, iterations: int | None = None) -> CfgNode:
    """See `kd_det.tools.runs.run_config`."""
    return runs.run_config("quickstart/{}.yaml", name, output, seed, iterations, CONTROLS)


def mixed_config_of(name: str, output: Path, seed: int, iterations: int | None = None) -> CfgNode:
    """`config_of` where the teacher is a Faster R-CNN."""
    files = "quickstart/mixed_{}.yaml"
    return runs.run_config(files, name, output, seed, iterations, MIXED_CONTROLS)


def train(name: str, output: Path, seed: int, iterations: int | None = None) -> dict[str, Any]:
    """See `kd_det.tools.runs.train`."""
    return runs.train(name, output, seed, config_of, measure, iterations)


def measure(cfg: CfgNode, results: dict[str, Any]) -> dict[str, float]:
    """AP, AP50, AP75 of COCOEvaluator, which says NaN where nothing is detected, and AR."""
    found = {key: results["bbox"][key] for key in ("AP", "AP50", "AP75")}
    found = {key: 0.0 if math.isnan(value) else value for key, value in found.items()}
    return {**found, "AR": average_recall(cfg)}


def average_recall(cfg: CfgNode) -> float:
    """AR at 100 detections per image in percent, from the predictions that COCOEvaluator wrote."""
    truth = COCO(MetadataCatalog.get(cfg.DATASETS.TEST[0]).json_file)
    predictions = Path(cfg.OUTPUT_DIR) / "inference" / "coco_instances_results.json"
    if not json.loads(predictions.read_text()):
        return 0.0
    evaluation = COCOeval(truth, truth.loadRes(str(predictions)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * float(evaluation.stats[8])
