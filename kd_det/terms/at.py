"""AT: attention transfer."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_det.connectors import Connector, Unbridged
from kd_det.context import Context
from kd_det.losses import attention_transfer, energy
from kd_det.registry import TERMS
from kd_det.taps import Maps
from kd_det.terms.levelwise import LevelwiseTerm
from kd_det.terms.term import Aligned


@TERMS.register()
class AT(LevelwiseTerm):
    """
    Attention transfer (Zagoruyko and Komodakis, ICLR 2017, https://arxiv.org/abs/1612.03928) of
    feature maps or class logits: where a level responds strongly, one map per image; see
    `kd_det.losses.attention_transfer` for formula, normaliser and dtype.

    It needs no connector, even where the channels differ: they are averaged away. The authors'
    weight, 1000, is for maps of 8 x 8 to 32 x 32 cells; see ``over_cells``.

    Args:
        p: power of the response; 2 in the authors' code.
        over_cells: ``"mean"``, as published, is weaker the larger a level is; ``"sum"`` gives
            levels of all sizes one scale.
        connector: none.
        levelwise: tap, source_tap, levels, level_weights, region, and source, weight, schedule:
            see `LevelwiseTerm`.

    Raises:
        ValueError: if ``p`` is below 1 or not finite, or ``over_cells`` is unknown.
    """

    saves_target = False  # only its attention

    def __init__(
        self,
        *,
        p: float = 2.0,
        over_cells: str = "mean",
        connector: Connector = Unbridged(),
        **levelwise: Any,
    ) -> None:
        super().__init__(connector=connector, **levelwise)
        if not 1 <= p < float("inf"):
            raise ValueError(f"AT needs a finite power p >= 1, but got {p}.")
        if over_cells not in ("mean", "sum"):
            raise ValueError(f"AT's over_cells is mean or sum, but got '{over_cells}'.")
        self.p = float(p)
        self.over_cells = over_cells

    def aligned(
        self, student: Mapping[str, Maps], target: Mapping[str, Maps], context: Context
    ) -> Iterator[Aligned]:
        """As in the base, of the energies: that is what is compared, whatever the channels are."""
        for level, s, t, region in super().aligned(student, target, context):
            with torch.no_grad():
                t = energy(t, self.p)
            yield level, energy(s, self.p), t, region

    def compare(self, student: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
        """Attention transfer of the energies of one level, both ``(N, 1, H, W)``."""
        # Energies are their own: of one channel, >= 0.
        return attention_transfer(student, target, p=1.0, region=region, over_cells=self.over_cells)
