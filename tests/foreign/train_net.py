"""Training script of the flock project."""

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from flock import FlockTrainer, add_flock_config, register_flocks


def setup(args):
    cfg = get_cfg()
    add_flock_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args):
    torch.set_num_threads(1)
    cfg = setup(args)
    register_flocks()
    if args.eval_only:
        model = FlockTrainer.build_model(cfg)
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        return FlockTrainer.test(cfg, model)
    trainer = FlockTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))
