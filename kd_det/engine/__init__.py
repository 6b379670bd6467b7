"""What a training loop needs beside the Distiller: trainer, gate, evaluators, launch, dry run."""

from kd_det.engine.checkpointing import AtomicPaths
from kd_det.engine.dry_run import dry_run
from kd_det.engine.ensemble import EnsembleModel
from kd_det.engine.errors import plain_errors
from kd_det.engine.evaluators import build_evaluator
from kd_det.engine.launch import launch
from kd_det.engine.loader import ResumableLoader
from kd_det.engine.output_dir import check_output_dir, remove_stale
from kd_det.engine.peer_evaluation import PeerEvaluation
from kd_det.engine.preflight import check_data, check_solver, check_weights, load_config
from kd_det.engine.resume import RunState
from kd_det.engine.teacher_ap import check_gate, check_gates, evaluate_teacher
from kd_det.engine.teacher_gap import TeacherGap
from kd_det.engine.trainer import Trainer, TrainerMixin

__all__ = [
    "AtomicPaths",
    "EnsembleModel",
    "PeerEvaluation",
    "ResumableLoader",
    "RunState",
    "TeacherGap",
    "Trainer",
    "TrainerMixin",
    "build_evaluator",
    "check_data",
    "check_gate",
    "check_gates",
    "check_output_dir",
    "check_solver",
    "check_weights",
    "dry_run",
    "evaluate_teacher",
    "launch",
    "load_config",
    "plain_errors",
    "remove_stale",
]
