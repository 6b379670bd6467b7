"""Distillation of the box head on the student's sampled proposals."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kd_det.channels import common_classes
from kd_det.context import Context
from kd_det.detectors import TapShape
from kd_det.losses import bernoulli_kl, delta_gap, softmax_kl, temperature
from kd_det.pairing import Pair, unit_ratio
from kd_det.registry import TERMS
from kd_det.sources import Source
from kd_det.taps import Maps
from kd_det.terms.term import PlanRow, Term

logger = logging.getLogger(__name__)

_SCORES, _DELTAS = "roi_scores", "roi_deltas"


@TERMS.register()
class BoxHead(Term):
    """
    What a two-stage teacher says of the very boxes that the student's box head is trained on.

        scores:  1 / R * sum_r tau^2 KL( softmax(t_r / tau) || softmax(s_r / tau) )
        deltas:  1 / R * sum_r sum_k p_rk * smooth_l1(s_rk - t_rk),   p = the teacher's (tau 1)

    r runs over the R proposals that the student sampled from the batch, the KL over its K classes
    and the background, k over the classes alone: proposals that the teacher takes for background
    move no box. R counts them all, as in Detectron2's own two losses, so the values stand beside
    ``loss_cls`` and ``loss_box_reg``; it is the process's own, as theirs is. Without proposals both
    are 0. Heads with `use_sigmoid_ce` compare K Bernoulli distributions, summed. Deltas are taken
    in the student's units; one delta for all classes stands for each of them.

    Stages of a cascade are paired from the first on, each on the boxes that the student's stage
    looks at; where one side has more, the rest is left out: the first stage of a cascade and a
    plain box head are both trained on boxes of an RPN at one IoU threshold, later stages on better
    boxes at a higher one.

    Other classes are matched by name, see `kd_det.channels.common_classes`: both softmaxes then run
    over the common classes and the background.

    The soft labels are those of Chen et al. (NeurIPS 2017), with one weight for background and
    classes and the teacher's deltas as they are (theirs are bounded by the ground truth). That the
    teacher's head is run on the student's sampled proposals, and tau 1, is as in the public code of
    DKD (Zhao et al., CVPR 2022, https://arxiv.org/abs/2203.08679). The weights of 1 are our choice.

    Args:
        tau: temperature of the scores.
        delta_weight: factor on the deltas, beside the term's; 0 leaves them out.
        beta: of the smooth L1 loss; 0 is L1, as Detectron2's box head has it.
        common: source, weight, schedule: see `Term`.

    Raises:
        ValueError: if ``tau`` is not positive and finite, or another value is negative.
    """

    def __init__(
        self, *, tau: float = 1.0, delta_weight: float = 1.0, beta: float = 0.0, **common: Any
    ) -> None:
        super().__init__(**common)
        if not (0 <= delta_weight < math.inf and 0 <= beta < math.inf):
            raise ValueError(
                "BoxHead needs a finite delta_weight >= 0 and beta >= 0, but got delta_weight "
                f"{delta_weight} and beta {beta}."
            )
        self.tau = temperature("BoxHead", tau)
        self.delta_weight = float(delta_weight)
        self.beta = float(beta)
        self.pairs: dict[str, list[Pair]] = {}
        # Positions of the common classes, (the student's, the source's); None for all.
        self.classes: tuple[Sequence[int], Sequence[int]] | None = None

    def student_taps(self) -> tuple[str, ...]:  # noqa: D102  # as in the base
        return (_SCORES, _DELTAS) if self.delta_weight else (_SCORES,)

    def source_taps(self) -> tuple[str, ...]:  # noqa: D102  # as in the base
        return self.student_taps()

    def wire(  # noqa: D102  # as in the base
        self, student: Mapping[str, list[TapShape]], target: Mapping[str, list[TapShape]]
    ) -> list[PlanRow]:
        self.pairs = {
            tap: [Pair(s, t) for s, t in zip(student[tap], target[tap], strict=False)]
            for tap in self.student_taps()
        }
        for pair in self.pairs[_SCORES]:
            _check_activation(pair)
        note = self._match(self.pairs[_SCORES][0])
        rows = [self._row(tap, pair, note) for tap, pairs in self.pairs.items() for pair in pairs]
        left = abs(len(student[_SCORES]) - len(target[_SCORES]))
        if left:
            logger.info(
                "BoxHead: the student has %d stage(s) and the source %d: %d left out.",
                len(student[_SCORES]),
                len(target[_SCORES]),
                left,
            )
        return rows

    def _match(self, pair: Pair) -> str:
        """The common classes, which are those of every stage; a sentence about them."""
        s, t = (
            replace(x, channels=x.channels - 1, kind="classes") for x in (pair.student, pair.target)
        )
        try:
            mine, theirs, note = common_classes(s, t)
        except ValueError as e:
            raise ValueError(f"{s.level}, beside the background: {e}") from None
        if mine or theirs:
            self.classes = mine or range(s.channels), theirs or range(t.channels)
        return note

    def _row(self, tap: str, pair: Pair, note: str) -> PlanRow:
        return PlanRow(
            tap=tap,
            level=pair.student.level,
            target=f"{tap}.{pair.target.level}",
            student_channels=pair.student.channels,
            target_channels=pair.target.channels,
            stride=0,
            connector="-",
            region="-",
            loss=type(self).__name__,
            parameters=0,
            value=_value(tap, pair),
            rows=pair.student.rows,
            note=note,
        )

    def forward(  # noqa: D102  # as in the base
        self,
        student: Mapping[str, Maps],
        target: Mapping[str, Maps],
        context: Context,
        source: Source,
    ) -> dict[str, Tensor]:
        values = {}
        for pair in self.pairs[_SCORES]:
            s = self._columns(student[_SCORES][pair.student.level], 0)
            t = self._columns(target[_SCORES][pair.target.level], 1)
            if pair.student.activation == "softmax":
                each = softmax_kl(s, t, tau=self.tau)  # (R)
            else:  # the last column is trained by nobody
                each = bernoulli_kl(s[:, :-1], t[:, :-1], tau=self.tau).sum(-1)  # (R)
            values[_value(_SCORES, pair)] = each.sum() / max(len(s), 1)
        for pair, scored in zip(self.pairs.get(_DELTAS, []), self.pairs[_SCORES], strict=False):
            scores = self._columns(target[_SCORES][scored.target.level], 1)
            s = self._per_class(student[_DELTAS][pair.student.level], 0)  # (R, K or 1, 4)
            t = self._per_class(target[_DELTAS][pair.target.level], 1)
            ratio = unit_ratio(pair.student, pair.target)
            gap = delta_gap(s, t, ratio=ratio, beta=self.beta)  # (R, K or 1)
            p = _foreground(scores, scored.target.activation)  # (R, K)
            values[_value(_DELTAS, pair)] = (p * gap).sum() / max(len(s), 1)
        return values

    def _columns(self, scores: Tensor, side: int) -> Tensor:
        """Scores of the classes that both know, and of the background."""
        if self.classes is None:
            return scores
        return scores[:, [*self.classes[side], -1]]

    def _per_class(self, deltas: Tensor, side: int) -> Tensor:
        deltas = deltas.unflatten(1, (-1, 4))
        if self.classes is None or deltas.shape[1] == 1:  # one for all classes
            return deltas
        return deltas[:, list(self.classes[side])]

    def level_weight(self, level: str) -> float:  # noqa: D102  # as in the base
        return self.delta_weight if level.startswith("deltas") else 1.0


def _check_activation(pair: Pair) -> None:
    s, t = pair.student, pair.target
    if s.activation != t.activation:
        raise ValueError(
            f"{s.level}: the student's scores go through a {s.activation} and those of the "
            f"source through a {t.activation} (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE): they are no "
            "distributions of one kind. Distil features (TYPE: CWD, TAP: features), or train "
            "the student as the source was"
        )


def _value(tap: str, pair: Pair) -> str:
    """``scores.stage0``, ``deltas.stage0``: names of the term's values."""
    return f"{tap.removeprefix('roi_')}.{pair.student.level}"


def _foreground(scores: Tensor, activation: str) -> Tensor:
    """(R, K) the teacher's probabilities of the classes."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    if activation == "softmax":
        return torch.softmax(scores, dim=-1, dtype=wide)[:, :-1]
    return torch.sigmoid(scores[:, :-1].to(wide))
