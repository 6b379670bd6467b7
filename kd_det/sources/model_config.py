"""Building a model from a config file of either kind."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from omegaconf import OmegaConf
from torch import nn
from torch.overrides import TorchFunctionMode

from kd_det.paths import CONFIGS, find_file, zoo_checkpoint
from kd_det.sources.source import SourceUnavailable


class ModelConfig:
    """
    A config (``.yaml``, or a LazyConfig ``.py`` with a ``model``, also as LazyConfig saves it) that
    builds a detector. Of a distilled model's config that is its student.

    Args:
        path: see `kd_det.paths.find_file`.
        what: how errors call it.
        content: instead of the file's: the text of a YAML config, or its keys; ``path`` is only its
            name then. Neither Python tags nor ``_BASE_`` are read there.
        defaults: what a YAML file is merged into; ``None`` for Detectron2's own. A project's file
            needs one with the project's keys.

    Raises:
        SourceUnavailable: if the file is not found.
        ValueError: if it cannot be read as a config.
    """

    def __init__(
        self,
        path: str,
        *,
        what: str,
        content: str | Mapping[str, Any] | None = None,
        defaults: CfgNode | None = None,
    ) -> None:
        found = find_file(path) if content is None else path
        if found is None:
            raise SourceUnavailable(
                f"{what}: there is no config file '{path}'. Looked relative to the file that names "
                f"it, in the working directory {os.getcwd()}, in kd_det's configs {CONFIGS} and in "
                "Detectron2's model zoo."
            )
        self.path = found
        try:
            into = get_cfg() if defaults is None else defaults.clone()
            self._cfg = _read(found, into) if content is None else _merged(_parsed(content), into)
        except Exception as e:  # YAML, Python and config errors alike
            raise ValueError(
                f"{what}: '{found}' cannot be read as a Detectron2 config "
                f"({type(e).__name__}: {' '.join(str(e).split())})."
            ) from e

    @property
    def input_format(self) -> str:
        """Channel order of the images that the model was trained on."""
        if self._is_lazy:
            loader = self._cfg.get("dataloader") or {}
            mapper = (loader.get("train") or {}).get("mapper") or {}
            return str(mapper.get("image_format") or self._cfg.model.get("input_format") or "BGR")
        return str(self._cfg.INPUT.FORMAT)

    @property
    def weights(self) -> str:
        """
        The checkpoint that belongs to the config: for one of Detectron2's model zoo, and kd_det's
        of that name, what the zoo has trained with it; else what the config itself names.
        """
        trained = zoo_checkpoint(self.path)
        return self.initial_weights if trained is None else trained

    @property
    def initial_weights(self) -> str:
        """The checkpoint that a training of this config starts from; empty for random weights."""
        if self._is_lazy:
            weights = str((self._cfg.get("train") or {}).get("init_checkpoint") or "")
        else:
            weights = str(self._cfg.MODEL.WEIGHTS)
        return find_file(weights, os.path.dirname(self.path)) or weights if weights else ""

    @property
    def dataset(self) -> str:
        """Name of the first dataset that the model was trained on; empty if none is named."""
        if self._is_lazy:
            train = (self._cfg.get("dataloader") or {}).get("train") or {}
            datasets = (train.get("dataset") or {}).get("names") or ()
            datasets = (datasets,) if isinstance(datasets, str) else datasets
        else:
            datasets = self._cfg.DATASETS.TRAIN
        return str(datasets[0]) if datasets else ""

    @property
    def text(self) -> str:
        """All that the file and its bases say, the same in every process."""
        if self._is_lazy:
            tree = OmegaConf.to_container(self._cfg, resolve=False)
            return json.dumps(tree, default=lambda x: getattr(x, "__qualname__", str(type(x))))
        return str(self._cfg.dump())

    def in_place_of(self, cfg: CfgNode) -> CfgNode:
        """
        A config that trains and tests this model as another config does its own: that one, with
        this one's ``MODEL`` and channel order.

        Args:
            cfg: of a plain detector.

        Raises:
            ValueError: if this is a LazyConfig, which says nothing in these terms.
        """
        if self._is_lazy:
            raise ValueError(
                f"'{self.path}' is a LazyConfig, so that this network has no YAML config to be "
                "tested with: to export it (KD.EXPORT_PEER, --peer), describe it in YAML."
            )
        cfg = cfg.clone()
        cfg.defrost()
        device = cfg.MODEL.DEVICE
        cfg.MODEL = self._cfg.MODEL.clone()
        cfg.MODEL.DEVICE = device
        cfg.INPUT.FORMAT = self._cfg.INPUT.FORMAT
        return cfg

    def test_mapper(self, input_format: str) -> Callable[[dict[str, Any]], Any]:
        """
        From a dataset's record to what the model is evaluated on: its own sizes of test images.

        Args:
            input_format: channel order of the images, whatever the file says.
        """
        if self._is_lazy:
            test = (self._cfg.get("dataloader") or {}).get("test") or {}
            if "mapper" in test:
                mapper = instantiate(test["mapper"])
                if hasattr(mapper, "image_format"):
                    mapper.image_format = input_format
                return mapper
            return default_test_mapper(get_cfg(), input_format)
        return default_test_mapper(self._cfg, input_format)

    def build(self, device: torch.device | str) -> nn.Module:
        """
        Build the architecture with fresh weights; on ``"meta"`` without storage, unless its
        constructor reads values of tensors: then it is built on the CPU first.
        """
        device = torch.device(device)
        if device.type != "meta":
            return self._build(device)
        try:
            return self._build(device)
        except (RuntimeError, NotImplementedError):  # what reading a meta tensor raises
            return self._build(torch.device("cpu")).to(device)

    def _build(self, device: torch.device) -> nn.Module:
        with device, _RealLinspace():
            if self._is_lazy:
                return instantiate(self._cfg.model).to(device)
            cfg = self._cfg.clone()
            cfg.MODEL.DEVICE = str(device)
            return build_model(cfg)

    @property
    def _is_lazy(self) -> bool:
        return not isinstance(self._cfg, CfgNode)


def _read(path: str, cfg: CfgNode) -> Any:
    if not is_lazy(path):
        return _merged(CfgNode.load_yaml_with_base(path, allow_unsafe=True), cfg)
    lazy = LazyConfig.load(path)
    if "model" not in lazy:
        raise ValueError("it has no `model` node")
    target = lazy.model.get("_target_")
    if str(getattr(target, "__name__", target)).split(".")[-1] == "Distiller":
        lazy.model = lazy.model.student
    return lazy


def is_lazy(path: str) -> bool:
    """
    Whether a file is a LazyConfig, or a YAML file that `LazyConfig.save` has written: Detectron2's
    other keys are upper.
    """
    if path.endswith(".py"):
        return True
    with PathManager.open(path, encoding="utf-8") as f:
        return any(line.startswith("model:") for line in f)


def _parsed(content: str | Mapping[str, Any]) -> dict[str, Any]:
    tree = yaml.safe_load(content) if isinstance(content, str) else dict(content)
    if not isinstance(tree, dict):
        raise ValueError(f"it is a {type(tree).__name__}, not a map of keys and values")
    if "_BASE_" in tree:
        raise ValueError("it has a _BASE_, of which nobody knows where it lies: keep all keys")
    return tree


def _merged(loaded: dict[str, Any], cfg: CfgNode) -> CfgNode:
    kd = loaded.pop("KD", None)
    # The config of a distilled model: what it trained is its student.
    if kd is not None and loaded["MODEL"].get("META_ARCHITECTURE") == "Distiller":
        loaded["MODEL"]["META_ARCHITECTURE"] = kd["STUDENT"]["META_ARCHITECTURE"]
    cfg.defrost()
    cfg.merge_from_other_cfg(CfgNode(loaded))
    return cfg


class _RealLinspace(TorchFunctionMode):
    """Detectron2's transformers compute the drop rates of their blocks so, and read them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def default_test_mapper(cfg: CfgNode, input_format: str) -> DatasetMapper:
    """Detectron2's own mapper for boxes, in test mode, with images in ``input_format``."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT = input_format
    # Of keypoints it would ask the training set, which need not be registered here.
    cfg.MODEL.KEYPOINT_ON = cfg.MODEL.LOAD_PROPOSALS = False
    return DatasetMapper(cfg, is_train=False)
