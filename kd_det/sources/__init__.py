"""Target sources: who is imitated."""

from kd_det.sources.hidden import Hidden
from kd_det.sources.source import Source, SourceUnavailable, Targets
from kd_det.sources.teacher import Teacher

__all__ = ["Hidden", "Source", "SourceUnavailable", "Targets", "Teacher"]
