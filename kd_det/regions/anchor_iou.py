"""The region of FGFI: where anchors overlap the ground truth."""

import math

import torch
import torch.nn.functional as F
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from kd_det.context import Context
from kd_det.regions.boxes import ground_truth
from kd_det.regions.padding import image_cells
from kd_det.regions.region import Region
from kd_det.registry import REGIONS


@REGIONS.register()
class AnchorIoU(Region):
    """
    Cells one of whose anchors overlaps a box almost as well as the best anchor does (FGFI, Wang et
    al., CVPR 2019): ``any over boxes b and anchors a of the cell: IoU(a, b) > psi * m_b``.

    ``m_b`` is the best IoU of box b over the anchors of all levels. Anchors of padded cells are
    left out, so that an image's region does not depend on the images beside it. The anchors are the
    student's.

    Args:
        psi: share of the best overlap, in [0, 1); 0.5 in the paper, 0 takes every anchor that
            overlaps at all.
        every_level: whether a box counts on every level where an anchor reaches the threshold; if
            not, only on the level of its best anchor. (Published code for pyramids has both; some
            choose the level by the box's size.)

    Raises:
        ValueError: if ``psi`` is not in [0, 1); in a step, if the student has no anchors, or none
            with the stride of the level.
    """

    def __init__(self, *, psi: float = 0.5, every_level: bool = True) -> None:
        if not 0 <= psi < 1:
            raise ValueError(f"AnchorIoU needs psi in [0, 1), but got {psi}.")
        self.psi = psi
        self.every_level = every_level

    def __call__(  # noqa: D102  # as in the base
        self, context: Context, student: Tensor, target: Tensor, stride: int
    ) -> Tensor | None:
        key = ("anchor IoU", self.psi, self.every_level, target.device)
        levels = context.once(key, lambda: self._levels(context, target.device))
        if stride not in levels:
            raise ValueError(
                f"Region AnchorIoU: the student has anchors of the strides "
                f"{', '.join(map(str, levels))}, and none for a map of stride {stride}. Leave the "
                "level out of LEVELS, or choose another REGION."
            )
        region = levels[stride]
        h, w = (a - b for a, b in zip(target.shape[-2:], region.shape[-2:], strict=True))
        return F.pad(region, (0, w, 0, h))  # what lies beyond the largest image is padding

    @torch.no_grad()
    def _levels(self, context: Context, device: torch.device) -> dict[int, Tensor]:
        """For every stride the weights ``(N, 1, H, W)``, on a grid that covers all the images."""
        strides = _strides(context)
        height, width = (max(sides) for sides in zip(*context.image_sizes, strict=True))
        grids = [
            torch.empty(0, 0, math.ceil(height / s), math.ceil(width / s), device=device)
            for s in strides
        ]
        levels = [x.to(device) for x in context.anchors(grids)]
        valid = [
            _in_images(context, grid, stride, len(anchors))
            for grid, stride, anchors in zip(grids, strides, levels, strict=True)
        ]
        counts = [len(anchors) for anchors in levels]
        anchors, real = Boxes.cat(levels), torch.cat(valid, dim=1)  # R anchors, (N, R)
        near = torch.stack(
            [
                self._near(pairwise_iou(Boxes(boxes), anchors) * mine, counts)
                for boxes, mine in zip(ground_truth(context, device), real, strict=True)
            ]
        )  # (N, R)
        return {
            stride: _any_anchor(x, grid)
            for stride, grid, x in zip(strides, grids, near.split(counts, dim=1), strict=True)
        }

    def _near(self, iou: Tensor, counts: list[int]) -> Tensor:
        """Which anchors ``(R)`` of an image come near enough to a box, by their IoU ``(B, R)``."""
        best = torch.stack([x.amax(1) for x in iou.split(counts, dim=1)], dim=1)  # (B, L)
        near = iou > self.psi * best.amax(1, keepdim=True)
        if not self.every_level:
            levels = torch.arange(len(counts), device=iou.device)
            own = best.argmax(1, keepdim=True) == levels  # (B, L); one_hot would wait for a check
            per_level = near.split(counts, dim=1)
            near = torch.cat([x & own[:, [i]] for i, x in enumerate(per_level)], dim=1)
        return near.any(0)


def _strides(context: Context) -> list[int]:
    for module in context.student.modules():
        if isinstance(module, DefaultAnchorGenerator):
            return list(module.strides)
    raise ValueError(
        f"Region AnchorIoU: {type(context.student).__name__} has no anchors. Choose another "
        "REGION (GTBox, say)."
    )


def _in_images(context: Context, grid: Tensor, stride: int, anchors: int) -> Tensor:
    """``(N, H W A)``: 1 for the anchors of cells that begin inside their image."""
    cells = image_cells(context, grid, stride)  # (N, 1, H, W)
    if cells is None:
        return torch.ones(len(context.inputs), anchors, device=grid.device)
    cells = cells.flatten(1)  # (N, H W)
    return cells.repeat_interleave(anchors // max(cells.shape[1], 1), dim=1)


def _any_anchor(near: Tensor, grid: Tensor) -> Tensor:
    """From anchors ``(N, H W A)`` to cells ``(N, 1, H, W)``."""
    n, (h, w) = len(near), grid.shape[-2:]
    return near.view(n, h * w, -1).any(-1).view(n, 1, h, w).float()
