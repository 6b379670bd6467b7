"""RetinaNet R-50, 1x: the student and plain baseline of retinanet_R_50_FPN_1x_cwd_R_101.py.

It is COCO-Detection/retinanet_R_50_FPN_1x.yaml as a LazyConfig.
"""

from .common.coco import dataloader
from .common.retinanet import model
from .common.solver import lr_multiplier_1x as lr_multiplier
from .common.solver import optimizer
from .common.train import train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
