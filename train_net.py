#!/usr/bin/env python
"""
Train, evaluate or inspect a distilled detector; Detectron2's own train_net.py with a ``KD`` node.

    train_net.py --config-file configs/COCO-Detection/retinanet_R_50_FPN_1x_cwd_R_101.yaml
    train_net.py --config-file ... --resume
    train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
    train_net.py --config-file ... --dry-run
    train_net.py --config-file ... KD.ENABLED False         # the matched baseline
    torchrun --nproc-per-node 2 train_net.py --config-file ...
"""

import argparse
from typing import Any

import kd_det  # noqa: F401  # first: it makes Detectron2 0.6 importable without compiled operators
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from kd_det.engine import (
    Trainer,
    check_data,
    check_output_dir,
    check_solver,
    check_weights,
    dry_run,
    launch,
    load_config,
)


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of this run: file, overrides, no GPU if there is none; checked and frozen."""
    cfg = load_config(args.config_file, args.opts)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    if not args.eval_only:
        check_solver(cfg)
    check_data(cfg, training=not args.eval_only)
    check_weights(cfg, resume=args.resume)
    check_output_dir(cfg)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kd_det")
    return cfg


def main(args: argparse.Namespace) -> Any:
    """One process of the run."""
    cfg = setup(args)
    if args.dry_run:
        return dry_run(cfg)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments and ``--dry-run``."""
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, read the teacher, run one batch, print the plan, and exit",
    )
    return parser


if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    launch(main, arguments)
