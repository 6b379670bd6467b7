"""Dense detectors of Detectron2: RetinaNet, and any other `DenseDetector`."""

from collections.abc import Sequence
from typing import Any

from detectron2.structures import Boxes
from torch import Tensor

from kd_det.detectors.detector import Depth, Detector
from kd_det.registry import DETECTORS
from kd_det.taps import Tap


def backbone_presets(backbone: Any, levels: Sequence[str]) -> dict[str, Tap]:
    """
    ``features``: the pyramid levels that the head reads; ``res2``...: the bottom-up stages.

    Args:
        backbone: a Detectron2 backbone; an FPN's bottom-up network is found by its attribute.
        levels: names of the pyramid levels, fine to coarse.
    """
    top_block = getattr(backbone, "top_block", None)
    extra = getattr(top_block, "num_levels", 0)
    names = list(backbone.output_shape())
    # An FPN lists its extra levels last; what they are made of decides if two of them compare.
    top = set(names[len(names) - extra :] if extra else [])
    # A top block works on the last map of the pyramid (p5) or of the bottom-up network.
    below = "pyramid" if str(getattr(top_block, "in_feature", "")).startswith("p") else "bottom-up"
    made_by = f"{type(top_block).__name__} on {below}"
    origins = tuple(made_by if level in top else "" for level in levels)
    presets = {"features": Tap("features", "backbone", levels=tuple(levels), origins=origins)}
    bottom_up = getattr(backbone, "bottom_up", None)
    for stage in bottom_up.output_shape() if bottom_up is not None else ():
        presets[stage] = Tap(stage, "backbone.bottom_up", key=stage, levels=(stage,))
    return presets


def backbone_depths(backbone: Any) -> list[Depth]:
    """The bottom-up network alone, which spares a tap on ``res4`` the pyramid, and all of it."""
    bottom_up = getattr(backbone, "bottom_up", None)
    alone = [] if bottom_up is None else [("backbone.bottom_up", bottom_up)]
    return [*alone, ("backbone", backbone)]


@DETECTORS.register()
class DenseDetector(Detector):
    """`features`, bottom-up stages, and the head's first two outputs (FCOS too)."""

    running = ("loss_normalizer",)  # a moving average of the number of foreground anchors

    def presets(self) -> dict[str, Tap]:  # noqa: D102  # as in the base
        levels = tuple(self.model.head_in_features)
        presets = backbone_presets(self.model.backbone, levels)
        for key, (name, kind) in enumerate([("cls_logits", "logits"), ("box_deltas", "deltas")]):
            # The head, not its last convolution: that one is called once per level. What a logit
            # means does not depend on what made its level: no origins.
            presets[name] = Tap(name, "head", key, levels, kind)
        return presets

    def depths(self) -> list[Depth]:  # noqa: D102  # as in the base
        def head(image_tensor: Tensor) -> Any:
            maps = self.model.backbone(image_tensor)
            return self.model.head([maps[f] for f in self.model.head_in_features])

        return [*backbone_depths(self.model.backbone), ("head", head)]

    def anchors(self, features: list[Tensor]) -> list[Boxes]:  # noqa: D102  # as in the base
        return self.model.anchor_generator(features)
