"""The region that the teacher's own scores draw."""

import torch
from torch import Tensor

from kd_det.context import Context
from kd_det.regions.padding import image_cells
from kd_det.regions.region import Region
from kd_det.registry import REGIONS


@REGIONS.register()
class TeacherScore(Region):
    """
    A cell counts by the largest of the teacher's scores in it.

    The weight is ``max over anchors and classes of sigmoid(logit)``, in (0, 1); padded cells count
    0. No ground truth is needed. FRS (Du et al., NeurIPS 2021) weighs features and scores so.

    Args:
        tap: the source's class logits, whatever map the term compares. Of its levels the one on
            the map's grid is taken: the smallest that covers it.

    Raises:
        ValueError: in a step, if no level of the tap covers the map.
    """

    def __init__(self, *, tap: str = "cls_logits") -> None:
        self.tap = tap

    def source_taps(self) -> tuple[str, ...]:  # noqa: D102  # as in the base
        return (self.tap,)

    @torch.no_grad()
    def __call__(  # noqa: D102  # as in the base
        self, context: Context, student: Tensor, target: Tensor, stride: int
    ) -> Tensor | None:
        logits = self._level(context, target)
        # The largest logit first: one sigmoid per cell.
        score = torch.sigmoid(logits.float().amax(1, keepdim=True))  # (N, 1, H, W)
        cells = image_cells(context, target, stride)
        return score if cells is None else score * cells

    def _level(self, context: Context, target: Tensor) -> Tensor:
        h, w = target.shape[-2:]
        levels = context.target_maps[self.tap].values()
        covering = [x for x in levels if x.shape[-2] >= h and x.shape[-1] >= w]
        if not covering:
            grids = ", ".join(f"{x.shape[-2]} x {x.shape[-1]}" for x in levels)
            raise ValueError(
                f"Region TeacherScore: the map is {h} x {w}, and tap '{self.tap}' of the source "
                f"has no level that covers it (they are {grids}). Leave the level out of LEVELS, "
                "or choose another REGION."
            )
        # Detectors that pad differently differ in how far their grids reach.
        return min(covering, key=lambda x: x.shape[-2] * x.shape[-1])[..., :h, :w]
