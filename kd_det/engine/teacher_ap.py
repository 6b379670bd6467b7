"""What a teacher scores: a gate before training, and a reference beside the student's AP."""

import contextlib
import hashlib
import io
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from kd_det._compat import fast_coco_eval_available
from kd_det.classes import listed, match_names
from kd_det.distiller import Distiller
from kd_det.engine import ap_cache
from kd_det.rng import preserved_rng
from kd_det.sources import Teacher
from kd_det.sources.model_config import default_test_mapper
from kd_det.sources.weights_file import file_fingerprint

logger = logging.getLogger(__name__)

_FORMAT = 1  # raised whenever the same key would mean other numbers


def check_gates(cfg: CfgNode | None, distiller: Distiller) -> None:
    """
    Measure every teacher that has a ``MIN_AP`` on the first ``GATE_IMAGES`` images of
    ``DATASETS.TEST[0]``. Called by every process, before `Distiller.prepare`.

    Args:
        cfg: see `evaluate_teacher`.
        distiller: whose teachers.

    Raises:
        ValueError: if one scores less, on all processes alike, or cannot be measured.
        SourceUnavailable: if a file of a teacher is missing.
    """
    for name, source in distiller.wiring.sources.items():
        if not isinstance(source, Teacher) or source.min_ap <= 0:
            continue
        if cfg is None or not cfg.DATASETS.TEST:
            raise ValueError(
                f"KD.SOURCES.{name.upper()}.MIN_AP is {source.min_ap:g}, but DATASETS.TEST names "
                "no dataset to measure the teacher on: name one in COCO format, or set MIN_AP to 0."
            )
        check_gate(cfg, source, cfg.DATASETS.TEST[0], name=name)


def check_gate(
    cfg: CfgNode | None, teacher: Teacher, dataset_name: str, *, name: str = "teacher"
) -> None:
    """
    `check_gates` for one teacher and any dataset, in loops without a config.

    Args:
        cfg: see `evaluate_teacher`.
        teacher: with a ``min_ap``.
        dataset_name: a registered dataset in COCO format.
        name: what logs and errors call the teacher.

    Raises:
        ValueError: if its AP is less than its ``min_ap``, or cannot be measured.
        SourceUnavailable: if a file of it is missing.
    """
    results = evaluate_teacher(cfg, teacher, dataset_name, teacher.gate_images, name=name)
    if results["bbox/AP"] < teacher.min_ap:
        key = f"KD.SOURCES.{name.upper()}"
        raise ValueError(
            f"Source '{name}' has a box AP of {results['bbox/AP']:.1f} on the first "
            f"{teacher.gate_images} images of '{dataset_name}', but {key}.MIN_AP is "
            f"{teacher.min_ap:g}: training would imitate a detector that does not detect. Its "
            f"weights are {teacher.weights_file or 'those of the given model'}. Check that WEIGHTS "
            f"belong to CONFIG_FILE, that INPUT_FORMAT ({teacher.input_format}) is what it was "
            f"trained on, and the order of its classes; or lower {key}.MIN_AP."
        )
    teacher.ap_checked = True


def evaluate_teacher(
    cfg: CfgNode | None,
    teacher: Teacher,
    dataset_name: str,
    images: int = 0,
    *,
    name: str = "teacher",
) -> dict[str, float]:
    """
    COCO's box AP of a teacher, in points (0 to 100), as Detectron2 evaluates it by itself: own
    test-time mapper, float32, not folded. Classes are matched by name where the teacher's are
    known; those that only one side has count for nothing. No random state is changed.

    The results are kept in ``$FVCORE_CACHE`` (``~/.torch/iopath_cache``) under a hash of the
    teacher's weights and config, the annotation file, and how is measured.

    Called by every process; all get the same results.

    Args:
        cfg: of the run, for its number of workers, and for the size of images where the teacher
            was given as a model; ``None`` takes Detectron2's defaults.
        teacher: prepared or not, released or not.
        dataset_name: a registered dataset in COCO format.
        images: read and score the first so many images only; 0 for all.
        name: what logs call the teacher.

    Returns:
        ``bbox/AP``, ``bbox/AP50``, ..., and ``bbox/AP-<class>`` where there is more than one class;
        without the numbers that have no ground truth.

    Raises:
        ValueError: if the dataset cannot be evaluated, if no class of it is the teacher's, or if
            the teacher is not what its files say.
        SourceUnavailable: if a file of the teacher is missing.
    """
    cfg = get_cfg() if cfg is None else cfg
    json_file = _annotation_file(dataset_name)
    with preserved_rng():
        records = DatasetCatalog.get(dataset_name)
        records = records[:images] if images else records
        class_map = match_classes(
            teacher.class_names,
            teacher.num_classes,
            MetadataCatalog.get(dataset_name).thing_classes,
            dataset_name,
        )
        mapper = teacher.test_mapper() or default_test_mapper(cfg, teacher.input_format)
        key = _key(teacher, mapper, class_map, json_file, len(records))
        # One process asks the cache, or they could take different ways.
        cached = comm.all_gather(ap_cache.read(key) if comm.is_main_process() else None)[0]
        results = cached
        if results is None:
            logger.info("Evaluating teacher '%s' on %s; what follows is its.", name, dataset_name)
            loader = build_detection_test_loader(
                records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
            )
            evaluator = _BoxEvaluator(dataset_name, [r["image_id"] for r in records], class_map)
            measured = inference_on_dataset(teacher.detector(), loader, evaluator)
            results = comm.all_gather(measured)[0]
            if results and comm.is_main_process():
                ap_cache.write(key, results)
    which = f"first {len(records)}" if images else str(len(records))
    if "bbox/AP" not in results:
        raise ValueError(
            f"The AP of source '{name}' cannot be measured: the {which} images of '{dataset_name}' "
            "have no annotated box of a class that it knows."
        )
    logger.info(
        "Teacher '%s': AP %.1f on the %s images of %s%s",
        name, results["bbox/AP"], which, dataset_name, " (cached)" if cached else "",
    )  # fmt: skip
    return results


def match_classes(
    theirs: Sequence[str] | None, count: int | None, ours: Sequence[str], dataset_name: str
) -> list[int]:
    """
    For each class of a teacher the dataset's class of the same name.

    Args:
        theirs: the teacher's classes; where they are not known, or not as many as its boxes are of,
            they must be as many as the dataset's and are taken to be the same.
        count: of how many classes its boxes are; ``None`` for as many as it has names.
        ours: the dataset's classes.
        dataset_name: for errors.

    Returns:
        The dataset's index, or -1 where it has no such class.

    Raises:
        ValueError: if no class is the same.
    """
    if theirs is None or count not in (None, len(theirs)):
        if count not in (None, len(ours)):
            raise ValueError(
                f"The teacher detects {count} classes and the dataset '{dataset_name}' has "
                f"{len(ours)}, and what the teacher's are called is not known: name the dataset "
                "that it was trained on in its config (DATASETS.TRAIN) and register that, or give "
                "the source CLASSES."
            )
        return list(range(len(ours)))
    matched = match_names(theirs, ours)
    if max(matched, default=-1) < 0:
        raise ValueError(
            f"The teacher and the dataset '{dataset_name}' have no class in common: the teacher "
            f"detects {listed(theirs)}, the dataset has {listed(ours)}."
        )
    return matched


class _BoxEvaluator(COCOEvaluator):
    """
    Boxes of some images, of the classes that the teacher and the dataset share.

    Args:
        dataset_name: in COCO format.
        ids: of the images to score; COCO's API would count boxes of unseen images as missed.
        class_map: of `match_classes`.
    """

    def __init__(self, dataset_name: str, ids: list[int], class_map: list[int]) -> None:
        super().__init__(dataset_name, tasks=("bbox",), use_fast_impl=fast_coco_eval_available())
        self._ids = ids
        self._class_map = torch.tensor(class_map)
        self._leave_out_unknown_classes()

    def _leave_out_unknown_classes(self) -> None:
        contiguous = self._metadata.thing_dataset_id_to_contiguous_id
        known = {k for k, v in contiguous.items() if v in self._class_map.tolist()}
        annotations = self._coco_api.dataset.get("annotations", [])
        kept = [a for a in annotations if a["category_id"] in known]
        if len(kept) < len(annotations):
            self._coco_api.dataset["annotations"] = kept
            with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
                self._coco_api.createIndex()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for output in outputs:
            if "instances" not in output:
                raise ValueError(
                    "The teacher's AP cannot be measured: it predicts no instances, but "
                    f"{', '.join(output) or 'nothing'}."
                )
        super().process(inputs, [{"instances": self._translated(x["instances"])} for x in outputs])

    def _translated(self, found: Instances) -> Instances:
        classes = self._class_map[found.pred_classes.cpu()]
        kept = Instances(found.image_size)
        kept.pred_boxes = found.pred_boxes.to("cpu")
        kept.scores = found.scores.cpu()
        kept.pred_classes = classes
        return kept[classes >= 0]

    def evaluate(self, img_ids: Any = None) -> dict[str, float]:
        results = super().evaluate(self._ids).get("bbox", {})
        finite = {f"bbox/{k}": v for k, v in results.items() if math.isfinite(v)}
        return self._nothing_found() if results and not finite else finite

    def _nothing_found(self) -> dict[str, float]:
        """Without predictions Detectron2 says NaN, whether or not there is something to find."""
        truth = self._coco_api.loadAnns(self._coco_api.getAnnIds(imgIds=self._ids))
        to_find = {a["category_id"] for a in truth if not a.get("iscrowd")}
        contiguous = self._metadata.thing_dataset_id_to_contiguous_id
        names = [self._metadata.thing_classes[contiguous[k]] for k in sorted(to_find)]
        per_class = {f"bbox/AP-{name}": 0.0 for name in names}
        return {"bbox/AP": 0.0, **per_class} if names else {}


def _annotation_file(dataset_name: str) -> str:
    if dataset_name not in DatasetCatalog.list():
        raise ValueError(
            f"The teacher's AP cannot be measured on '{dataset_name}': no such dataset is "
            "registered."
        )
    metadata = MetadataCatalog.get(dataset_name)
    json_file = metadata.get("json_file")
    if metadata.get("evaluator_type") not in ("coco", "coco_panoptic_seg") or json_file is None:
        raise ValueError(
            "The teacher's AP is measured on datasets in COCO format, but "
            f"'{dataset_name}' is of type '{metadata.get('evaluator_type')}': leave MIN_AP at 0."
        )
    if not PathManager.isfile(json_file):
        raise ValueError(
            f"The teacher's AP cannot be measured on '{dataset_name}': its annotation file "
            f"{json_file} is missing."
        )
    return str(json_file)


def _key(teacher: Teacher, mapper: Any, class_map: list[int], json_file: str, images: int) -> str:
    parts = (
        _FORMAT,
        teacher.identity(),
        type(mapper).__qualname__,
        str(getattr(mapper, "augmentations", "")),
        class_map,
        file_fingerprint(PathManager.get_local_path(json_file)),
        images,
        ("bbox", fast_coco_eval_available()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
