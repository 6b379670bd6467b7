"""
``python -m benchmarks [NAME ...] [options]``: some or all benchmarks, each in a process of its own,
with the options that follow.
"""

import subprocess
import sys
import time

from benchmarks import NAMES
from benchmarks.command import parser


def main(argv: list[str]) -> int:
    """Run the benchmarks; those that failed are named at the end."""
    options = parser(__doc__)
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    args = options.parse_args(argv)
    if unknown := set(args.names) - set(NAMES):
        options.error(f"there is no benchmark {', '.join(unknown)}: take of {', '.join(NAMES)}")
    passed = [word for word in argv if word not in args.names]
    began, failed = time.perf_counter(), []
    for name in args.names or NAMES:
        print(f"\n== {name}", flush=True)
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *passed]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
    print(f"\n{time.perf_counter() - began:.0f} s in all; tables and samples: {args.output}/*.json")
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
