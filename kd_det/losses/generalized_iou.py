"""Generalized IoU of pairs of boxes."""

from torch import Tensor

_SMALLEST = 1e-7


def generalized_iou(a: Tensor, b: Tensor, *, dim: int = -1) -> Tensor:
    """
    ``IoU - (hull - union) / hull`` of box by box (Rezatofighi et al., CVPR 2019), in [-1, 1].

    Args:
        a: XYXY along ``dim``, with x0 <= x1 and y0 <= y1.
        b: of the same shape.
        dim: where the four numbers lie.

    Returns:
        The shape without ``dim``; gradients flow to both. Two empty boxes in one place have 0.
    """
    ax0, ay0, ax1, ay1 = a.unbind(dim)
    bx0, by0, bx1, by1 = b.unbind(dim)
    width = (ax1.minimum(bx1) - ax0.maximum(bx0)).clamp_min(0)
    height = (ay1.minimum(by1) - ay0.maximum(by0)).clamp_min(0)
    common = width * height
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - common
    hull = (ax1.maximum(bx1) - ax0.minimum(bx0)) * (ay1.maximum(by1) - ay0.minimum(by0))
    return common / union.clamp_min(_SMALLEST) - (hull - union) / hull.clamp_min(_SMALLEST)
