"""Datasets: registration and checks of COCO-format data, and the synthetic dataset."""

from kd_det.data.coco import check_coco, check_datasets, check_same_classes, register_coco
from kd_det.data.synthetic import make_synthetic_coco

__all__ = [
    "check_coco",
    "check_datasets",
    "check_same_classes",
    "make_synthetic_coco",
    "register_coco",
]
