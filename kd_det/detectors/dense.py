"""Dense detectors of Detectron2: RetinaNet, and any other `DenseDetector`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from kd_det.detectors.detector import Detector, running_values, set_running_values
from kd_det.detectors.pieces import bottom_up, coordinates, head_branches, in_turn, stages
from kd_det.detectors.shapes import Depth
from kd_det.registry import DETECTORS
from kd_det.taps import Tap


def backbone_presets(backbone: Any, levels: Sequence[str] = ()) -> dict[str, Tap]:
    """
    ``features``: the pyramid levels that the head reads; ``res2``...: the bottom-up stages, or for
    a ViT, which has one stride, its last map (``last_feat``).

    Args:
        backbone: a Detectron2 backbone.
        levels: names of the pyramid levels, fine to coarse; empty for all of them.
    """
    shapes = backbone.output_shape()
    levels = tuple(levels) or tuple(sorted(shapes, key=lambda f: shapes[f].stride))
    top_block = getattr(backbone, "top_block", None)
    extra = getattr(top_block, "num_levels", 0)
    names = list(shapes)
    # An FPN lists its extra levels last; what they are made of decides if two of them compare.
    top = set(names[len(names) - extra :] if extra else [])
    # A top block works on the last map of the pyramid (p5) or of the bottom-up network.
    below = "pyramid" if str(getattr(top_block, "in_feature", "")).startswith("p") else "bottom-up"
    made_by = f"{type(top_block).__name__} on {below}"
    origins = tuple(made_by if level in top else "" for level in levels)
    presets = {"features": Tap("features", "backbone", levels=levels, origins=origins)}
    path, net = bottom_up(backbone)
    known = dict(stages(net))
    for stage in net.output_shape():
        if stage in known:  # its own module: what comes behind it need not run
            tap = Tap(stage, f"{path}.{stage}", levels=(stage,))
        else:
            tap = Tap(stage, path, key=stage, levels=(stage,))
        # A Swin's stages are p0, p1...: in front of a pyramid, p3 would be two things.
        clash = net is not backbone and stage in shapes
        name = f"bottom_up.{stage}" if clash else stage
        presets[name] = replace(tap, name=name)
    return presets


def backbone_depths(backbone: Any) -> list[Depth]:
    """
    The bottom-up network up to each of its stages, which spares a tap on ``res4`` the last stage
    and the pyramid, all of it, and the whole backbone.
    """
    path, net = bottom_up(backbone)
    depths, paths, modules = [], [], []
    for name, stage in stages(net):
        paths.append(f"{path}.{name}")
        modules.append(stage)
        depths.append(Depth(tuple(paths), in_turn(tuple(modules))))
    if net is not backbone:
        depths.append(Depth((path,), net))
    return [*depths, Depth(("backbone",), backbone)]


@DETECTORS.register()
class DenseDetector(Detector):
    """`features`, bottom-up stages, and the head's first two outputs (FCOS too)."""

    running = ("loss_normalizer",)  # a moving average of the number of foreground anchors

    def presets(self) -> dict[str, Tap]:  # noqa: D102  # as in the base
        levels = tuple(self.model.head_in_features)
        presets = backbone_presets(self.model.backbone, levels)
        branches = head_branches(self.model.head)
        count = self.num_classes or 0
        transform = getattr(self.model, "box2box_transform", None)
        box = coordinates(transform)
        units = tuple(getattr(transform, "weights", ()))
        # What a logit means does not depend on what made its level: no origins.
        for tap in (
            Tap("cls_logits", "head", 0, levels, "logits", per_anchor=count, names="thing_classes"),
            Tap(
                "box_deltas",
                "head",
                1,
                levels,
                "deltas",
                per_anchor=len(box),
                names=box,
                units=units,
            ),
        ):
            if tap.name in branches:  # called once per level, and without the other branch
                tap = replace(tap, path=f"head.{branches[tap.name][1]}", key=None)
            presets[tap.name] = tap
        return presets

    def depths(self) -> list[Depth]:  # noqa: D102  # as in the base
        def features(image_tensor: Tensor) -> list[Tensor]:
            maps = self.model.backbone(image_tensor)
            return [maps[f] for f in self.model.head_in_features]

        def branch(names: tuple[str, str]) -> Depth:
            each = in_turn([getattr(self.model.head, name) for name in names])
            paths = ("backbone", *(f"head.{name}" for name in names))
            return Depth(paths, lambda x: [each(level) for level in features(x)])

        return [
            *backbone_depths(self.model.backbone),
            *map(branch, head_branches(self.model.head).values()),
            Depth(("backbone", "head"), lambda x: self.model.head(features(x))),
        ]

    def dense_head(self) -> nn.Module:  # noqa: D102  # as in the base
        return self.model.head

    def dense_losses(  # noqa: D102  # as in the base
        self, inputs: list[dict[str, Any]], features: list[Tensor], predictions: Any
    ) -> dict[str, Tensor]:
        images = self.model.preprocess_image(inputs)
        instances = [x["instances"].to(features[0].device) for x in inputs]
        kept = running_values(self.model)
        with EventStorage(0):  # num_pos_anchors was counted by the detector's own forward
            losses = self.model.forward_training(images, features, predictions, instances)
        set_running_values(self.model, kept)
        return losses

    def dense_predictions(  # noqa: D102  # as in the base
        self, inputs: list[dict[str, Any]]
    ) -> tuple[ImageList, list[Tensor], list[list[Tensor]]]:
        images = self.model.preprocess_image(inputs)
        maps = self.model.backbone(images.tensor)
        features = [maps[f] for f in self.model.head_in_features]
        return images, features, self.model.head(features)

    def dense_inference(  # noqa: D102  # as in the base
        self,
        inputs: list[dict[str, Any]],
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
    ) -> list[dict[str, Any]]:
        results = self.model.forward_inference(images, features, predictions)
        sizes = [
            (x.get("height", height), x.get("width", width))
            for x, (height, width) in zip(inputs, images.image_sizes, strict=True)
        ]
        return [
            {"instances": detector_postprocess(found, *size)}
            for found, size in zip(results, sizes, strict=True)
        ]

    def anchors(self, features: list[Tensor]) -> list[Boxes]:  # noqa: D102  # as in the base
        return self.model.anchor_generator(features)
