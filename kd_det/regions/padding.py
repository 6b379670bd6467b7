"""All cells, and the cells that are not padding."""

import math

import torch
from torch import Tensor

from kd_det.context import Context
from kd_det.regions.region import Region
from kd_det.registry import REGIONS


@REGIONS.register()
class Ones(Region):
    """Every cell counts 1, padding included: what published code does."""

    def __call__(  # noqa: D102  # as in the base
        self, context: Context, student: Tensor, target: Tensor, stride: int
    ) -> Tensor | None:
        return None


@REGIONS.register()
class Padding(Region):
    """
    Cells that begin inside their image count 1, cells of the padding 0.

    Detectron2 pads the images of a batch to one size; left in, the padding pulls the student
    towards the teacher's response to black. No host synchronisation: sizes are host integers.
    """

    def __call__(  # noqa: D102  # as in the base
        self, context: Context, student: Tensor, target: Tensor, stride: int
    ) -> Tensor | None:
        return image_cells(context, target, stride)


def image_cells(context: Context, target: Tensor, stride: int) -> Tensor | None:
    """
    The cells that begin inside their image.

    Args:
        context: the step.
        target: ``(N, C, H, W)``, for its grid and device.
        stride: pixels per cell.

    Returns:
        float32 ``(N, 1, H, W)`` of 0 and 1, or ``None`` where all do.
    """
    h, w = target.shape[-2:]
    sizes = [
        (math.ceil(height / stride), math.ceil(width / stride))
        for height, width in context.image_sizes
    ]
    if all(rows >= h and columns >= w for rows, columns in sizes):
        return None
    valid = torch.tensor(sizes).to(target.device, non_blocking=True)  # (N, 2)
    rows = torch.arange(h, device=target.device) < valid[:, :1]  # (N, H)
    columns = torch.arange(w, device=target.device) < valid[:, 1:]  # (N, W)
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()  # (N, 1, H, W)
