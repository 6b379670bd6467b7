"""``python -m kd_det <command>``: see ``python -m kd_det --help``."""

import argparse
import sys

from kd_det.engine import plain_errors
from kd_det.tools import compare, export, plan, quickstart, taps, visualise


def argument_parser() -> argparse.ArgumentParser:
    """Of all commands."""
    parser = argparse.ArgumentParser(prog="python -m kd_det", description="Tools around kd_det.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for tool in (quickstart, plan, taps, compare, visualise, export):
        tool.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; bad input ends in one sentence on stderr and exit status 2."""
    args = argument_parser().parse_args(argv)
    with plain_errors():
        args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
