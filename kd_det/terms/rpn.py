"""Distillation of a region proposal network: objectness and deltas of every anchor."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_det.context import Context
from kd_det.detectors import TapShape
from kd_det.losses import bernoulli_kl, delta_gap, temperature
from kd_det.pairing import Pair, on_one_grid, pair_levels, unit_ratio
from kd_det.regions import Padding, Region
from kd_det.registry import TERMS
from kd_det.sources import Source
from kd_det.taps import Maps
from kd_det.terms.term import Aligned, PlanRow, Term

_LOGITS, _DELTAS = "rpn_logits", "rpn_deltas"


@TERMS.register()
class RPN(Term):
    """
    A teacher's objectness and deltas for the student's anchors.

        p_a = sigmoid(t_a)                      the teacher's objectness of anchor a
        kl_a = tau^2 KL( Bernoulli(sigmoid(t_a / tau)) || Bernoulli(sigmoid(s_a / tau)) )
        logits:  mean over images of 1/2 * [ sum p kl / max(1, sum p)
                                           + sum (1 - p) kl / max(1, sum (1 - p)) ]
        deltas:  mean over images of sum h smooth_l1(s - t) / max(1, sum h),
                 h_a = p_a where p_a >= min_objectness, else 0

    Sums run over the anchors of all levels inside the region; a level's value holds its share. Half
    the weight is on what the teacher takes for objects: anchors are a thousand to one background,
    and a plain mean would be of nothing else (Detectron2 samples up to half its anchors from the
    objects, for the same reason). An image whose anchors are all below ``min_objectness`` adds
    exactly 0 to the deltas. Every image has its own normaliser, so several processes with one
    number of images each have the gradient of the joined batch.

    Soft targets for the RPN are Chen et al.'s (NeurIPS 2017); the two halves, the threshold and the
    weights of 1 are our choice.

    The teacher's anchors must be the student's: as many per cell, of the same sizes and shapes (in
    the student's pixels). Their number is checked.

    Args:
        levels: names of the student's levels; empty for all that have a partner.
        tau: temperature of the objectness.
        delta_weight: factor on the deltas, beside the term's; 0 leaves them out.
        min_objectness: the teacher's probability below which an anchor's deltas do not count.
        beta: of the smooth L1 loss; 0 is L1, as Detectron2's RPN has it.
        region: where it counts.
        common: source, weight, schedule: see `Term`.

    Raises:
        ValueError: if ``tau`` is not positive and finite, or another value is out of its range.
    """

    def __init__(
        self,
        *,
        levels: tuple[str, ...] = (),
        tau: float = 1.0,
        delta_weight: float = 1.0,
        min_objectness: float = 0.5,
        beta: float = 0.0,
        region: Region = Padding(),
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not (0 <= delta_weight < math.inf and 0 <= beta < math.inf and 0 <= min_objectness <= 1):
            raise ValueError(
                "RPN needs a finite delta_weight >= 0 and beta >= 0 and a min_objectness between 0 "
                f"and 1, but got delta_weight {delta_weight}, beta {beta} and min_objectness "
                f"{min_objectness}."
            )
        self.levels = tuple(levels)
        self.tau = temperature("RPN", tau)
        self.delta_weight = float(delta_weight)
        self.min_objectness = float(min_objectness)
        self.beta = float(beta)
        self.region = region
        self.pairs: list[Pair] = []
        self.ratios: dict[str, tuple[float, ...]] = {}

    def student_taps(self) -> tuple[str, ...]:  # noqa: D102  # as in the base
        return (_LOGITS, _DELTAS) if self.delta_weight else (_LOGITS,)

    def source_taps(self) -> tuple[str, ...]:  # noqa: D102  # as in the base
        return self.student_taps()

    def wire(  # noqa: D102  # as in the base
        self, student: Mapping[str, list[TapShape]], target: Mapping[str, list[TapShape]]
    ) -> list[PlanRow]:
        self.pairs = pair_levels(student[_LOGITS], target[_LOGITS], self.levels)
        for pair in self.pairs:
            _check_anchors(pair)
        rows = []
        for tap in self.student_taps():
            ours = {x.level: x for x in student[tap]}
            theirs = {x.level: x for x in target[tap]}
            for pair in self.pairs:
                s, t = ours[pair.student.level], theirs[pair.target.level]
                rows.append(self._row(tap, s, t))
                if tap == _DELTAS:
                    self.ratios[s.level] = unit_ratio(s, t)
        return rows

    def _row(self, tap: str, student: TapShape, target: TapShape) -> PlanRow:
        return PlanRow(
            tap=tap,
            level=student.level,
            target=f"{tap}.{target.level}",
            student_channels=student.channels,
            target_channels=target.channels,
            stride=target.stride,
            connector="-",
            region=type(self.region).__name__,
            loss=type(self).__name__,
            parameters=0,
            value=f"{tap.removeprefix('rpn_')}.{student.level}",
        )

    def forward(  # noqa: D102  # as in the base
        self,
        student: Mapping[str, Maps],
        target: Mapping[str, Maps],
        context: Context,
        source: Source,
    ) -> dict[str, Tensor]:
        yes, no, moved = _Mean(), _Mean(), _Mean()
        for pair, (level, s, t, region) in zip(
            self.pairs, self.aligned(student, target, context), strict=True
        ):
            p = torch.sigmoid(t.to(torch.promote_types(t.dtype, torch.float32)))  # (N, A, H, W)
            inside = torch.ones_like(p[:, :1]) if region is None else region  # (N, 1, H, W)
            kl = bernoulli_kl(s, t, tau=self.tau)
            yes.add(level, kl, inside * p)
            no.add(level, kl, inside * (1 - p))
            if self.delta_weight:
                gap = self._gap(student[_DELTAS], target[_DELTAS], pair)
                moved.add(
                    f"deltas.{pair.student.level}", gap, inside * p * (p >= self.min_objectness)
                )
        wrong, missed = no.values(), yes.values()
        return {level: (missed[level] + wrong[level]) / 2 for level in missed} | moved.values()

    def _gap(self, student: Maps, target: Maps, pair: Pair) -> Tensor:
        """(N, A, H, W) distance of the deltas of every anchor."""
        s, t = on_one_grid(student[pair.student.level], target[pair.target.level], pair)
        s, t = s.unflatten(1, (-1, 4)), t.unflatten(1, (-1, 4))  # (N, A, 4, H, W)
        ratio = self.ratios[pair.student.level]
        return delta_gap(s, t, ratio=ratio, beta=self.beta, dim=-3)

    def aligned(  # noqa: D102  # as in the base
        self, student: Mapping[str, Maps], target: Mapping[str, Maps], context: Context
    ) -> Iterator[Aligned]:
        for pair in self.pairs:
            level = pair.student.level
            s, t = on_one_grid(student[_LOGITS][level], target[_LOGITS][pair.target.level], pair)
            yield f"logits.{level}", s, t, self.region(context, s, t, pair.target.stride)

    def level_weight(self, level: str) -> float:  # noqa: D102  # as in the base
        return self.delta_weight if level.startswith("deltas") else 1.0

    def target_level(self, level: str) -> str:  # noqa: D102  # as in the base
        name = level.partition(".")[2]
        return next(p.target.level for p in self.pairs if p.student.level == name)


class _Mean:
    """A weighted mean per image over the cells of all levels, kept level by level."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: list[Tensor] = []

    def add(self, level: str, x: Tensor, weight: Tensor) -> None:
        self.sums[level] = (x * weight).sum((1, 2, 3))  # (N)
        self.weights.append(weight.sum((1, 2, 3)))

    def values(self) -> dict[str, Tensor]:
        """Every level's share, mean over images; the shares' sum is the weighted mean."""
        if not self.sums:
            return {}
        total = torch.stack(self.weights).sum(0).clamp_min(1)  # (N)
        return {level: (x / total).mean() for level, x in self.sums.items()}


def _check_anchors(pair: Pair) -> None:
    s, t = pair.student, pair.target
    if s.channels != t.channels:
        raise ValueError(
            f"level {s.level}: the student's RPN has {s.channels} anchors per cell and that of the "
            f"source {t.channels}: both need the same anchors (MODEL.ANCHOR_GENERATOR), or distil "
            "features (TYPE: CWD, TAP: features)"
        )
    if s.stride != t.stride:
        raise ValueError(
            f"level {s.level}: a cell of the student's RPN covers {s.stride} pixels and one of the "
            f"source's level {t.level} {t.stride}: their anchors stand in other places. Distil "
            "features (TYPE: CWD, TAP: features)"
        )
