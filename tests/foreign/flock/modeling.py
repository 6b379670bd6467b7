from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, ROI_BOX_HEAD_REGISTRY, GeneralizedRCNN
from torch import nn


@ROI_BOX_HEAD_REGISTRY.register()
class FlockBoxHead(nn.Module):
    @configurable
    def __init__(self, *, shape: ShapeSpec, dim: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(shape.channels * shape.height * shape.width, dim)
        self.dim = dim

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return {"shape": input_shape, "dim": cfg.MODEL.FLOCK.BOX_DIM}

    @property
    def output_shape(self) -> ShapeSpec:
        return ShapeSpec(channels=self.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.squeeze(x.flatten(1)))


@META_ARCH_REGISTRY.register()
class FlockRCNN(GeneralizedRCNN):
    """Also says how many birds there are."""

    @configurable
    def __init__(self, *, count_level: str, count_weight: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count_level, self.count_weight = count_level, count_weight
        self.count = nn.Linear(self.backbone.output_shape()[count_level].channels, 1)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        flock = cfg.MODEL.FLOCK
        own = {"count_level": flock.COUNT_LEVEL, "count_weight": flock.COUNT_WEIGHT}
        return {**super().from_config(cfg), **own}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        counts = self.count(features[self.count_level].mean((2, 3)))[:, 0]
        instances = None
        if self.training:
            instances = [x["instances"].to(self.device) for x in batched_inputs]
        proposals, losses = self.proposal_generator(images, features, instances)
        found, box_losses = self.roi_heads(images, features, proposals, instances)
        if self.training:
            birds = counts.new_tensor([len(x) for x in instances])
            count_loss = self.count_weight * F.smooth_l1_loss(counts, birds)
            return {**losses, **box_losses, "loss_count": count_loss}
        outputs = self._postprocess(found, batched_inputs, images.image_sizes)
        return [{**x, "count": n} for x, n in zip(outputs, counts, strict=True)]
