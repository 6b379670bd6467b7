"""FKD: attention-guided and non-local distillation."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.connectors import Connector, Conv
from kd_det.context import Context
from kd_det.detectors import TapShape
from kd_det.losses import root_of_squares
from kd_det.pairing import Pair, on_one_grid
from kd_det.regions import Attention, Region
from kd_det.regions.padding import image_cells
from kd_det.registry import TERMS
from kd_det.sources import Source
from kd_det.taps import Maps
from kd_det.terms.levelwise import LevelwiseTerm
from kd_det.terms.non_local import NonLocal
from kd_det.terms.term import PlanRow


@TERMS.register()
class FKD(LevelwiseTerm):
    """
    Zhang and Ma, "Improve Object Detection with Feature-based Knowledge Distillation" (ICLR 2021):
    features where both networks respond strongly, the two attentions, and relations between cells.

        L_l =   feature_weight   * || A^(1/2) (R s - t) ||      A: `kd_det.regions.Attention`
              + channel_weight   * || W mean_i s - mean_i t ||
              + spatial_weight   * || conv3x3(mean_c s) - mean_c t ||
              + non_local_weight * || R' NL_S(s) - NL_T(t) ||

    Each norm is the root of the sum of squares over the whole batch and level, as in public code:
    it is no mean, and grows with the root of the images per process and of the cells. The gradient
    at 0 is finite. Cells of the padding are left out of all four.

    The non-local block of the teacher's side, NL_T, trains too, with the student's optimizer;
    the gradient of the first three parts reaches the student and the connectors alone. W (linear),
    the 3x3 convolution, R' (1x1) and both blocks exist per level, are part of the kd state and are
    never exported.

    Where it departs from the authors' code and mmrazor's, to our knowledge: their non-local blocks
    max-pool the keys and values (8 x 8 cells on the finest level of mmrazor's config) and have a
    BatchNorm behind the last convolution. Here nothing is pooled, as the order of the products
    makes it cheap (`kd_det.terms.non_local.NonLocal`), and nothing depends on the statistics of a
    process; both start as the identity. Their student's attention is of the map before R.

    Weights and temperature are those of mmrazor's FBKD, which re-implements the authors' code with
    its values for two-stage detectors; the paper's values for one-stage detectors are 4e-4, 2e-2,
    2e-2 and 4e-4, to our knowledge.

    Args:
        feature_weight: see the formula.
        channel_weight: see the formula.
        spatial_weight: see the formula.
        non_local_weight: see the formula; 0 leaves both blocks out.
        connector: R, a 1x1 convolution.
        region: where the features count; the other parts count every cell of the images.
        levelwise: tap, source_tap, levels, level_weights, and source, weight, schedule: see
            `LevelwiseTerm`.

    Raises:
        ValueError: if a weight is negative or not finite.
    """

    def __init__(
        self,
        *,
        feature_weight: float = 7e-5,
        channel_weight: float = 4e-3,
        spatial_weight: float = 4e-3,
        non_local_weight: float = 7e-5,
        connector: Connector = Conv(),
        region: Region = Attention(),
        **levelwise: Any,
    ) -> None:
        super().__init__(connector=connector, region=region, **levelwise)
        weights = (feature_weight, channel_weight, spatial_weight, non_local_weight)
        if not all(0 <= w < float("inf") for w in weights):
            raise ValueError(
                "FKD needs finite weights >= 0, but got feature, channel, spatial and non-local "
                f"weights {', '.join(map(str, weights))}."
            )
        self.feature_weight = float(feature_weight)
        self.channel_weight = float(channel_weight)
        self.spatial_weight = float(spatial_weight)
        self.non_local_weight = float(non_local_weight)
        self.channels = nn.ModuleDict()
        self.spatial = nn.ModuleDict()
        self.student_blocks = nn.ModuleDict()
        self.bridges = nn.ModuleDict()
        self.target_blocks = nn.ModuleDict()

    def wire(  # noqa: D102  # as in the base
        self, student: Mapping[str, list[TapShape]], target: Mapping[str, list[TapShape]]
    ) -> list[PlanRow]:
        rows = super().wire(student, target)
        return [
            replace(row, parameters=row.parameters + self._build(pair))
            for row, pair in zip(rows, self.pairs, strict=True)
        ]

    def _build(self, pair: Pair) -> int:
        """Make the modules of a level; how many parameters they have."""
        level, c, to = pair.student.level, pair.student.channels, pair.target.channels
        self.channels[level] = nn.Linear(c, to)
        self.spatial[level] = nn.Conv2d(1, 1, 3, padding=1)
        if self.non_local_weight:
            # A quarter of the channels inside, as in public code.
            self.student_blocks[level] = NonLocal(c, max(c // 4, 1))
            self.bridges[level] = nn.Conv2d(c, to, 1)
            self.target_blocks[level] = NonLocal(to, max(to // 4, 1))
        parts = (
            self.channels,
            self.spatial,
            self.student_blocks,
            self.bridges,
            self.target_blocks,
        )
        return sum(p.numel() for x in parts if level in x for p in x[level].parameters())

    def forward(  # noqa: D102  # as in the base
        self,
        student: Mapping[str, Maps],
        target: Mapping[str, Maps],
        context: Context,
        source: Source,
    ) -> dict[str, Tensor]:
        values = {}
        for pair, (level, s, t, region) in zip(
            self.pairs, self.aligned(student, target, context), strict=True
        ):
            own, t = on_one_grid(student[self.tap][level], t, pair)
            cells = image_cells(context, t, pair.target.stride)
            value = self.feature_weight * self.compare(s, t, region)
            dtype = next(self.channels.parameters()).dtype  # not that of autocast
            with torch.autocast(t.device.type, enabled=False):
                values[level] = value + self._others(level, own.to(dtype), t.to(dtype), cells)
        return values

    def compare(self, student: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
        """The features' part of one level, unweighted; see `LevelwiseTerm.compare`."""
        return root_of_squares(student, target, region)

    def _others(self, level: str, s: Tensor, t: Tensor, cells: Tensor | None) -> Tensor:
        """The three other parts of a level, weighted; ``s`` as the student made it."""
        real = torch.ones_like(t[:, :1]) if cells is None else cells.to(t.dtype)
        inside = real.sum((2, 3)).clamp_min(1)  # (N, 1)
        s_pooled, t_pooled = ((x * real).sum((2, 3)) / inside for x in (s, t))  # (N, C), (N, C')
        value = self.channel_weight * root_of_squares(self.channels[level](s_pooled), t_pooled)
        # What lies beyond the image is 0 to the convolution, as beyond the border.
        s_mean, t_mean = (x.mean(1, keepdim=True) * real for x in (s, t))  # (N, 1, H, W)
        value = value + self.spatial_weight * root_of_squares(
            self.spatial[level](s_mean), t_mean, real
        )
        if self.non_local_weight:
            relation = self.bridges[level](self.student_blocks[level](s, real))
            value = value + self.non_local_weight * root_of_squares(
                relation, self.target_blocks[level](t, real), real
            )
        return value
