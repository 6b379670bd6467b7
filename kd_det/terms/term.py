"""The base of terms."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from kd_det.context import Context
from kd_det.detectors import TapShape
from kd_det.schedules import Constant, Schedule
from kd_det.sources import Source
from kd_det.taps import Maps

Aligned = tuple[str, Tensor, Tensor, Tensor | None]
"""(level, student's map, target's map, region), as `kd_det.terms.LevelwiseTerm` compares them."""


@dataclass(frozen=True)
class PlanRow:
    """
    What a term does on one level, for the plan that ``--dry-run`` prints.

    Attributes:
        tap: of the student.
        level: of that tap.
        target: the source's tap and level.
        student_channels: C of the student.
        target_channels: C of the source.
        stride: pixels of the student's input per cell; 0 for rows (`kd_det.taps.ROWS`).
        connector: between the two.
        region: where it counts.
        loss: how they are compared.
        parameters: of the connector.
        value: name of the value that `Term.forward` gives for it; empty for the level's.
        rows: how many rows there are at most per image, where there is no grid.
        compared_channels: those that the loss sees, where they are not the target's; 0 stands for
            the target's.
        note: a sentence for below the table: the classes that were matched, say.
    """

    tap: str
    level: str
    target: str
    student_channels: int
    target_channels: int
    stride: int
    connector: str
    region: str
    loss: str
    parameters: int
    compared_channels: int = 0
    note: str = ""
    value: str = ""
    rows: int = 0


class Term(nn.Module):
    """
    One addition to a learner's loss, the student's unless it says otherwise:
    ``weight * schedule(progress) * sum_l value_l``.

    A term owns what it trains (connectors, generators, teacher-side modules) as submodules: those
    parameters are optimised with the student's and are never exported.

    Args:
        source: name of the source that is imitated; empty for the only one, ``student`` for the
            student itself, whom a peer imitates.
        learner: who imitates: empty for the student, or the name of a source that learns with it
            (`Source.is_learner`). "The student" is then that one, in all that a term is given.
        weight: factor on the term, finite and >= 0; 0 removes the term and its taps.
        schedule: how the weight moves over the run.

    Raises:
        ValueError: if the weight is negative or not finite.
    """

    saves_target: bool = True
    """
    Whether `forward` may save a target's map for its backward, as most arithmetic with the
    student's map does. A source whose terms all say False runs in inference mode, whose tensors
    autograd refuses to save. Not inherited: a subclass may compute something else.
    """

    moves_target: bool = False
    """
    Whether the gradient of `forward` goes to both sides: targets of sources that learn come as they
    are then, and not detached. Not inherited either.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.saves_target = cls.__dict__.get("saves_target", True)
        cls.moves_target = cls.__dict__.get("moves_target", False)

    def __init__(
        self,
        *,
        source: Annotated[str, "name"] = "",
        learner: Annotated[str, "name"] = "",
        weight: float = 1.0,
        schedule: Schedule = Constant(),
    ) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{type(self).__name__} needs a finite weight >= 0, but got {weight}.")
        self.source = source
        self.learner = learner
        self.weight = float(weight)
        self.schedule = schedule

    def student_taps(self) -> tuple[str, ...]:
        """Names of the taps of the student that `forward` reads."""
        raise NotImplementedError

    def source_taps(self) -> tuple[str, ...]:
        """Names of the taps of the source that `forward` reads."""
        raise NotImplementedError

    def wire(
        self, student: Mapping[str, list[TapShape]], target: Mapping[str, list[TapShape]]
    ) -> list[PlanRow]:
        """
        Build what depends on shapes; called once, before the optimizer is made.

        Args:
            student: for every student tap its levels.
            target: for every source tap its levels.

        Returns:
            One row per level for the plan.

        Raises:
            ValueError: if the shapes cannot be brought together.
        """
        raise NotImplementedError

    def forward(
        self,
        student: Mapping[str, Maps],
        target: Mapping[str, Maps],
        context: Context,
        source: Source,
    ) -> dict[str, Tensor]:
        """
        The unweighted value of every level, a scalar attached to the student's graph. A term that
        compares several taps may have several values per level, each under a name of its own.

        Args:
            student: for every student tap its maps, with gradients.
            target: for every source tap its maps.
            context: ground truth, sizes, anchors, progress.
            source: the source itself, for methods that run parts of it.
        """
        raise NotImplementedError

    def level_weight(self, level: str) -> float:
        """Factor on the value of a level, beside the term's weight."""
        return 1.0

    def target_level(self, level: str) -> str:
        """Name of the target's level that a level of the student is compared with."""
        return level

    def aligned(
        self, student: Mapping[str, Maps], target: Mapping[str, Maps], context: Context
    ) -> Iterator[Aligned]:
        """
        What `forward` compares, for diagnostics and pictures: maps of one shape, the student's
        after its connector, and the region. A term that compares no two maps has none.

        Args:
            student: as in `forward`.
            target: as in `forward`.
            context: as in `forward`.
        """
        yield from ()
