"""The student as somebody whom another network imitates."""

from collections.abc import Mapping

from kd_det.context import Context
from kd_det.detectors import TapShape
from kd_det.sources.source import Source, Targets

STUDENT = "student"
"""What the student is called among learners, networks and sources."""


class Student(Source):
    """
    The student itself, as the source of a term whose learner is a peer. It is always there, under
    the name ``student``, and costs nothing: its maps are those of the student's own forward.
    """

    _shapes: Mapping[str, list[TapShape]] = {}

    def student_taps(self, taps: tuple[str, ...]) -> tuple[str, ...]:  # noqa: D102  # as in the base
        return taps

    def wire(self, student: Mapping[str, list[TapShape]]) -> None:  # noqa: D102  # as in the base
        self._shapes = dict(student)

    def shapes(self, taps: tuple[str, ...]) -> dict[str, list[TapShape]]:  # noqa: D102  # as in the base
        return {tap: self._shapes[tap] for tap in taps}

    def forward(self, context: Context, taps: tuple[str, ...]) -> Targets:
        """The student's maps of this step, with gradients."""
        return Targets({tap: context.student_maps[tap] for tap in taps})
