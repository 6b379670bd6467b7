"""Target sources: who is imitated."""

from kd_det.sources.ema import EMA
from kd_det.sources.frskd import FRSKD
from kd_det.sources.hidden import Hidden
from kd_det.sources.scripted import ScriptedTeacher
from kd_det.sources.source import Source, SourceUnavailable, Targets
from kd_det.sources.teacher import Teacher

__all__ = [
    "EMA",
    "FRSKD",
    "Hidden",
    "ScriptedTeacher",
    "Source",
    "SourceUnavailable",
    "Targets",
    "Teacher",
]
