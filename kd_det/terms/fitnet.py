"""FitNet: hints, the squared distance that everybody must beat."""

from typing import Any

from torch import Tensor

from kd_det.connectors import Connector, Conv
from kd_det.losses import imitation
from kd_det.registry import TERMS
from kd_det.terms.levelwise import LevelwiseTerm


@TERMS.register()
class FitNet(LevelwiseTerm):
    """
    Hints (FitNets, Romero et al., ICLR 2015, https://arxiv.org/abs/1412.6550): half the mean of
    squares between connected features and the teacher's; see `kd_det.losses.imitation`.

        1 / (2 C sum w) * sum_{n,i} w_ni || R(s)_ni - t_ni ||^2

    Where it counts is the region's business: ``Padding`` the whole image, ``GTBox`` inside the
    ground truth, ``TopBoxes`` under the student's own proposals (Mimicking, Li, Jin, Yan, CVPR
    2017), ``TeacherScore`` where the teacher sees something.

    Args:
        connector: a 1x1 convolution, also where the channels agree.
        levelwise: tap, source_tap, levels, level_weights, region, and source, weight, schedule:
            see `LevelwiseTerm`.
    """

    saves_target = False  # only the difference

    def __init__(self, *, connector: Connector = Conv(), **levelwise: Any) -> None:
        super().__init__(connector=connector, **levelwise)

    def compare(self, student: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
        """Imitation of one level, see `LevelwiseTerm.compare`."""
        return imitation(student, target, region=region)
