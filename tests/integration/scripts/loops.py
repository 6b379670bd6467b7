"""Training as users of Detectron2 write it; nothing in here knows of kd_det."""

import json
import os

from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from torch import nn


def write_history(folder: str, history: list[dict[str, float]]) -> None:
    with open(os.path.join(folder, "history.json"), "w") as f:
        json.dump(history, f)


class History(HookBase):
    """Raw values of every iteration; the stock writers smooth them."""

    def before_train(self) -> None:
        self.rows: list[dict[str, float]] = []

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        self.rows.append({k: v for k, (v, at) in latest.items() if at == self.trainer.iter})

    def after_train(self) -> None:
        write_history(self.trainer.cfg.OUTPUT_DIR, self.rows)


def default_trainer(cfg: CfgNode, resume: bool) -> None:
    trainer = DefaultTrainer(cfg)
    trainer.register_hooks([History()])
    trainer.resume_or_load(resume=resume)
    trainer.train()


def plain_loop(cfg: CfgNode, resume: bool) -> None:
    """As Detectron2's tools/plain_train_net.py."""
    model = build_model(cfg)
    model.train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    checkpointer = DetectionCheckpointer(
        model, cfg.OUTPUT_DIR, optimizer=optimizer, scheduler=scheduler
    )
    loaded = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    start = loaded.get("iteration", -1) + 1
    periodic = PeriodicCheckpointer(
        checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_iter=cfg.SOLVER.MAX_ITER
    )
    history = []
    with EventStorage(start) as storage:
        batches = zip(
            build_detection_train_loader(cfg), range(start, cfg.SOLVER.MAX_ITER), strict=False
        )
        for data, iteration in batches:
            storage.iter = iteration
            losses = model(data)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            scheduler.step()
            history.append({k: v.item() for k, v in losses.items()})
            periodic.step(iteration)
    write_history(cfg.OUTPUT_DIR, history)


def lazy_loop(file: str, output: str, resume: bool, overrides: list[str]) -> None:
    """As Detectron2's tools/lazyconfig_train_net.py."""
    cfg = LazyConfig.load(file)
    cfg = LazyConfig.apply_overrides(cfg, [f"train.output_dir={output}", *overrides])
    os.makedirs(output, exist_ok=True)
    model = instantiate(cfg.model)
    model.to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = create_ddp_model(model)
    trainer = SimpleTrainer(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = DetectionCheckpointer(model, output, trainer=trainer)
    trainer.register_hooks(
        [
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.PeriodicWriter(default_writers(output, cfg.train.max_iter), period=1),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)


def build_from(config_file: str) -> nn.Module:
    """A student for LazyConfig files, by a YAML file."""
    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    return build_model(cfg)


def evaluate(cfg: CfgNode, words: list[str]) -> None:
    """For every pair of words, a checkpoint and a folder: writes COCO results into the folder."""
    dataset = cfg.DATASETS.TEST[0]
    for weights, output in zip(words[0::2], words[1::2], strict=True):
        model = build_model(cfg)
        DetectionCheckpointer(model).load(weights)
        evaluator = COCOEvaluator(dataset, tasks=("bbox",), output_dir=output, use_fast_impl=False)
        inference_on_dataset(model.eval(), build_detection_test_loader(cfg, dataset), evaluator)
