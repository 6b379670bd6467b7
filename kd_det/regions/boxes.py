"""Which cells of a grid lie in which boxes; nothing here loops over boxes or waits for a device."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd_det.context import Context


def ground_truth(context: Context, device: torch.device) -> Tensor:
    """
    The boxes of all images as one tensor, made once per step.

    They are in pixels of the padded canvas, whose origin is the image's: a cell's stride is all
    that is needed to place them on a grid. (Scaling by the size of the unpadded image, as some
    published code does, misplaces them in every padded batch.)

    Returns:
        float32 ``(N, B, 4)`` XYXY, B the largest number in an image and at least 1; rows that an
        image does not have are empty boxes (all 0).
    """

    def upload() -> Tensor:
        boxes = [x.gt_boxes.tensor.float() for x in context.instances]  # on the loader's device
        padded = pad_sequence([*boxes, boxes[0].new_zeros(1, 4)], batch_first=True)
        return padded[:-1].to(device, non_blocking=True)  # (N, B, 4)

    return context.once(("ground truth", device), upload)


def spans(boxes: Tensor, grid: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """
    The rows and columns of a grid that each box reaches into: cell i covers the pixels from
    ``i * stride`` to ``(i + 1) * stride``, and a box reaches into it when it shares an open
    interval with it. Every box of positive size inside the grid has at least one cell, however
    coarse the grid; an empty box has none.

    Args:
        boxes: ``(..., 4)`` XYXY in pixels.
        grid: (H, W).
        stride: pixels per cell.

    Returns:
        Booleans ``(..., H)`` and ``(..., W)``: a cell lies in a box when its row and its column do.
    """
    x0, y0, x1, y1 = boxes[..., None].unbind(-2)  # (..., 1) each
    real = (x1 > x0) & (y1 > y0)
    y = torch.arange(grid[0], device=boxes.device) * stride  # (H)
    x = torch.arange(grid[1], device=boxes.device) * stride  # (W)
    return (y0 < y + stride) & (y < y1) & real, (x0 < x + stride) & (x < x1) & real


def counts(rows: Tensor, columns: Tensor, weights: Tensor | None = None) -> Tensor:
    """
    For every cell the sum over the boxes that it lies in, 1 (or its weight) each.

    Args:
        rows: ``(N, B, H)`` of `spans`.
        columns: ``(N, B, W)``.
        weights: ``(N, B)``.

    Returns:
        float32 ``(N, 1, H, W)``, without a ``(N, B, H, W)`` in between.
    """
    weighted = rows.float() if weights is None else rows * weights[..., None]  # (N, B, H)
    # Not einsum or matmul under autocast: the counts would be rounded to half precision.
    with torch.autocast(rows.device.type, enabled=False):
        return torch.bmm(weighted.transpose(1, 2), columns.float())[:, None]  # (N, 1, H, W)


def areas(rows: Tensor, columns: Tensor) -> Tensor:
    """
    The number of cells in each box, and 1 where there are none.

    Args:
        rows: ``(N, B, H)`` of `spans`.
        columns: ``(N, B, W)``.

    Returns:
        float32 ``(N, B)``.
    """
    return (rows.sum(-1) * columns.sum(-1)).clamp_min(1).float()
