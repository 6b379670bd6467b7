"""Several dense detectors that predict as one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kd_det.context import in_format
from kd_det.detectors import TapShape, describe, probe


class EnsembleModel(nn.Module):
    """
    The ensemble of dense detectors (RetinaNet, FCOS), for evaluation.

    Every member normalises the images and runs its backbone and head; at each level the raw outputs
    are averaged over the members,

        z_l = 1/M sum_m z_l^m,   d_l = 1/M sum_m d_l^m

    class logits before their sigmoid, box deltas before they are decoded, and all else that the
    head predicts (FCOS's centerness). The first member decodes them, with its thresholds and NMS.

    It holds the members themselves, which learn on; it has no losses.

    Args:
        members: by name; on one device.
        input_format: channel order of the images that it is given; empty takes the first member's.

    Raises:
        ValueError: if their outputs do not mean the same: a member without a dense head, or other
            levels, classes, anchors or box coding.
    """

    def __init__(self, members: Mapping[str, nn.Module], input_format: str = "") -> None:
        super().__init__()
        if not members:
            raise ValueError("An ensemble needs at least one member.")
        (first, model), *others = members.items()
        expected = _outputs(first, model)
        for name, other in others:
            if (found := _outputs(name, other)) != expected:
                raise ValueError(_differ(first, expected, name, found))
            if not _same_anchors(model, other, len(expected["box_deltas"])):
                raise ValueError(
                    f"'{first}' and '{name}' cannot be averaged: their anchors have other sizes, "
                    "aspect ratios or offsets, and box deltas are relative to anchors."
                )
        self.members = nn.ModuleDict(members)
        self.input_format = input_format or str(getattr(model, "input_format", "BGR"))
        self.training = model.training  # of the members: an evaluation gives it back

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        What the first member makes of the averaged outputs: for each image its ``instances``.

        Args:
            batched_inputs: Detectron2's batched inputs, images in ``input_format``.

        Raises:
            RuntimeError: in training mode.
            ValueError: if members pad or number their outputs differently.
        """
        if self.training:
            raise RuntimeError("An EnsembleModel has no losses: call eval() first.")
        names, models = zip(*self.members.items(), strict=True)
        given = self.input_format
        halves = [
            describe(m).dense_predictions(
                in_format(batched_inputs, given, getattr(m, "input_format", given))
            )
            for m in models
        ]
        found = [[[x.shape for x in maps] for maps in outputs] for _, _, outputs in halves]
        for name, shapes in zip(names, found, strict=True):
            if shapes != found[0]:
                raise ValueError(
                    f"'{names[0]}' and '{name}' cannot be averaged: their heads give maps of "
                    f"{_sizes(found[0])} and of {_sizes(shapes)}."
                )
        images, features, _ = halves[0]
        mean = [
            [torch.stack(level).mean(0) for level in zip(*maps, strict=True)]
            for maps in zip(*(outputs for _, _, outputs in halves), strict=True)
        ]
        return describe(models[0]).dense_inference(batched_inputs, images, features, mean)


def _outputs(name: str, model: nn.Module) -> dict[str, list[tuple[Any, ...]]]:
    """What the head's outputs mean, level by level."""
    detector = describe(model)
    try:
        detector.dense_head()
        shapes = probe(model, map(detector.tap, ("cls_logits", "box_deltas")))
    except (ValueError, KeyError) as e:
        raise ValueError(f"'{name}' cannot be a member of an ensemble: {e.args[0]}") from e
    return {tap: list(map(_meaning, levels)) for tap, levels in shapes.items()}


def _meaning(x: TapShape) -> tuple[Any, ...]:
    return x.stride, x.channels, x.anchors, x.names, x.units


def _differ(first: str, expected: Mapping[str, Any], name: str, found: Mapping[str, Any]) -> str:
    tap = next(tap for tap in expected if expected[tap] != found[tap])
    levels = zip(expected[tap], found[tap], strict=False)
    level = next(((x, y) for x, y in levels if x != y), None)
    if level is None:
        what = f"{len(expected[tap])} and {len(found[tap])} levels"
    else:
        what = " and ".join(
            f"{channels} channels of stride {stride} ({anchors} anchors"
            + (f", {', '.join(coordinates)}" if coordinates else "")
            + (f" in units of {units}" if units else "")
            + ")"
            for stride, channels, anchors, coordinates, units in level
        )
    return (
        f"'{first}' and '{name}' cannot be averaged: their {tap} have {what}. Members of an "
        "ensemble need the same levels, classes, anchors and box coding."
    )


def _same_anchors(one: nn.Module, other: nn.Module, levels: int) -> bool:
    """On a grid of two by two cells: what they are on another one follows."""
    device = next(one.parameters()).device
    grids = [torch.zeros(1, 1, 2, 2, device=device)] * levels
    mine, theirs = (describe(model).anchors(grids) for model in (one, other))
    return all(torch.equal(x.tensor, y.tensor) for x, y in zip(mine, theirs, strict=True))


def _sizes(shapes: list[list[torch.Size]]) -> str:
    return "; ".join(", ".join(" x ".join(map(str, x)) for x in maps) for maps in shapes)
