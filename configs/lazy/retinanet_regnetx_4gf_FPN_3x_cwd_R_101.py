"""retinanet_regnetx_4gf_FPN_1x_cwd_R_101.py, three times as long."""

from .common.solver import lr_multiplier_3x as lr_multiplier
from .retinanet_regnetx_4gf_FPN_1x_cwd_R_101 import dataloader, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

train.max_iter = 270000
