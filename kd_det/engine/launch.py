"""Starting one process or several."""

import argparse
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch as d2_launch
from torch.multiprocessing.spawn import ProcessExitedException

from kd_det._compat import create_local_process_group
from kd_det.engine.errors import STATUS, plain_errors

logger = logging.getLogger(__name__)


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """
    Run ``main(args)`` as the command line and the environment ask.

    * under ``torchrun`` (its environment variables are set): in this process, in a group of all
      of torchrun's processes, NCCL on GPUs and gloo on CPUs, on one machine or several;
    * with GPUs: through Detectron2's own ``launch`` (``--num-gpus``, ``--num-machines``, ...);
    * without a GPU: in this process, on the CPU.

    A user's mistake ends every process with one sentence: see `kd_det.engine.plain_errors`.

    Args:
        main: the script.
        args: of `detectron2.engine.default_argument_parser`.

    Returns:
        What ``main`` returns, where it runs in this process.
    """
    with plain_errors():
        return _launch(partial(_plainly, main), args)


def _plainly(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """In the process that fails, before its group is gone and its parent sees text alone."""
    with plain_errors():
        return main(args)


def _launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    if "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ:
        return _under_torchrun(main, args)
    if not torch.cuda.is_available():
        if args.num_gpus > 1:
            raise ValueError(
                f"--num-gpus {args.num_gpus} was asked for, but PyTorch sees no GPU here. For "
                "several CPU processes: torchrun --nproc-per-node N train_net.py ..."
            )
        return main(args)
    try:
        return d2_launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as e:
        if e.exit_code == STATUS:  # the process has said why
            raise SystemExit(STATUS) from None
        raise


def _under_torchrun(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        dist.barrier()
        return main(args)
    finally:
        dist.destroy_process_group()
