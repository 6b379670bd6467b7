"""Parts of a detector's description: depths, shapes of taps, heads of two-stage detectors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kd_det.taps import Maps, Tap


@dataclass(frozen=True)
class Depth:
    """
    One way to run a detector in part.

    Attributes:
        reaches: module paths: everything at or under them is run, and nothing else.
        forward: from the image tensor.
    """

    reaches: tuple[str, ...]
    forward: Callable[[Tensor], Any]

    def has(self, path: str) -> bool:
        """Whether the module at this path is run."""
        return any(path == part or path.startswith(part + ".") for part in self.reaches)


@dataclass(frozen=True)
class TapShape:
    """
    What a tap's level looks like, measured on the architecture.

    Attributes:
        level: its name, ``p3`` for instance.
        channels: C.
        stride: pixels of the padded input per cell; 0 for rows (`kd_det.taps.ROWS`).
        origin: see `Tap.origins`.
        kind: see `Tap.kind`.
        calls: how often the tapped module fires in one forward.
        anchors: A, where its channels are anchors x classes (or coordinates), anchor by anchor; 0
            where that is unknown.
        names: what the channels of one anchor are called, in order; empty where that is unknown.
        units: see `Tap.units`.
        activation: of class scores, what makes probabilities of them: ``"softmax"``, the background
            last, or ``"sigmoid"``, where the last column means nothing.
        rows: how many of them a training step has at most per image.
    """

    level: str
    channels: int
    stride: int
    origin: str = ""
    kind: str = "feature"
    calls: int = 1
    anchors: int = 0
    names: tuple[str, ...] = ()
    units: tuple[float, ...] = ()
    activation: str = ""
    rows: int = 0

    @property
    def per_anchor(self) -> int:
        """Channels of one anchor: classes, or coordinates."""
        return self.channels // (self.anchors or 1)


@dataclass(frozen=True)
class RoiHead:
    """
    How a two-stage detector looks at given boxes, stage by stage (a cascade has several).

    Attributes:
        features: the maps that it pools from.
        taps: ``proposals``, ``roi_scores`` and ``roi_deltas``; a level is a stage.
        shapes: what they look like. They cannot be measured: how many regions there are is data.
        run: from those maps and, for every stage, its boxes, up to the last predictor. Stages
            without boxes are not run. A Recorder sees what the predictors return.
    """

    features: Tap
    taps: dict[str, Tap]
    shapes: dict[str, list[TapShape]]
    run: Callable[[Maps, Maps], None]
