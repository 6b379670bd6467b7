"""A user's script: ``import kd_det`` and ``add_kd_config`` are the only two lines about kd_det."""

import kd_det  # isort: skip

import sys

import loops
import torch
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup

if __name__ == "__main__":
    torch.set_num_threads(1)
    loop, *words = sys.argv[1:]
    args = default_argument_parser().parse_args(words)
    if loop == "lazy_loop":
        output, *overrides = args.opts
        loops.lazy_loop(args.config_file, output, args.resume, overrides)
    else:
        cfg = get_cfg()
        kd_det.add_kd_config(cfg)
        cfg.merge_from_file(args.config_file)
        if loop == "evaluate":
            sys.exit(loops.evaluate(cfg, args.opts))
        cfg.merge_from_list(args.opts)
        cfg.freeze()
        default_setup(cfg, args)
        getattr(loops, loop)(cfg, args.resume)
