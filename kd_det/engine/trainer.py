"""A DefaultTrainer that knows of the Distiller."""

import logging
import weakref
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from kd_det.build import begin_run
from kd_det.distiller import Distiller, find_distiller
from kd_det.engine.checkpointing import AtomicPaths
from kd_det.engine.evaluators import build_evaluator
from kd_det.engine.loader import ResumableLoader, resumable
from kd_det.engine.output_dir import check_output_dir, remove_stale
from kd_det.engine.peer_evaluation import PeerEvaluation
from kd_det.engine.resume import RunState, check_last_checkpoint
from kd_det.engine.teacher_ap import check_gates
from kd_det.engine.teacher_gap import TeacherGap
from kd_det.kd_state import KDState

logger = logging.getLogger(__name__)


class TrainerMixin:
    """
    Goes in front of a `DefaultTrainer`, stock or your own.

        class Trainer(kd_det.TrainerMixin, DefaultTrainer): ...

    * A run that is killed loses at most ``SOLVER.CHECKPOINT_PERIOD`` iterations, and resumed it
      goes on as if it had not stopped: checkpoints are written to a temporary file and renamed,
      and hold the optimizer (which Detectron2 0.6 forgets), what trains beside the student
      (``kd``), and the data position and random states of every process (``run``, `RunState`).
    * The folder's last checkpoint is resumed only if it is this run's.
    * Before the first batch the output folder is tried, and the teacher's weights are read and
      checked, and its AP where it has a ``MIN_AP``; then ``kd_run.json`` is written.
    * Training images have two views where ``KD.VIEWS`` asks for them.
    * Evaluations report the teacher's AP and the gap per class, see `TeacherGap`, and those of
      peers each peer, mean and ensemble, see `PeerEvaluation`.
    * A loss that is not finite names the term and level.
    * Hooks that draw random numbers after a step (evaluation, PreciseBN) do not change the run.
    * It trains on several CPU processes; there a constructor behind the mixin is not called.

    Without a Distiller (``KD.ENABLED: False``) only the general parts apply.
    """

    cfg: CfgNode
    model: nn.Module
    checkpointer: DetectionCheckpointer
    _trainer: SimpleTrainer
    iter: int
    max_iter: int
    _done: int | None = None  # the last iteration that was finished

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if DefaultTrainer in order[: order.index(TrainerMixin)]:
            raise TypeError(
                f"{cls.__name__} has TrainerMixin behind DefaultTrainer, where it has no effect: "
                f"class {cls.__name__}(kd_det.TrainerMixin, ...)."
            )

    def __init__(self, cfg: CfgNode, *args: Any, **kwargs: Any) -> None:
        if comm.get_world_size() > 1 and cfg.MODEL.DEVICE == "cpu":
            self._init_on_cpus(cfg)
        else:  # DefaultTrainer comes behind, maybe after one of yours with more arguments
            super().__init__(cfg, *args, **kwargs)  # type: ignore[call-arg]
        self.checkpointer.path_manager = AtomicPaths(self.checkpointer.path_manager)
        self._run_state = RunState(self.model, self._install_loader())
        self.checkpointer.add_checkpointable("run", self._run_state)
        distiller = find_distiller(self.model)
        if distiller is not None:
            self.checkpointer.add_checkpointable("kd", KDState(distiller))
        self.register_hooks([_Start()])  # type: ignore[attr-defined]

    def _init_on_cpus(self, cfg: CfgNode) -> None:
        """DefaultTrainer's constructor, whose DDP asks for a GPU, with a DDP for CPUs."""
        trainer: Any = self
        super(DefaultTrainer, trainer).__init__()
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = trainer.build_model(cfg)
        optimizer = trainer.build_optimizer(cfg, model)
        loader = trainer.build_train_loader(cfg)
        ddp = DistributedDataParallel(model, broadcast_buffers=False)
        inner = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        trainer._trainer = inner(ddp, loader, optimizer)
        trainer.scheduler = trainer.build_lr_scheduler(cfg, optimizer)
        trainer.checkpointer = DetectionCheckpointer(
            ddp, cfg.OUTPUT_DIR, trainer=weakref.proxy(trainer)
        )
        trainer.start_iter = 0
        trainer.max_iter = cfg.SOLVER.MAX_ITER
        trainer.cfg = cfg
        trainer.register_hooks(trainer.build_hooks())

    def _install_loader(self) -> ResumableLoader | None:
        """Put a `ResumableLoader` in the place of Detectron2's loader, if that is what it is."""
        inner: Any = self._trainer
        stock = inner.data_loader
        loader = resumable(stock, self.cfg)
        if loader is None:
            logger.warning(
                "The training loader (%s) is not of Detectron2's build_detection_train_loader: a "
                "resumed run will start its shuffle anew.",
                type(stock).__name__,
            )
            return None
        if hasattr(inner, "reset_data_loader"):
            inner.reset_data_loader(lambda: loader)
        else:  # 0.6 iterates in its constructor, which starts a DataLoader but not a generator
            loader.starts_quietly = isinstance(stock, DataLoader)
            inner.data_loader, inner._data_loader_iter = loader, iter(loader)
        return loader

    def build_hooks(self) -> list[HookBase]:
        """The stock hooks, and ours in their places among them."""
        stock: list[HookBase] = super().build_hooks()  # type: ignore[misc]
        # Writers come last, after what they write; states are gathered before the first save.
        # Only the main process has one, so it is no place for what all processes do together.
        behind = [i + 1 for i, hook in enumerate(stock) if isinstance(hook, hooks.EvalHook)]
        at = behind[-1] if behind else len(stock)
        stock[at:at] = [TeacherGap(self.cfg), PeerEvaluation(self.cfg)]
        _insert_before(stock, (hooks.PeriodicWriter,), [_Flush()])
        _insert_before(stock, (hooks.PeriodicCheckpointer, hooks.EvalHook), [_Gather()])
        return stock

    def resume_or_load(self, resume: bool = True) -> None:
        """
        As in `DefaultTrainer`; a last checkpoint that is not this run's is refused.

        Raises:
            ValueError: if it is damaged, of another model, or of a run with other terms or sources,
                or with and without distillation.
        """
        distiller = find_distiller(self.model)
        if resume and self.checkpointer.has_checkpoint():
            check_last_checkpoint(
                self.checkpointer, self.checkpointer.model, distilled=distiller is not None
            )
        elif distiller is not None:
            with distiller.starting():
                super().resume_or_load(resume=False)  # type: ignore[misc]
            return
        super().resume_or_load(resume=resume)  # type: ignore[misc]

    def before_train(self) -> None:
        """The hooks."""
        self._done = self.iter - 1
        super().before_train()  # type: ignore[misc]

    def before_step(self) -> None:
        """The hooks; before the first step a resumed run takes up the checkpoint's states."""
        self._run_state.before_step()
        super().before_step()  # type: ignore[misc]

    def run_step(self) -> None:
        """
        One step.

        Raises:
            FloatingPointError: if a loss is not finite, before the weights are changed.
        """
        try:
            super().run_step()  # type: ignore[misc]
        except FloatingPointError as e:
            why = self._why_not_finite(find_distiller(self.model))
            raise FloatingPointError(
                f"{e} {why}The weights are those before this step; the last checkpoint is intact."
            ) from e

    @staticmethod
    def _why_not_finite(distiller: Distiller | None) -> str:
        if distiller is None:
            return ""
        if why := distiller.explain_non_finite():
            return why + " "
        if comm.get_world_size() > 1:  # Detectron2 averages the losses of all, and one raises
            return (
                "Every distillation term of this process is finite: it is the detector itself, or "
                "another process's batch. "
            )
        return "Every distillation term is finite: it is the detector itself. "

    def after_step(self) -> None:
        """The hooks; what they draw does not reach the next step."""
        self._done = self.iter
        with self._run_state.aside(self.iter):
            super().after_step()  # type: ignore[misc]

    def after_train(self) -> None:
        """The hooks; after a last step that failed, no evaluation, which would wait for others."""
        reached = self.iter
        if self._done is not None and self._done < reached == self.max_iter - 1:
            self.iter = self._done  # EvalHook takes the last iteration for the end of training
        super().after_train()  # type: ignore[misc]
        self.iter = reached

    def state_dict(self) -> dict[str, Any]:
        """With the inner trainer's (optimizer, scaler), which Detectron2 0.6 leaves out."""
        state = super().state_dict()  # type: ignore[misc]
        if self._done is not None:  # BestCheckpointer saves after training, where iter is one more
            state["iteration"] = self._done
        state.setdefault("_trainer", self._trainer.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        The counterpart of `state_dict`; what a checkpoint has not (the optimizer, of Detectron2
        0.6; the scaler, of a run without AMP) starts anew.

        Raises:
            ValueError: if the optimizer's state is of other parameters.
        """
        own, saved = self._trainer.state_dict(), state.get("_trainer", {})
        if missing := sorted(own.keys() - saved.keys() - {"iteration"}):
            logger.warning("The checkpoint has no state of %s: it starts anew.", ", ".join(missing))
        inner = {**own, **saved}
        try:
            self._trainer.load_state_dict(inner)
        except ValueError as e:
            raise ValueError(
                "The checkpoint's optimizer trained other parameters than this run's "
                f"({e}): resume with the same MODEL.BACKBONE.FREEZE_AT, norms and optimizer, or "
                "start a new run with MODEL.WEIGHTS set to the checkpoint."
            ) from e
        super().load_state_dict({**state, "_trainer": inner})  # type: ignore[misc]


class _Start(HookBase):
    """Before the first batch: what cannot work is an error now, not in an hour."""

    def before_train(self) -> None:
        trainer = self.trainer
        cfg, distiller = trainer.cfg, find_distiller(trainer.model)
        check_output_dir(cfg, trainer.model)
        if comm.is_main_process():
            remove_stale(cfg.OUTPUT_DIR)
        if distiller is not None:
            check_gates(cfg, distiller)
            distiller.prepare()
        if distiller is None or distiller.on_start is None:  # else the Distiller does it
            begin_run(cfg, distiller)


class _Flush(HookBase):
    """The diagnostics of the last steps, which no forward comes after to write."""

    def after_train(self) -> None:
        distiller = find_distiller(self.trainer.model)
        if distiller is not None:
            distiller.flush(wait=True)


class _Gather(HookBase):
    """Before a checkpoint is written by the main process: what it needs of the other ones."""

    def after_step(self) -> None:
        if comm.get_world_size() == 1:
            return
        cfg, done = self.trainer.cfg, self.trainer.iter + 1
        # BestCheckpointer saves after an evaluation.
        periods = (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
        if done >= self.trainer.max_iter or any(p > 0 and done % p == 0 for p in periods):
            self.trainer._run_state.gather()


class Trainer(TrainerMixin, DefaultTrainer):
    """What ``train_net.py`` runs: `DefaultTrainer`, the mixin, and COCO evaluation."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See `kd_det.engine.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)


def _insert_before(
    stock: list[HookBase], kinds: tuple[type[HookBase], ...], ours: list[HookBase]
) -> None:
    first = next((i for i, hook in enumerate(stock) if isinstance(hook, kinds)), len(stock))
    stock[first:first] = ours
