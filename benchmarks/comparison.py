"""
What comparisons of many runs on the quickstart's synthetic data share: one folder per seed, in it
one per run; several runs at a time; what is there is skipped, what was interrupted continues.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from benchmarks.report import Report, machine, write_docs, write_json
from benchmarks.turns import Samples, take_turns
from kd_det.data.synthetic import make_synthetic_coco
from kd_det.tools import quickstart, runs


@dataclass(frozen=True)
class Task:
    """One run; ``iterations`` are those of its schedule."""

    name: str
    seed: int
    iterations: int


Work = Callable[[Task, Path], dict[str, Any]]
"""From a run and the comparison's folder to the run's result; it can be pickled."""


class Costs(NamedTuple):
    """By run: seconds of whole training steps that took turns, and parameters that train."""

    seconds: Samples
    parameters: Mapping[str, int]


def folder_of(output: Path, seed: int) -> Path:
    """Of a seed's runs."""
    return output / f"seed_{seed}"


def data_of(output: Path, seed: int) -> Path:
    """Of a seed's dataset."""
    return folder_of(output, seed) / f"data_seed{seed}"


def make_data(output: Path, seeds: Iterable[int], images: tuple[int, int]) -> None:
    """Write the datasets that are not there; ``images`` for training and for evaluation."""
    for seed in seeds:
        train, val = images
        make_synthetic_coco(data_of(output, seed), seed=seed, num_train=train, num_val=val)


def do(
    tasks: Sequence[Task], output: Path, jobs: int, work: Work
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Results as they come, with a line for each that was not there."""
    todo = [t for t in tasks if not _result_file(t, output).is_file()]
    began = time.perf_counter()
    for done, (task, result) in enumerate(each(todo, output, jobs, work), 1):
        said = f"AP {result['AP']:5.1f}, {result['seconds']:4.0f} s of training"
        print(
            f"[{done}/{len(todo)}, {time.perf_counter() - began:.0f} s] seed {task.seed}, "
            f"{task.name}: {said}",
            flush=True,
        )
    for task in tasks:
        yield task, work(task, output)


def each(
    tasks: Sequence[Task], output: Path, jobs: int, work: Work
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Results in the order in which runs end; of two jobs or more each has a process of its own."""
    if jobs == 1:
        for task in tasks:
            yield task, work(task, output)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads(jobs),)) as pool:
        futures = {pool.submit(work, task, output): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def threads(jobs: int) -> int:
    """Of each of some jobs: its share of the cores."""
    return max((os.cpu_count() or 1) // jobs, 1)


def train(
    task: Task,
    output: Path,
    config_of: runs.ConfigOf,
    measure: runs.Measure = quickstart.measure,
) -> dict[str, Any]:
    """One run's result, see `kd_det.tools.runs.train`; one that diverges says so, and has 0 AP."""
    folder = folder_of(output, task.seed)
    log = folder / "logs" / f"{task.name}.txt"
    quickstart.register(data_of(output, task.seed))
    with runs.quiet(log), open(log, "a") as f, contextlib.redirect_stderr(f):
        try:
            return runs.train(task.name, folder, task.seed, config_of, measure, task.iterations)
        except FloatingPointError as e:
            found = dict.fromkeys(("AP", "AP50", "AP75", "AR", "seconds"), 0.0)
            result = {**found, "iterations": task.iterations, "diverged": str(e)}
            _result_file(task, output).write_text(json.dumps(result, indent=2))
            return result


def _result_file(task: Task, output: Path) -> Path:
    return folder_of(output, task.seed) / task.name / "result.json"


def costs(configs: Mapping[str, CfgNode], turns: int) -> Costs:
    """
    Of whole training steps, data loading and update included, as they are in the middle of a run:
    what waits has begun, and what grows has grown.
    """
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, cfg in configs.items():
            cfg = cfg.clone()
            cfg.defrost()
            cfg.OUTPUT_DIR = scratch
            found[name] = runs.Trainer(cfg)
        steps = {name: trainer._trainer.run_step for name, trainer in found.items()}
        with EventStorage(0):
            for step in steps.values():
                step()
        middle = cfg.SOLVER.MAX_ITER // 2 | 1  # odd: no step that measures gradients
        with EventStorage(middle):
            seconds = take_turns(steps, turns, torch.device(cfg.MODEL.DEVICE))
    parameters = {
        name: sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        for name, trainer in found.items()
    }
    return Costs(seconds, parameters)


def gradient_ratios(folder: Path) -> dict[str, float]:
    """
    By term the median over a run of its gradient over the task's, both on the shared features; a
    term that was never measured, as of a run that diverged at once, is not there.
    """
    found: dict[str, list[float]] = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        for key, value in json.loads(line).items():
            if key.endswith("/grad_ratio"):
                found.setdefault(key.split("/")[1], []).append(value)
    return {term: statistics.median(values) for term, values in found.items()}


def median(values: Iterable[float]) -> float:
    """Of those that are numbers; NaN where none is."""
    known = [x for x in values if not math.isnan(x)]
    return statistics.median(known) if known else math.nan


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; made when it is not there."""
    if not path.is_file():
        path.with_suffix(".tmp").write_text(json.dumps(make(), indent=2) + "\n")
        os.replace(path.with_suffix(".tmp"), path)
    return json.loads(path.read_text())


def remember(plan: Any, output: Path) -> None:
    """
    Write down what is compared, but for its ``seeds``: runs of two plans in one folder would be
    compared with each other.

    Raises:
        ValueError: if the folder holds another plan's runs.
    """
    output.mkdir(parents=True, exist_ok=True)
    asked = json.loads(json.dumps(asdict(replace(plan, seeds=()))))
    found = once(output / "plan.json", lambda: asked)
    if found != asked:
        changed = ", ".join(
            f"{k} {found.get(k)} there, {v} here" for k, v in asked.items() if found.get(k) != v
        )
        raise ValueError(
            f"{output} holds runs of another plan ({changed}): choose another --output, or delete "
            "the folder."
        )


def add_options(parser: argparse.ArgumentParser, methods: Iterable[str]) -> None:
    """Those of every comparison."""
    names = tuple(methods)
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="instead of the plan's")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", choices=names, help=", ".join(names)
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 8),
        metavar="N",
        help="runs at a time (default: one per core, 8 at most; on a GPU one)",
    )
    parser.add_argument(
        "--docs", metavar="FILE", help="write the tables into this page, the chart beside it"
    )


def finish(
    name: str,
    words: Sequence[str],
    args: argparse.Namespace,
    output: Path,
    made: Report,
    draw: Callable[[Path], None],
) -> None:
    """
    Write ``summary.json`` and ``.png``, and what goes into the docs.

    Args:
        name: of the benchmark.
        words: of its command line, but for those of `add_options`.
        args: the command line.
        output: folder of the comparison.
        made: what is said.
        draw: the chart, into a file.
    """
    lists = [
        f"--{key} {' '.join(map(str, found))}"
        for key in ("seeds", "methods")
        if (found := getattr(args, key))
    ]
    command = " ".join([f"python -m benchmarks.{name}", *words, *lists, f"--jobs {args.jobs}"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {"benchmark": name, "command": command, "machine": machine(device)}
    write_json(output / "summary.json", record, made)
    draw(output / "summary.png")
    if args.docs:
        page = Path(args.docs)
        write_docs(page, name, command, made, device)
        draw(page.with_suffix(".png"))
