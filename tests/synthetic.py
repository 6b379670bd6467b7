"""Whole runs on a dozen synthetic images."""

from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from kd_det.data.synthetic import CLASSES, make_synthetic_coco
from tests.toys import distiller_cfg, save_teacher


def synthetic_run(folder: Path, **kwargs: Any) -> CfgNode:
    """A distilled toy with connectors: 4 iterations, a checkpoint every 2, one evaluation."""
    make_synthetic_coco(folder / "data", num_train=12, num_val=4)
    teacher = save_teacher(folder / "teacher", classes=len(CLASSES), fpn=16)
    cfg = distiller_cfg(teacher, classes=len(CLASSES), **kwargs)
    datasets = {
        f"{folder.name}_{split}": {
            "JSON": str(folder / "data" / "annotations" / f"instances_{split}.json"),
            "IMAGES": str(folder / "data" / split),
        }
        for split in ("train", "val")
    }
    cfg.merge_from_other_cfg(type(cfg)({"KD": {"DATASETS": datasets}}))
    train, val = datasets
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train,), (val,)
    cfg.SOLVER.MAX_ITER = cfg.TEST.EVAL_PERIOD = 4
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.SEED = 1
    return cfg
