"""Feature maps as pictures."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE = 256  # pixels of the longer side of one map; TensorBoard shows images about that large


def panel(student: Tensor, target: Tensor) -> Tensor:
    """
    The student's map on the left and the target's on the right: channel mean of the absolute
    value, each scaled from its smallest to its largest cell, enlarged by a whole factor.

    Args:
        student: ``(C, H, W)``.
        target: ``(C', H, W)``.

    Returns:
        ``(3, H', W')`` uint8 on the maps' device.
    """
    factor = max(1, math.ceil(_SIDE / max(student.shape[-2:])))
    left, right = (_picture(x, factor) for x in (student, target))
    gap = left.new_full((len(left), max(1, factor // 2)), 255)
    picture = torch.cat([left, gap, right], dim=1)
    return picture.to(torch.uint8).expand(3, -1, -1)


def _picture(x: Tensor, factor: int) -> Tensor:
    grey = torch.nan_to_num(x.detach().float()).abs().mean(0)  # (H, W)
    low, high = grey.amin(), grey.amax()
    grey = (grey - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny) * 255
    return F.interpolate(grey[None, None], scale_factor=factor, mode="nearest")[0, 0]
