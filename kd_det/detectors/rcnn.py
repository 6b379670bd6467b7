"""`GeneralizedRCNN` (Faster, Mask, Cascade R-CNN): its region proposal network and box head."""

from typing import Any

from detectron2.structures import Boxes
from torch import Tensor

from kd_det.detectors.dense import backbone_depths, backbone_presets
from kd_det.detectors.detector import Detector
from kd_det.detectors.pieces import coordinates
from kd_det.detectors.roi_heads import describe_roi_head
from kd_det.detectors.shapes import Depth, RoiHead
from kd_det.registry import DETECTORS
from kd_det.taps import Tap


@DETECTORS.register()
class GeneralizedRCNN(Detector):
    """
    `features`, bottom-up stages, the RPN head's objectness and deltas; of a box head that kd_det
    knows the sampled proposals, class scores and deltas.
    """

    @property
    def num_classes(self) -> int | None:  # noqa: D102  # as in the base
        return getattr(self.model.roi_heads, "num_classes", None)

    def presets(self) -> dict[str, Tap]:  # noqa: D102  # as in the base
        presets = backbone_presets(self.model.backbone)
        rpn = self.model.proposal_generator
        if not hasattr(rpn, "rpn_head"):  # precomputed proposals
            return presets
        box = coordinates(rpn.box2box_transform)
        for key, (name, kind, channels) in enumerate(
            [("rpn_logits", "logits", ("objectness",)), ("rpn_deltas", "deltas", box)]
        ):
            presets[name] = Tap(
                name,
                "proposal_generator.rpn_head",
                key,
                tuple(rpn.in_features),
                kind,
                per_anchor=len(channels),
                names=channels,
                units=tuple(rpn.box2box_transform.weights) if kind == "deltas" else (),
            )
        return presets

    def depths(self) -> list[Depth]:  # noqa: D102  # as in the base
        def rpn_head(image_tensor: Tensor) -> Any:
            maps = self.model.backbone(image_tensor)
            rpn = self.model.proposal_generator
            return rpn.rpn_head([maps[f] for f in rpn.in_features])

        depths = backbone_depths(self.model.backbone)
        if hasattr(self.model.proposal_generator, "rpn_head"):
            depths.append(Depth(("backbone", "proposal_generator.rpn_head"), rpn_head))
        return depths

    def roi_head(self) -> RoiHead | None:  # noqa: D102  # as in the base
        return describe_roi_head(self.model.roi_heads)

    def anchors(self, features: list[Tensor]) -> list[Boxes]:  # noqa: D102  # as in the base
        return self.model.proposal_generator.anchor_generator(features)
