"""The config that a checkpoint carries: inside of it, or in the folder that its training wrote."""

import os
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from kd_det.sources.model_config import ModelConfig
from kd_det.sources.strict import local_file
from kd_det.sources.weights_file import load_pickle

_ENTRIES = ("cfg", "config")
# kd_det's runs write both: student.yaml is the detector alone, config.yaml is of the whole run.
_BESIDE = ("student.yaml", "config.yaml")


def carried_config(weights: str, *, what: str, defaults: Any = None) -> ModelConfig:
    """
    The config of a checkpoint that is named without one.

    It is looked for in this order:

    1. the entry ``cfg`` or ``config`` of the checkpoint, beside ``model``: the text of a YAML
       config, as ``cfg.dump()`` gives it, or a dict of its keys;
    2. ``student.yaml`` or ``config.yaml`` in its folder, as training leaves them there (Detectron2
       of both kinds, YAML and LazyConfig, and kd_det).

    No code of the checkpoint is run: it is read by PyTorch's safe loader, its config by YAML's.

    Args:
        weights: a file, or an address that Detectron2's PathManager knows.
        what: how errors call the model.
        defaults: see `ModelConfig`.

    Raises:
        SourceUnavailable: if there is no such checkpoint.
        ValueError: if it carries no config, or one that cannot be read.
    """
    local = local_file(weights, what=what)
    entry, found = _entry(local, weights, what)
    if found is not None:
        name = f"{weights}[{entry!r}]"
        return ModelConfig(name, what=what, content=found, defaults=defaults)
    folder = os.path.dirname(os.path.abspath(local))
    for name in _BESIDE:
        if os.path.isfile(os.path.join(folder, name)):
            return ModelConfig(os.path.join(folder, name), what=what, defaults=defaults)
    raise ValueError(
        f"{what} has WEIGHTS '{weights}' and no CONFIG_FILE, and these weights carry no config: "
        f"the file has no entry {' or '.join(map(repr, _ENTRIES))} beside its weights, and its "
        f"folder {folder} has no {' or '.join(_BESIDE)}. Set CONFIG_FILE to the config that it was "
        "trained with."
    )


def _entry(local: str, weights: str, what: str) -> tuple[str, Any]:
    try:
        if local.endswith(".pkl"):
            checkpoint = load_pickle(local)
        else:
            # Of the zip format the weights themselves are not read.
            mapped = zipfile.is_zipfile(local)
            checkpoint = torch.load(local, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:  # unpickling a damaged file raises almost anything
        reason = " ".join(str(e).split())[:200]
        raise ValueError(
            f"{what} has no CONFIG_FILE, and its checkpoint '{weights}' cannot be read to see "
            f"whether it carries a config ({type(e).__name__}: {reason})."
        ) from e
    # Weights by name, without the outer dict, may be called anything.
    if isinstance(checkpoint, Mapping):
        for name in _ENTRIES:
            if isinstance(checkpoint.get(name), (str, Mapping)):
                return name, checkpoint[name]
    return "", None
