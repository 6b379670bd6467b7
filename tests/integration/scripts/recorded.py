"""
Train the config of argv[1] in this process, with every step's losses written to argv[2].

    recorded.py CONFIG LOSSES [--seed N] [--kill-at ITERATION] [--opts KEY VALUE ...]

Losses are read from the EventStorage, where Detectron2 puts every value that it logs; a line is on
disk before the next step begins. With --kill-at the process dies without warning at that step.
Runs under torchrun too; the main process writes.
"""

import kd_det  # isort: skip

import argparse
import json
import os
import signal

import torch
from detectron2.config import get_cfg
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from kd_det.engine import Trainer, launch

# TorchScript's profiling executor makes the first calls of a process different from later ones.
torch._C._jit_set_profiling_executor(False)
torch.set_num_threads(1)


class Record(HookBase):
    def __init__(self, path: str, kill_at: int) -> None:
        self.path, self.kill_at = path, kill_at

    def before_step(self) -> None:
        if self.trainer.iter == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_step(self) -> None:
        if not comm.is_main_process():
            return
        losses = {k: v[0] for k, v in self.trainer.storage.latest().items() if "loss" in k}
        with open(self.path, "a") as f:
            f.write(json.dumps([self.trainer.iter, losses]) + "\n")
            f.flush()
            os.fsync(f.fileno())


def main(_: argparse.Namespace) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("losses")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--opts", nargs="*", default=[])
    args = parser.parse_args()
    cfg = get_cfg()
    kd_det.add_kd_config(cfg)
    cfg.merge_from_file(args.config)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    seed_all_rng(args.seed + comm.get_rank())
    trainer = Trainer(cfg)
    trainer.register_hooks([Record(args.losses, args.kill_at)])
    trainer.resume_or_load(resume=True)
    trainer.train()


if __name__ == "__main__":
    launch(main, argparse.Namespace(num_gpus=0))
