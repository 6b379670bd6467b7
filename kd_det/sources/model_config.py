"""Building a model from a config file of either kind."""

import os
from typing import Any

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from torch import nn

from kd_det.paths import CONFIGS, find_file
from kd_det.sources.source import SourceUnavailable


class ModelConfig:
    """
    A config file (``.yaml``, or a LazyConfig ``.py`` with a ``model``) that builds a detector.

    Args:
        path: see `kd_det.paths.find_file`.
        what: how errors call it.

    Raises:
        SourceUnavailable: if the file is not found.
        ValueError: if it cannot be read as a config.
    """

    def __init__(self, path: str, *, what: str) -> None:
        found = find_file(path)
        if found is None:
            raise SourceUnavailable(
                f"{what}: there is no config file '{path}'. Looked relative to the file that names "
                f"it, in the working directory {os.getcwd()}, in kd_det's configs {CONFIGS} and in "
                "Detectron2's model zoo."
            )
        self.path = found
        try:
            self._cfg = self._read(found)
        except Exception as e:  # YAML, Python and config errors alike
            raise ValueError(
                f"{what}: '{found}' cannot be read as a Detectron2 config "
                f"({type(e).__name__}: {e})."
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
        """The checkpoint that the config itself names."""
        if self._is_lazy:
            weights = str((self._cfg.get("train") or {}).get("init_checkpoint") or "")
        else:
            weights = str(self._cfg.MODEL.WEIGHTS)
        return find_file(weights, os.path.dirname(self.path)) or weights if weights else ""

    def build(self, device: torch.device | str) -> nn.Module:
        """Build the architecture with fresh weights; on ``"meta"`` without storage."""
        device = torch.device(device)
        with torch.device(device):
            if self._is_lazy:
                return instantiate(self._cfg.model).to(device)
            cfg = self._cfg.clone()
            cfg.MODEL.DEVICE = str(device)
            return build_model(cfg)

    @property
    def _is_lazy(self) -> bool:
        return self.path.endswith(".py")

    @staticmethod
    def _read(path: str) -> Any:
        if path.endswith(".py"):
            return LazyConfig.load(path)
        loaded = CfgNode.load_yaml_with_base(path, allow_unsafe=True)
        # The config of a distilled model: what it trained is its student.
        kd = loaded.pop("KD", None)
        if kd is not None and loaded["MODEL"].get("META_ARCHITECTURE") == "Distiller":
            loaded["MODEL"]["META_ARCHITECTURE"] = kd["STUDENT"]["META_ARCHITECTURE"]
        cfg = get_cfg()
        cfg.merge_from_other_cfg(CfgNode(loaded))
        return cfg
