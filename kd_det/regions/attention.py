"""The region where student and teacher respond strongly."""

import torch
from torch import Tensor

from kd_det.context import Context
from kd_det.losses import temperature
from kd_det.regions.padding import image_cells
from kd_det.regions.region import Region
from kd_det.registry import REGIONS


@REGIONS.register()
class Attention(Region):
    """
    Spatial attention of FKD (Zhang & Ma, ICLR 2021; FGD's too), the student's and the teacher's.

        w_i = ( A(s)_i + A(t)_i ) / 2
        A(F)_i = M * softmax over the M cells of the image of  (1/C) sum_c |F_ci| / tau

    An image's weights sum to M, its number of cells. Padded cells count 0 and are in no softmax.
    A constant: no gradient flows through it.

    The student's map is the one after its connector (the public code takes the one before it).

    Args:
        tau: temperature; 0.5 in the paper's setting for one-stage detectors and in public code,
            0.1 for two-stage ones.

    Raises:
        ValueError: if ``tau`` is not a positive finite number.
    """

    def __init__(self, *, tau: float = 0.5) -> None:
        self.tau = temperature("Attention", tau)

    @torch.no_grad()
    def __call__(  # noqa: D102  # as in the base
        self, context: Context, student: Tensor, target: Tensor, stride: int
    ) -> Tensor | None:
        cells = image_cells(context, target, stride)
        return (self._attention(student, cells) + self._attention(target, cells)) / 2

    def _attention(self, x: Tensor, cells: Tensor | None) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        energy = x.abs().mean(1, keepdim=True) / self.tau  # (N, 1, H, W)
        if cells is None:
            return energy.flatten(1).softmax(1).view_as(energy) * energy[0].numel()
        # Not -inf: an image without a cell on this grid would be NaN.
        shares = energy.masked_fill(cells == 0, torch.finfo(energy.dtype).min).flatten(1).softmax(1)
        inside = cells.sum((1, 2, 3), keepdim=True)  # (N, 1, 1, 1)
        return shares.view_as(energy) * cells * inside
