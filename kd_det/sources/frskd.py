"""FRSKD: a self-teacher that is grown on the student's own maps."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kd_det.connectors import Auto
from kd_det.context import Context
from kd_det.detectors import TapShape, describe
from kd_det.registry import SOURCES
from kd_det.sources.bifpn import BiFPN
from kd_det.sources.drawn_anew import drawn_anew
from kd_det.sources.second_head import PREDICTIONS, head_losses
from kd_det.sources.source import Source, Targets


@SOURCES.register()
class FRSKD(Source):
    """
    Feature refinement via self-knowledge distillation (Ji et al., CVPR 2021,
    https://arxiv.org/abs/2103.08273), for dense detectors: the student's own maps, refined by a
    `BiFPN`, and a second head on them that learns the student's task.

    Its taps are ``refined``, with the levels of ``inputs``, and the second head's ``cls_logits``
    and ``box_deltas``. All are detached: terms move the student alone. What moves the self-teacher
    is the student's own loss of the second head, ``loss_cls_self`` and so on, of weight 1, in every
    step until its terms are over; by way of ``inputs`` it moves the student too, as published.
    Those losses are divided as the student's own are: where that is by a running number
    (RetinaNet's foreground anchors), by the student's, moved on by this batch once more; the
    student's stays as it is. Images without labels are refined, and count for no loss.

    Published for classification and segmentation. Ours are the second head, in place of a linear
    classifier, and the way from the refined maps to its levels: a 1x1 convolution where the
    channels differ, and for levels coarser than all refined ones every second cell of the level
    below. The head is of the student's kind; its weights are the student's initial ones in another
    order.

    It trains with the student's optimizer, is in the kd state and never in the checkpoint.

    Args:
        inputs: taps of the student, whose levels are refined: at least two, each of twice the
            stride of the one before. ``backbone.bottom_up`` is the paper's choice, all stages that
            an FPN reads.
        width: w: a refined map has w times the channels of what it is made of; 2 in the paper.
        depth: convolutions per node; 2 in the authors' code.
        detach_input: whether the self-teacher's loss leaves the student alone.
        suffix: of the names of its losses, for a second self-teacher.

    Raises:
        ValueError: if a value is out of range; when attached, if the student is no dense detector;
            when wired, if the levels do not fit.
    """

    learns = True

    def __init__(
        self,
        *,
        inputs: tuple[str, ...] = ("features",),
        width: float = 2.0,
        depth: int = 2,
        detach_input: bool = False,
        suffix: str = "self",
    ) -> None:
        super().__init__()
        if not (inputs and 0 < width < float("inf") and depth >= 1):
            raise ValueError(
                "FRSKD needs inputs, a finite width > 0 and depth >= 1, but got inputs "
                f"{tuple(inputs)}, width {width} and depth {depth}."
            )
        self.inputs = tuple(inputs)
        self.width = float(width)
        self.depth = depth
        self.detach_input = detach_input
        self.suffix = suffix
        self.head: nn.Module = nn.Identity()

    def attach(self, student: nn.Module) -> None:  # noqa: D102  # as in the base
        self.head = drawn_anew(describe(student).dense_head())

    def student_taps(self, taps: tuple[str, ...]) -> tuple[str, ...]:
        """What is refined, and what says how its own taps look, and its head's levels."""
        return tuple(dict.fromkeys((*self.inputs, "features", *PREDICTIONS)))

    def wire(self, student: Mapping[str, list[TapShape]]) -> None:  # noqa: D102  # as in the base
        found = [(shape, tap) for tap in self.inputs for shape in student[tap]]
        found.sort(key=lambda x: x[0].stride)
        shapes = [shape for shape, _ in found]
        strides = [shape.stride for shape in shapes]
        if len(shapes) < 2 or any(b != 2 * a for a, b in pairwise(strides)):
            levels = ", ".join(f"{s.level} (stride {s.stride})" for s in shapes)
            raise ValueError(
                "FRSKD refines two levels or more, each of twice the stride of the one before, but "
                f"INPUTS {', '.join(self.inputs)} are {levels}."
            )
        self._read = [(tap, shape.level) for shape, tap in found]
        channels = [max(1, round(self.width * s.channels)) for s in shapes]
        self.bifpn = BiFPN([s.channels for s in shapes], channels, self.depth)
        self._shapes = {name: student[name] for name in PREDICTIONS}
        self._shapes["refined"] = [
            replace(s, channels=d) for s, d in zip(shapes, channels, strict=True)
        ]
        self._bridge(student["features"], self._shapes["refined"])

    def _bridge(self, levels: Sequence[TapShape], refined: Sequence[TapShape]) -> None:
        """From refined maps to the levels of the head."""
        by_stride = {s.stride: i for i, s in enumerate(refined)}
        self._from = [by_stride.get(s.stride) for s in levels]
        lost = [s for s, i in zip(levels, self._from, strict=True) if i is None]
        if bad := [s for s in lost if s.stride < refined[-1].stride]:
            raise ValueError(
                f"the head of the student reads level {bad[0].level} (stride {bad[0].stride}), and "
                f"INPUTS {', '.join(self.inputs)} have none of that stride: add it to them."
            )
        self.bridges = nn.ModuleList(
            nn.Identity() if i is None else Auto()(refined[i].channels, s.channels)
            for s, i in zip(levels, self._from, strict=True)
        )

    def shapes(self, taps: tuple[str, ...]) -> dict[str, list[TapShape]]:  # noqa: D102  # as in the base
        if unknown := set(taps) - self._shapes.keys():
            raise KeyError(
                f"FRSKD has no tap {', '.join(sorted(unknown))}: only {', '.join(self._shapes)}."
            )
        return {tap: self._shapes[tap] for tap in taps}

    def forward(self, context: Context, taps: tuple[str, ...]) -> Targets:
        """The self-teacher's losses of this batch, and the maps of the taps."""
        maps = [context.student_maps[tap][level] for tap, level in self._read]
        if self.detach_input:
            maps = [x.detach() for x in maps]
        refined = self.bifpn(maps)
        levels: list[Tensor] = []
        for i, bridge in zip(self._from, self.bridges, strict=True):
            levels.append(
                F.max_pool2d(levels[-1], 1, stride=2) if i is None else bridge(refined[i])
            )
        predictions = self.head(levels)
        found = {"refined": refined, **{tap: predictions[i] for tap, i in PREDICTIONS.items()}}
        targets = {
            tap: {
                shape.level: x.detach()
                for shape, x in zip(self._shapes[tap], found[tap], strict=True)
            }
            for tap in taps
        }
        return Targets(
            targets,
            {
                f"{name}_{self.suffix}": loss
                for name, loss in head_losses(
                    context.detector(), context.inputs, levels, predictions
                ).items()
            },
        )
