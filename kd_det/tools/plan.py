"""``python -m kd_det plan``: what a config would do, without doing it."""

import argparse
from typing import Any

from kd_det.engine import check_data, check_solver, check_weights, dry_run
from kd_det.tools.options import add_command, add_import_argument, add_overrides, run_config


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "plan",
        "print what a config would do: terms, shapes, losses and memory of one batch",
        takes="the config of a training. The datasets and the teacher are read.",
        gives="the resolved plan, a line per term and level (what is compared with what, shapes, "
        "connector, region, loss, weight, memory), the losses of one batch and the peak memory of "
        "a step; or one sentence about what cannot work. Nothing is trained or written. It is "
        "train_net.py --dry-run, which also tries OUTPUT_DIR.",
        example="--config-file my_distilled.yaml SOLVER.IMS_PER_BATCH 4",
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="YAML, as for train_net.py"
    )
    add_import_argument(parser)
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check the config as train_net.py does, and print the report."""
    cfg = run_config(args)
    cfg.freeze()
    check_solver(cfg)
    check_data(cfg, training=True)
    check_weights(cfg)
    print(dry_run(cfg))
