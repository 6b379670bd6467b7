"""
What comparisons on synthetic data share, whatever is learnt: the runs, their trainer, its recipe.

A comparison has four runs: a teacher; the plain student; the distilled student, from the same
initial weights, data order and config file but for ``KD``; and the plain student again, trained for
the wall-clock of the distilled run. Controls are further distilled runs with some keys changed.
"""

import contextlib
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, get_default_optimizer_params
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter
from torch import nn
from tqdm import tqdm

from kd_det.config import add_kd_config
from kd_det.engine import TrainerMixin, build_evaluator
from kd_det.paths import CONFIGS

RUNS = ("teacher", "student", "student_equal_time", "distilled")
RANDOM_TEACHER = "random_teacher"
"""The control whose teacher knows nothing: it must not help."""

Controls = Mapping[str, Sequence[Any]]
"""By name of the run, what it changes in the distilled one: key, value, key, value, ..."""

ConfigOf = Callable[[str, Path, int, int | None], CfgNode]
"""From (name of the run, folder of the comparison, seed, iterations) to the run's config."""

Measure = Callable[[CfgNode, dict[str, Any]], dict[str, float]]
"""From a run's config and the results of its last evaluation to what the table shows of it."""


def compare(
    output: Path, seed: int, config_of: ConfigOf, measure: Measure, controls: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """
    All runs of one seed; the data are there and registered.

    Args:
        output: a folder of this seed's own.
        seed: of weights and data order.
        config_of: of each run.
        measure: what is said of each run.
        controls: names of further runs.

    Returns:
        The results by run, in the order of the table.
    """

    def result(name: str, iterations: int | None = None) -> dict[str, Any]:
        return train(name, output, seed, config_of, measure, iterations)

    results = {name: result(name) for name in ("teacher", "student", "distilled")}
    iterations = None
    if not (output / "student_equal_time" / "config.yaml").is_file():
        ratio = step_ratio(output, seed, config_of)
        iterations = round(results["distilled"]["iterations"] * ratio)
    results["student_equal_time"] = result("student_equal_time", iterations)
    results = {name: results[name] for name in RUNS}
    if RANDOM_TEACHER in controls:
        save_random_teacher(output, seed, config_of)
    return {**results, **{name: result(name) for name in controls}}


def run_config(
    files: str,
    name: str,
    output: Path,
    seed: int,
    iterations: int | None,
    controls: Controls,
) -> CfgNode:
    """
    The config of one run. Both students come from one file; ``KD.ENABLED`` makes the difference.

    Args:
        files: of kd_det's configs, with ``{}`` for ``teacher`` or ``distilled``.
        name: one of `RUNS`, or a control.
        output: folder of the comparison.
        seed: of weights and data order.
        iterations: replaces the length of the schedule.
        controls: those that the comparison has.
    """
    cfg = read_config(files.format("teacher" if name == "teacher" else "distilled"))
    if name != "teacher":
        weights = output / "teacher" / "model_final.pth"
        if name == RANDOM_TEACHER:
            weights = _random_teacher(output)
        cfg.merge_from_list(["KD.SOURCES.TEACHER.WEIGHTS", str(weights.absolute())])
        cfg.merge_from_list(list(controls.get(name, [])))
        cfg.KD.ENABLED = name == "distilled" or name in controls
    fit_config(cfg, output / name, seed, iterations)
    cfg.freeze()
    return cfg


def read_config(file: str) -> CfgNode:
    """One of kd_det's configs, by its path below ``configs``."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_file(str(CONFIGS / file))
    return cfg


def fit_config(cfg: CfgNode, folder: Path, seed: int, iterations: int | None) -> None:
    """
    What a run adds to its config: where it runs and writes, how long, and how often it evaluates.

    Args:
        cfg: is changed.
        folder: of the run.
        seed: of weights and data order.
        iterations: replaces the length of the schedule.
    """
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.OUTPUT_DIR = str(folder)
    cfg.SEED = seed
    if iterations is not None:
        cfg.SOLVER.MAX_ITER = iterations
    cfg.TEST.EVAL_PERIOD = -(-cfg.SOLVER.MAX_ITER // 4)
    cfg.SOLVER.CHECKPOINT_PERIOD = 100


def save_random_teacher(output: Path, seed: int, config_of: ConfigOf) -> None:
    """A checkpoint of the teacher's architecture, as it is before training."""
    path = _random_teacher(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    seed_all_rng(seed)
    model = build_model(config_of("teacher", output, seed, None))
    torch.save({"model": model.state_dict()}, path)


def _random_teacher(output: Path) -> Path:
    return output / RANDOM_TEACHER / "teacher.pth"


def train(
    name: str,
    output: Path,
    seed: int,
    config_of: ConfigOf,
    measure: Measure,
    iterations: int | None = None,
) -> dict[str, Any]:
    """
    Train and evaluate one run; read its result when it is there, continue it when it was cut off.

    Args:
        name: of the run.
        output: folder of the comparison.
        seed: of weights and data order.
        config_of: of the run.
        measure: what is said of it.
        iterations: replaces the length of the schedule.

    Returns:
        What is measured, and parameters, iterations, seconds, seconds_per_iteration. The seconds
        are those of training steps: with data loading, without evaluation.

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
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    result = {
        **measure(cfg, trainer._last_eval_results),
        "parameters": sum(p.numel() for p in _student_of(trainer.model).parameters()),
        "iterations": cfg.SOLVER.MAX_ITER,
        "seconds": trainer.clock.seconds,
        "seconds_per_iteration": trainer.clock.seconds / cfg.SOLVER.MAX_ITER,
    }
    result_file.with_suffix(".tmp").write_text(json.dumps(result, indent=2))
    os.replace(result_file.with_suffix(".tmp"), result_file)
    return result


def step_ratio(output: Path, seed: int, config_of: ConfigOf, pairs: int = 25) -> float:
    """
    What a distilled step costs in plain steps.

    Steps of both runs take turns, data loading and optimizer included, and medians are compared: on
    a shared machine the seconds of two runs that follow each other say little.
    """
    seconds: dict[str, list[float]] = {"student": [], "distilled": []}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name in seconds:
            cfg = config_of(name, output, seed, None)
            cfg.defrost()
            cfg.OUTPUT_DIR = folder
            trainers[name] = Trainer(cfg)
        with EventStorage(0):
            for _ in range(pairs):
                for name, trainer in trainers.items():
                    began = time.perf_counter()
                    trainer._trainer.run_step()
                    seconds[name].append(time.perf_counter() - began)
    return statistics.median(seconds["distilled"]) / statistics.median(seconds["student"])


def _student_of(model: nn.Module) -> nn.Module:
    """The detector that is evaluated: the model, or the student in a Distiller."""
    student = getattr(model, "student", model)
    assert isinstance(student, nn.Module)
    return student


class Trainer(TrainerMixin, DefaultTrainer):
    """DefaultTrainer with AdamW, a clock and a progress bar."""

    clock: "_Clock"

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW."""
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
        """Of the config."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See `kd_det.engine.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)

    def build_hooks(self) -> list[HookBase]:
        """Those of kd_det, a clock and a progress bar."""
        self.clock = _Clock()  # first: what the other hooks do after a step is not training
        return [self.clock, *super().build_hooks(), _Progress(Path(self.cfg.OUTPUT_DIR).name)]

    def build_writers(self) -> list[EventWriter]:
        """``metrics.json``."""
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
    """One line with loss, last AP or mIoU, and ETA."""

    def __init__(self, name: str) -> None:
        self.name = name

    def before_train(self) -> None:
        self._bar = tqdm(
            total=self.trainer.max_iter, initial=self.trainer.start_iter, desc=f"{self.name:18s}"
        )

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        shown = {"loss": f"{latest['total_loss'][0]:.3f}"} if "total_loss" in latest else {}
        for key in ("bbox/AP", "sem_seg/mIoU"):
            if key in latest:
                shown[key.split("/")[1]] = f"{latest[key][0]:.1f}"
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
