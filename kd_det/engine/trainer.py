"""A DefaultTrainer that knows of the Distiller."""

import logging
import weakref
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd_det.build import write_student_config
from kd_det.distiller import Distiller
from kd_det.engine.checkpointing import AtomicPaths
from kd_det.engine.evaluators import build_evaluator
from kd_det.kd_state import KDState

logger = logging.getLogger(__name__)


class TrainerMixin:
    """
    Goes in front of a `DefaultTrainer`, stock or your own.

        class Trainer(kd_det.TrainerMixin, DefaultTrainer): ...

    It saves what trains beside the student as the checkpointable ``kd``, writes checkpoints by
    temporary file and rename, saves the optimizer where Detectron2 0.6 forgets it, reads and checks
    the teacher's weights before the first batch, writes ``student.yaml``, and trains on several
    CPU processes. Without a Distiller (``KD.ENABLED: False``) only the general parts apply.
    """

    cfg: CfgNode
    model: nn.Module
    checkpointer: DetectionCheckpointer
    _trainer: SimpleTrainer

    def __init__(self, cfg: CfgNode) -> None:
        if comm.get_world_size() > 1 and cfg.MODEL.DEVICE == "cpu":
            self._init_on_cpus(cfg)
        else:
            super().__init__(cfg)  # type: ignore[call-arg]  # DefaultTrainer comes behind
        self.checkpointer.path_manager = AtomicPaths(self.checkpointer.path_manager)
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

    def state_dict(self) -> dict[str, Any]:
        """With the inner trainer's (optimizer, scaler), which Detectron2 0.6 leaves out."""
        state = super().state_dict()  # type: ignore[misc]
        state.setdefault("_trainer", self._trainer.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`; a checkpoint without the inner state is accepted."""
        super().load_state_dict(state)  # type: ignore[misc]
        if "_trainer" in state:
            self._trainer.load_state_dict(state["_trainer"])
        else:
            logger.warning("The checkpoint has no optimizer state: momentum starts from zero.")


class _Start(HookBase):
    """Before the first batch: a teacher that cannot be read is an error now, not in an hour."""

    def before_train(self) -> None:
        distiller = find_distiller(self.trainer.model)
        if distiller is not None:
            distiller.prepare()
        write_student_config(self.trainer.cfg)


class Trainer(TrainerMixin, DefaultTrainer):
    """What ``train_net.py`` runs: `DefaultTrainer`, the mixin, and COCO evaluation."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See `kd_det.engine.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)


def find_distiller(model: nn.Module) -> Distiller | None:
    """The Distiller inside of wrappers such as DDP, or ``None``."""
    return next((m for m in model.modules() if isinstance(m, Distiller)), None)
