"""
What learning without a trained teacher is worth: ``python -m benchmarks.without_teacher``, on the
quickstart's synthetic data.

The quickstart's student and schedule for all, from the same initial weights and in the same data
order: plain, and by each of `METHODS`, whose config is ``configs/quickstart/<method>.yaml``, among
them controls of OKDCR, which sees augmented images by two heads. Each is held against the plain
student twice: of as many iterations, and of the method's wall-clock, a plain run with its schedule
stretched by what a step of the method costs in plain steps. What is there already is skipped, what
was interrupted continues.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from benchmarks import comparison
from benchmarks.comparison import Costs, Task, folder_of, once
from benchmarks.turns import ratios, spread
from benchmarks.without_teacher_report import (
    METHODS,
    NETWORKS,
    PLAIN,
    Found,
    draw,
    report,
    write_csv,
)
from kd_det.tools import quickstart, runs

FILES = {"augmented": "two_heads"}
"""By name the file of another, whose ``KD.ENABLED`` is False here: the views stay."""


@dataclass(frozen=True)
class Plan:
    """
    What is compared.

    Attributes:
        seeds: of data, weights and data order.
        methods: of `METHODS`.
        iterations: of every run but the plain ones for a method's wall-clock.
        images: for training and for evaluation.
        turns: of steps by which costs are measured.
        spare: methods share a plain run for their wall-clock where it has at most this share of
            iterations more than each of them is worth; never fewer.
    """

    seeds: tuple[int, ...] = (1, 2, 3)
    methods: tuple[str, ...] = tuple(METHODS)
    iterations: int = 1000
    images: tuple[int, int] = (3000, 200)
    turns: int = 25
    spare: float = 0.08


FULL = Plan()
SHORT = Plan(seeds=(1,), iterations=250, turns=9)


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
    found = Costs(*once(output / "costs.json", lambda: costs(plan, first, jobs)))
    stretched = equal_time(
        {m: spread(ratios(found.seconds, m, PLAIN)).median for m in plan.methods},
        plan.iterations,
        plan.spare,
    )
    longer = {plain_of(i): i for i in sorted(stretched.values()) if i != plan.iterations}
    lengths = {**dict.fromkeys((PLAIN, *plan.methods), plan.iterations), **longer}
    tasks = [Task(name, seed, n) for name, n in lengths.items() for seed in plan.seeds]
    results: dict[int, dict[str, Any]] = {seed: {} for seed in plan.seeds}
    for task, result in comparison.do(tasks, output, jobs, work):
        results[task.seed][task.name] = result
    return Found(
        results,
        {
            m: PLAIN if stretched[m] == plan.iterations else plain_of(stretched[m])
            for m in plan.methods
        },
        found,
        {m: pulls(m, (folder_of(output, seed) / m for seed in plan.seeds)) for m in plan.methods},
    )


def equal_time(ratio: Mapping[str, float], iterations: int, spare: float) -> dict[str, int]:
    """
    By method the iterations of a plain run for its wall-clock.

    The dearest method's is rounded up to the next iteration. A cheaper one shares it as long as
    that gives the plain student at most ``spare`` of its due as an extra; then the next begins.

    Args:
        ratio: of each method's step to a plain one's; below 1 it counts as 1.
        iterations: of the methods.
        spare: that may be given away.
    """
    found: dict[str, int] = {}
    given = math.inf
    for method in sorted(ratio, key=lambda m: -ratio[m]):
        due = math.ceil(max(ratio[method], 1.0) * iterations)
        if given > due * (1 + spare):
            given = due
        found[method] = int(given)
    return found


def plain_of(iterations: int) -> str:
    """Name of the plain run of another length."""
    return f"{PLAIN}_{iterations}"


def config_of(name: str, output: Path, seed: int, iterations: int | None = None) -> CfgNode:
    """
    The config of one run.

    Args:
        name: of the run.
        output: folder of the seed.
        seed: of weights and data order.
        iterations: length of the schedule.
    """
    file = name if name in METHODS else PLAIN
    cfg = runs.read_config(f"quickstart/{FILES.get(file, file)}.yaml")
    cfg.KD.ENABLED = file not in (PLAIN, *FILES)
    runs.fit_config(cfg, output / name, seed, iterations)
    cfg.TEST.EVAL_PERIOD = 0  # at the end
    cfg.freeze()
    return cfg


def costs(plan: Plan, folder: Path, jobs: int) -> Costs:
    """See `benchmarks.comparison.costs`; with as many threads as the runs have."""
    seed = plan.seeds[0]
    quickstart.register(comparison.data_of(folder.parent, seed))
    configs = {m: config_of(m, folder, seed, plan.iterations) for m in (PLAIN, *plan.methods)}
    before = torch.get_num_threads()
    torch.set_num_threads(comparison.threads(jobs))
    try:
        with runs.quiet(folder / "logs" / "costs.txt"):
            return comparison.costs(configs, plan.turns)
    finally:
        torch.set_num_threads(before)


def measure(cfg: CfgNode, results: dict[str, Any]) -> dict[str, float]:
    """`quickstart.measure`, and the last AP of every other network, their mean and ensemble."""
    found = quickstart.measure(cfg, results)
    for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines():
        for key, value in json.loads(line).items():
            if key.startswith("kd/") and key.endswith("/bbox/AP"):
                found[NETWORKS + key.split("/")[1]] = 0.0 if math.isnan(value) else value
    return found


def pulls(method: str, folders: Iterable[Path]) -> dict[str, float]:
    """By term the median over seeds of `benchmarks.comparison.gradient_ratios`."""
    each = [comparison.gradient_ratios(folder) for folder in folders]
    terms = dict.fromkeys(term for found in each for term in found)
    return {t: comparison.median(found.get(t, math.nan) for found in each) for t in terms}


def work(task: Task, output: Path) -> dict[str, Any]:
    """See `benchmarks.comparison.train`."""
    return comparison.train(task, output, config_of, measure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.without_teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help=f"seed 1 and {SHORT.iterations} iterations: no ranking. Without it seeds "
        f"{FULL.seeds} and {FULL.iterations} iterations",
    )
    parser.add_argument("--iterations", type=int, metavar="N", help="instead of the plan's")
    comparison.add_options(parser, METHODS)
    parser.add_argument(
        "--output", metavar="DIR", help="default: output/without_teacher, with _short behind it"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compare, print the tables and write them, a CSV of all runs, and the chart."""
    args = parse(argv)
    if args.jobs < 1:
        raise SystemExit(f"A comparison needs --jobs >= 1, but got {args.jobs}.")
    plan = SHORT if args.short else FULL
    plan = replace(
        plan,
        seeds=tuple(args.seeds or plan.seeds),
        methods=tuple(args.methods or plan.methods),
        iterations=args.iterations or plan.iterations,
    )
    output = Path(args.output or f"output/without_teacher{'_short' * args.short}")
    began = time.perf_counter()
    found = compare(plan, output, args.jobs)
    made = report(found)
    print(f"\n{made.text()}\n\n{time.perf_counter() - began:.0f} s, {output}/")
    write_csv(output / "summary.csv", found)
    words = ["--short"] * args.short
    words += [f"--iterations {args.iterations}"] * bool(args.iterations)
    comparison.finish("without_teacher", words, args, output, made, lambda p: draw(p, found))


if __name__ == "__main__":
    main()
