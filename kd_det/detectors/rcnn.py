"""`GeneralizedRCNN` (Faster, Mask, Cascade R-CNN) up to its region proposal network's head."""

from typing import Any

from detectron2.structures import Boxes
from torch import Tensor

from kd_det.detectors.dense import backbone_depths, backbone_presets
from kd_det.detectors.detector import Depth, Detector
from kd_det.registry import DETECTORS
from kd_det.taps import Tap


@DETECTORS.register()
class GeneralizedRCNN(Detector):
    """`features`, bottom-up stages, and the RPN head's objectness and deltas."""

    @property
    def num_classes(self) -> int | None:  # noqa: D102  # as in the base
        return getattr(self.model.roi_heads, "num_classes", None)

    def presets(self) -> dict[str, Tap]:  # noqa: D102  # as in the base
        backbone = self.model.backbone
        shapes = backbone.output_shape()
        presets = backbone_presets(backbone, sorted(shapes, key=lambda f: shapes[f].stride))
        levels = tuple(self.model.proposal_generator.in_features)
        for key, (name, kind) in enumerate([("rpn_logits", "logits"), ("rpn_deltas", "deltas")]):
            presets[name] = Tap(name, "proposal_generator.rpn_head", key, levels, kind)
        return presets

    def depths(self) -> list[Depth]:  # noqa: D102  # as in the base
        def rpn_head(image_tensor: Tensor) -> Any:
            maps = self.model.backbone(image_tensor)
            rpn = self.model.proposal_generator
            return rpn.rpn_head([maps[f] for f in rpn.in_features])

        return [
            *backbone_depths(self.model.backbone),
            Depth(("backbone", "proposal_generator.rpn_head"), rpn_head),
        ]

    def anchors(self, features: list[Tensor]) -> list[Boxes]:  # noqa: D102  # as in the base
        return self.model.proposal_generator.anchor_generator(features)
