"""What can be known to fail before anything is built: the config, the data, the weights."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from kd_det.config import add_kd_config, student_config
from kd_det.data.coco import check_datasets
from kd_det.data.unlabelled import is_unlabelled
from kd_det.engine.errors import is_plain, sentence
from kd_det.registry import did_you_mean
from kd_det.sources.model_config import is_lazy
from kd_det.sources.weights_file import check_whole

_CLASS_KEYS = {
    "RetinaNet": ("RETINANET", "NUM_CLASSES"),
    "GeneralizedRCNN": ("ROI_HEADS", "NUM_CLASSES"),
    "PanopticFPN": ("ROI_HEADS", "NUM_CLASSES"),
}
_COUNTING_SAMPLERS = ("RepeatFactorTrainingSampler", "WeightedCategoryTrainingSampler")
_WITH_CLASS_MAPS = ("SemanticSegmentor", "PanopticFPN")


def load_config(
    file: str, overrides: Sequence[Any], extend: Sequence[Callable[[CfgNode], object]] = ()
) -> CfgNode:
    """
    A config with the ``KD`` node, of a file and the command line's ``KEY VALUE`` pairs.

    Args:
        file: YAML; empty for none.
        overrides: key, value, key, value, ...
        extend: each is given the config before files are merged: a project's ``add_x_config``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if something cannot be read or does not exist; the message says where it stands.
    """
    cfg = get_cfg()
    for add in extend:
        add(cfg)
    add_kd_config(cfg)
    if file:
        if not PathManager.isfile(file):
            raise FileNotFoundError(
                f"There is no config file '{file}' (working directory {os.getcwd()})."
            )
        with _read_from(f"The config '{file}'", cfg):
            if is_lazy(file):
                raise ValueError(
                    "it is a LazyConfig, and what is asked for here is a YAML config. Detectron2's "
                    "tools/lazyconfig_train_net.py trains it, distilled or not: docs/projects.md."
                )
            cfg.merge_from_file(file)
    options = [word for word in overrides if str(word).startswith("--")]
    if options:
        raise ValueError(
            f"The option {options[0]} stands among the KEY VALUE pairs: options come before them."
        )
    with _read_from("The command line", cfg):
        cfg.merge_from_list(list(overrides))
    return cfg


@contextmanager
def _read_from(where: str, cfg: CfgNode) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # YAML, files, yacs' assertions and key errors alike
        said = " ".join(sentence(e).split())
        if is_plain(e):
            raise ValueError(f"{where}: {said}") from e
        if isinstance(e, TypeError):  # of the code that meets it
            raise ValueError(f"{where} is no config: that is a map of words to values.") from e
        unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", said)
        if unknown is None:
            raise ValueError(f"{where} cannot be read ({type(e).__name__}: {said}).") from e
        raise ValueError(
            f"{where}: there is no config key {unknown[1]}.{_near(cfg, unknown[1])}"
        ) from e


def _near(cfg: CfgNode, key: str) -> str:
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return did_you_mean(part, node) if isinstance(node, CfgNode) else ""
        node = node[part]
    return ""


def check_data(cfg: CfgNode, *, training: bool) -> None:
    """
    Check the datasets of a run, see `kd_det.data.coco.check_datasets`, and that the student has as
    many classes: Detectron2 trains on when it has more.

    Args:
        cfg: the config of the run. Students whose number of classes is no config key, and datasets
            in another format than COCO's, are left alone; of class maps the metadata is checked.
        training: whether ``DATASETS.TRAIN`` counts.

    Raises:
        ValueError: one sentence for the first problem found.
    """
    train = cfg.DATASETS.TRAIN if training else ()
    if training and not train:
        raise ValueError("DATASETS.TRAIN is empty: name what to train on.")
    _check_unlabelled(cfg, train)
    classes = check_datasets(train, cfg.DATASETS.TEST)
    architecture = student_config(cfg).MODEL.META_ARCHITECTURE
    if architecture in _WITH_CLASS_MAPS:
        for name in dict.fromkeys([*train, *cfg.DATASETS.TEST]):
            _check_class_maps(cfg, name, architecture)
    keys = _CLASS_KEYS.get(architecture)
    if keys is None or classes is None:
        return
    found = cfg.MODEL[keys[0]][keys[1]]
    if found != len(classes):
        shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise ValueError(
            f"MODEL.{'.'.join(keys)} is {found}, but the datasets have {len(classes)} class(es) "
            f"({shown}): set it to {len(classes)}."
        )


def _check_unlabelled(cfg: CfgNode, train: Sequence[str]) -> None:
    if tested := [name for name in cfg.DATASETS.TEST if is_unlabelled(name)]:
        raise ValueError(
            f"The images of '{tested[0]}' have no labels, so nothing can be evaluated on them: "
            "leave it out of DATASETS.TEST, or name its annotation file, "
            f"KD.DATASETS.{tested[0]}.JSON."
        )
    names = [name for name in train if is_unlabelled(name)]
    if not names:
        return
    kd = cfg.KD if "KD" in cfg and cfg.KD.ENABLED else None
    if kd is None:
        raise ValueError(
            f"The images of '{names[0]}' have no labels, and without distillation (KD.ENABLED is "
            "False) nothing can be learnt from them: leave it out of DATASETS.TRAIN."
        )
    if len(names) == len(train) and kd.TASK_LOSS_WEIGHT > 0:
        raise ValueError(
            "No image of DATASETS.TRAIN has labels, so the student's own losses have nothing to "
            "count: set KD.TASK_LOSS_WEIGHT to 0 to learn from the teacher alone, or name the "
            f"annotation file, KD.DATASETS.{names[0]}.JSON."
        )
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        raise ValueError(
            f"The images of '{names[0]}' have no labels, and Detectron2 leaves images without "
            "objects out: set DATALOADER.FILTER_EMPTY_ANNOTATIONS to False."
        )
    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    if sampler in _COUNTING_SAMPLERS:
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN '{sampler}' counts the objects of every image, and those of "
            f"'{names[0]}' have no labels: take 'TrainingSampler'."
        )
    if cfg.MODEL.KEYPOINT_ON:
        raise ValueError(
            f"MODEL.KEYPOINT_ON is True, and Detectron2 asks every training set what its keypoints "
            f"are, which '{names[0]}', images without labels, cannot say: leave it out of "
            "DATASETS.TRAIN."
        )


def _check_class_maps(cfg: CfgNode, name: str, architecture: str) -> None:
    metadata, head = MetadataCatalog.get(name), cfg.MODEL.SEM_SEG_HEAD
    classes, ignored = metadata.get("stuff_classes"), metadata.get("ignore_label")
    if classes is None and metadata.get("evaluator_type") == "coco":
        raise ValueError(
            f"A {architecture} predicts the class of every pixel, but the dataset '{name}' has "
            "boxes only: register one with masks, see datasets/README.md."
        )
    if classes is not None and len(classes) != head.NUM_CLASSES:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {head.NUM_CLASSES}, but the pixels of '{name}' are "
            f"of {len(classes)} class(es): set it to {len(classes)}."
        )
    if ignored is not None and ignored != head.IGNORE_VALUE:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {head.IGNORE_VALUE}, but pixels of '{name}' that "
            f"do not count are {ignored}: set it to {ignored}."
        )


def check_solver(cfg: CfgNode) -> None:
    """
    Check settings of a training run that Detectron2 meets with an assertion, some of them in the
    middle of the first step.

    Args:
        cfg: the config of the run.

    Raises:
        ValueError: one sentence for the first problem found.
    """
    if not cfg.OUTPUT_DIR:
        raise ValueError("OUTPUT_DIR is empty: name the folder of this run.")
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        if cfg.SOLVER[key] < 1:
            raise ValueError(f"SOLVER.{key} is {cfg.SOLVER[key]}: it is at least 1.")
    images, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if images % processes and not cfg.SOLVER.REFERENCE_WORLD_SIZE:  # which scales the batch
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {images}, the images of all processes together, which "
            f"{processes} processes cannot share: set it to a multiple of {processes}."
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        raise ValueError(
            "SOLVER.AMP.ENABLED is True, but this run is on the CPU, and Detectron2's AMPTrainer "
            "needs a GPU: set it to False."
        )


def check_weights(cfg: CfgNode, *, resume: bool = False) -> None:
    """
    Check that ``MODEL.WEIGHTS``, where it is a local file, is there and whole.

    Args:
        cfg: the config of the run.
        resume: whether the run continues from its last checkpoint, if there is one: then nobody
            reads ``MODEL.WEIGHTS``.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is no checkpoint, or a damaged one.
    """
    path = cfg.MODEL.WEIGHTS
    if not path or "://" in path:
        return
    if resume and PathManager.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        return
    path = path.partition("?")[0]  # ?matching_heuristics=True
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"MODEL.WEIGHTS is '{path}', but there is no such file (working directory "
            f"{os.getcwd()}). Leave it empty to start from random weights."
        )
    try:
        check_whole(path)
    except ValueError as e:
        raise ValueError(
            f"MODEL.WEIGHTS is '{path}' ({os.path.getsize(path)} bytes), which cannot be read as a "
            f"checkpoint ({e}): name a .pth or .pkl file."
        ) from e
