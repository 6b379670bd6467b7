"""TrainerMixin before trainers, and among hooks, of a user's own."""

import random
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.utils import comm

import kd_det
from kd_det.engine import TeacherGap, Trainer
from tests.toys import batch, distiller_cfg, toy_cfg


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


class SavesAtBothEnds(HookBase):
    """BestCheckpointer saves when training is over."""

    def before_train(self) -> None:
        self.trainer.checkpointer.save("model_begin")

    def after_train(self) -> None:
        self.trainer.checkpointer.save("model_best")


def train(cfg: CfgNode, *more: HookBase, until: int, resume: bool = False) -> tuple[Steps, Draws]:
    trainer, draws = Steps(cfg), Draws()
    trainer.register_hooks([draws, *more])
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


def test_no_iteration_is_left_out_where_a_finished_run_is_taken_further(cfg, tmp_path):
    steps, _ = train(cfg, until=6)
    torch.manual_seed(0)
    cfg.OUTPUT_DIR = str(tmp_path / "cut")
    train(cfg, SavesAtBothEnds(), until=4)
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_best.pth"
    resumed, _ = train(cfg, SavesAtBothEnds(), until=6, resume=True)
    assert resumed.start_iter == 4
    assert resumed.drawn == steps.drawn[4:]
    at = {n: torch.load(tmp_path / "cut" / f"model_{n}.pth")["trainer"] for n in ("begin", "best")}
    assert (at["begin"]["iteration"], at["best"]["iteration"]) == (3, 5)


class Diverges(Steps):
    tests = 0

    def run_step(self) -> None:
        if self.iter == self.cfg.SOLVER.MAX_ITER - 1:
            raise FloatingPointError("not finite")

    @classmethod
    def test(cls, cfg: CfgNode, model: Any, evaluators: Any = None) -> dict:
        cls.tests += 1
        return {}


def test_a_last_step_that_fails_is_not_followed_by_an_evaluation(cfg, tmp_path):
    """The other processes are waiting in that step, and it would wait for them."""
    with pytest.raises(FloatingPointError):
        Diverges(cfg).train()
    assert Diverges.tests == 0
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


@pytest.mark.parametrize(
    ("distilled", "processes", "says"),
    [
        (False, 1, "not finite The weights are"),
        (True, 1, "not finite Every distillation term is finite: it is the detector itself. The"),
        (True, 2, "of this process is finite: it is the detector itself, or another process's"),
    ],
)
def test_what_is_not_finite_where_no_term_is(
    cfg, teacher, distilled, processes, says, tmp_path, monkeypatch
):
    if distilled:
        cfg = distiller_cfg(teacher)
        cfg.OUTPUT_DIR = str(tmp_path)
    cfg.SOLVER.MAX_ITER = 1
    trainer = Toy(cfg)

    def run_step() -> None:
        raise FloatingPointError("not finite")

    trainer._trainer.run_step = run_step
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    with pytest.raises(FloatingPointError, match=says):
        trainer.run_step()


class Own(DefaultTrainer):
    """Another constructor, and a hook behind all others."""

    def __init__(self, cfg: CfgNode, name: str, *, number: int) -> None:
        super().__init__(cfg)
        self.name, self.number = name, number

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return [batch()]

    def build_hooks(self) -> list[HookBase]:
        return [*super().build_hooks(), Draws()]


class Distilled(kd_det.TrainerMixin, Own):
    """With the mixin."""


def test_a_constructor_with_more_arguments(cfg):
    trainer = Distilled(cfg, "mine", number=3)
    assert (trainer.name, trainer.number) == ("mine", 3)


def test_what_all_processes_do_together_is_in_one_order_on_all_of_them(cfg, monkeypatch):
    """Only the main process has a PeriodicWriter: a hook behind it waits for others too."""
    main = Distilled(cfg, "main", number=0)._hooks
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    other = Distilled(cfg, "other", number=1)._hooks
    together = (hooks.EvalHook, TeacherGap, Draws)
    orders = [[type(h) for h in found if isinstance(h, together)] for found in (main, other)]
    assert orders[0] == orders[1] == list(together)
    names = [type(h).__name__ for h in main]
    assert names.index("TeacherGap") < names.index("PeriodicWriter")


def test_behind_the_trainer_the_mixin_is_refused():
    with pytest.raises(TypeError, match=r"class Wrong\(kd_det\.TrainerMixin, \.\.\.\)"):

        class Wrong(Own, kd_det.TrainerMixin):
            pass


@pytest.mark.parametrize("lost", ["_trainer", "optimizer"])
def test_a_checkpoint_without_the_optimizer_is_accepted(cfg, lost, caplog):
    trainer = Toy(cfg)
    saved = {**trainer.state_dict(), "iteration": 3}
    del (saved if lost == "_trainer" else saved["_trainer"])[lost]
    trainer.load_state_dict(saved)
    assert trainer.iter == 3
    assert "The checkpoint has no state of optimizer: it starts anew" in caplog.text


def test_a_run_resumes_with_the_layers_that_it_trained(cfg):
    saved = Toy(cfg).state_dict()
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    with pytest.raises(ValueError, match=r"optimizer trained other parameters .*FREEZE_AT"):
        Toy(cfg).load_state_dict(saved)
