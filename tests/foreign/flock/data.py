import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.structures import BoxMode

CLASSES = ("crow", "gull")
SIZE = 64


def load_flocks(images: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    records = []
    for i in range(images):
        birds = []
        for _ in range(rng.integers(1, 4)):
            x, y = rng.integers(0, 40, 2).tolist()
            box = {"bbox": [x, y, 20, 14], "bbox_mode": BoxMode.XYWH_ABS}
            birds.append({**box, "category_id": int(rng.integers(2)), "iscrowd": 0})
        records.append(
            {"image_id": i, "height": SIZE, "width": SIZE, "sky": seed + i, "annotations": birds}
        )
    return records


def register_flocks() -> None:
    for name, images, seed in (("flocks_train", 8, 0), ("flocks_val", 3, 100)):
        DatasetCatalog.register(name, lambda images=images, seed=seed: load_flocks(images, seed))
        MetadataCatalog.get(name).thing_classes = list(CLASSES)


class FlockMapper:
    """There are no files: the sky and its birds are painted."""

    def __init__(self, cfg: CfgNode, is_train: bool) -> None:
        self.noise = cfg.INPUT.FLOCK_NOISE
        self.is_train = is_train

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = copy.deepcopy(record)
        rng = np.random.default_rng(record.pop("sky"))
        image = np.full((3, SIZE, SIZE), 180.0) + rng.normal(0, self.noise, (3, SIZE, SIZE))
        birds = record.pop("annotations")
        for bird in birds:
            x, y, w, h = bird["bbox"]
            image[:, y : y + h, x : x + w] = 20 + 100 * bird["category_id"]
        record["image"] = torch.as_tensor(image.clip(0, 255).astype(np.uint8))
        if self.is_train:
            for bird in birds:
                x, y, w, h = bird["bbox"]
                bird.update(bbox=[x, y, x + w, y + h], bbox_mode=BoxMode.XYXY_ABS)
            record["instances"] = utils.annotations_to_instances(birds, (SIZE, SIZE))
        return record
