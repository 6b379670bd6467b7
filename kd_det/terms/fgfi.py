"""FGFI: fine-grained feature imitation."""

from typing import Any

from torch import Tensor

from kd_det.connectors import Connector, Conv
from kd_det.losses import imitation
from kd_det.regions import AnchorIoU, Region
from kd_det.registry import TERMS
from kd_det.schedules import Constant, Schedule
from kd_det.terms.levelwise import LevelwiseTerm


@TERMS.register()
class FGFI(LevelwiseTerm):
    """
    Fine-grained feature imitation (Wang et al., CVPR 2019, https://arxiv.org/abs/1906.03609):
    features are imitated at the cells whose anchors lie near objects; see
    `kd_det.regions.AnchorIoU` and `kd_det.losses.imitation`.

        1 / (2 N_p) * sum over cells of the region of || R(s)_i - t_i ||^2

    N_p is the number of those cells in the batch, level by level; there is no division by C. A
    level without such cells is exactly 0. It needs ground truth and a student with anchors.

    Defaults are the authors' (weight, threshold, and no imitation in the first 400 iterations),
    with one exception: their connector starts near 0 (standard deviation 1e-4), ours as
    Detectron2 starts the convolutions of an FPN. The student's gradient goes through it: one that
    starts near 0 passes next to none on until it has grown.

    Args:
        connector: a 3x3 convolution and ReLU.
        region: where it counts.
        weight: factor on the term.
        schedule: how the weight moves over the run.
        levelwise: tap, source_tap, levels, level_weights, and source: see `LevelwiseTerm`.
    """

    saves_target = False  # only the difference

    def __init__(
        self,
        *,
        connector: Connector = Conv(kernel=3, relu=True),
        region: Region = AnchorIoU(),
        weight: float = 0.01,
        schedule: Schedule = Constant(start_iter=400),
        **levelwise: Any,
    ) -> None:
        super().__init__(
            connector=connector, region=region, weight=weight, schedule=schedule, **levelwise
        )

    def compare(self, student: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
        """Imitation of one level, see `LevelwiseTerm.compare`."""
        return imitation(student, target, region=region, over_channels="sum")
