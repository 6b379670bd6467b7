"""One training step, as the diagnostics see it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kd_det.context import Context
from kd_det.taps import Maps

Values = dict[str, dict[str, Tensor]]
"""For every active term, level name to unweighted value."""


@dataclass
class Learner:
    """
    One of those that terms teach: the student, or a source that learns with it.

    Attributes:
        losses: names in the loss dict of its own losses.
        maps: for every recorded tap its maps, with gradients; more than `context` shows, maybe.
        context: the step as its terms see it.
    """

    losses: tuple[str, ...]
    maps: Mapping[str, Maps]
    context: Context


@dataclass
class Step:
    """
    What the forward of one training step made; nobody keeps it longer than that.

    Attributes:
        losses: the loss dict.
        values: see `Values`.
        weights: for every term its weight times its schedule's factor.
        learners: by name, the student first.
        targets: for every source that ran and every asked tap its maps.
    """

    losses: dict[str, Tensor]
    values: Values
    weights: dict[str, float]
    learners: dict[str, Learner]
    targets: dict[str, Mapping[str, Maps]]
