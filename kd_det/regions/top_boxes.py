"""The region of the boxes that the student itself proposes."""

import torch
from torch import Tensor

from kd_det.boxes import decode
from kd_det.context import Context
from kd_det.regions.boxes import areas, counts, spans
from kd_det.regions.region import Region
from kd_det.registry import REGIONS


@REGIONS.register()
class TopBoxes(Region):
    """
    The student's ``k`` highest-scoring boxes per image, before non-maximum suppression: what
    proposals are to a two-stage detector. Every box counts alike: 1 / (number of its cells) on
    each cell that it reaches into, summed over the boxes, on every level.

    So a mean of squares under these weights is the mean over proposals of the mean over a
    proposal's cells: Mimicking (Li, Jin, Yan, CVPR 2017), with the cells under a box in place of
    RoI pooling. No ground truth is needed; no gradient flows through the boxes.

    Args:
        k: boxes per image.

    Raises:
        ValueError: if ``k`` is below 1.
    """

    def __init__(self, *, k: int = 100) -> None:
        if k < 1:
            raise ValueError(f"TopBoxes needs k >= 1, but got {k}.")
        self.k = k

    def student_taps(self) -> tuple[str, ...]:  # noqa: D102  # as in the base
        return ("cls_logits", "box_deltas")

    def __call__(  # noqa: D102  # as in the base
        self, context: Context, student: Tensor, target: Tensor, stride: int
    ) -> Tensor | None:
        boxes = context.once(("top boxes", self.k), lambda: self._boxes(context))  # (N, k, 4)
        h, w = target.shape[-2:]
        rows, columns = spans(boxes, (h, w), stride)  # (N, k, H), (N, k, W)
        return counts(rows, columns, 1 / areas(rows, columns))  # (N, 1, H, W)

    @torch.no_grad()
    def _boxes(self, context: Context) -> Tensor:
        logits, deltas = (context.student_maps[tap] for tap in self.student_taps())
        decoded = decode(context, list(deltas.values()))  # (N, A, 4, H, W) per level
        scores, boxes = [], []
        for x, corners in zip(logits.values(), decoded, strict=True):
            best = x.float().unflatten(1, (corners.shape[1], -1)).amax(2)  # (N, A, H, W)
            scores.append(best.flatten(1))  # (N, A H W)
            boxes.append(corners.permute(0, 1, 3, 4, 2).flatten(1, 3))  # (N, A H W, 4)
        every = torch.cat(scores, dim=1)  # (N, R)
        top = every.topk(min(self.k, every.shape[1]), dim=1).indices  # (N, k)
        chosen = torch.cat(boxes, dim=1).gather(1, top[..., None].expand(-1, -1, 4))
        sides = torch.tensor([(w, h, w, h) for h, w in context.image_sizes])  # (N, 4)
        limits = sides.to(chosen, non_blocking=True)[:, None]
        return chosen.clamp_min(0).minimum(limits)  # one in the padding becomes empty
