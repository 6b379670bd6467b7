"""`SemanticSegmentor` and `PanopticFPN`: their heads up to the class map, before it is enlarged."""

from typing import Any

from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch import Tensor, nn

from kd_det.detectors.dense import backbone_depths, backbone_presets
from kd_det.detectors.detector import Detector
from kd_det.detectors.rcnn import GeneralizedRCNN
from kd_det.detectors.shapes import Depth
from kd_det.registry import DETECTORS
from kd_det.taps import Tap


def class_map(head: nn.Module) -> dict[str, Tap]:
    """
    ``sem_seg_logits``: ``(N, K, H / s, W / s)``, what a head's ``predictor`` returns at its common
    stride s (4 in Detectron2), one channel per class. A head that has no module of that name has no
    such preset: what makes its class map is tapped by module path.
    """
    if not isinstance(getattr(head, "predictor", None), nn.Module):
        return {}
    tap = Tap(
        "sem_seg_logits",
        "sem_seg_head.predictor",
        levels=("sem_seg",),
        kind="logits",
        per_anchor=getattr(head.predictor, "out_channels", 0),
        names="stuff_classes",
    )
    return {tap.name: tap}


def run_head(head: Any, maps: dict[str, Tensor]) -> Any:
    """
    A head in eval mode, without losses: `SemSegFPNHead` up to its class map, any other one whole,
    with its enlargement to the size of the image.
    """
    if type(head).forward is SemSegFPNHead.forward:
        return head.layers(maps)
    return head(maps, None)


@DETECTORS.register()
class SemanticSegmentor(Detector):
    """`features` (what the head reads), bottom-up stages, and the class map `sem_seg_logits`."""

    def presets(self) -> dict[str, Tap]:  # noqa: D102  # as in the base
        backbone, head = self.model.backbone, self.model.sem_seg_head
        shapes = backbone.output_shape()
        levels = getattr(head, "in_features", shapes)
        levels = sorted(levels, key=lambda f: shapes[f].stride)
        return {**backbone_presets(backbone, levels), **class_map(head)}

    def depths(self) -> list[Depth]:  # noqa: D102  # as in the base
        def head(image_tensor: Tensor) -> Any:
            return run_head(self.model.sem_seg_head, self.model.backbone(image_tensor))

        return [
            *backbone_depths(self.model.backbone),
            Depth(("backbone", "sem_seg_head"), head),
        ]


@DETECTORS.register()
class PanopticFPN(GeneralizedRCNN):
    """What `GeneralizedRCNN` has, and the class map `sem_seg_logits`."""

    def presets(self) -> dict[str, Tap]:  # noqa: D102  # as in the base
        return {**super().presets(), **class_map(self.model.sem_seg_head)}

    def depths(self) -> list[Depth]:  # noqa: D102  # as in the base
        def head(image_tensor: Tensor) -> Any:
            return run_head(self.model.sem_seg_head, self.model.backbone(image_tensor))

        def both(image_tensor: Tensor) -> Any:
            maps = self.model.backbone(image_tensor)
            rpn = self.model.proposal_generator
            rpn.rpn_head([maps[f] for f in rpn.in_features])
            return run_head(self.model.sem_seg_head, maps)

        depths = [*super().depths(), Depth(("backbone", "sem_seg_head"), head)]
        if hasattr(self.model.proposal_generator, "rpn_head"):
            paths = ("backbone", "proposal_generator.rpn_head", "sem_seg_head")
            depths.append(Depth(paths, both))
        return depths
