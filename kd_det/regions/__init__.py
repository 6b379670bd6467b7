"""
Regions: where on the grid a term counts, as weights >= 0 of shape ``(N, 1, H, W)``.

A region is computed on the padded canvas, where cell (i, j) of a level covers the pixels from
(i * stride, j * stride); the size of the unpadded image says which cells are real.
"""

from kd_det.regions.anchor_iou import AnchorIoU
from kd_det.regions.attention import Attention
from kd_det.regions.gt_box import GTBox
from kd_det.regions.padding import Ones, Padding
from kd_det.regions.region import Region
from kd_det.regions.teacher_score import TeacherScore
from kd_det.regions.top_boxes import TopBoxes

__all__ = [
    "AnchorIoU",
    "Attention",
    "GTBox",
    "Ones",
    "Padding",
    "Region",
    "TeacherScore",
    "TopBoxes",
]
