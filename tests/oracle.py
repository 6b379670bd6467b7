"""A detector that finds what an annotation file says: an AP without training."""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.structures import Boxes, Instances

from kd_det.data.coco import register_coco
from kd_det.data.synthetic import CLASSES, make_synthetic_coco
from tests.toys import save_teacher


@META_ARCH_REGISTRY.register()
class Oracle(RetinaNet):
    """
    A toy RetinaNet whose predictions are the annotations of ``json_file``.

    ``order`` are its classes, ``missed`` those that it never finds. It sees nothing in the images
    of ``blind``, and of the other images with an even id it finds shifted boxes: its AP is neither
    0 nor 100. ``seen`` are its inputs.
    """

    json_file: ClassVar[str] = ""
    order: ClassVar[tuple[str, ...]] = CLASSES
    missed: ClassVar[tuple[str, ...]] = ()
    blind: ClassVar[tuple[int, ...]] = ()
    shift: ClassVar[float] = 0.0
    seen: ClassVar[list[dict[str, Any]]] = []

    @classmethod
    def reset(cls, json_file: str) -> None:
        cls.json_file, cls.order = json_file, CLASSES
        cls.missed, cls.blind, cls.shift = (), (), 0.0
        cls.seen.clear()

    def forward(self, inputs: list[dict[str, Any]]) -> Any:
        if self.training:
            return super().forward(inputs)
        self.seen.extend(inputs)
        return [{"instances": self.found(x)} for x in inputs]

    def found(self, x: dict[str, Any]) -> Instances:
        content = json.loads(Path(self.json_file).read_text())
        names = {c["id"]: c["name"] for c in content["categories"]}
        truth = [
            (a["bbox"], self.order.index(names[a["category_id"]]))
            for a in content["annotations"]
            if a["image_id"] == x["image_id"] and x["image_id"] not in self.blind
            if names[a["category_id"]] in self.order
            if names[a["category_id"]] not in self.missed
        ]
        boxes = torch.tensor([box for box, _ in truth]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        if x["image_id"] % 2 == 0:
            boxes += self.shift
        result = Instances((x["height"], x["width"]))
        result.pred_boxes = Boxes(boxes)
        result.scores = torch.linspace(1, 0.9, len(truth))
        result.pred_classes = torch.tensor([label for _, label in truth], dtype=torch.int64)
        return result.to(self.device)


def make_dataset(folder: Path, name: str, **kwargs: int) -> str:
    """Draw and register ``<name>_train`` and ``<name>_val``; the path of val's annotations."""
    make_synthetic_coco(folder, **kwargs)
    for split in ("train", "val"):
        json_file = str(folder / "annotations" / f"instances_{split}.json")
        register_coco(f"{name}_{split}", json_file, str(folder / split))
    return str(folder / "annotations" / "instances_val.json")


def altered_dataset(json_file: str, name: str, folder: Path, change: Any) -> str:
    """Register a copy of a dataset whose annotation file was changed; its path."""
    content = json.loads(Path(json_file).read_text())
    change(content)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
    register_coco(name, str(path), str(Path(json_file).parents[1] / "val"))
    return str(path)


def save_oracle(
    folder: Path, *, trained_on: tuple[str, ...] = (), **kwargs: Any
) -> tuple[str, str]:
    """(config file, weights file) of an oracle, as `tests.toys.save_teacher`'s."""
    config, weights = save_teacher(folder, **{"classes": len(CLASSES), "fpn": 16, **kwargs})
    cfg = get_cfg()
    cfg.merge_from_file(config)
    cfg.MODEL.META_ARCHITECTURE = "Oracle"
    cfg.DATASETS.TRAIN = trained_on
    Path(config).write_text(cfg.dump())
    return config, weights
