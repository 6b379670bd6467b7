"""
Knowledge distillation for Detectron2 detectors.

Importing kd_det registers the meta-architecture "Distiller"; `add_kd_config` gives a config its
``KD`` node. The Python door is `Distiller`, with sources (`Teacher`) and `terms`.
"""

from kd_det import _compat

_compat.prepare()  # before anything else: what follows imports Detectron2

from kd_det import connectors, losses, regions, schedules, sources, terms
from kd_det.build import build_distiller
from kd_det.config import add_kd_config
from kd_det.distiller import Distiller
from kd_det.engine import TrainerMixin
from kd_det.inherit import Inherit
from kd_det.kd_state import KDState
from kd_det.sources import Teacher

__version__ = "0.1.0"

__all__ = [
    "Distiller",
    "Inherit",
    "KDState",
    "Teacher",
    "TrainerMixin",
    "add_kd_config",
    "build_distiller",
    "connectors",
    "losses",
    "regions",
    "schedules",
    "sources",
    "terms",
]
