"""Detectron2's box heads: which boxes they look at, what they say, and how to run them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Boxes
from torch import Tensor, nn

from kd_det.detectors.shapes import RoiHead, TapShape
from kd_det.taps import Maps, Tap


def describe_roi_head(roi_heads: nn.Module | None) -> RoiHead | None:
    """
    The box head of `StandardROIHeads`, `CascadeROIHeads` or `Res5ROIHeads`; ``None`` for ROI heads
    that are not known to be one of them (another box forward, rotated boxes, other predictors).

    Args:
        roi_heads: of a `GeneralizedRCNN`; may live on the meta device.
    """
    heads: Any = roi_heads
    box_forward = getattr(type(heads), "_forward_box", None)
    if isinstance(heads, CascadeROIHeads) and box_forward is CascadeROIHeads._forward_box:
        numbers = range(heads.num_cascade_stages)
        predictors = [f"box_predictor.{k}" for k in numbers]
        towers: list[Callable[[Tensor], Tensor]] = [heads.box_head[k] for k in numbers]
        pooler, levels = "box_pooler", heads.box_in_features
    elif isinstance(heads, StandardROIHeads) and box_forward is StandardROIHeads._forward_box:
        predictors, towers = ["box_predictor"], [heads.box_head]
        pooler, levels = "box_pooler", heads.box_in_features
    elif isinstance(heads, Res5ROIHeads) and type(heads).forward is Res5ROIHeads.forward:
        predictors, towers = ["box_predictor"], [lambda x: heads.res5(x).mean(dim=[2, 3])]
        pooler, levels = "pooler", heads.in_features
    else:
        return None
    layers = [heads.get_submodule(path) for path in predictors]
    if not all(map(_is_known, layers)):
        return None

    def run(features: Maps, rois: Maps) -> None:
        # Pooled in float32: below it a box of a large image would move by whole pixels, and not
        # every device's operator takes bfloat16. Copied once, not by every stage.
        maps = [features[level] for level in levels]
        dtype = maps[0].dtype
        maps = [x.to(torch.promote_types(x.dtype, torch.float32)).contiguous() for x in maps]
        for tower, predictor, boxes in zip(towers, layers, rois.values(), strict=False):
            pooled = getattr(heads, pooler)(maps, _per_image(boxes, len(maps[0])))
            predictor(tower(pooled.to(dtype)))

    stages = tuple(f"stage{k}" for k in range(len(predictors)))
    return RoiHead(
        features=Tap("features", "backbone", levels=tuple(levels)),
        taps=_taps(pooler, predictors, stages),
        shapes=_shapes(layers, stages, int(heads.batch_size_per_image)),
        run=run,
    )


def _is_known(layer: Any) -> bool:
    # Four numbers per box: rotated boxes have five.
    known = type(layer).forward is FastRCNNOutputLayers.forward
    return known and len(layer.box2box_transform.weights) == 4


def _taps(pooler: str, predictors: Sequence[str], stages: tuple[str, ...]) -> dict[str, Tap]:
    path, *also = (f"roi_heads.{predictor}" for predictor in predictors)
    taps = [Tap("proposals", f"roi_heads.{pooler}", 1, stages, "proposals", inputs=True)]
    for key, name in enumerate(["roi_scores", "roi_deltas"]):
        taps.append(Tap(name, path, key, stages, name, also=tuple(also)))
    return {tap.name: tap for tap in taps}


def _shapes(layers: Sequence[Any], stages: tuple[str, ...], rows: int) -> dict[str, list[TapShape]]:
    def of(kind: str, columns: Callable[[Any], int], calls: int = 1) -> list[TapShape]:
        return [
            TapShape(
                stage,
                channels=columns(layer),
                stride=0,
                kind=kind,
                calls=calls,
                units=tuple(layer.box2box_transform.weights) if kind == "roi_deltas" else (),
                activation=_activation(layer) if kind == "roi_scores" else "",
                rows=rows,
            )
            for stage, layer in zip(stages, layers, strict=True)
        ]

    return {
        "proposals": of("proposals", lambda _: 5, calls=len(stages)),
        "roi_scores": of("roi_scores", lambda layer: layer.cls_score.out_features),
        "roi_deltas": of("roi_deltas", lambda layer: layer.bbox_pred.out_features),
    }


def _activation(layer: Any) -> str:
    return "sigmoid" if getattr(layer, "use_sigmoid_ce", False) else "softmax"


def _per_image(rois: Tensor, images: int) -> list[Boxes]:
    """The boxes of `kd_det.taps.as_rois`, image by image."""
    counts = torch.bincount(rois[:, 0].long(), minlength=images).tolist()
    return [Boxes(x) for x in rois[:, 1:].split(counts)]
