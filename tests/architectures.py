"""Every stock architecture at toy size: YAML where Detectron2 has it so, else LazyConfig."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import backbone as backbones
from detectron2.structures import PolygonMasks

from tests.toys import batch, toy_cfg

STAND_INS = Path(__file__).parent / "stand_ins"
if importlib.util.find_spec("timm") is None:
    sys.path.append(str(STAND_INS))

needs_vit = pytest.mark.skipif(
    not hasattr(backbones, "ViT"), reason="Detectron2 0.6 has no ViT, Swin or MViT"
)


def rcnn(*, fpn: int = 8, mask: bool = False, cascade: bool = False) -> CfgNode:
    """Faster, Mask or Cascade R-CNN with FPN, which detects something without training."""
    cfg = toy_cfg(arch="GeneralizedRCNN", fpn=fpn)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 40
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    cfg.MODEL.MASK_ON = mask
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 4
    if cascade:
        cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    return cfg


def rcnn_without_pyramid(*, dilated: bool = False, width: int = 4) -> CfgNode:
    """Faster R-CNN on one level: C4 with its res5 in the head, or DC5."""
    cfg = rcnn()
    level = "res5" if dilated else "res4"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = width
    cfg.MODEL.RESNETS.OUT_FEATURES = [level]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = [level]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 32]]
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 4
    if dilated:
        cfg.MODEL.RESNETS.RES5_DILATION = 2
    else:
        cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    return cfg


def retinanet(*, fpn: int = 8) -> CfgNode:
    """RetinaNet, which detects something without training."""
    cfg = toy_cfg(fpn=fpn)
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 20
    return cfg


def semantic(*, arch: str = "SemanticSegmentor", fpn: int = 8) -> CfgNode:
    """SemanticSegmentor, or PanopticFPN, which detects something without training."""
    cfg = toy_cfg(arch=arch, fpn=fpn)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    return cfg


_LAZY = """
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import backbone as B
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers, StandardROIHeads

{backbone}

{head}
dataloader = {{"train": {{"mapper": {{"image_format": "{order}"}}}}}}
"""

_FCOS = """
model = L(FCOS)(
    backbone=backbone,
    head=L(FCOSHead)(
        input_shape=[ShapeSpec(channels={fpn})] * 5, num_classes=3, conv_dims=[{fpn}], norm=""
    ),
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    num_classes=3,
    test_score_thresh=0.0,
    test_topk_candidates=20,
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
)
"""

_RCNN = """
model = L(GeneralizedRCNN)(
    backbone=backbone,
    proposal_generator=L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels={fpn}, num_anchors=1),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[16], [32], [64], [128], [256]],
            aspect_ratios=[1.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=32,
        positive_fraction=0.5,
        pre_nms_topk=(100, 100),
        post_nms_topk=(40, 40),
        nms_thresh=0.7,
    ),
    roi_heads=L(StandardROIHeads)(
        num_classes=3,
        batch_size_per_image=32,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=L(ROIPooler)(
            output_size=3,
            scales=(1 / 4, 1 / 8, 1 / 16, 1 / 32),
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels={fpn}, height=3, width=3), conv_dims=[], fc_dims=[16]
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=16),
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes=3,
            test_score_thresh=0.0,
            test_topk_per_image=10,
        ),
    ),
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="{order}",
)
"""

_RESNET = """
backbone = L(FPN)(
    bottom_up=L(B.ResNet)(
        stem=L(B.BasicStem)(in_channels=3, out_channels=64, norm="BN"),
        stages=[
            L(B.ResNet.make_stage)(
                block_class=BasicBlock, num_blocks=1, in_channels=i, out_channels=o,
                stride_per_block=[s], norm="BN",
            )
            for i, o, s in [(64, 8, 1), (8, 12, 2), (12, 16, 2), (16, 24, 2)]
        ],
        out_features=["res3", "res4", "res5"],
    ),
    in_features=["res3", "res4", "res5"],
    out_channels={fpn},
    top_block=L(LastLevelP6P7)(in_channels=24, out_channels={fpn}),
)
"""

_VITDET = """
backbone = L(B.SimpleFeaturePyramid)(
    net=L(B.ViT)(
        img_size={square}, patch_size=16, embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.5,
        window_size=2, window_block_indexes=[0], use_rel_pos=True, out_feature="last_feat",
        pretrain_img_size=64,
    ),
    in_feature="${{.net.out_feature}}",
    out_channels={fpn},
    scale_factors=(4.0, 2.0, 1.0, 0.5),
    top_block=L(LastLevelMaxPool)(),
    norm="LN",
    square_pad={square},
)
"""

_SWIN = """
backbone = L(FPN)(
    bottom_up=L(B.SwinTransformer)(
        embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=2
    ),
    in_features=["p0", "p1", "p2", "p3"],
    out_channels={fpn},
    top_block=L(LastLevelMaxPool)(),
)
"""

_MVIT = """
backbone = L(FPN)(
    bottom_up=L(B.MViT)(
        img_size=64, embed_dim=8, depth=4, num_heads=1, last_block_indexes=(0, 1, 2, 3),
        adaptive_window_size=8, drop_path_rate=0.5,
    ),
    in_features=["scale2", "scale3", "scale4", "scale5"],
    out_channels={fpn},
    top_block=L(LastLevelMaxPool)(),
)
"""


def lazy(kind: str, *, fpn: int = 8, order: str = "BGR", square: int = 64) -> str:
    """The text of a LazyConfig file: ``fcos``, or R-CNN on a ``vitdet``, ``swin`` or ``mvit``."""
    backbone = {"fcos": _RESNET, "vitdet": _VITDET, "swin": _SWIN, "mvit": _MVIT}[kind]
    values = {"fpn": fpn, "order": order, "square": square}
    head = _FCOS if kind == "fcos" else _RCNN
    return _LAZY.format(backbone=backbone.format(**values), head=head.format(**values), **values)


def full_batch(sizes: tuple[tuple[int, int], ...] = ((64, 64), (56, 64))) -> list[dict[str, Any]]:
    """A batch with everything that any stock architecture trains on."""
    inputs = batch(sizes)
    for x in inputs:
        instances = x["instances"]
        corners = instances.gt_boxes.tensor[:, [0, 1, 2, 1, 2, 3, 0, 3]]
        instances.gt_masks = PolygonMasks([[polygon.numpy()] for polygon in corners])
        x["sem_seg"] = torch.randint(3, x["image"].shape[-2:])
    return inputs
