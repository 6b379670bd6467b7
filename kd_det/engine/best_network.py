"""The weights of the network that has scored highest in a run."""

import logging
import os
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from kd_det.engine.checkpointing import AtomicPaths

logger = logging.getLogger(__name__)

FILE = "best_network.pth"
"""In ``OUTPUT_DIR``; ``model_best.pth`` is `BestCheckpointer`'s."""


class BestNetwork:
    """
    Keeps ``best_network.pth``: ``model``, a network's plain state_dict that stock Detectron2 loads,
    and beside it ``kd_best``: its ``network``, its ``AP`` in points, and the ``iteration`` of the
    evaluation as in ``metrics.json``. To be used on the main process alone.

    Args:
        folder: ``OUTPUT_DIR``.
    """

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, FILE)
        self._paths = AtomicPaths(PathManager)
        self._best: dict[str, Any] = {}

    def resume(self) -> None:
        """Go on from what the file says, if there is one."""
        if self._paths.isfile(self.path):
            with self._paths.open(self.path, "rb") as f:
                content = torch.load(f, map_location="cpu", weights_only=True)
            self._best = dict(content.get("kd_best", {}))

    def offer(self, name: str, network: nn.Module, ap: float, *, iteration: int) -> None:
        """
        Write a network's weights if none has scored as high before.

        Args:
            name: of the network.
            network: as it was evaluated.
            ap: its box AP in points; NaN never counts.
            iteration: when.

        Raises:
            OSError: if the file cannot be written; the old one stays.
        """
        if not ap > self._best.get("AP", -1.0):
            return
        best = {"network": name, "iteration": iteration, "AP": float(ap)}
        state = {key: x.cpu() for key, x in network.state_dict().items()}
        with self._paths.open(self.path, "wb") as f:
            torch.save({"model": state, "kd_best": best}, f)
        self._best = best
        logger.info(
            "'%s' has the highest AP so far, %.1f: its weights are %s.", name, ap, self.path
        )
