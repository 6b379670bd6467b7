"""RetinaNet RegNetX-4GF, 1x: the student and plain baseline of the distilled configs beside it."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem

from .common.coco import dataloader
from .common.retinanet import model
from .common.solver import lr_multiplier_1x as lr_multiplier
from .common.solver import optimizer
from .common.train import train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

# RegNetX-4.0GF of https://arxiv.org/abs/2103.06877, with the settings that Detectron2's
# mask_rcnn_regnetx_4gf_dds_fpn_1x.py has for it: widths 80, 240, 560, 1360.
model.backbone.bottom_up = L(RegNet)(
    stem_class=SimpleStem,
    stem_width=32,
    block_class=ResBottleneckBlock,
    depth=23,
    w_a=38.65,
    w_0=96,
    w_m=2.43,
    group_width=40,
    norm="FrozenBN",
    freeze_at=2,
    out_features=["s2", "s3", "s4"],
)
model.backbone.top_block.in_channels = 1360
model.backbone.top_block.in_feature = "s4"
# These weights expect normalised BGR images, unlike the MSRA ones.
model.pixel_std = [57.375, 57.120, 58.395]

optimizer.weight_decay = 5e-5
train.init_checkpoint = (
    "https://dl.fbaipublicfiles.com/pycls/dds_baselines/160906383/RegNetX-4.0GF_dds_8gpu.pyth"
)
train.cudnn_benchmark = True  # pays off with grouped convolutions
