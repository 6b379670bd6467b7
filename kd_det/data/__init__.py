"""Datasets: registration and checks of COCO-format data, masks, views, the synthetic dataset."""

from kd_det.data.coco import check_coco, check_datasets, check_same_classes, register_coco
from kd_det.data.sem_seg import register_sem_seg
from kd_det.data.synthetic import make_synthetic_coco
from kd_det.data.synthetic_masks import make_synthetic_masks, register_synthetic_masks
from kd_det.data.unlabelled import is_unlabelled, register_unlabelled
from kd_det.data.views import PhotometricViews

__all__ = [
    "PhotometricViews",
    "check_coco",
    "check_datasets",
    "check_same_classes",
    "is_unlabelled",
    "make_synthetic_coco",
    "make_synthetic_masks",
    "register_coco",
    "register_sem_seg",
    "register_synthetic_masks",
    "register_unlabelled",
]
