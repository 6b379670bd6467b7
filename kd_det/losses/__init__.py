"""
Losses: pure functions, tensors in, values out. This room imports torch alone (and, in the file that
only a forced backend opens, triton).
"""

from kd_det.losses.attention_transfer import attention_transfer, energy
from kd_det.losses.channel_mean import channel_mean
from kd_det.losses.channel_wise import BACKENDS, channel_wise_kl, channel_wise_kl_levels
from kd_det.losses.class_scores import MODES, check_mode
from kd_det.losses.consistency import consistency, ensemble_logits
from kd_det.losses.generalized_iou import generalized_iou
from kd_det.losses.imitation import imitation
from kd_det.losses.pearson import pearson_distance
from kd_det.losses.pixel_wise import pixel_wise_kl
from kd_det.losses.predictions import bernoulli_kl, delta_gap, softmax_kl
from kd_det.losses.reduce import mean_over_images, sum_over_cells
from kd_det.losses.root import root, root_of_squares
from kd_det.losses.standardize import standardize
from kd_det.losses.temperature import temperature
from kd_det.losses.weighted_bce import weighted_bce

__all__ = [
    "BACKENDS",
    "MODES",
    "attention_transfer",
    "bernoulli_kl",
    "channel_mean",
    "channel_wise_kl",
    "channel_wise_kl_levels",
    "check_mode",
    "consistency",
    "delta_gap",
    "energy",
    "ensemble_logits",
    "generalized_iou",
    "imitation",
    "mean_over_images",
    "pearson_distance",
    "pixel_wise_kl",
    "root",
    "root_of_squares",
    "softmax_kl",
    "standardize",
    "sum_over_cells",
    "temperature",
    "weighted_bce",
]
