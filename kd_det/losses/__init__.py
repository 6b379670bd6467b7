"""
Losses: pure functions, tensors in, values out. This room imports torch alone (and, in the file that
only a forced backend opens, triton).
"""

from kd_det.losses.channel_wise import BACKENDS, channel_wise_kl, channel_wise_kl_levels
from kd_det.losses.predictions import bernoulli_kl, delta_gap, softmax_kl
from kd_det.losses.standardize import standardize

__all__ = [
    "BACKENDS",
    "bernoulli_kl",
    "channel_wise_kl",
    "channel_wise_kl_levels",
    "delta_gap",
    "softmax_kl",
    "standardize",
]
