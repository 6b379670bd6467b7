"""PKD: Pearson correlation of features."""

from torch import Tensor

from kd_det.losses import pearson_distance
from kd_det.registry import TERMS
from kd_det.terms.levelwise import LevelwiseTerm


@TERMS.register()
class PKD(LevelwiseTerm):
    """
    PKD (Cao et al., NeurIPS 2022, https://arxiv.org/abs/2207.02039): features are imitated up to
    the scale and the offset of every channel, so that teacher and student may be detectors of
    different kinds; see `kd_det.losses.pearson_distance` for formula, normaliser and dtype.

    Its statistics span the batch of a process: accumulating gradients over small batches, or more
    processes with fewer images each, is not the same.

    The published form has no connector; with other channel counts on the two sides ``Auto`` puts a
    1x1 convolution there. Weight 10 for one-stage, 6 for two-stage detectors in mmrazor's configs.

    Args:
        levelwise: tap, source_tap, levels, level_weights, connector, region, and source, weight,
            schedule: see `LevelwiseTerm`.
    """

    saves_target = False  # only its standardised form

    def compare(self, student: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
        """Pearson distance of one level, see `LevelwiseTerm.compare`."""
        return pearson_distance(student, target, region=region)
