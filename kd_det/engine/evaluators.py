"""Evaluators by the type of a dataset."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

from kd_det._compat import fast_coco_eval_available


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """
    COCO mAP for datasets in COCO format.

    Args:
        cfg: names the output folder and the thresholds.
        dataset_name: a registered dataset.
        output_folder: where predictions go; ``<OUTPUT_DIR>/inference`` by default.

    Raises:
        ValueError: if the dataset is of another type.
    """
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type", None)
    if kind not in ("coco", "coco_panoptic_seg"):
        raise ValueError(
            f"train_net.py evaluates datasets in COCO format, but '{dataset_name}' is of type "
            f"'{kind}'. Override Trainer.build_evaluator in a script of your own."
        )
    return COCOEvaluator(
        dataset_name,
        output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"),
        use_fast_impl=fast_coco_eval_available(),
    )
