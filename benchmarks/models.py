"""Detectors with random weights, and batches in memory."""

from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

import kd_det
from kd_det.paths import CONFIGS


def read_config(file: str, device: torch.device, *overrides: Any) -> CfgNode:
    """One of kd_det's configs, for models that write nothing."""
    cfg = get_cfg()
    kd_det.add_kd_config(cfg)
    cfg.merge_from_file(str(CONFIGS / file))
    cfg.merge_from_list(["MODEL.DEVICE", str(device), "OUTPUT_DIR", "", *overrides])
    return cfg


def build_random(cfg: CfgNode, seed: int = 0) -> nn.Module:
    """
    The detector with random weights and with normalisation statistics as training leaves them:
    fresh ones (mean 0, variance 1) would make folding and half precision look better than they are.
    """
    torch.manual_seed(seed)
    model = build_model(cfg)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)):
                # Buffers, which PyTorch's stubs take for modules as well.
                m.running_mean.normal_(0, 0.3)  # type: ignore[union-attr, operator]
                m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.3)
    return model


def make_batch(images: int, height: int, width: int, classes: int) -> list[dict[str, Any]]:
    """Detectron2's batched inputs: smooth random pictures, each with three boxes."""
    g = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(images):
        coarse = torch.rand(1, 3, max(height // 16, 1), max(width // 16, 1), generator=g)
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
        image = (255 * smooth + 20 * torch.randn(3, height, width, generator=g)).clamp(0, 255)
        side = torch.tensor([width, height])
        corner = torch.rand(3, 2, generator=g) * side / 2
        size = (0.1 + 0.4 * torch.rand(3, 2, generator=g)) * side
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(classes, (3,), generator=g)
        image = image.to(torch.uint8)
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs
