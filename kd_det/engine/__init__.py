"""What a training loop needs beside the Distiller: trainer, evaluators, launch, dry run."""

from kd_det.engine.checkpointing import AtomicPaths
from kd_det.engine.dry_run import dry_run
from kd_det.engine.evaluators import build_evaluator
from kd_det.engine.launch import launch
from kd_det.engine.trainer import Trainer, TrainerMixin

__all__ = ["AtomicPaths", "Trainer", "TrainerMixin", "build_evaluator", "dry_run", "launch"]
