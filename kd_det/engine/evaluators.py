"""Evaluators by the type of a dataset."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN

from kd_det._compat import fast_coco_eval_available
from kd_det.config import student_config


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """
    COCO mAP for datasets in COCO format, mIoU for those with class maps, and both for panoptic ones
    where the student is a PanopticFPN; panoptic quality, which needs the package panopticapi, is
    for a script of your own.

    Args:
        cfg: names the output folder, the thresholds and the student.
        dataset_name: a registered dataset.
        output_folder: where predictions go; ``<OUTPUT_DIR>/inference`` by default.

    Raises:
        ValueError: if the dataset is of another type.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    evaluators: list[DatasetEvaluator] = []
    if kind in ("coco", "coco_panoptic_seg"):
        fast = fast_coco_eval_available()
        evaluators.append(COCOEvaluator(dataset_name, output_dir=folder, use_fast_impl=fast))
    if kind == "sem_seg" or (kind == "coco_panoptic_seg" and _is_panoptic(cfg)):
        evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
    if not evaluators:
        raise ValueError(
            "train_net.py evaluates datasets in COCO format and those with class maps (evaluator "
            f"type 'sem_seg'), but '{dataset_name}' is of type '{kind}'. Override "
            "Trainer.build_evaluator in a script of your own."
        )
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _is_panoptic(cfg: CfgNode) -> bool:
    """Others, a Mask R-CNN on panoptic data say, predict no class map."""
    student = META_ARCH_REGISTRY.get(student_config(cfg).MODEL.META_ARCHITECTURE)
    return isinstance(student, type) and issubclass(student, PanopticFPN)
