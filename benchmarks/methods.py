"""
Every method beside every other: ``make compare-methods``, on the quickstart's synthetic data.

One student, one schedule and one set of seeds for all. Each method runs twice: at the weight of its
config under ``configs/KD``, as published, and at the weight with which its gradient on the shared
features would have been as strong as the task's (the median over its first run, on the first
seed). Controls: the plain student; the plain student for the wall-clock of the dearest method; the
student that inherits the teacher's head and FPN outputs, as all of them do, without any method; and
CWD from a teacher that was never trained. What is there already is skipped, what was interrupted
continues.
"""

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from benchmarks import comparison
from benchmarks.comparison import Task, folder_of, median, once
from benchmarks.methods_report import (
    BALANCED,
    EQUAL_TIME,
    INHERITED,
    PLAIN,
    TEACHER,
    Found,
    draw,
    report,
    write_csv,
)
from benchmarks.turns import Samples, ratios, spread
from kd_det.paths import CONFIGS
from kd_det.tools import quickstart, runs

_OTHERS = ("cwd_R_101", "teacher_R_101")  # two terms, and none
METHODS = {
    "cwd": "cwd_R_101_features",
    "cwd_logits": "cwd_R_101_logits",
    **{
        path.stem.removesuffix("_R_101"): path.stem
        for path in sorted((CONFIGS / "KD").glob("*_R_101.yaml"))
        if path.stem not in _OTHERS
    },
}
"""By name of the run, its file under ``configs/KD``, of one term. A new file is a new method."""


@dataclass(frozen=True)
class Plan:
    """
    What is compared.

    Attributes:
        seeds: of data, weights and data order.
        methods: of `METHODS`.
        teacher: iterations of the teacher.
        students: iterations of every student.
        images: for training and for evaluation.
        ratio: KD gradient : task gradient on the shared features in the balanced runs.
        turns: of steps by which costs are measured.
    """

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    methods: tuple[str, ...] = tuple(METHODS)
    teacher: int = 3000
    students: int = 500
    images: tuple[int, int] = (3000, 200)
    ratio: float = 1.0
    turns: int = 15


FULL = Plan()
SHORT = Plan(seeds=(1,), teacher=1000, students=250)


def compare(plan: Plan, output: Path, jobs: int = 1) -> Found:
    """
    Run what is missing.

    Args:
        plan: what is compared.
        output: its folder: one folder per seed, and in that one per run.
        jobs: how many runs at a time, each in a process of its own with its share of the cores.

    Raises:
        ValueError: if the folder holds another plan's runs.
    """
    comparison.remember(plan, output)
    comparison.make_data(output, plan.seeds, plan.images)
    first = folder_of(output, plan.seeds[0])
    results: dict[int, dict[str, Any]] = {seed: {} for seed in plan.seeds}

    def do(names: Iterable[str], iterations: int = plan.students) -> None:
        tasks = [Task(name, seed, iterations) for name in names for seed in plan.seeds]
        for task, result in comparison.do(tasks, output, jobs, work):
            results[task.seed][task.name] = result

    do([TEACHER], plan.teacher)
    steps = once(output / "steps.json", lambda: step_seconds(plan, first))
    do([PLAIN, INHERITED, runs.RANDOM_TEACHER, *plan.methods])
    dearest = max(spread(ratios(steps, name, PLAIN)).median for name in plan.methods)
    do([EQUAL_TIME], round(plan.students * max(dearest, 1.0)))
    once(
        output / "factors.json",
        lambda: {name: _factor(plan, gradient_ratio(first / name)) for name in plan.methods},
    )
    do(name + BALANCED for name in plan.methods)
    folders = [folder_of(output, seed) for seed in plan.seeds]
    return Found(
        results,
        plan.methods,
        {m: [weight_of(run, first) for run in (m, m + BALANCED)] for m in plan.methods},
        {
            m: [median(gradient_ratio(f / run) for f in folders) for run in (m, m + BALANCED)]
            for m in plan.methods
        },
        steps,
        plan.ratio,
    )


def weight_of(run: str, folder: Path) -> float:
    """Of its term."""
    return float(_term(config_of(run, folder, 0)).WEIGHT)


def config_of(name: str, output: Path, seed: int, iterations: int | None = None) -> CfgNode:
    """
    The config of one run, see `kd_det.tools.runs.run_config`: the quickstart's distilled student
    with the method's term in the place of its own.

    Args:
        name: of the run.
        output: folder of the seed.
        seed: of weights and data order.
        iterations: length of the schedule.
    """
    cfg = runs.run_config("quickstart/{}.yaml", name, output, seed, iterations, {name: ()})
    cfg.defrost()
    cfg.TEST.EVAL_PERIOD = 0  # at the end
    cfg.KD.EVAL_TEACHER = False
    cfg.KD.ENABLED = name not in (TEACHER, PLAIN, EQUAL_TIME)
    cfg.KD.TERMS.clear()
    method = "cwd" if name == runs.RANDOM_TEACHER else name.removesuffix(BALANCED)
    if method in METHODS:
        found = CfgNode.load_yaml_with_base(str(CONFIGS / f"KD/{METHODS[method]}.yaml"))
        cfg.merge_from_other_cfg(CfgNode({"KD": {"TERMS": found["KD"]["TERMS"]}}))
        term = _term(cfg)
        _adapt(term, cfg)
        if name.endswith(BALANCED):
            term.WEIGHT *= json.loads((output.parent / "factors.json").read_text())[method]
    cfg.freeze()
    return cfg


def _term(cfg: CfgNode) -> CfgNode:
    (term,) = (x for x in cfg.KD.TERMS.values() if x.ENABLED)
    return term


def _adapt(term: CfgNode, cfg: CfgNode) -> None:
    """What a term says of COCO and a RetinaNet of full size, said of this one."""
    if term.get("LEVELS"):
        term.LEVELS = [x for x in term.LEVELS if x in cfg.MODEL.RETINANET.IN_FEATURES]
    if "START_ITER" in term.SCHEDULE:
        term.SCHEDULE.START_ITER = min(term.SCHEDULE.START_ITER, cfg.SOLVER.MAX_ITER // 10)


def gradient_ratio(folder: Path) -> float:
    """Of its only term, see `benchmarks.comparison.gradient_ratios`; NaN where it has none."""
    return median(comparison.gradient_ratios(folder).values())


def _factor(plan: Plan, pull: float) -> float:
    """On the published weight; 1 where nothing pulled that could be balanced."""
    return plan.ratio / pull if pull > 0 else 1.0


def step_seconds(plan: Plan, folder: Path) -> Samples:
    """See `benchmarks.comparison.costs`."""
    seed = plan.seeds[0]
    quickstart.register(comparison.data_of(folder.parent, seed))
    configs = {name: config_of(name, folder, seed) for name in (PLAIN, *plan.methods)}
    with runs.quiet(folder / "logs" / "steps.txt"):
        return comparison.costs(configs, plan.turns).seconds


def work(task: Task, output: Path) -> dict[str, Any]:
    """See `benchmarks.comparison.train`."""
    folder = folder_of(output, task.seed)
    if task.name == runs.RANDOM_TEACHER and not (folder / task.name / "result.json").is_file():
        with runs.quiet(folder / "logs" / f"{task.name}.txt"):
            runs.save_random_teacher(folder, task.seed, config_of)
    return comparison.train(task, output, config_of)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help=f"seeds {FULL.seeds}, {FULL.students} iterations: an hour and more. Without it seed 1 "
        f"and {SHORT.students} iterations, some 15 minutes: no ranking",
    )
    comparison.add_options(parser, METHODS)
    parser.add_argument(
        "--output", metavar="DIR", help="default: output/methods, or output/methods_full"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compare, print the tables and write them, a CSV of all runs, and the chart."""
    args = parse(argv)
    if args.jobs < 1:
        raise SystemExit(f"A comparison needs --jobs >= 1, but got {args.jobs}.")
    plan = FULL if args.full else SHORT
    plan = replace(
        plan, seeds=tuple(args.seeds or plan.seeds), methods=tuple(args.methods or plan.methods)
    )
    output = Path(args.output or ("output/methods_full" if args.full else "output/methods"))
    began = time.perf_counter()
    found = compare(plan, output, args.jobs)
    made = report(found)
    print(f"\n{made.text()}\n\n{time.perf_counter() - began:.0f} s, {output}/")
    write_csv(output / "summary.csv", found)
    words = ["--full"] * args.full
    comparison.finish("methods", words, args, output, made, lambda path: draw(path, found))


if __name__ == "__main__":
    main()
