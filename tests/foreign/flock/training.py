import copy
import itertools
import json
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from flock.data import FlockMapper


class EMA(HookBase):
    """A running mean of the weights, saved beside the model."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def before_train(self) -> None:
        self.mean = copy.deepcopy(self.trainer.model).eval()

    @torch.no_grad()
    def after_step(self) -> None:
        pairs = zip(self.mean.parameters(), self.trainer.model.parameters(), strict=True)
        for mean, now in pairs:
            mean.lerp_(now, 1 - self.decay)
        for mean, now in zip(self.mean.buffers(), self.trainer.model.buffers(), strict=True):
            mean.copy_(now)

    def after_train(self) -> None:
        if comm.is_main_process():
            folder = self.trainer.cfg.OUTPUT_DIR
            torch.save({"model": self.mean.state_dict()}, os.path.join(folder, "model_ema.pth"))


class ClippedSGD(torch.optim.SGD):
    """Clips the norm of all gradients together, which Detectron2 does not."""

    def step(self, closure: Any = None) -> Any:
        everything = itertools.chain(*(group["params"] for group in self.param_groups))
        nn.utils.clip_grad_norm_(everything, 1.0)
        return super().step(closure)


class FlockEvaluator(DatasetEvaluator):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def reset(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for record, output in zip(inputs, outputs, strict=True):
            birds = output["instances"]
            row = {
                "image_id": record["image_id"],
                "count": output["count"].item(),
                "boxes": birds.pred_boxes.tensor.tolist(),
                "scores": birds.scores.tolist(),
            }
            self.rows.append(row)

    def evaluate(self) -> dict[str, Any]:
        with open(os.path.join(self.folder, "birds.json"), "w") as f:
            json.dump(self.rows, f)
        return {"flock": {"birds": float(sum(len(row["scores"]) for row in self.rows))}}


class FlockTrainer(DefaultTrainer):
    def build_hooks(self) -> list[HookBase]:
        return [*super().build_hooks(), EMA(self.cfg.SOLVER.EMA_DECAY)]

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        backbone = [p for name, p in model.named_parameters() if "backbone" in name]
        others = [p for name, p in model.named_parameters() if "backbone" not in name]
        groups = [{"params": backbone, "lr": 0.1 * cfg.SOLVER.BASE_LR}, {"params": others}]
        return ClippedSGD(groups, lr=cfg.SOLVER.BASE_LR, momentum=0.9)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_detection_train_loader(cfg, mapper=FlockMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        mapper = FlockMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return FlockEvaluator(cfg.OUTPUT_DIR)
