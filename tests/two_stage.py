"""Toy two-stage detectors of every box head that kd_det knows, and Distillers of two of them."""

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import BitMasks
from torch import Tensor, nn

from kd_det import Distiller, Teacher
from kd_det.taps import Recorder
from kd_det.terms import RPN, BoxHead
from tests.toys import batch, toy_cfg

KINDS = ("faster", "mask", "cascade", "c4")


def rcnn_cfg(kind: str = "faster", **kwargs: Any) -> CfgNode:
    """A toy R-CNN: frozen statistics, so training and eval mode compute the same."""
    cfg = toy_cfg(arch="GeneralizedRCNN", **{"norm": "FrozenBN", **kwargs})
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 20
    if kind == "mask":
        cfg.MODEL.MASK_ON = True
        cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
        cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
        cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 3
    elif kind == "cascade":
        cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    elif kind == "c4":
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
        cfg.MODEL.RPN.IN_FEATURES = ["res4"]
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
        cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 4
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    return cfg


def rcnn(kind: str = "faster", *, seed: int = 0, **kwargs: Any) -> nn.Module:
    return lively(build_model(rcnn_cfg(kind, **kwargs)), seed)


def lively(model: nn.Module, seed: int) -> nn.Module:
    """
    Predictions as wide apart as those of trained detectors, where fresh ones are all but 0, on maps
    that frozen statistics do not let grow from block to block.
    """
    for name, m in model.named_modules():
        if isinstance(m, FrozenBatchNorm2d) and name.endswith(("stem.conv1.norm", "conv3.norm")):
            m.weight.fill_(0.02 if "stem" in name else 0.2)
    g = torch.Generator().manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, FastRCNNOutputLayers)]
    heads = [x for m in layers for x in (m.cls_score, m.bbox_pred)]
    rpn = model.proposal_generator.rpn_head
    for layer in (*heads, rpn.objectness_logits, rpn.anchor_deltas):
        noise = torch.randn(layer.weight.shape, generator=g)
        layer.weight.data = 0.3 * noise / layer.weight[0].numel() ** 0.5
        layer.bias.data = torch.randn(layer.bias.shape, generator=g)
    rpn.anchor_deltas.bias.data *= 0.1
    rpn.objectness_logits.bias.data.zero_()  # about half the anchors are above 0.5
    return model


def save_rcnn(folder: Path, kind: str = "faster", *, seed: int = 1, **kwargs: Any) -> Any:
    """(config file, weights file) of a toy R-CNN."""
    cfg = rcnn_cfg(kind, **kwargs)
    model = lively(build_model(cfg), seed)
    del cfg["KD"]
    config, weights = folder / f"{kind}.yaml", folder / f"{kind}.pth"
    config.write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, weights)
    return str(config), str(weights)


def exact(model: nn.Module, **kwargs: Any) -> Teacher:
    """A teacher that computes as the model itself does, to the last bit."""
    return Teacher(model=model, fold_batch_norm=False, channels_last=False, **kwargs)


def pair(student: nn.Module, teacher: Any, **terms: Any) -> Distiller:
    """A Distiller in training mode; its terms are both of the two-stage ones, if not said."""
    source = teacher if isinstance(teacher, Teacher) else exact(teacher)
    terms = terms or {"box": BoxHead(), "rpn": RPN()}
    return Distiller(student=student, sources={"teacher": source}, terms=terms).train()


def inputs(*sizes: tuple[int, int], **kwargs: Any) -> list[dict[str, Any]]:
    """A batch whose instances have masks."""
    found = batch(sizes or ((128, 128), (96, 128)), **kwargs)
    for x in found:
        h, w = x["instances"].image_size
        boxes = x["instances"].gt_boxes.tensor
        masks = torch.zeros(len(boxes), h, w, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        x["instances"].gt_masks = BitMasks(masks)
    return found


def poolers(model: nn.Module) -> nn.Module:
    """The box pooler of a toy R-CNN."""
    return getattr(model.roi_heads, "box_pooler", None) or model.roi_heads.pooler


def boxes_seen(model: nn.Module, seen: list[list[Tensor]]) -> Any:
    """Appends, for every call of the box pooler from now on, the boxes of each image."""
    return poolers(model).register_forward_pre_hook(
        lambda m, args: seen.append([b.tensor.clone() for b in args[1]])
    )


def recorded(model: nn.Module, taps: Any, batched_inputs: Any) -> Recorder:
    """A Recorder of one training forward."""
    with Recorder(model, taps) as recorder:
        model(batched_inputs)
    return recorder
