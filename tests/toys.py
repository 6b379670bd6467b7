"""Toy detectors and batches: small enough that a training step takes a fraction of a second."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image
from torch import nn

import kd_det


def toy_cfg(
    *,
    fpn: int = 8,
    classes: int = 3,
    arch: str = "RetinaNet",
    width: int = 4,
    sizes: int = 1,
    ratios: tuple[float, ...] = (1.0,),
    norm: str = "BN",
) -> CfgNode:
    """A very thin ResNet-50 FPN detector, with the KD node (disabled)."""
    cfg = get_cfg()
    kd_det.add_kd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.OUTPUT_DIR = ""  # or single steps would write into the working directory
    cfg.MODEL.META_ARCHITECTURE = arch
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = width
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = width
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = width
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.OUT_CHANNELS = fpn
    if arch == "RetinaNet":
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.RETINANET.NUM_CONVS = 1
        cfg.MODEL.RETINANET.NUM_CLASSES = classes
        levels = 5
    else:
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
        levels = 5
    if arch in ("SemanticSegmentor", "PanopticFPN"):
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = classes + 1
        cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = fpn
        cfg.MODEL.SEM_SEG_HEAD.NORM = norm
        cfg.MODEL.MASK_ON = arch == "PanopticFPN"
        cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
        cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
        cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 4
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
        [16 * 2**i + j for j in range(sizes)] for i in range(levels)
    ]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [list(ratios)]
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.MAX_ITER = 100
    cfg.SOLVER.IMS_PER_BATCH = 2
    return cfg


def toy_fcos(*, fpn: int = 8, classes: int = 3) -> nn.Module:
    """An FCOS around the toy RetinaNet's backbone; Detectron2 has no YAML config of it."""
    backbone = build_backbone(toy_cfg(fpn=fpn))
    shapes = backbone.output_shape()
    levels = ["p3", "p4", "p5", "p6", "p7"]
    head = FCOSHead(
        input_shape=[shapes[f] for f in levels], num_classes=classes, conv_dims=[fpn], norm=""
    )
    return FCOS(
        backbone=backbone,
        head=head,
        head_in_features=levels,
        num_classes=classes,
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
    )


def save_teacher(folder: Path, *, seed: int = 1, **kwargs: Any) -> tuple[str, str]:
    """A toy teacher's (config file, weights file), as stock Detectron2 would write them."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = toy_cfg(**kwargs)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(cfg)
        randomize_norms(model)
    del cfg["KD"]
    config, weights = folder / "teacher.yaml", folder / "teacher.pth"
    config.write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, weights)
    return str(config), str(weights)


def randomize_norms(model: nn.Module) -> None:
    """BatchNorm statistics as training leaves them: a fresh one hides errors of folding."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                m.weight.data.uniform_(0.5, 1.5)
                m.bias.data.normal_(0, 0.3)


def distiller_cfg(
    teacher: tuple[str, str], terms: dict[str, Any] | None = None, **kwargs: Any
) -> CfgNode:
    """A toy student's config that distils from a toy teacher; CWD on features and logits."""
    cfg = toy_cfg(**kwargs)
    cfg.KD.STUDENT.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    if terms is None:
        terms = {
            "FPN": {"TYPE": "CWD", "TAP": "features", "WEIGHT": 5.0},
            "LOGITS": {"TYPE": "CWD", "TAP": "cls_logits"},
        }
    config, weights = teacher
    kd = {
        "ENABLED": True,
        "SOURCES": {"TEACHER": {"TYPE": "Teacher", "CONFIG_FILE": config, "WEIGHTS": weights}},
        "TERMS": terms,
    }
    cfg.merge_from_other_cfg(CfgNode({"KD": kd}))
    return cfg


def batch(
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (64, 64)), *, seed: int = 0, boxes: int = 2
) -> list[dict[str, Any]]:
    """Detectron2's batched inputs with random pixels and a few boxes per image."""
    g = torch.Generator().manual_seed(seed)
    inputs = []
    for h, w in sizes:
        corner = torch.rand(boxes, 2, generator=g) * torch.tensor([w / 2, h / 2])
        size = 8 + torch.rand(boxes, 2, generator=g) * torch.tensor([w / 2 - 8, h / 2 - 8])
        instances = Instances((h, w))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(3, (boxes,), generator=g)
        image = torch.randint(0, 256, (3, h, w), generator=g, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances, "height": h, "width": w})
    return inputs


def with_pixels(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with the boxes as masks: background 0, class + 1 inside, 255 along the top."""
    for x in inputs:
        h, w = x["image"].shape[-2:]
        found = x["instances"]
        masks = torch.zeros(len(found), h, w, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, found.gt_boxes.tensor.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        found.gt_masks = BitMasks(masks)
        x["sem_seg"] = torch.zeros(h, w, dtype=torch.long)
        for mask, label in zip(masks, found.gt_classes, strict=True):
            x["sem_seg"][mask] = label + 1
        x["sem_seg"][0] = 255
    return inputs


def save_noise(folder: Path) -> dict[str, str]:
    """
    Eleven images of noise, wide and tall in no order, with one box of three classes each; what
    ``KD.DATASETS`` wants to know of them.
    """
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i, wide in enumerate([1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1]):
        h, w = (48, 64) if wide else (64, 48)
        name = f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / name)
        images.append({"id": i + 1, "file_name": name, "height": h, "width": w})
        box = {"bbox": [4 + i, 6, 24, 20], "area": 480, "iscrowd": 0}
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 1 + i % 3, **box})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate("abc")]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "noise.json").write_text(json.dumps(content))
    return {"JSON": str(folder / "noise.json"), "IMAGES": str(folder)}
