"""The base of target sources."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from kd_det.classes import ClassNames, unknown
from kd_det.context import Context
from kd_det.detectors import TapShape
from kd_det.taps import Maps


class SourceUnavailable(FileNotFoundError):
    """A file that a source needs is not there: training cannot start, evaluation can."""


@dataclass
class Targets:
    """
    What a source gives to one step.

    Attributes:
        maps: for every asked tap its maps; with gradients where the source learns by them
            (`Source.is_learner`). As targets they reach a term detached, see `Term.moves_target`.
        losses: losses of the source's own networks (a self-teacher's task loss), which are added
            to the step's loss dict under their names.
        learner: of a source that is a learner, the step from its side: its network as ``student``,
            and ``maps`` as ``student_maps``.
    """

    maps: Mapping[str, Maps]
    losses: dict[str, Tensor] = field(default_factory=dict)
    learner: Context | None = None


class Source(nn.Module):
    """
    Who is imitated. A source that trains owns its networks as submodules: their parameters are
    optimised with the student's, live in the kd state, and never enter the student's checkpoint.
    A frozen network is held by `Hidden`.
    """

    targets_saved: bool = True
    """
    Whether a term may save the targets for its backward, see `Term.saves_target`; the wiring says
    so. Where none does, they may be inference tensors.
    """
    learns: bool = False
    """
    Whether it runs in every step until its terms are over, and not only in those where a term
    counts: an average follows the student, a self-teacher has a task loss. In the other steps it is
    asked for no taps.
    """
    is_learner: bool = False
    """
    Whether it learns the student's task from the labels, as the student does: it runs in every
    step, whether a term names it or not, and a term may name it as its ``learner``.
    """
    run_name: str = ""
    """What the run calls it; set by the wiring."""
    of: str = ""
    """Which network it is made of, of those that learn: the student (empty), or a peer's name."""
    members: tuple[str, ...] = ()
    """
    Names of other sources whose maps it reads, ``student`` for the student's: they run before it,
    and their maps come as ``context.targets``.
    """
    run_classes: ClassNames = staticmethod(unknown)
    """What the run's labels are called; set by the wiring."""

    @property
    def network(self) -> nn.Module | None:
        """A whole detector of its own, to be evaluated and exported, or ``None``."""
        return None

    def reads(self, taps: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
        """
        Taps of its members that it needs to give these taps, by member: of each the same ones.

        Args:
            taps: names of taps of this source.
        """
        return dict.fromkeys(self.members, taps)

    def wire_members(self, shapes: Mapping[str, Mapping[str, list[TapShape]]]) -> None:
        """
        Look at the shapes of what it `reads`, by member and tap; called once, before `shapes`.

        Raises:
            ValueError: if they do not fit together.
        """

    def attach(self, student: nn.Module) -> None:
        """
        Meet the student, for a source that is made of it, or the peer that `of` names; called once,
        first of all. Its weights may be loaded later, and it may move to another device.

        Args:
            student: the detector. It must not become a submodule.

        Raises:
            ValueError: if nothing can be made of this one.
            SourceUnavailable: if a file that says what the source is is missing.
        """

    def student_taps(self, taps: tuple[str, ...]) -> tuple[str, ...]:
        """
        Taps of the student that this source reads from ``context.student_maps`` to give these taps.

        Args:
            taps: names of taps of the source. No file is read here: evaluation needs none.
        """
        return ()

    def wire(self, student: Mapping[str, list[TapShape]]) -> None:
        """Build what depends on the student's shapes, by tap name; called once, before `shapes`."""

    def shapes(self, taps: tuple[str, ...]) -> dict[str, list[TapShape]]:
        """
        What its taps look like, without reading weights.

        Args:
            taps: names of taps of the source.

        Raises:
            SourceUnavailable: if a file that says so is missing.
            KeyError: if a tap does not exist.
        """
        raise NotImplementedError

    def prepare(self, taps: tuple[str, ...]) -> None:
        """
        Get ready to run these taps: read and check weights. Called before the first training step,
        even where the first term starts later; a second call does nothing.

        Raises:
            SourceUnavailable: if a file is missing.
            ValueError: if a file is not what it should be.
        """

    def forward(self, context: Context, taps: tuple[str, ...]) -> Targets:
        """The targets of one batch: maps of the asked taps."""
        raise NotImplementedError

    def release(self) -> None:
        """Free what is held; called when no term needs the source until the end of the run."""

    def trained_state(self) -> dict[str, Tensor]:
        """
        Trained weights that a student may inherit, by the names of its detector's state_dict.

        Raises:
            ValueError: if the source has none.
        """
        raise ValueError(f"A {type(self).__name__} has no trained weights to inherit from.")

    def fingerprint(self) -> str:
        """Identity of what is imitated, checked on resume; empty when there is nothing to check."""
        return ""
