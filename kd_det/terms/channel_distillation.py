"""Channel Distillation: channels without positions."""

from typing import Any

from torch import Tensor

from kd_det.connectors import Connector, Conv
from kd_det.losses import channel_mean
from kd_det.registry import TERMS
from kd_det.terms.levelwise import LevelwiseTerm


@TERMS.register()
class ChannelDistillation(LevelwiseTerm):
    """
    Channel Distillation (Zhou et al., 2020, https://arxiv.org/abs/2006.01683): the mean response of
    every channel; see `kd_det.losses.channel_mean` for formula, normaliser and dtype.

    Made for classification. It says nothing of positions, and the authors of CWD found it of no
    use for segmentation: here it shows what CWD adds to channels. Their weight is 6, with a
    guided KD of class scores beside it, which is not part of this term.

    Args:
        connector: 1x1 convolution, BatchNorm and ReLU, as published.
        levelwise: tap, source_tap, levels, level_weights, region, and source, weight, schedule:
            see `LevelwiseTerm`.
    """

    saves_target = False  # only the difference

    def __init__(
        self, *, connector: Connector = Conv(norm=True, relu=True), **levelwise: Any
    ) -> None:
        super().__init__(connector=connector, **levelwise)

    def compare(self, student: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
        """Difference of means of one level, see `LevelwiseTerm.compare`."""
        return channel_mean(student, target, region=region)
