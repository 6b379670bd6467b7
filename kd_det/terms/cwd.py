"""CWD: channel-wise distillation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_det.losses import BACKENDS, channel_wise_kl_levels, standardize, temperature
from kd_det.registry import TERMS
from kd_det.terms.levelwise import LevelwiseTerm
from kd_det.terms.term import Aligned

_CHANNEL_WEIGHTS = ("none", "teacher_max_prob")


@TERMS.register()
class CWD(LevelwiseTerm):
    """
    Channel-wise distillation (Shu et al., ICCV 2021, https://arxiv.org/abs/2011.13256) of feature
    maps or class logits; see `kd_det.losses.channel_wise_kl` for formula, normaliser and dtype.

    On sigmoid logits two facts shape the options: a constant per channel changes nothing, so CWD
    transfers *where* a class fires and never how confidently; and every channel counts alike, so
    channels of absent classes make up most of the loss.

    Args:
        tau: temperature. 1 in the authors' detection code, 4 for segmentation logits.
        channel_weight: ``"none"`` (the paper), or ``"teacher_max_prob"``: a channel counts by the
            largest sigmoid of the teacher in it (meant for class logits), normalised per image.
        standardize: give every channel of both maps zero mean and unit variance first, as in
            RTMDet's public CWD recipe (there with weight 1).
        backend: how it is computed, see `kd_det.losses.channel_wise_kl`.
        levelwise: tap, source_tap, levels, level_weights, connector, region, and source, weight,
            schedule: see `LevelwiseTerm`.

    Raises:
        ValueError: if ``tau`` is not a positive finite number, or a value is unknown.
    """

    saves_target = False  # the loss saves its gradient alone

    def __init__(
        self,
        *,
        tau: float = 1.0,
        channel_weight: str = "none",
        standardize: bool = False,
        backend: str = "auto",
        **levelwise: Any,
    ) -> None:
        super().__init__(**levelwise)
        if channel_weight not in _CHANNEL_WEIGHTS:
            raise ValueError(
                f"CWD's channel_weight is one of {', '.join(_CHANNEL_WEIGHTS)}, but got "
                f"'{channel_weight}'."
            )
        if backend not in BACKENDS:
            raise ValueError(f"CWD's backend is one of {', '.join(BACKENDS)}, but got '{backend}'.")
        self.tau = temperature("CWD", tau)
        self.channel_weight = channel_weight
        self.standardize = standardize
        self.backend = backend

    def compare(self, student: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
        """Channel-wise KL of one level, see `LevelwiseTerm.compare`."""
        return self._together([("", student, target, region)])[""]

    def compare_levels(self, levels: Sequence[Aligned]) -> dict[str, Tensor]:
        """Channel-wise KL of all levels in one call, see `LevelwiseTerm.compare_levels`."""
        if type(self).compare is not CWD.compare:  # a subclass says what a level's value is
            return super().compare_levels(levels)
        return self._together(levels)

    def _together(self, levels: Sequence[Aligned]) -> dict[str, Tensor]:
        names, students, targets, regions = zip(*levels, strict=True)
        weights = [self._channel_weight(t, r) for t, r in zip(targets, regions, strict=True)]
        if self.standardize:
            students = tuple(map(standardize, students, regions))
            targets = tuple(map(standardize, targets, regions))
        values = channel_wise_kl_levels(
            students,
            targets,
            tau=self.tau,
            regions=regions,
            channel_weights=weights,
            backend=self.backend,
        )
        return dict(zip(names, values.unbind(), strict=True))

    def _channel_weight(self, target: Tensor, region: Tensor | None) -> Tensor | None:
        if self.channel_weight == "none":
            return None
        if region is not None:
            target = target.masked_fill(region <= 0, float("-inf"))
        return torch.sigmoid(target.float().amax(dim=(2, 3)))  # (N, C)
