"""What is measured of a run now and then; between measurements nothing is computed."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from kd_det.detectors import describe
from kd_det.diagnostics.measures import channel_agreement, gradient_norm, top_overlap
from kd_det.diagnostics.panel import panel
from kd_det.diagnostics.scalars import ScalarQueue
from kd_det.diagnostics.step import Step
from kd_det.diagnostics.stopwatch import Stopwatch
from kd_det.taps import Tap
from kd_det.terms import Term
from kd_det.wiring import Wiring

logger = logging.getLogger(__name__)

FIRST = 200  # iterations at the start of a run: measured more often, and a weight is suggested
_FIRST_PERIOD = 20
_ENOUGH = 3  # measurements for a median


class Diagnostics:
    """
    Measures, every ``period`` iterations (20 within the first 200), written as scalars of the
    EventStorage; ``docs/diagnostics.md`` says how to read them.

    * ``kd/<term>/grad_ratio``: norm of the weighted term's gradient over that of the learner's own
      losses, both with respect to the shared features (tap ``features``; where that is not
      recorded, the term's own taps);
    * ``kd/<term>/suggested_weight``, once, after the first 200 iterations of a run, with a line in
      the log: the weight at which the median of that ratio would be ``target_ratio``;
    * ``kd/<term>/<level>/channel_agreement`` and ``.../top_overlap``, see the functions of these
      names in `kd_det.diagnostics.measures`;
    * ``kd/time/<source>`` and ``kd/time_share/<source>``: seconds and share of the step.

    Losses, gradients and random states are untouched. The host waits for nothing, except in a
    measurement's backward where that of the student's own losses does (RetinaNet's masks).

    Args:
        period: 0 measures never.
        target_ratio: what a suggested weight aims at, > 0.
        vis_period: every so many iterations one image per term and level, ``kd/<term>/<level>``:
            student and target beside each other. 0 makes none.

    Raises:
        ValueError: if a period is negative, or the ratio not positive and finite.
    """

    def __init__(
        self, *, period: int = 100, target_ratio: float = 1.0, vis_period: int = 0
    ) -> None:
        if period < 0 or vis_period < 0:
            raise ValueError(
                "Diagnostics need period >= 0 and vis_period >= 0 (0 is never), but got period "
                f"{period} and vis_period {vis_period}."
            )
        if not 0 < target_ratio < math.inf:
            raise ValueError(f"Diagnostics need a target_ratio > 0, but got {target_ratio}.")
        self.period = period
        self.target_ratio = float(target_ratio)
        self.vis_period = vis_period
        self.stopwatch = Stopwatch()
        self._unit_ratios: dict[str, list[float]] = {}  # at weight 1, of the first iterations
        self._no_gradients = False

    def due(self, iteration: int) -> bool:
        """
        Whether an iteration is measured: the one before last of each period, so that its scalars,
        which arrive with the next forward, are there when Detectron2's writers run.
        """
        period = self._period(iteration)
        return period > 0 and (iteration + 2) % period == 0

    def begin(self, student: nn.Module, storage: EventStorage | None) -> dict[str, Tap]:
        """
        A training step begins, and the one before is over.

        Args:
            student: the detector.
            storage: of the step; without one nothing is measured.

        Returns:
            The student's taps that the measurement reads, beside the terms'.
        """
        self.stopwatch.stop()
        if storage is None or not self.due(int(storage.iter)):
            return {}
        if getattr(student, "_compiled_call_impl", None) is not None:
            self._give_up(
                "the student is compiled as a whole, and its graph no longer leads from the losses "
                "to the features. Compile what is in it instead: student.backbone.compile()"
            )
        self.stopwatch.start(storage, next(student.parameters()).device)
        presets = describe(student).presets()
        return {name: presets[name] for name in ("features",) if name in presets}

    def end(self, step: Step, wiring: Wiring, storage: EventStorage, queue: ScalarQueue) -> None:
        """A step's forward is over: measure what is due."""
        iteration = int(storage.iter)
        if self.due(iteration):
            norms = self._gradient_norms(step, wiring)
            queue.put(storage, norms, partial(self._report, iteration, step.weights, wiring.terms))
            queue.put(storage, dict(_likeness(step, wiring)))
        if self.vis_period and iteration % self.vis_period == 0:
            for name, level, s, t, _ in _aligned(step, wiring):
                storage.put_image(f"kd/{name}/{level}", panel(s[0], t[0]))

    def _period(self, iteration: int) -> int:
        return min(self.period, _FIRST_PERIOD) if iteration < FIRST else self.period

    def _gradient_norms(self, step: Step, wiring: Wiring) -> dict[str, Tensor]:
        """For every active term its norm, and under ``<term>/task`` that of the task's losses."""
        norms: dict[str, Tensor] = {}
        if self._no_gradients:
            return norms
        shared: dict[str, Tensor] = {}  # of every learner's own losses on its features
        try:
            for name in step.values:
                who = wiring.learner_of[name]
                learner = step.learners[who]
                if not learner.losses:
                    continue
                task = torch.stack([step.losses[loss] for loss in learner.losses]).sum()
                features = list(learner.maps.get("features", {}).values())
                if features and who not in shared:
                    shared[who] = gradient_norm(task, features)
                maps = features or [
                    x
                    for tap in wiring.terms[name].student_taps()
                    for x in learner.maps[tap].values()
                ]
                norms[name] = gradient_norm(step.losses[f"loss_kd_{name}"], maps)
                norms[f"{name}/task"] = shared[who] if features else gradient_norm(task, maps)
        except RuntimeError as e:  # no reason to lose a run
            self._give_up(
                "torch.autograd.grad of the losses with respect to the student's features failed "
                f"({str(e).partition(chr(10))[0]})"
            )
            return {}
        return norms

    def _give_up(self, why: str) -> None:
        if not self._no_gradients:
            logger.warning("kd/<term>/grad_ratio is not measured in this run: %s.", why)
        self._no_gradients = True

    def _report(
        self,
        iteration: int,
        weights: Mapping[str, float],
        terms: Mapping[str, Term],
        norms: Mapping[str, float],
    ) -> dict[str, float]:
        scalars = {}
        for name in [n for n in norms if not n.endswith("/task")]:
            kd, task = norms[name], norms[f"{name}/task"]
            ratio = kd / task if task else (math.inf if kd else 0.0)
            if not math.isfinite(ratio):
                continue  # an overflow under autocast, or a batch without a task
            scalars[f"kd/{name}/grad_ratio"] = ratio
            if iteration < FIRST:
                self._unit_ratios.setdefault(name, []).append(ratio / weights[name])
        if iteration < FIRST <= iteration + self._period(iteration):
            scalars.update(self._suggest(terms))
        return scalars

    def _suggest(self, terms: Mapping[str, Term]) -> dict[str, float]:
        """The weights at which the median ratio of the first iterations would be as aimed at."""
        scalars = {}
        for name, ratios in self._unit_ratios.items():
            unit = median(ratios)
            if len(ratios) < _ENOUGH or unit == 0:
                continue
            weight = terms[name].weight
            scalars[f"kd/{name}/suggested_weight"] = suggested = self.target_ratio / unit
            logger.info(
                "Term '%s': in the first %d iterations its gradient on the shared features was "
                "%.3g times that of the student's own losses (median of %d, at weight %g and "
                "schedule 1). For %g times: KD.TERMS.%s.WEIGHT %.3g. A ratio is no AP: it says how "
                "hard the term pulls.",
                name,
                FIRST,
                unit * weight,
                len(ratios),
                weight,
                self.target_ratio,
                name.upper(),
                suggested,
            )
        return scalars


@torch.no_grad()
def _likeness(step: Step, wiring: Wiring) -> Iterator[tuple[str, Tensor]]:
    for name, level, s, t, region in _aligned(step, wiring):
        yield f"kd/{name}/{level}/channel_agreement", channel_agreement(s, t, region)
        yield f"kd/{name}/{level}/top_overlap", top_overlap(s, t, region)


@torch.no_grad()
def _aligned(
    step: Step, wiring: Wiring
) -> Iterator[tuple[str, str, Tensor, Tensor, Tensor | None]]:
    """(term, level, student's map, target's map, region) of all active terms that compare maps."""
    for name in step.values:
        term = wiring.terms[name]
        targets = step.targets[wiring.source_of[name]]
        context = step.learners[wiring.learner_of[name]].context
        with _as_in_evaluation(term):
            for level, s, t, region in term.aligned(context.student_maps, targets, context):
                yield name, level, s, t, region


@contextmanager
def _as_in_evaluation(term: Term) -> Iterator[None]:
    """A look at a connector moves no running statistics and draws no random numbers."""
    training = [m for m in term.modules() if m.training]
    term.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True
