"""``python -m kd_det <command>``: see ``python -m kd_det --help``."""

import argparse
import sys

from kd_det.tools import quickstart, taps


def main(argv: list[str] | None = None) -> int:
    """Run one command; bad input ends in one sentence on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m kd_det", description="Tools around kd_det.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for tool in (quickstart, taps):
        tool.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, KeyError, FileNotFoundError) as e:
        print(f"error: {e.args[0] if isinstance(e, KeyError) else e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
