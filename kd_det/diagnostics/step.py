"""One training step, as the diagnostics see it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kd_det.context import Context
from kd_det.taps import Maps

Values = dict[str, dict[str, Tensor]]
"""For every active term, level name to unweighted value."""


@dataclass
class Step:
    """
    What the forward of one training step made; nobody keeps it longer than that.

    Attributes:
        losses: the loss dict.
        task: the names in it of the student's own losses.
        values: see `Values`.
        weights: for every term its weight times its schedule's factor.
        maps: for every recorded tap of the student its maps, with gradients.
        targets: for every source that ran and every asked tap its maps.
        context: the step as the terms see it.
    """

    losses: dict[str, Tensor]
    task: tuple[str, ...]
    values: Values
    weights: dict[str, float]
    maps: dict[str, Maps]
    targets: dict[str, Mapping[str, Maps]]
    context: Context
