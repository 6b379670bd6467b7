"""TrainerMixin before trainers, and among hooks, of a user's own."""

import random
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase

from kd_det.engine import Trainer
from tests.toys import batch, toy_cfg


class Toy(Trainer):
    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return [batch()] * cfg.SOLVER.MAX_ITER


class Steps(Toy):
    """Has a step of its own, that draws and is quick."""

    def run_step(self) -> None:
        self.drawn = [*getattr(self, "drawn", []), float(torch.rand(()))]


class Draws(HookBase):
    """Draws before and after each step, as hooks that choose a size of images do."""

    def __init__(self) -> None:
        self.before: list[float] = []
        self.after: list[float] = []

    def before_step(self) -> None:
        self.before.append(random.random())

    def after_step(self) -> None:
        self.after.append(random.random())


@pytest.fixture
def cfg(tmp_path):
    cfg = toy_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 6, 2
    return cfg


def train(cfg: CfgNode, *, until: int, resume: bool = False) -> tuple[Steps, Draws]:
    trainer, draws = Steps(cfg), Draws()
    trainer.register_hooks([draws])
    trainer.resume_or_load(resume=resume)
    trainer.max_iter = until
    trainer.train()
    return trainer, draws


def test_what_hooks_draw_is_new_each_time_and_comes_again_when_resumed(cfg, tmp_path):
    steps, draws = train(cfg, until=6)
    assert len({*draws.before, *draws.after}) == 12

    random.seed(0)
    torch.manual_seed(0)
    cfg.OUTPUT_DIR = str(tmp_path / "cut")
    train(cfg, until=4)
    random.seed(9)
    torch.manual_seed(9)
    resumed, continued = train(cfg, until=6, resume=True)
    assert continued.before == draws.before[4:]
    assert continued.after == draws.after[4:]
    assert resumed.drawn == steps.drawn[4:]
