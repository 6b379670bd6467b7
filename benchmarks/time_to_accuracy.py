"""
How much of the plain student's training time the distilled student needs to be as good.

On the quickstart's synthetic dataset and configs: the time of training steps, teacher included and
evaluation not, from which on the distilled student's AP is at least the plain student's final AP,
over the time of the plain run. Times are iterations times the ratio of the two steps, which take
turns: the clocks of two runs that follow each other are given too, and say less.
"""

import dataclasses
import math
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from benchmarks.command import Options, main
from benchmarks.report import Report, Table, has_bfloat16
from benchmarks.scaling import student_t
from benchmarks.turns import Samples, ratios, spread, take_turns
from kd_det import Teacher
from kd_det.context import Context, with_images_on
from kd_det.data.synthetic import make_synthetic_coco
from kd_det.engine import build_evaluator
from kd_det.tools import quickstart, runs

HEAD = ("features", "cls_logits", "box_deltas")


class Plan(NamedTuple):
    """
    Attributes:
        seeds: of data, weights and order.
        teacher: iterations of its training.
        students: iterations of both students'.
        evaluations: of the distilled student, evenly spaced.
        budgets: parts of the plain run's time, in each of which one more distilled student is
            trained from beginning to end.
        images: training and validation images.
        step_pairs: steps of both students that take turns.
    """

    seeds: tuple[int, ...] = (1, 2, 3)
    teacher: int = 3000
    students: int = 1000
    evaluations: int = 20
    budgets: tuple[float, ...] = (0.5, 0.8)
    images: tuple[int, int] = (3000, 200)
    step_pairs: int = 25


PLANS = {
    "full": Plan(),
    "short": Plan(
        seeds=(1,), teacher=200, students=120, evaluations=4, budgets=(0.5,), images=(500, 50)
    ),
}


@dataclasses.dataclass
class Run:
    """One training: AP in percent and seconds of training steps at every evaluation."""

    iterations: int
    seconds: float
    curve: list[tuple[int, float, float]]  # iteration, seconds, AP

    @property
    def ap(self) -> float:
        """At the end."""
        return self.curve[-1][2]


def run(options: Options, plan: Plan | None = None) -> Report:
    """Measure every seed."""
    kind = "short" if options.short else "full"
    plan = plan or PLANS[kind]
    found = {}
    for seed in plan.seeds:
        folder = options.output / "time_to_accuracy" / f"{kind}_{plan.teacher}_seed_{seed}"
        found[seed] = _seed(plan, seed, folder, options)
    report = Report(samples={str(seed): each for seed, each in found.items()})
    report.tables = [_table(plan, found), _precisions(found)]
    report.notes = _conclusions(plan, found)
    if plan.teacher < Plan().teacher:
        report.notes.append("Teacher and students are far from trained: this shows that it runs.")
    return report


def _seed(plan: Plan, seed: int, folder: Path, options: Options) -> dict[str, Any]:
    data = folder / f"data_seed{seed}"
    train, val = plan.images
    make_synthetic_coco(data, seed=seed, num_train=train, num_val=val)
    quickstart.register(data)
    with runs.quiet(folder / "log.txt"):
        teacher = quickstart.train("teacher", folder, seed, plan.teacher)  # kept between runs
        steps = _steps(plan, folder, seed, options)
        cost = spread(ratios(steps, "distilled", "student")).median
        plain = train_run("student", plan.students, 1, folder, seed, options)
        distilled = train_run("distilled", plan.students, plan.evaluations, folder, seed, options)
        within = {}
        for budget in plan.budgets:
            iterations = max(round(plan.students * budget / cost), 1)
            within[budget] = train_run("distilled", iterations, 1, folder, seed, options).ap
        precisions = ["float32"] + ["bfloat16"] * has_bfloat16(options.device)
        aps = {p: teacher_ap(p, folder, seed, options) for p in precisions}
    reached = reach(distilled.curve, plain.ap)
    return {
        "teacher": teacher,
        "teacher_ap_by_precision": aps,
        "step_seconds": steps,
        "step_ratio": cost,
        "plain": dataclasses.asdict(plain),
        "distilled": dataclasses.asdict(distilled),
        "ap_within_budget": within,
        "reached_at": None if reached is None else reached[0],
        "ratio": None if reached is None else reached[0] / plain.iterations * cost,
        "ratio_by_clock": None if reached is None else reached[1] / plain.seconds,
    }


def reach(curve: Sequence[tuple[int, float, float]], target: float) -> tuple[int, float] | None:
    """Iteration and seconds from which on no evaluation is below ``target``; ``None`` for never."""
    found = None
    for iteration, seconds, ap in reversed(curve):
        if ap < target:
            break
        found = iteration, seconds
    return found


def train_run(
    name: str, iterations: int, evaluations: int, folder: Path, seed: int, options: Options
) -> Run:
    """Train one of the quickstart's students, always anew."""
    cfg = _config(name, folder, seed, options, iterations)
    cfg.OUTPUT_DIR = str(folder / f"{name}_{iterations}")
    cfg.TEST.EVAL_PERIOD = -(-iterations // evaluations)
    cfg.SOLVER.CHECKPOINT_PERIOD = iterations
    shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True)
    seed_all_rng(seed)
    trainer = runs.Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    clock = {int(i) + 1: s for s, i in trainer.storage.history("train_seconds").values()}
    curve = []
    for ap, i in trainer.storage.history("bbox/AP").values():
        done = min(int(i) + 1, iterations)  # the last evaluation comes after the last iteration
        # Where nothing is detected, COCOEvaluator says NaN.
        curve.append((done, clock[done], 0.0 if math.isnan(ap) else ap))
    return Run(iterations, trainer.clock.seconds, curve)


def _steps(plan: Plan, folder: Path, seed: int, options: Options) -> Samples:
    """Seconds of steps of both students, data loading included."""
    with tempfile.TemporaryDirectory() as scratch, EventStorage(0):
        steps = {}
        for name in ("student", "distilled"):
            cfg = _config(name, folder, seed, options)
            cfg.OUTPUT_DIR = scratch
            steps[name] = runs.Trainer(cfg)._trainer.run_step
        return take_turns(steps, plan.step_pairs, options.device, warmup=2)


def _config(
    name: str, folder: Path, seed: int, options: Options, iterations: int | None = None
) -> CfgNode:
    cfg = quickstart.config_of(name, folder, seed, iterations)
    cfg.defrost()
    cfg.MODEL.DEVICE = str(options.device)
    cfg.KD.EVAL_TEACHER = False
    return cfg


class Decoded(nn.Module):
    """A `Teacher`'s maps, as fast as a distilled step makes them, decoded to detections."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.model: Any = teacher.detector()
        teacher.shapes(HEAD)
        teacher.prepare(HEAD)

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detectron2's predictions."""
        inputs = with_images_on(self.model.device, inputs)
        context = Context(inputs, self.teacher.input_format, self.model)
        maps = self.teacher(context, HEAD).maps
        features, *predictions = ([x.float() for x in maps[tap].values()] for tap in HEAD)
        images = self.model.preprocess_image(inputs)
        results = self.model.forward_inference(images, features, predictions)
        sizes = [(x.get("height", h), x.get("width", w)) for x, (h, w) in _sized(inputs)]
        return [
            {"instances": detector_postprocess(r, *size)}
            for r, size in zip(results, sizes, strict=True)
        ]


def _sized(inputs: list[dict[str, Any]]) -> list[tuple[dict[str, Any], tuple[int, int]]]:
    return [(x, (x["image"].shape[-2], x["image"].shape[-1])) for x in inputs]


@torch.no_grad()
def teacher_ap(precision: str, folder: Path, seed: int, options: Options) -> float:
    """AP of the teacher as a distilled step runs it: folded, and in this precision."""
    cfg = _config("student", folder, seed, options)
    weights = str(folder / "teacher" / "model_final.pth")
    teacher = Teacher(config_file="quickstart/teacher.yaml", weights=weights, precision=precision)
    model = Decoded(teacher.to(options.device)).eval()
    dataset = cfg.DATASETS.TEST[0]
    evaluator = build_evaluator(cfg, dataset, str(folder / f"teacher_{precision}"))
    ap = inference_on_dataset(model, build_detection_test_loader(cfg, dataset), evaluator)
    return 0.0 if math.isnan(ap["bbox"]["AP"]) else float(ap["bbox"]["AP"])


def _table(plan: Plan, found: dict[int, dict[str, Any]]) -> Table:
    headers = ["seed", "teacher AP", "plain AP", "distilled AP", "as good from", "step ratio"]
    headers += ["time ratio", "by clock"]
    headers += [f"AP of a run of {budget:g} of the time" for budget in plan.budgets]
    rows = []
    for seed, each in found.items():
        plain, distilled = each["plain"], each["distilled"]
        at = each["reached_at"]
        row = [str(seed), f"{each['teacher']['AP']:.1f}", f"{plain['curve'][-1][2]:.1f}"]
        row += [f"{distilled['curve'][-1][2]:.1f}", "never" if at is None else f"{at:,}"]
        row += [f"{each['step_ratio']:.2f}"]
        row += ["" if x is None else f"{x:.2f}" for x in (each["ratio"], each["ratio_by_clock"])]
        rows.append(row + [f"{ap:.1f}" for ap in each["ap_within_budget"].values()])
    return Table(f"Time to the plain student's AP after {plan.students:,} steps", headers, rows)


def _precisions(found: dict[int, dict[str, Any]]) -> Table:
    precisions = list(next(iter(found.values()))["teacher_ap_by_precision"])
    rows = [
        [str(seed), *(f"{each['teacher_ap_by_precision'][p]:.2f}" for p in precisions)]
        for seed, each in found.items()
    ]
    return Table("AP of the teacher as it is run in a distilled step", ["seed", *precisions], rows)


def _conclusions(plan: Plan, found: dict[int, dict[str, Any]]) -> list[str]:
    values = [each["ratio"] for each in found.values() if each["ratio"] is not None]
    if len(values) < len(found):
        return [f"{len(found) - len(values)} of {len(found)} seeds never got there: no mean."]
    mean = statistics.mean(values)
    if len(values) == 1:
        return [f"Time ratio {mean:.2f}, of one seed."]
    n = len(values)
    half = student_t(n - 1) * statistics.stdev(values) / n**0.5
    return [f"Mean time ratio {mean:.2f} ± {half:.2f} (95 %, Student's t over {n} seeds)."]


if __name__ == "__main__":
    main("time_to_accuracy", run, __doc__)
