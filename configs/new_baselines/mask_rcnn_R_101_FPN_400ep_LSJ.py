"""Teacher. Detectron2's zoo has it trained, 48.9 box AP (43.7 mask AP) on val2017:

detectron2://new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ/42073830/model_final_f96b26.pkl

Mask R-CNN R-101 FPN from scratch, 400 epochs with large-scale jitter. Here are its model and what
it reads (BGR images, like every model of that series); the zoo's file of the same name has the
recipe. Detectron2 0.6 from PyPI comes without these files.
"""

from detectron2.layers import NaiveSyncBatchNorm

from ..lazy.common.coco import dataloader
from ..lazy.common.mask_rcnn import model

__all__ = ["dataloader", "model"]

model.backbone.norm = "SyncBN"
model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "SyncBN"
model.backbone.bottom_up.stages.depth = 101
model.backbone.bottom_up.freeze_at = 0


def _head_norm(channels):
    """A head may get no box at all, which PyTorch's own SyncBatchNorm does not take."""
    return NaiveSyncBatchNorm(channels, stats_mode="N")


model.roi_heads.box_head.conv_norm = model.roi_heads.mask_head.conv_norm = _head_norm
model.proposal_generator.head.conv_dims = [-1, -1]  # two convolutions
model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.fc_dims = [1024]
