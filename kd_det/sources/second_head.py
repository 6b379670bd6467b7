"""A second head on the backbone of a network that learns."""

from dataclasses import replace
from typing import Annotated, Any

from torch import Tensor, nn

from kd_det.context import Context, second_view
from kd_det.detectors import Detector, TapShape, describe, probe
from kd_det.labels import is_labelled, without_objects
from kd_det.registry import SOURCES
from kd_det.sources.drawn_anew import drawn_anew
from kd_det.sources.forward import PartialForward
from kd_det.sources.hidden import Box
from kd_det.sources.source import Source, Targets

PREDICTIONS = {"cls_logits": 0, "box_deltas": 1}
"""Taps of a dense head, and their places in what it returns."""


@SOURCES.register()
class SecondHead(Source):
    """
    A second dense head on a network's own backbone, which learns the same task from the second
    photometric view of every image: one of OKDCR's two classifiers (Zhang, Gong, Liu, 2021), each
    of which sees one of two transformed images. The head of a detector in place of a linear
    classifier is a *reconstruction*.

        losses of the step:  <name>/<loss> = the network's own losses of this head, of weight 1

    The backbone runs a second time in each step, on the second view, and learns from it too. Both
    heads start from the numbers of the first one's initialisation, this one's shuffled. It trains
    with the run's optimizer, is in the kd state and in no checkpoint's ``model``. Its losses are
    divided as the network's own are, see `kd_det.detectors.Detector.dense_losses`. Without a term
    it is the control of OKDCR: a plain network with two heads.

    Args:
        of: the network, a peer's name; empty for the student.
        view: 2, or 1: the same image that the network's own head sees.

    Raises:
        ValueError: if there is no such view; when attached, if the network is no dense detector; in
            a step, if the batch has no second view.
    """

    learns = True
    is_learner = True

    def __init__(self, *, of: Annotated[str, "name"] = "", view: int = 2) -> None:
        super().__init__()
        if view not in (1, 2):
            raise ValueError(f"A SecondHead sees view 1 or 2, but got {view}.")
        self.of = of
        self.view = view
        self.head: nn.Module = nn.Identity()
        self._network = Box(None)
        self._run = PartialForward()

    def attach(self, student: nn.Module) -> None:  # noqa: D102  # as in the base
        self._network.module = student
        self.head = drawn_anew(describe(student).dense_head())

    def shapes(self, taps: tuple[str, ...]) -> dict[str, list[TapShape]]:  # noqa: D102  # as in the base
        if unknown := set(taps) - {"features", *PREDICTIONS}:
            raise KeyError(
                f"A SecondHead has no tap {', '.join(sorted(unknown))}: only features, "
                f"{', '.join(PREDICTIONS)}."
            )
        network = self._network.module
        assert network is not None, "attach() comes before shapes()"
        detector = describe(network)
        # Measured on the network itself: its own head is of the same make.
        names = ("features", *PREDICTIONS)
        shapes = probe(network, map(detector.tap, names), self.run_classes)
        self._run.expect([detector.tap("features")], shapes)
        self._levels = {name: [s.level for s in shapes[name]] for name in names}
        return {tap: shapes[tap] for tap in taps}

    def forward(self, context: Context, taps: tuple[str, ...]) -> Targets:
        """Its losses of this batch, and the maps of the taps, with gradients."""
        network = self._network.module
        assert network is not None, "attach() comes before forward()"
        if self.view == 2:
            context = replace(context, inputs=second_view(context.inputs))
        context = context.seen_by(network)
        detector = describe(network)
        features = self._run(network, [detector.tap("features")], context.inputs, {})["features"]
        levels = list(features.values())
        predictions = self.head(levels)
        maps = {"features": features} | {
            tap: dict(zip(self._levels[tap], predictions[i], strict=True))
            for tap, i in PREDICTIONS.items()
        }
        losses = head_losses(detector, context.inputs, levels, predictions)
        return Targets(
            {tap: maps[tap] for tap in taps},
            {f"{self.run_name}/{loss}": x for loss, x in losses.items()},
            replace(context, student_maps={tap: maps[tap] for tap in taps}),
        )


def head_losses(
    detector: Detector, inputs: list[dict[str, Any]], levels: list[Tensor], predictions: Any
) -> dict[str, Tensor]:
    """
    The detector's own losses of another head than its own, for the labelled images of a batch.

    Args:
        detector: description of the network.
        inputs: Detectron2's batched inputs, labelled images first.
        levels: what the head was given.
        predictions: what it returned.
    """
    # Without any label there is a loss all the same, of weight 0: DDP waits for every parameter.
    count = sum(map(is_labelled, inputs))
    labelled = inputs[:count] or [without_objects(x) for x in inputs]
    n = len(labelled)
    losses = detector.dense_losses(
        labelled, [x[:n] for x in levels], [[x[:n] for x in maps] for maps in predictions]
    )
    weight = 1 if count else 0
    return {name: weight * loss for name, loss in losses.items()}
