"""What a term, a region or a source may see of a training step besides the maps."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from kd_det.detectors import Detector, describe, running_values
from kd_det.taps import Maps

T = TypeVar("T")


@dataclass
class Context:
    """
    One training step, as the parts see it.

    Attributes:
        inputs: Detectron2's batched inputs; images are in the student's channel order, on its
            device.
        input_format: that order, ``"BGR"`` or ``"RGB"``.
        student: the student detector.
        student_maps: for every recorded tap of the student its maps, with gradients.
        progress: share of the run that is done, in [0, 1].
        targets: what other sources have given in this step, by source and tap; for those that a
            source says it reads (`Source.reads`).
        target_maps: for a region that asks for taps of the source, their maps; see `with_targets`.
    """

    inputs: list[dict[str, Any]]
    input_format: str
    student: nn.Module
    student_maps: dict[str, Maps] = field(default_factory=dict)
    progress: float = 0.0
    targets: Mapping[str, Mapping[str, Maps]] = field(default_factory=dict)
    target_maps: Mapping[str, Maps] = field(default_factory=dict)
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def with_targets(self, maps: Mapping[str, Maps]) -> "Context":
        """The same step, beside the maps of one source."""
        return replace(self, target_maps=maps)

    def inputs_in(self, input_format: str) -> list[dict[str, Any]]:
        """
        The step's images in another network's channel order: it normalises them itself, and its
        mean and standard deviation belong to its own order.
        """
        return in_format(self.inputs, self.input_format, input_format)

    def seen_by(self, network: nn.Module) -> "Context":
        """
        The same step from the side of another network that learns: its images in that one's channel
        order, and nothing that was made for this one.

        Args:
            network: which; the student itself keeps the order that it is fed.
        """
        order = self.input_format
        if network is not self.student:
            order = str(getattr(network, "input_format", order))
        inputs = self.inputs_in(order)
        return replace(
            self, inputs=inputs, input_format=order, student=network, student_maps={}, _made={}
        )

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """
        What several levels or terms need in one step, made the first time it is asked for.

        Args:
            key: says what it is, and everything that it depends on beside the student and the
                batch.
            make: makes it.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def positives(self) -> float:
        """
        The student's own normaliser of its losses: its running number of foreground anchors per
        batch, of this process. A plain number; nothing waits.

        Raises:
            ValueError: if its meta-architecture keeps none.
        """
        found = running_values(self.student).get("loss_normalizer")
        if found is None:
            raise ValueError(
                f"A term is normalised by the number of foreground anchors, which "
                f"{type(self.student).__name__} does not keep (RetinaNet and FCOS do, from their "
                'first labelled images on): set NORMALIZER: "cells".'
            )
        return float(found)

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of every image before padding, host integers."""
        return [(int(x["image"].shape[-2]), int(x["image"].shape[-1])) for x in self.inputs]

    @property
    def instances(self) -> list[Instances]:
        """
        Ground truth of every image (boxes in pixels of the padded canvas, whose origin is the
        image's), on the device of the data loader.

        Raises:
            ValueError: if the batch carries none.
        """
        if any("instances" not in x for x in self.inputs):
            raise ValueError(
                "A term asked for ground truth, but an image of the batch has no 'instances': "
                "where images have no labels, take terms and regions that need none."
            )
        return [x["instances"] for x in self.inputs]

    def detector(self) -> Detector:
        """kd_det's description of the student's meta-architecture."""
        return describe(self.student)

    def anchors(self, maps: list[Tensor]) -> list[Boxes]:
        """The student's anchors on these grids, one `Boxes` per level, in pixels."""
        return self.detector().anchors(maps)


def in_format(inputs: list[dict[str, Any]], given: str, wanted: str) -> list[dict[str, Any]]:
    """The same inputs, with their images in another channel order, ``"BGR"`` or ``"RGB"``."""
    if given == wanted:
        return inputs
    return [{**x, "image": x["image"].flip(0)} for x in inputs]


def with_images_on(device: torch.device, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    The same inputs with their images, and second views, on a device. To be called before the
    student's forward is queued: a source that uploaded its own afterwards would make the host wait
    for that forward.
    """
    views = ("image", "view_2")
    return [
        {**x, **{k: x[k].to(device, non_blocking=True) for k in views if k in x}} for x in inputs
    ]


def second_view(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    The same inputs with the second view of every image (``view_2``) in the place of ``image``.

    Raises:
        ValueError: if an image has none.
    """
    if any("view_2" not in x for x in inputs):
        raise ValueError(
            "A second view was asked for, but an image of the batch has no 'view_2': set "
            "KD.VIEWS.ENABLED to True where TrainerMixin trains, or wrap the mapper of your "
            "loader in kd_det.data.PhotometricViews."
        )
    return [{**x, "image": x["view_2"]} for x in inputs]
