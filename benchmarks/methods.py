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
import contextlib
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

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
from benchmarks.report import machine, write_docs, write_json
from benchmarks.turns import ratios, spread, take_turns
from kd_det.data.synthetic import make_synthetic_coco
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


@dataclass(frozen=True)
class Task:
    """One run; ``iterations`` are those of its schedule."""

    name: str
    seed: int
    iterations: int


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
    _remember(plan, output)
    for seed in plan.seeds:
        train, val = plan.images
        make_synthetic_coco(_data(output, seed), seed=seed, num_train=train, num_val=val)
    first = _folder(output, plan.seeds[0])
    results: dict[int, dict[str, Any]] = {seed: {} for seed in plan.seeds}

    def do(names: Iterable[str], iterations: int = plan.students) -> None:
        tasks = [Task(name, seed, iterations) for name in names for seed in plan.seeds]
        for task, result in _do(tasks, output, jobs):
            results[task.seed][task.name] = result

    do([TEACHER], plan.teacher)
    steps = _once(output / "steps.json", lambda: step_seconds(plan, first))
    do([PLAIN, INHERITED, runs.RANDOM_TEACHER, *plan.methods])
    dearest = max(spread(ratios(steps, name, PLAIN)).median for name in plan.methods)
    do([EQUAL_TIME], round(plan.students * max(dearest, 1.0)))
    _once(
        output / "factors.json",
        lambda: {name: _factor(plan, gradient_ratio(first / name)) for name in plan.methods},
    )
    do(name + BALANCED for name in plan.methods)
    folders = [_folder(output, seed) for seed in plan.seeds]
    return Found(
        results,
        plan.methods,
        {m: [weight_of(run, first) for run in (m, m + BALANCED)] for m in plan.methods},
        {
            m: [_median(gradient_ratio(f / run) for f in folders) for run in (m, m + BALANCED)]
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
    """
    Median over a run of its term's gradient over the task's, both on the shared features; NaN where
    it was never measured, as of a run that diverged at once.
    """
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    found = [v for row in rows for k, v in row.items() if k.endswith("/grad_ratio")]
    return _median(found)


def _median(values: Iterable[float]) -> float:
    """Of those that are numbers; NaN where none is."""
    known = [x for x in values if not math.isnan(x)]
    return statistics.median(known) if known else math.nan


def _factor(plan: Plan, pull: float) -> float:
    """On the published weight; 1 where nothing pulled that could be balanced."""
    return plan.ratio / pull if pull > 0 else 1.0


def step_seconds(plan: Plan, folder: Path) -> dict[str, list[float]]:
    """Seconds of whole training steps, data loading and update included, taking turns."""
    seed = plan.seeds[0]
    quickstart.register(_data(folder.parent, seed))
    steps = {}
    with (
        runs.quiet(folder / "logs" / "steps.txt"),
        tempfile.TemporaryDirectory() as scratch,
        EventStorage(0),
    ):
        for name in (PLAIN, *plan.methods):
            cfg = config_of(name, folder, seed)
            cfg.defrost()
            cfg.OUTPUT_DIR = scratch
            for term in cfg.KD.TERMS.values():
                if "START_ITER" in term.SCHEDULE:
                    term.SCHEDULE.START_ITER = 0  # as it is for most of the run
            steps[name] = runs.Trainer(cfg)._trainer.run_step
        return take_turns(steps, plan.turns, torch.device(cfg.MODEL.DEVICE), warmup=2)


def _do(tasks: list[Task], output: Path, jobs: int) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Results as they come, with a line for each that was not there."""
    todo = [t for t in tasks if not (_folder(output, t.seed) / t.name / "result.json").is_file()]
    began = time.perf_counter()
    for done, (task, result) in enumerate(_each(todo, output, jobs), 1):
        said = f"AP {result['AP']:5.1f}, {result['seconds']:4.0f} s of training"
        print(
            f"[{done}/{len(todo)}, {time.perf_counter() - began:.0f} s] seed {task.seed}, "
            f"{task.name}: {said}",
            flush=True,
        )
    for task in tasks:
        yield task, work(task, output)


def _each(tasks: list[Task], output: Path, jobs: int) -> Iterator[tuple[Task, dict[str, Any]]]:
    if jobs == 1:
        for task in tasks:
            yield task, work(task, output)
        return
    threads = max((os.cpu_count() or 1) // jobs, 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        futures = {pool.submit(work, task, output): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def work(task: Task, output: Path) -> dict[str, Any]:
    """One run's result, see `kd_det.tools.runs.train`; one that diverges says so, and has 0 AP."""
    folder = _folder(output, task.seed)
    log = folder / "logs" / f"{task.name}.txt"
    quickstart.register(_data(output, task.seed))
    with runs.quiet(log), open(log, "a") as f, contextlib.redirect_stderr(f):
        done = (folder / task.name / "result.json").is_file()
        if task.name == runs.RANDOM_TEACHER and not done:
            runs.save_random_teacher(folder, task.seed, config_of)
        try:
            return runs.train(
                task.name, folder, task.seed, config_of, quickstart.measure, task.iterations
            )
        except FloatingPointError as e:
            found = dict.fromkeys(("AP", "AP50", "AP75", "AR", "seconds"), 0.0)
            result = {**found, "iterations": task.iterations, "diverged": str(e)}
            (folder / task.name / "result.json").write_text(json.dumps(result, indent=2))
            return result


def _folder(output: Path, seed: int) -> Path:
    return output / f"seed_{seed}"


def _data(output: Path, seed: int) -> Path:
    return _folder(output, seed) / f"data_seed{seed}"


def _once(path: Path, make: Any) -> Any:
    """What a file holds; made when it is not there."""
    if not path.is_file():
        path.with_suffix(".tmp").write_text(json.dumps(make(), indent=2) + "\n")
        os.replace(path.with_suffix(".tmp"), path)
    return json.loads(path.read_text())


def _remember(plan: Plan, output: Path) -> None:
    """Runs of two plans in one folder would be compared with each other."""
    output.mkdir(parents=True, exist_ok=True)
    asked = json.loads(json.dumps(asdict(replace(plan, seeds=()))))
    found = _once(output / "plan.json", lambda: asked)
    if found != asked:
        changed = ", ".join(
            f"{k} {found.get(k)} there, {v} here" for k, v in asked.items() if found.get(k) != v
        )
        raise ValueError(
            f"{output} holds runs of another plan ({changed}): choose another --output, or delete "
            "the folder."
        )


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
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="instead of the plan's")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", choices=tuple(METHODS), help=", ".join(METHODS)
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 8),
        metavar="N",
        help="runs at a time (default: one per core, 8 at most; on a GPU one)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="default: output/methods, or output/methods_full"
    )
    parser.add_argument(
        "--docs", metavar="FILE", help="write the tables into this page, the chart beside it"
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
    words = ["python -m benchmarks.methods"] + ["--full"] * args.full
    words += [f"--seeds {' '.join(map(str, args.seeds or ()))}"] * bool(args.seeds)
    words += [f"--methods {' '.join(args.methods or ())}"] * bool(args.methods)
    command = " ".join([*words, f"--jobs {args.jobs}"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {"benchmark": "methods", "command": command, "machine": machine(device)}
    write_json(output / "summary.json", record, made)
    write_csv(output / "summary.csv", found)
    draw(output / "summary.png", found)
    if args.docs:
        page = Path(args.docs)
        write_docs(page, "methods", command, made, device)
        draw(page.with_suffix(".png"), found)


if __name__ == "__main__":
    main()
