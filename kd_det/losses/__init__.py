"""Losses: pure functions, tensors in, scalar out. This room imports torch alone."""

from kd_det.losses.channel_wise import channel_wise_kl
from kd_det.losses.standardize import standardize

__all__ = ["channel_wise_kl", "standardize"]
