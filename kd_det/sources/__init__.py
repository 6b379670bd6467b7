"""Target sources: who is imitated."""

from kd_det.sources.ema import EMA
from kd_det.sources.ensemble import Ensemble
from kd_det.sources.frskd import FRSKD
from kd_det.sources.hidden import Hidden
from kd_det.sources.peer import Peer
from kd_det.sources.scripted import ScriptedTeacher
from kd_det.sources.second_head import SecondHead
from kd_det.sources.source import Source, SourceUnavailable, Targets
from kd_det.sources.student import STUDENT, Student
from kd_det.sources.teacher import Teacher

__all__ = [
    "EMA",
    "FRSKD",
    "STUDENT",
    "Ensemble",
    "Hidden",
    "Peer",
    "ScriptedTeacher",
    "SecondHead",
    "Source",
    "SourceUnavailable",
    "Student",
    "Targets",
    "Teacher",
]
