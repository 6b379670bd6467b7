"""Detectron2's own networks, piece by piece: what a forward need not run to reach a tap."""

from collections.abc import Callable, Sequence
from typing import Any

from detectron2.modeling.backbone.regnet import AnyNet
from detectron2.modeling.backbone.resnet import ResNet
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

_BRANCHES = {"cls_logits": ("cls_subnet", "cls_score"), "box_deltas": ("bbox_subnet", "bbox_pred")}

_COORDINATES = {
    "Box2BoxTransform": ("dx", "dy", "dw", "dh"),
    "Box2BoxTransformRotated": ("dx", "dy", "dw", "dh", "da"),
    "Box2BoxTransformLinear": ("left", "top", "right", "bottom"),
}


def coordinates(transform: object) -> tuple[str, ...]:
    """
    What a head's box outputs mean, of the transform that decodes them: offsets from an anchor are
    no distances to the sides (FCOS). Empty for transforms that are not known.
    """
    return _COORDINATES.get(type(transform).__name__, ())


def bottom_up(backbone: nn.Module) -> tuple[str, Any]:
    """
    Path and module of the network under a pyramid: ``bottom_up`` of an `FPN`, ``net`` of a ViTDet's
    `SimpleFeaturePyramid`; the backbone itself where there is no pyramid (C4, DC5).
    """
    for name in ("bottom_up", "net"):
        net = getattr(backbone, name, None)
        if hasattr(net, "output_shape"):
            return f"backbone.{name}", net
    return "backbone", backbone


def stages(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """
    Names and modules of a bottom-up network that is a chain, in the order of its forward; empty
    for networks that are not known to be one.
    """
    forward = type(net).forward  # a subclass may do something else
    if isinstance(net, ResNet) and forward is ResNet.forward:
        named = list(zip(net.stage_names, net.stages, strict=True))
    elif isinstance(net, AnyNet) and forward is AnyNet.forward:
        named = [(name, stage) for stage, name in net.stages_and_names]
    else:
        return []
    return [("stem", net.stem), *named]


def head_branches(head: nn.Module) -> dict[str, tuple[str, str]]:
    """
    For each tap of a dense head the (tower, predictor) that make it from one level at a time,
    without the other branch; empty for heads that are not known to be built so.
    """
    known = (RetinaNetHead.forward, FCOSHead.forward)
    return _BRANCHES if type(head).forward in known else {}


def in_turn(modules: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """The forward that calls modules one after the other."""

    def forward(x: Tensor) -> Any:
        for module in modules:
            x = module(x)
        return x

    return forward
