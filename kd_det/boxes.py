"""Boxes that a dense detector predicts, decoded on the student's anchors."""

from torch import Tensor

from kd_det.context import Context


def decode(context: Context, deltas: list[Tensor]) -> list[Tensor]:
    """
    Box deltas as boxes, with the student's anchors and the student's coding of deltas.

    For the deltas of a teacher too: the anchors of both sides must then be the same.

    Args:
        context: the step.
        deltas: ``(N, A * 4, H, W)`` of every level of the head, in order.

    Returns:
        float32 ``(N, A, 4, H, W)`` XYXY in pixels of the padded canvas, per level; gradients flow
        to the deltas.

    Raises:
        ValueError: if the student has no anchors, or does not say how its deltas are coded.
    """
    detector = context.detector()
    transform = getattr(detector.model, "box2box_transform", None)
    if transform is None:
        raise ValueError(
            f"{type(detector.model).__name__} has no box2box_transform, by which its deltas could "
            "be decoded: boxes are compared for dense detectors (RetinaNet, FCOS)."
        )
    boxes = []
    for x, anchors in zip(deltas, context.anchors(deltas), strict=True):
        n, _, h, w = x.shape
        rows = x.float().unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(-1, 4)  # (N H W A, 4)
        places = anchors.tensor.to(rows.device).repeat(n, 1)  # (N H W A, 4)
        corners = transform.apply_deltas(rows, places)
        boxes.append(corners.view(n, h, w, -1, 4).permute(0, 3, 4, 1, 2))  # (N, A, 4, H, W)
    return boxes
