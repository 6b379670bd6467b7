"""The running average of the student's own weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kd_det.context import Context
from kd_det.detectors import TapShape, describe
from kd_det.registry import SOURCES
from kd_det.sources.forward import PartialForward
from kd_det.sources.hidden import Box, Hidden
from kd_det.sources.source import Source, Targets
from kd_det.taps import ROWS


@SOURCES.register()
class EMA(Source):
    """
    The running average of the student itself, a mean teacher (Tarvainen and Valpola, NeurIPS 2017,
    https://arxiv.org/abs/1703.01780).

        t_0 = s_0,   t_i = m_i t_{i-1} + (1 - m_i) s_i,   m_i = min(momentum, (1 + i) / (10 + i))

    s_i are the weights that the student's forward of this training step ran with: what an optimizer
    step changes is in the average from the next training step on. The average moves once in every
    `steps` training forwards, before its own forward, whether a term is active or not; on the
    device, and nothing waits for it.

    It runs in eval mode and without gradients, on the student's inputs, under the student's
    autocast, only as deep as its taps need. So that its BatchNorms fit its weights, their running
    statistics are averaged as the weights are (in the original, the teacher normalises by the
    statistics of its batch); with several processes, which each have statistics of their own, the
    mean of all of them is, so that every process has the same average. Integer buffers are copied.

    It is in no ``parameters()``, ``state_dict()``, DDP or optimizer; the kd state holds it.

    Args:
        momentum: m, in [0, 1); 0.999 in the original, after a first phase with 0.99. The warm-up is
            that of TensorFlow's `ExponentialMovingAverage`.
        steps: training steps from one move to the next.

    Raises:
        ValueError: if a value is out of range.
    """

    learns = True

    def __init__(self, *, momentum: float = 0.999, steps: int = 1) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"An EMA needs a momentum in [0, 1), but got {momentum}.")
        if steps < 1:
            raise ValueError(f"An EMA needs steps >= 1, but got {steps}.")
        self.momentum = float(momentum)
        self.steps = steps
        self.hidden = Hidden(shared=False)
        self.run = PartialForward()
        self._student = Box(None)
        self._shapes: dict[str, list[TapShape]] = {}
        self._seen = 0  # training steps
        self._loaded: dict[str, Tensor] = {}  # of a checkpoint, until there is a network

    def attach(self, student: nn.Module) -> None:  # noqa: D102  # as in the base
        self._student.module = student

    def student_taps(self, taps: tuple[str, ...]) -> tuple[str, ...]:
        """The same taps, which look the same, and for those of a box head its boxes."""
        return (*taps, "proposals") if set(taps) & set(ROWS) else taps

    def wire(self, student: Mapping[str, list[TapShape]]) -> None:  # noqa: D102  # as in the base
        self._shapes = dict(student)

    def shapes(self, taps: tuple[str, ...]) -> dict[str, list[TapShape]]:  # noqa: D102  # as in the base
        assert self._student.module is not None, "attach() comes before shapes()"
        self.run.expect(map(describe(self._student.module).tap, taps), self._shapes)
        return {tap: self._shapes[tap] for tap in taps}

    def prepare(self, taps: tuple[str, ...]) -> None:
        """Copy the student, or take up what a checkpoint held."""
        if self.hidden.held is not None:
            return
        self.hidden.hold(copy.deepcopy(self._student.module))
        if self._loaded:
            self._load(self._loaded)

    def forward(self, context: Context, taps: tuple[str, ...]) -> Targets:
        """Move the average, then the maps of the taps, detached; without taps it moves alone."""
        model = self.hidden.held
        assert model is not None, "prepare() comes before forward()"
        moves, wait = divmod(self._seen, self.steps)
        self._seen += 1
        if wait == 0:
            average(model, context.student, self.momentum_of(moves))
        if not taps:
            return Targets({})
        resolved = [describe(model).tap(tap) for tap in taps]
        rois = context.student_maps.get("proposals", {})
        with torch.no_grad() if self.targets_saved else torch.inference_mode():
            return Targets(self.run(model, resolved, context.inputs, rois))

    def momentum_of(self, move: int) -> float:
        """m_i of a move, counted from 0; the first one is a copy."""
        return min(self.momentum, (1 + move) / (10 + move)) if move > 0 else 0.0

    def release(self) -> None:  # noqa: D102  # as in the base
        self.hidden.hold(None)

    def get_extra_state(self) -> dict[str, Any]:
        """How many steps it has seen, and its weights."""
        held = self.hidden.held
        weights = self._loaded if held is None else dict(held.state_dict())
        return {"seen": self._seen, "weights": weights}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The counterpart of `get_extra_state`."""
        self._seen = state["seen"]
        self._load(state["weights"])

    def _load(self, weights: dict[str, Tensor]) -> None:
        if self.hidden.held is None:
            self._loaded = weights
        else:
            self.hidden.held.load_state_dict(weights)
            self._loaded = {}


@torch.no_grad()
def average(model: nn.Module, student: nn.Module, momentum: float) -> None:
    """
    Move the weights and floating point buffers of a model to ``momentum * its own + (1 - momentum)
    * the student's``, and copy the student's other buffers.

    Args:
        model: a copy of the student.
        student: with the same parameters and buffers in the same order.
        momentum: in [0, 1].
    """
    mine = [*model.parameters(), *model.buffers()]
    theirs = [*student.parameters(), *_agreed_buffers(student)]
    pairs = list(zip(mine, theirs, strict=True))
    floating = [(m, s) for m, s in pairs if m.is_floating_point()]
    get_ema_multi_avg_fn(momentum)([m for m, _ in floating], [s for _, s in floating], None)
    for m, s in pairs:
        if not m.is_floating_point():
            m.copy_(s)


def _agreed_buffers(student: nn.Module) -> list[Tensor]:
    """The student's buffers, running statistics as the mean over all processes."""
    buffers = list(student.buffers())
    world = comm.get_world_size()
    norms = [m for m in student.modules() if isinstance(m, _BatchNorm)]
    running = {id(x) for m in norms for x in (m.running_mean, m.running_var) if x is not None}
    places = [i for i, x in enumerate(buffers) if id(x) in running]
    if world > 1 and places:
        flat = torch.cat([buffers[i].flatten() for i in places])
        dist.all_reduce(flat)
        parts = (flat / world).split([buffers[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            buffers[i] = part.view_as(buffers[i])
    return buffers
