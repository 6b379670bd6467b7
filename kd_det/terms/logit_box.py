"""LogitBoxKD: sigmoid class scores, and boxes by their overlap."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_det.boxes import decode
from kd_det.context import Context
from kd_det.detectors import TapShape
from kd_det.losses import generalized_iou, mean_over_images, sum_over_cells, weighted_bce
from kd_det.pairing import in_units, on_one_grid, unit_ratio
from kd_det.registry import TERMS
from kd_det.sources import Source
from kd_det.taps import Maps
from kd_det.terms.levelwise import LevelwiseTerm
from kd_det.terms.normalizer import check_normalizer, divisor
from kd_det.terms.term import PlanRow

_BOX_SCORES = ("gap", "teacher")


@TERMS.register()
class LogitBoxKD(LevelwiseTerm):
    """
    The predictions of a dense detector: class scores by a weighted binary cross-entropy, boxes by
    their overlap, both divided by the number of positive anchors, as the student's own losses.

        L_l = [ sum_{n,a,k,i} |q - p| * BCE(q, p)  +  box_weight * sum_{n,a,i} v * (1 - GIoU(b_s,
                b_t)) ] / positives
        p = sigmoid(t), q = sigmoid(s);  v_nai = max_k |q - p|  or  max_k p

    The class part is that of CrossKD (Wang et al., CVPR 2024) and BCKD (Yang et al., ICCV 2023),
    see `kd_det.losses.weighted_bce`; the box part with ``v = max_k |q - p|`` and the weight 4 is
    BCKD's localisation term, with ``max_k p`` it is CrossKD's. No gradient flows through v.
    (CrossKD itself runs the student's features through the teacher's head, which this term does
    not.)

    Boxes are decoded with the student's anchors and coding on both sides. The anchors must be the
    same (their number per cell is checked), and so must what the deltas mean (offsets from anchors
    are no distances to sides); where the weights of the two box transforms differ, the teacher's
    deltas are brought into the student's units. Deltas are decoded in float32.

    Args:
        tap: class logits.
        box_tap: box deltas.
        beta: power of the class weight, 0 or >= 1.
        box_weight: factor on the boxes' part; 0 leaves it out, and its taps.
        box_score: ``"gap"`` or ``"teacher"``: what an anchor's box counts by.
        normalizer: ``"positives"`` or ``"cells"``, see `kd_det.terms.normalizer`.
        levelwise: source_tap, levels, level_weights, connector, region, and source, weight,
            schedule: see `LevelwiseTerm`.

    Raises:
        ValueError: if a value is out of its range; when wired, if the anchors or the coding of a
            level differ; in a step, if the student keeps no positives or has no anchors.
    """

    saves_target = False  # only its scores and boxes

    def __init__(
        self,
        *,
        tap: str = "cls_logits",
        box_tap: str = "box_deltas",
        beta: float = 1.0,
        box_weight: float = 4.0,
        box_score: str = "gap",
        normalizer: str = "positives",
        **levelwise: Any,
    ) -> None:
        super().__init__(tap=tap, **levelwise)
        if not (beta == 0 or 1 <= beta < float("inf")):
            raise ValueError(f"LogitBoxKD needs beta 0 or a finite beta >= 1, but got {beta}.")
        if not 0 <= box_weight < float("inf"):
            raise ValueError(f"LogitBoxKD needs a finite box_weight >= 0, but got {box_weight}.")
        if box_score not in _BOX_SCORES:
            raise ValueError(
                f"LogitBoxKD's box_score is one of {', '.join(_BOX_SCORES)}, but got '{box_score}'."
            )
        check_normalizer("LogitBoxKD", normalizer)
        self.box_tap = box_tap
        self.beta = float(beta)
        self.box_weight = float(box_weight)
        self.box_score = box_score
        self.normalizer = normalizer
        self.ratios: dict[str, tuple[float, ...]] = {}

    def student_taps(self) -> tuple[str, ...]:  # noqa: D102  # as in the base
        return (*super().student_taps(), *[self.box_tap] * bool(self.box_weight))

    def source_taps(self) -> tuple[str, ...]:  # noqa: D102  # as in the base
        return (*super().source_taps(), *[self.box_tap] * bool(self.box_weight))

    def wire(  # noqa: D102  # as in the base
        self, student: Mapping[str, list[TapShape]], target: Mapping[str, list[TapShape]]
    ) -> list[PlanRow]:
        rows = super().wire(student, target)
        if self.box_weight:
            self._check_boxes(student[self.box_tap], target[self.box_tap])
        return rows

    def _check_boxes(self, student: list[TapShape], target: list[TapShape]) -> None:
        ours = {x.level: x for x in student}
        theirs = {x.level: x for x in target}
        for pair in self.pairs:
            s, t = ours.get(pair.student.level), theirs.get(pair.target.level)
            if s is None or t is None:
                raise ValueError(
                    f"tap '{self.box_tap}' has no level {pair.student.level} on both sides, as tap "
                    f"'{self.tap}' has: leave the level out of LEVELS, or set BOX_WEIGHT: 0"
                )
            if s.channels != t.channels or s.stride != t.stride or s.channels % 4:
                raise ValueError(
                    f"level {s.level} of tap '{self.box_tap}': the student has {s.channels} "
                    f"channels at stride {s.stride} and the target {t.channels} at stride "
                    f"{t.stride}; boxes can be compared where both have 4 per anchor, for the same "
                    "anchors. Set BOX_WEIGHT: 0 for the class scores alone"
                )
            if s.names and t.names and s.names != t.names:
                raise ValueError(
                    f"level {s.level} of tap '{self.box_tap}': the student's boxes are coded as "
                    f"{', '.join(s.names)} and the target's as {', '.join(t.names)}, and both are "
                    "decoded alike. Set BOX_WEIGHT: 0 for the class scores alone"
                )
            self.ratios[s.level] = unit_ratio(s, t)

    def forward(  # noqa: D102  # as in the base
        self,
        student: Mapping[str, Maps],
        target: Mapping[str, Maps],
        context: Context,
        source: Source,
    ) -> dict[str, Tensor]:
        number = divisor(self.normalizer, context)
        distances = self._box_distances(student, target, context) if self.box_weight else {}
        values = {}
        for level, s, t, region in self.aligned(student, target, context):
            value = weighted_bce(s, t, beta=self.beta, region=region, normalizer=number)
            if self.box_weight:
                apart = self._score(s, t, distances[level]) * distances[level]  # (N, A, H, W)
                per_cell = apart.sum(1, keepdim=True)
                boxes = (
                    mean_over_images(per_cell, region)
                    if number is None
                    else sum_over_cells(per_cell, region) / number
                )
                value = value + self.box_weight * boxes
            values[level] = value
        return values

    def compare(self, student: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
        """The class part of one level as a mean over cells, see `LevelwiseTerm.compare`."""
        return weighted_bce(student, target, beta=self.beta, region=region)

    def _box_distances(
        self, student: Mapping[str, Maps], target: Mapping[str, Maps], context: Context
    ) -> dict[str, Tensor]:
        """For every level ``1 - GIoU`` of the two boxes of each anchor, ``(N, A, H, W)``."""
        # Anchors are made for all levels of the head at once; those without a partner are not used.
        ours = dict(student[self.box_tap])
        theirs = {level: x.detach() for level, x in ours.items()}
        for pair in self.pairs:
            level = pair.student.level
            ours[level], other = on_one_grid(
                ours[level], target[self.box_tap][pair.target.level], pair
            )
            theirs[level] = in_units(other, self.ratios[level])
        mine = decode(context, list(ours.values()))
        with torch.no_grad():
            given = decode(context, list(theirs.values()))
        return {
            level: 1 - generalized_iou(a, b, dim=2)
            for level, a, b in zip(ours, mine, given, strict=True)
        }

    @torch.no_grad()
    def _score(self, student: Tensor, target: Tensor, like: Tensor) -> Tensor:
        """What the box of each anchor counts, ``(N, A, H, W)``."""
        p = torch.sigmoid(target.to(like.dtype))
        score = p if self.box_score == "teacher" else (torch.sigmoid(student.to(like.dtype)) - p)
        return score.abs().unflatten(1, (like.shape[1], -1)).amax(2)
