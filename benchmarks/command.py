"""The command line that all benchmarks share."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import DOCS, Report, machine, write_docs, write_json


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        device: where the models and maps are.
        repeats: how often each variant is timed.
        short: the smaller version.
        output: folder of the JSON files, and of what a benchmark keeps between runs.
    """

    device: torch.device
    repeats: int
    short: bool = False
    output: Path = Path("output/benchmarks")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    made.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU")
    made.add_argument("--repeats", type=int, metavar="N", help="default 9, and 5 with --short")
    made.add_argument("--short", action="store_true", help="smaller; all six in some 7 minutes")
    made.add_argument("--output", default="output/benchmarks", metavar="DIR", help="of JSON files")
    made.add_argument(
        "--docs",
        nargs="?",
        const=str(DOCS),
        metavar="FILE",
        help="write the tables into the docs too (default docs/benchmarks.md)",
    )
    return made


def main(
    name: str,
    run: Callable[[Options], Report],
    description: str | None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse the options, run one benchmark, print its tables and write what it found."""
    args = parser(description).parse_args(argv)
    if args.repeats is not None and args.repeats < 1:
        raise SystemExit(f"A benchmark needs --repeats >= 1, but got {args.repeats}.")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device} was asked for, but torch finds no GPU.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    repeats = args.repeats or (5 if args.short else 9)
    options = Options(device, repeats, args.short, Path(args.output))
    before, began = machine(device), time.perf_counter()
    report = run(options)
    if args.short:
        report.notes.append("Short version: smaller than what the full one measures.")
    taken = time.perf_counter() - began
    print(f"\n{report.text()}\n\n{taken:.0f} s")
    command = command_of(name, options)
    record = {
        "benchmark": name,
        "command": command,
        "argv": list(sys.argv[1:] if argv is None else argv),
        "seconds": taken,
        "machine": {**before, "load_after": machine(device)["load"]},
    }
    write_json(options.output / f"{name}.json", record, report)
    if args.docs:
        write_docs(Path(args.docs), name, command, report, device)


def command_of(name: str, options: Options) -> str:
    """The command that measures this again, without the files that it writes."""
    words = ["python -m", f"benchmarks.{name}", "--device", options.device.type]
    words += ["--threads", str(torch.get_num_threads()), "--repeats", str(options.repeats)]
    return " ".join(words + ["--short"] * options.short)
