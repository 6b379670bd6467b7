"""
Regions: where on the grid a term counts, as weights >= 0 of shape ``(N, 1, H, W)``.

A region is computed on the padded canvas, where cell (i, j) of a level covers the pixels from
(i * stride, j * stride); the size of the unpadded image says which cells are real.
"""

import math

import torch
from torch import Tensor

from kd_det.context import Context
from kd_det.registry import REGIONS


class Region:
    """A function of the step and of one level's maps."""

    def __call__(
        self, context: Context, student: Tensor, target: Tensor, stride: int
    ) -> Tensor | None:
        """
        Weights of the cells of one level.

        Args:
            context: the step.
            student: ``(N, C, H, W)``, after its connector, on the target's grid.
            target: ``(N, C, H, W)``.
            stride: pixels per cell of that grid.

        Returns:
            ``(N, 1, H, W)`` weights >= 0 without gradient, or ``None`` where every cell counts 1.
        """
        raise NotImplementedError


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
