"""A detector whose maps tell where they look: each cell holds the mean position of its pixels."""

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor, nn

from kd_det.detectors import Depth, Detector
from kd_det.registry import DETECTORS
from kd_det.taps import Tap
from kd_det.terms import LevelwiseTerm


class Pooling(nn.Module):
    """Mean of the pixels under each cell; a grid that its stride does not divide is rounded up."""

    def __init__(self, strides: dict[str, int], size_divisibility: int) -> None:
        super().__init__()
        self.strides = strides
        self.size_divisibility = size_divisibility
        self.weight = nn.Parameter(torch.ones(1))  # every detector has a device

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {
            level: F.avg_pool2d(x * self.weight, stride, ceil_mode=True, count_include_pad=False)
            for level, stride in self.strides.items()
        }


class Ruler(nn.Module):
    """
    A detector that only pools its images. Of images made by `positions` a cell then holds the
    (x, y) of the middle of its pixels, wherever a map is cropped, padded or resized.
    """

    def __init__(self, strides: dict[str, int], size_divisibility: int = 0) -> None:
        super().__init__()
        self.backbone = Pooling(strides, size_divisibility)

    def preprocess_image(self, inputs: list[dict]) -> ImageList:
        images = [x["image"].float() for x in inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def forward(self, inputs: list[dict]) -> dict[str, Tensor]:
        maps = self.backbone(self.preprocess_image(inputs).tensor)
        return {"loss_none": 0 * sum(x.sum() for x in maps.values())}


class _RulerDetector(Detector):
    def presets(self) -> dict[str, Tap]:
        return {"features": Tap("features", "backbone", levels=tuple(self.model.backbone.strides))}

    def depths(self) -> list[Depth]:
        return [Depth(("backbone",), self.model.backbone)]


DETECTORS._do_register("Ruler", _RulerDetector)


def positions(height: int, width: int) -> dict:
    """An image of which each pixel holds its own (x, y) and a 1, in pixels from the top left."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return {"image": torch.stack([x, y, torch.ones_like(x)]), "height": height, "width": width}


class Watch(LevelwiseTerm):
    """Keeps what it is given to compare."""

    def compare(self, student: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
        self.__dict__.setdefault("seen", []).append((student.detach(), target, region))
        return (student - target).abs().mean()
