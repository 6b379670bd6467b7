"""The region of the ground truth's boxes."""

import torch
from torch import Tensor

from kd_det.context import Context
from kd_det.regions.boxes import areas, counts, ground_truth, spans
from kd_det.regions.region import Region
from kd_det.registry import REGIONS


@REGIONS.register()
class GTBox(Region):
    """
    Cells that a box of the ground truth reaches into, on every level.

    Args:
        per_area: whether a cell counts 1 / (number of cells of the box) instead of 1, so that a
            small object counts as much as a large one; where boxes overlap, the smallest decides.
            The form of FGD's foreground mask (Yang et al., CVPR 2022).
    """

    def __init__(self, *, per_area: bool = False) -> None:
        self.per_area = per_area

    def __call__(  # noqa: D102  # as in the base
        self, context: Context, student: Tensor, target: Tensor, stride: int
    ) -> Tensor | None:
        h, w = target.shape[-2:]
        boxes = ground_truth(context, target.device)  # (N, B, 4)
        rows, columns = spans(boxes, (h, w), stride)  # (N, B, H), (N, B, W)
        if not self.per_area:
            return (counts(rows, columns) > 0).float()  # (N, 1, H, W)
        inside = rows[..., :, None] & columns[..., None, :]  # (N, B, H, W)
        share = 1 / areas(rows, columns)[..., None, None]  # (N, B, 1, 1)
        return torch.where(inside, share, 0.0).amax(1, keepdim=True)  # (N, 1, H, W)
