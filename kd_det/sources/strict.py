"""Reading a frozen network's weights so that nothing of it stays random."""

import hashlib
import os
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from kd_det.registry import did_you_mean
from kd_det.sources.source import SourceUnavailable

_TOLERATED_MISSING = ("num_batches_tracked",)
# Older checkpoints carry buffers that are computed from the config today.
_TOLERATED_EXTRA = (
    "anchor_generator.cell_anchors",
    "pixel_mean",
    "pixel_std",
    "num_batches_tracked",  # a BatchNorm's counter, where the model freezes it
)


def load_strictly(model: nn.Module, path: str, *, what: str) -> str:
    """
    Load a file into a model with Detectron2's own checkpointer (so .pth, the zoo's .pkl, pycls and
    torchvision files work), and accept nothing less than all of it.

    Every entry of ``model.state_dict()`` except ``num_batches_tracked`` must come from the file
    with its shape, and the file must hold nothing else but cell anchors and pixel statistics.

    Args:
        model: filled in place.
        path: a file, or an address that Detectron2's PathManager knows.
        what: how errors call the model.

    Returns:
        SHA-256 of the file, the fingerprint of the weights.

    Raises:
        SourceUnavailable: if there is no such file.
        ValueError: if the file cannot be read as a checkpoint, or is not this model's.
    """
    try:
        local = PathManager.get_local_path(path)
    except Exception as e:  # a download can fail in as many ways as there are handlers
        raise SourceUnavailable(f"{what}: the weights '{path}' cannot be had: {e}") from e
    if not os.path.isfile(local):
        raise SourceUnavailable(
            f"{what}: there is no weights file '{path}'. Paths are resolved relative to the config "
            "that names them, then to the working directory."
        )
    checkpointer = _Checkpointer(model)
    try:
        checkpointer.load(path, checkpointables=[])
    except Exception as e:  # unpickling a damaged file raises almost anything
        raise ValueError(
            f"{what}: the file '{path}' ({os.path.getsize(local)} bytes) cannot be read as a "
            f"checkpoint of a model ({type(e).__name__}: {e}). Is it complete, and a .pth or .pkl?"
        ) from e
    _require_all(model, checkpointer.incompatible, path, what)
    return file_fingerprint(local)


def file_fingerprint(path: str) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


class _Checkpointer(DetectionCheckpointer):
    """Keeps the incompatible keys instead of logging them."""

    incompatible: Any = None

    def _load_model(self, checkpoint: Any) -> None:
        self.incompatible = super()._load_model(checkpoint)


def _require_all(model: nn.Module, incompatible: Any, path: str, what: str) -> None:
    wanted = [k for k in model.state_dict() if not k.endswith(_TOLERATED_MISSING)]
    shapes = {key: (found, need) for key, found, need in incompatible.incorrect_shapes}
    missing = [
        k
        for k in incompatible.missing_keys
        if not k.endswith(_TOLERATED_MISSING) and k not in shapes
    ]
    extra = [
        k
        for k in incompatible.unexpected_keys
        if not any(tolerated in k for tolerated in _TOLERATED_EXTRA)
    ]
    if not missing and not shapes and not extra:
        return
    covered = len(wanted) - len(missing) - len(shapes)
    lines = [
        f"{what}: '{path}' is not a checkpoint of this architecture: {covered} of {len(wanted)} "
        f"entries come from the file ({100 * covered / max(len(wanted), 1):.0f} %)."
    ]
    if missing:
        near = did_you_mean(missing[0], extra)
        lines.append(f"Missing: {_some(missing)}.{near}")
    if shapes:
        lines.append(
            "Of another shape: "
            + _some(
                [
                    f"{k} ({found} in the file, {need} in the model)"
                    for k, (found, need) in shapes.items()
                ]
            )
            + "."
        )
    if extra:
        lines.append(f"In the file only: {_some(extra)}.")
    lines.append("Check CONFIG_FILE and WEIGHTS: both must be of the same trained model.")
    raise ValueError(" ".join(lines))


def _some(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
