"""`GeneralizedRCNN` (Faster, Mask, Cascade R-CNN) up to its region proposal network's head."""

from detectron2.structures import Boxes
from torch import Tensor

from kd_det.detectors.dense import backbone_presets
from kd_det.detectors.detector import Detector, Stage
from kd_det.registry import DETECTORS
from kd_det.taps import Tap


@DETECTORS.register()
class GeneralizedRCNN(Detector):
    """`features`, bottom-up stages, and the RPN head's objectness and deltas."""

    def presets(self) -> dict[str, Tap]:  # noqa: D102
        backbone = self.model.backbone
        shapes = backbone.output_shape()
        presets = backbone_presets(backbone, sorted(shapes, key=lambda f: shapes[f].stride))
        levels = tuple(self.model.proposal_generator.in_features)
        made_by = dict(zip(presets["features"].levels, presets["features"].origins, strict=True))
        origins = tuple(made_by[f] for f in levels)
        for key, (name, kind) in enumerate([("rpn_logits", "logits"), ("rpn_deltas", "deltas")]):
            presets[name] = Tap(name, "proposal_generator.rpn_head", key, levels, kind, origins)
        return presets

    def stages(self) -> list[Stage]:  # noqa: D102
        rpn = self.model.proposal_generator
        return [
            ("backbone", self.model.backbone),
            ("proposal_generator", lambda maps: rpn.rpn_head([maps[f] for f in rpn.in_features])),
        ]

    def anchors(self, features: list[Tensor]) -> list[Boxes]:  # noqa: D102
        return self.model.proposal_generator.anchor_generator(features)
