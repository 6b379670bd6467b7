"""Build everything, run one batch, say what was found, and stop."""

import contextlib
import logging
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_det.detectors import describe
from kd_det.distiller import Distiller
from kd_det.engine.loader import resumable
from kd_det.engine.teacher_ap import check_gates
from kd_det.labels import is_labelled, without_objects
from kd_det.plan import plan_table

logger = logging.getLogger(__name__)

_MIB = 2**20


def dry_run(cfg: CfgNode) -> str:
    """
    Everything of a run before its second step: datasets, model, teacher's weights and gate,
    inheritance, one batch forward and backward. Nothing is written and nothing is updated.

    Args:
        cfg: the config of the run.

    Returns:
        The report, which is also logged: the plan, the losses, and the peak memory of the step
        beside the plain student's.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    model = build_model(cfg).train()
    with model.starting() if isinstance(model, Distiller) else contextlib.nullcontext():
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    loader = build_detection_train_loader(cfg)
    batch = next(iter(resumable(loader, cfg) or loader))
    if not isinstance(model, Distiller):
        losses, peak = measure_step(model, batch)
        return _report(["KD.ENABLED is False: this is the plain student."], losses, peak, None)
    model.on_start = None  # student.yaml belongs to runs
    check_gates(cfg, model)
    model.prepare()
    images = describe(model.student).preprocess(batch)
    n, _, h, w = images.shape
    del images
    # Its step on as many images, where some have no labels.
    known = [x if is_labelled(x) else without_objects(x) for x in batch]
    _, plain_peak = measure_step(model.student, known)
    losses, peak = measure_step(model, batch)
    return _report([plan_table(model, (n, h, w))], losses, peak, plain_peak)


def measure_step(
    model: torch.nn.Module, batch: list[dict[str, Any]]
) -> tuple[dict[str, float], int]:
    """
    One forward and backward without an update.

    Returns:
        The losses, and the peak of bytes that the step allocates beyond what is there before it:
        by the allocator's count on a GPU, and elsewhere by following every tensor's storage
        (workspaces inside of kernels are not seen).
    """
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        losses = _step(model, batch)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with StoragePeak() as tracker:
            losses = _step(model, batch)
        peak = tracker.peak
    model.zero_grad(set_to_none=True)
    return losses, peak


def _step(model: torch.nn.Module, batch: list[dict[str, Any]]) -> dict[str, float]:
    with EventStorage(0):
        losses = model(batch)
        sum(losses.values()).backward()
    return {name: float(value.detach()) for name, value in losses.items()}


class StoragePeak(TorchDispatchMode):
    """Follows the storages that operators create: ``peak`` is the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then look at what it returned."""
        known = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in known:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def _report(lines: list[str], losses: dict[str, float], peak: int, plain_peak: int | None) -> str:
    lines = [
        *lines,
        "",
        "losses of one batch: " + ", ".join(f"{k} {v:.4g}" for k, v in losses.items()),
    ]
    text = f"peak memory of the step: {peak / _MIB:.4g} MiB"
    if plain_peak is not None:
        text += f", of the plain student's step: {plain_peak / _MIB:.4g} MiB"
    lines.append(text)
    report = "\n".join(lines)
    logger.info("Dry run:\n%s", report)
    return report
