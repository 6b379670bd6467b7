"""Reading a frozen network's weights so that nothing of it stays random."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from kd_det.registry import did_you_mean
from kd_det.sources.source import SourceUnavailable
from kd_det.sources.weights_file import check_whole, file_fingerprint, load_pickle

_TOLERATED_MISSING = ("num_batches_tracked",)
# Older checkpoints carry buffers that are computed from the config today.
_TOLERATED_EXTRA = (
    "anchor_generator.cell_anchors",
    "pixel_mean",
    "pixel_std",
    "num_batches_tracked",  # a BatchNorm's counter, where the model freezes it
)


def load_strictly(
    model: nn.Module,
    path: str,
    *,
    what: str,
    sha256: str = "",
    pick: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> str:
    """
    Load a file into a model with Detectron2's own checkpointer (so .pth, the zoo's .pkl, pycls and
    torchvision files work), and accept nothing less than all of it, undamaged.

    Every entry of ``model.state_dict()`` except ``num_batches_tracked`` must come from the file
    with its shape and its kind of number, and the file must hold nothing else but cell anchors and
    pixel statistics. Weights must be finite and variances positive. The checksums of PyTorch's zip
    format are verified; the legacy format and .pkl have none, where only ``sha256`` tells a damaged
    weight from a trained one.

    Args:
        model: filled in place.
        path: a file, or an address that Detectron2's PathManager knows.
        what: how errors call the model.
        sha256: the expected SHA-256 of the file, or its leading digits in lower case; empty for
            any. It is compared before anything is read.
        pick: takes the model's weights out of all that the file holds, its ``model`` by default.

    Returns:
        SHA-256 of the file, the fingerprint of the weights.

    Raises:
        SourceUnavailable: if there is no such file.
        ValueError: if the file is not the expected one, is damaged, cannot be read as a checkpoint,
            or is not this model's.
    """
    local, fingerprint = expected_file(path, what=what, sha256=sha256)
    checkpointer = _Checkpointer(model)
    checkpointer.pick = pick
    try:
        check_whole(local)
        checkpointer.load(path, checkpointables=[])
    except Exception as e:  # unpickling a damaged file raises almost anything
        raise ValueError(
            f"{what}: the file '{path}' ({os.path.getsize(local)} bytes) cannot be read as a "
            f"checkpoint of a model ({_cause(e)}). Is it complete, and a .pth or .pkl?"
        ) from e
    _require_all(model, checkpointer.incompatible, path, what)
    _require_sane(model, checkpointer.found, path, what)
    return fingerprint


def local_file(path: str, *, what: str) -> str:
    """
    Where a file of weights lies on this machine; an address is fetched, once, into the cache of
    Detectron2's PathManager.

    Raises:
        SourceUnavailable: if it cannot be had.
    """
    try:
        local = PathManager.get_local_path(path)
    except Exception as e:  # a download can fail in as many ways as there are handlers
        fetch = (
            " Without a network, fetch that file elsewhere and set WEIGHTS to it."
            if "://" in path
            else ""
        )
        raise SourceUnavailable(
            f"{what}: the weights '{path}' cannot be had ({type(e).__name__}: {e}).{fetch}"
        ) from e
    if not os.path.isfile(local):
        raise SourceUnavailable(
            f"{what}: there is no weights file '{path}'. Paths are resolved relative to the config "
            "that names them, then to the working directory."
        )
    return str(local)


def expected_file(path: str, *, what: str, sha256: str) -> tuple[str, str]:
    """
    `local_file`, and its SHA-256, which must begin with ``sha256``.

    Raises:
        SourceUnavailable: if there is no such file.
        ValueError: if it is another one.
    """
    local = local_file(path, what=what)
    try:
        fingerprint = file_fingerprint(local)
    except OSError as e:
        raise SourceUnavailable(f"{what}: the weights '{path}' cannot be read: {e}.") from e
    if not fingerprint.startswith(sha256):
        raise ValueError(
            f"{what}: the file '{path}' has the SHA-256 {fingerprint}, but {sha256} is expected. "
            "It is another file or a damaged copy: restore it, or correct SHA256."
        )
    return local, fingerprint


class _Checkpointer(DetectionCheckpointer):
    """Keeps what it found, and the incompatible keys instead of logging them."""

    pick: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    incompatible: Any = None
    found: Mapping[str, Tensor]

    def _load_file(self, filename: str) -> Any:
        if not filename.endswith(".pkl"):
            checkpoint = super()._load_file(filename)
        else:
            checkpoint = load_pickle(filename)
            if not isinstance(checkpoint, Mapping):
                raise ValueError(f"it holds a {type(checkpoint).__name__}, not weights by name")
            if not {"model", "__author__"} <= checkpoint.keys():  # of Caffe2, as Detectron2 has it
                blobs = checkpoint.get("blobs", checkpoint)
                weights = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
                checkpoint = {
                    "model": weights,
                    "__author__": "Caffe2",
                    "matching_heuristics": True,
                }
        if self.pick is not None:
            checkpoint = {**checkpoint, "model": self.pick(checkpoint)}
        _require_weights(checkpoint["model"])
        return checkpoint

    def _convert_ndarray_to_tensor(self, state_dict: dict[str, Any]) -> None:
        # The last step before the model is filled that sees the entries under the model's names.
        super()._convert_ndarray_to_tensor(state_dict)
        self.found = state_dict

    def _load_model(self, checkpoint: Any) -> None:
        self.incompatible = super()._load_model(checkpoint)


def _cause(error: Exception) -> str:
    """What an error says, in one line: the safe loader speaks in paragraphs of its options."""
    text = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0].rstrip(".")
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


def _require_weights(found: Any) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"it holds a {type(found).__name__}, not weights by name")
    for name, x in found.items():
        if not isinstance(name, str) or not isinstance(x, (Tensor, np.ndarray)):
            raise ValueError(
                f"its entry {name!r} is a {type(x).__name__}, not a tensor, beside "
                f"{_some([repr(k) for k in found if k != name]) or 'nothing'}; weights are "
                "tensors by name, at the top or under 'model'"
            )


def _require_sane(model: nn.Module, found: Mapping[str, Tensor], path: str, what: str) -> None:
    """Refuse what no training leaves: kinds of numbers, NaN, infinity, negative variances."""
    complaints = []
    for name, x in model.state_dict().items():
        if name.endswith(_TOLERATED_MISSING):
            continue
        if name in found and found[name].is_floating_point() != x.is_floating_point():
            complaints.append(f"{name} is of {found[name].dtype}, the model's of {x.dtype}")
        elif x.is_floating_point() and not torch.isfinite(x).all():
            complaints.append(f"{name} is not finite")
    for name, module in model.named_modules():
        variance = getattr(module, "running_var", None)
        if isinstance(variance, Tensor):
            # Detectron2 subtracts eps from the variances of old frozen norms.
            frozen = isinstance(module, FrozenBatchNorm2d)
            if (variance < (-module.eps if frozen else 0)).any():  # type: ignore[operator]
                complaints.append(f"{name}.running_var is negative")
    if complaints:
        raise ValueError(
            f"{what}: '{path}' holds weights that cannot be used: {_some(complaints)}. The file is "
            "damaged, or its training had failed."
        )


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
