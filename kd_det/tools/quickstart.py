"""
``python -m kd_det quickstart``: the main job on synthetic data, from nothing to a table.

Four runs of one recipe (AdamW, warm-up, cosine): a teacher; the plain student; the distilled
student, from the same initial weights, data order and config file but for ``KD``; and the plain
student again, trained for the wall-clock of the distilled run, because distilling costs time that
the plain student could have trained.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, get_default_optimizer_params
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from tqdm import tqdm

from kd_det.config import add_kd_config
from kd_det.data.coco import register_coco
from kd_det.data.synthetic import make_synthetic_coco
from kd_det.engine import TrainerMixin, build_evaluator
from kd_det.paths import CONFIGS
from kd_det.tools.report import table, write_means, write_report

DATASET = "kd_det_synthetic"
RUNS = ("teacher", "student", "student_equal_time", "distilled")
CONTROLS = {
    # The head start alone: the teacher's head and FPN outputs, and no term.
    "inherited": ["KD.TERMS.FPN.WEIGHT", 0, "KD.TERMS.LOGITS.WEIGHT", 0],
    # A teacher that knows nothing must not help.
    "random_teacher": [],
}


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "quickstart",
        help="train a teacher, a plain and a distilled student on synthetic data, and compare",
        description="Generates a synthetic dataset, trains a teacher, the plain student and the "
        "distilled student on it, evaluates each, and writes summary.json, .csv and .png. What is "
        "there already is skipped, what was interrupted continues.",
    )
    parser.add_argument("--output", default="output/quickstart", metavar="DIR")
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
        help="also: inheritance without distillation, and a teacher with random weights",
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
    output = Path(args.output)
    if len(args.seeds) == 1:
        results = run_seed(output, args.seeds[0], args.controls)
    else:
        by_seed = {
            seed: run_seed(output / f"seed_{seed}", seed, args.controls) for seed in args.seeds
        }
        results = write_means(output, by_seed)
    print(table(results))
    print(f"\n{time.perf_counter() - began:.0f} s in all. Tables, curves, pictures: {output}/")
    if args.check:
        check(results)


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
    make_synthetic_coco(output / f"data_seed{seed}", seed=seed)
    register(output / f"data_seed{seed}")
    with quiet(output / "log.txt"):
        results = {name: train(name, output, seed) for name in ("teacher", "student", "distilled")}
        iterations = None
        if not (output / "student_equal_time" / "config.yaml").is_file():
            iterations = round(results["distilled"]["iterations"] * step_ratio(output, seed))
        results["student_equal_time"] = train("student_equal_time", output, seed, iterations)
        results = {name: results[name] for name in RUNS}
        if controls:
            save_random_teacher(output, seed)
            results.update({name: train(name, output, seed) for name in CONTROLS})
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


def step_ratio(output: Path, seed: int, pairs: int = 25) -> float:
    """
    What a distilled step costs in plain steps.

    Steps of both runs take turns, data loading and optimizer included, and medians are compared: on
    a shared machine the seconds of two runs that follow each other say little.
    """
    seconds: dict[str, list[float]] = {"student": [], "distilled": []}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name in seconds:
            cfg = config_of(name, output, seed)
            cfg.defrost()
            cfg.OUTPUT_DIR = folder
            trainers[name] = _Trainer(cfg)
        with EventStorage(0):
            for _ in range(pairs):
                for name, trainer in trainers.items():
                    began = time.perf_counter()
                    trainer._trainer.run_step()
                    seconds[name].append(time.perf_counter() - began)
    return statistics.median(seconds["distilled"]) / statistics.median(seconds["student"])


def save_random_teacher(output: Path, seed: int) -> None:
    """A checkpoint of the teacher's architecture, as it is before training."""
    path = output / "random_teacher" / "teacher.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    seed_all_rng(seed)
    torch.save({"model": build_model(config_of("teacher", output, seed)).state_dict()}, path)


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
    """
    The config of one run. Both students come from one file; ``KD.ENABLED`` makes the difference.

    Args:
        name: one of `RUNS` or `CONTROLS`.
        output: folder of the quickstart.
        seed: of weights and data order.
        iterations: replaces the length of the schedule.
    """
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_file(
        str(CONFIGS / "quickstart" / ("teacher.yaml" if name == "teacher" else "distilled.yaml"))
    )
    if name != "teacher":
        weights = output / "teacher" / "model_final.pth"
        if name == "random_teacher":
            weights = output / "random_teacher" / "teacher.pth"
        cfg.merge_from_list(["KD.SOURCES.TEACHER.WEIGHTS", str(weights.absolute())])
        cfg.merge_from_list(CONTROLS.get(name, []))
        cfg.KD.ENABLED = name == "distilled" or name in CONTROLS
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.OUTPUT_DIR = str(output / name)
    cfg.SEED = seed
    if iterations is not None:
        cfg.SOLVER.MAX_ITER = iterations
    cfg.TEST.EVAL_PERIOD = -(-cfg.SOLVER.MAX_ITER // 4)
    cfg.SOLVER.CHECKPOINT_PERIOD = 100
    cfg.freeze()
    return cfg


def train(name: str, output: Path, seed: int, iterations: int | None = None) -> dict[str, Any]:
    """
    Train and evaluate one run; read its result when it is there, continue it when it was cut off.

    Returns:
        AP, AP50, AP75, AR, parameters, iterations, seconds, seconds_per_iteration. The seconds are
        those of training steps: with data loading, without evaluation.

    Raises:
        ValueError: if the folder holds a run of another seed.
    """
    folder = output / name
    result_file, seed_file = folder / "result.json", folder / "seed"
    if seed_file.is_file() and int(seed_file.read_text()) != seed:
        raise ValueError(
            f"{folder} holds a run of seed {seed_file.read_text()}, but seed {seed} was asked for: "
            "choose another --output, or delete the folder."
        )
    if result_file.is_file():
        return json.loads(result_file.read_text())
    if (folder / "config.yaml").is_file():  # an interrupted run keeps the length it began with
        begun = CfgNode.load_yaml_with_base(str(folder / "config.yaml"))
        iterations = begun["SOLVER"]["MAX_ITER"]
    cfg = config_of(name, output, seed, iterations)
    folder.mkdir(parents=True, exist_ok=True)
    seed_file.write_text(str(seed))
    (folder / "config.yaml").write_text(cfg.dump())

    seed_all_rng(seed)
    trainer = _Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    found = trainer._last_eval_results["bbox"]
    result = {
        # COCOEvaluator calls it NaN where nothing at all was detected.
        **{key: 0.0 if math.isnan(found[key]) else found[key] for key in ("AP", "AP50", "AP75")},
        "AR": average_recall(cfg),
        "parameters": sum(p.numel() for p in student_of(trainer.model).parameters()),
        "iterations": cfg.SOLVER.MAX_ITER,
        "seconds": trainer.clock.seconds,
        "seconds_per_iteration": trainer.clock.seconds / cfg.SOLVER.MAX_ITER,
    }
    result_file.with_suffix(".tmp").write_text(json.dumps(result, indent=2))
    os.replace(result_file.with_suffix(".tmp"), result_file)
    return result


def student_of(model: nn.Module) -> nn.Module:
    """The detector that is evaluated: the model, or the student in a Distiller."""
    student = getattr(model, "student", model)
    assert isinstance(student, nn.Module)
    return student


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


class _Trainer(TrainerMixin, DefaultTrainer):
    """DefaultTrainer with AdamW, a clock and a progress bar."""

    clock: "_Clock"

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        solver = cfg.SOLVER
        parameters = get_default_optimizer_params(
            model, base_lr=solver.BASE_LR, weight_decay_norm=solver.WEIGHT_DECAY_NORM
        )
        # Fused: 190 small tensors, of which each would be a handful of kernels on its own.
        return _ClippedAdamW(
            parameters, solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, fused=True
        )

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    def build_hooks(self) -> list[HookBase]:
        self.clock = _Clock()  # first: what the other hooks do after a step is not training
        return [self.clock, *super().build_hooks(), _Progress(Path(self.cfg.OUTPUT_DIR).name)]

    def build_writers(self) -> list[EventWriter]:
        return [JSONWriter(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"))]


class _ClippedAdamW(torch.optim.AdamW):
    """AdamW behind a bound on the gradient's norm over the whole model."""

    max_norm = 1.0

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        return super().step(closure)


class _Clock(HookBase):
    """Seconds spent in training steps, over all the processes that a run was cut into."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def before_step(self) -> None:
        self._began = time.perf_counter()

    def after_step(self) -> None:
        self.seconds += time.perf_counter() - self._began
        self.trainer.storage.put_scalar("train_seconds", self.seconds, smoothing_hint=False)

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds = state["seconds"]


class _Progress(HookBase):
    """One line with loss, last AP and ETA."""

    def __init__(self, name: str) -> None:
        self.name = name

    def before_train(self) -> None:
        self._bar = tqdm(
            total=self.trainer.max_iter, initial=self.trainer.start_iter, desc=f"{self.name:18s}"
        )

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        shown = {"loss": f"{latest['total_loss'][0]:.3f}"} if "total_loss" in latest else {}
        if "bbox/AP" in latest:
            shown["AP"] = f"{latest['bbox/AP'][0]:.1f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        self._bar.close()


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send Detectron2's log and pycocotools' prints to a file; progress stays on the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("[%(asctime)s %(name)s] %(levelname)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "kd_det")]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        with open(log, "a") as f, contextlib.redirect_stdout(f), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
