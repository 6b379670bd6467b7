"""The folder of a run: it can be written and has room, found out before the run needs it."""

import os
import shutil
import tempfile

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

_MIB = 2**20
_TEMPORARY = (".pth.tmp", "last_checkpoint.tmp", "student.yaml.tmp", "kd_run.json.tmp")


def check_output_dir(cfg: CfgNode, model: nn.Module | None = None) -> None:
    """
    Check, in the main process, that ``OUTPUT_DIR`` can be made and written, by writing a byte, and
    that one checkpoint fits. Nothing stays behind but the folder.

    Args:
        cfg: the config of the run; an address (``s3://``) or an empty ``OUTPUT_DIR`` is left alone.
        model: what is to be saved, with the momentum of its trained parameters; ``None`` asks for
            no room.

    Raises:
        ValueError: if the folder cannot be written, or has too little room.
    """
    folder = cfg.OUTPUT_DIR
    if not folder or "://" in folder or not comm.is_main_process():
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"1")
    except OSError as e:
        raise ValueError(
            f"OUTPUT_DIR is '{folder}', which cannot be written ({e.strerror or e}): name a folder "
            "that can be made and written."
        ) from e
    needed = 0 if model is None else checkpoint_bytes(model)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"OUTPUT_DIR is '{folder}', where {free / _MIB:.1f} MiB are free, but a checkpoint "
            f"takes about {needed / _MIB:.1f} MiB: make room, or name another folder."
        )


def checkpoint_bytes(model: nn.Module) -> int:
    """About the size of a checkpoint: parameters, buffers, and one momentum per trained weight."""

    def size(x: Tensor) -> int:
        return x.numel() * x.element_size()

    momentum = sum(size(p) for p in model.parameters() if p.requires_grad)
    return momentum + sum(size(x) for x in [*model.parameters(), *model.buffers()])


def remove_stale(folder: str) -> list[str]:
    """
    Remove the temporary files that a process killed while saving has left in a folder.

    Returns:
        Their names.
    """
    if not os.path.isdir(folder):
        return []
    stale = [name for name in sorted(os.listdir(folder)) if name.endswith(_TEMPORARY)]
    for name in stale:
        os.remove(os.path.join(folder, name))
    return stale
