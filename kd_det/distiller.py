"""The Distiller: a student detector, who it imitates, and the terms that say how."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from kd_det._compat import get_event_storage_or_none
from kd_det.context import Context, with_images_on
from kd_det.diagnostics import Diagnostics, LastValues, Learner, ScalarQueue, Step, put_levels
from kd_det.inherit import Inherit
from kd_det.kd_state import KDStateMixin
from kd_det.labels import labelled_first, run_student
from kd_det.sources import STUDENT, Source
from kd_det.sources.peer import warn_of_twins
from kd_det.taps import Maps, Tap, detached
from kd_det.terms import Term
from kd_det.wiring import Wiring, wire


class Distiller(KDStateMixin, nn.Module):
    """
    A Detectron2 meta-architecture that adds distillation terms to a student's losses. In eval mode
    it *is* the student; its checkpoint is the student's.

        task_loss_weight * student losses + losses of sources that learn
            + sum over terms: weight * schedule(progress) * sum_l value_l

    Images without labels are imitated on like all others, and count for no loss of the student's
    own: see `kd_det.labels.run_student`.

    Args:
        student: the detector that learns; it is not changed.
        sources: who is imitated, by name.
        terms: what is imitated and how, by name; the loss of term ``x`` is ``loss_kd_x``. A term of
            weight 0 is left out with its taps and, if nothing else needs it, its source.
        max_iter: length of the run, for schedules. The clock is the iteration of Detectron2's
            EventStorage, or `set_progress` in a loop without one.
        input_format: channel order of the images that the student is fed; ``None`` takes the
            student's ``input_format`` attribute, else BGR.
        export_peer: name of the source whose network is exported in the student's place: what eval
            mode runs and the checkpoint holds; empty for the student.
        classes: what the student's classes are called, in order, or the name of the dataset that
            says so; class logits of a source with other classes are matched by name.
        task_loss_weight: factor on the student's own losses; 0: it learns from its sources alone,
            and no image needs labels.
        inherit: what the student copies from a source before the first step of a new run.
        log_period: every so many iterations the value of each level goes to the EventStorage as
            ``kd/<term>/<level>``, unweighted, and ``.../weighted``; see `flush`.
        diagnostics: what is measured of the run beside that; ``None`` for nothing.
        on_start: called with the Distiller once, before the first training step: sources are read
            and checked, nothing is trained yet.

    Raises:
        ValueError: if names, taps or shapes do not fit together; the message names the term.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        sources: Mapping[str, Source],
        terms: Mapping[str, Term],
        max_iter: int | None = None,
        input_format: str | None = None,
        export_peer: str = "",
        classes: str | Sequence[str] = (),
        task_loss_weight: float = 1.0,
        inherit: Inherit | None = None,
        log_period: int = 20,
        diagnostics: Diagnostics | None = None,
        on_start: "Callable[[Distiller], None] | None" = None,
    ) -> None:
        super().__init__()
        if log_period < 1:
            raise ValueError(f"The Distiller needs log_period >= 1, but got {log_period}.")
        if not 0 <= task_loss_weight < math.inf:
            raise ValueError(
                f"The Distiller needs a finite task_loss_weight >= 0, but got {task_loss_weight}."
            )
        self.student = student
        self.max_iter = max_iter
        self.input_format = input_format or str(getattr(student, "input_format", "BGR"))
        self.task_loss_weight = float(task_loss_weight)
        self.inherit = inherit
        self.log_period = log_period
        self.diagnostics = diagnostics or Diagnostics(period=0)
        self.on_start = on_start
        self.wiring: Wiring = wire(student, sources, terms, inherit, classes)
        self.export_peer = self.wiring.network_name(export_peer)
        # The same objects as in the wiring, where PyTorch sees them: .to(), parameters(), DDP.
        self.sources = nn.ModuleDict(self.wiring.sources)
        self.terms = nn.ModuleDict(self.wiring.terms)
        self._queue = ScalarQueue()
        self._last: LastValues | None = None
        self._progress: float | None = None
        self._started = False

    def __getattr__(self, name: str) -> Any:
        # Code that follows the names of the state_dict into the modules (fvcore's checkpointer does
        # for a weight of another shape) finds the student's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "export_peer" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self.exported, name)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        In eval mode the predictions of the network that is exported; in training mode the student's
        losses and ``loss_kd_<term>``. In training mode without gradients (PreciseBN, a hook that
        watches losses) nothing can be learnt: the losses of the student and of peers alone, and no
        other source runs.

        Args:
            batched_inputs: Detectron2's batch format, images in ``input_format``.

        Raises:
            RuntimeError: if a tap did not fire, or the run cannot be resumed.
            SourceUnavailable: if a file of a source is missing.
        """
        if not self.training:
            given = Context(batched_inputs, self.input_format, self.student)
            return self.exported(given.seen_by(self.exported).inputs)
        storage = get_event_storage_or_none()
        iteration = None if storage is None else int(storage.iter)
        # Detectron2's losses write to a storage; a loop without one gets a throw-away.
        with EventStorage(0) if storage is None else contextlib.nullcontext():
            if not torch.is_grad_enabled():
                return self._without_gradients(labelled_first(batched_inputs))
            self.flush()
            self._start(iteration)
            progress = self._progress_at(iteration)
            watched = self.diagnostics.begin(self.student, storage)
            step = self._step(batched_inputs, progress, watched)
            self._last = LastValues(step, self.wiring)
            if storage is not None:
                # One iteration early: values arrive with the next forward, when a writer is due.
                if (storage.iter + 2) % self.log_period == 0:
                    put_levels(step, self.wiring, storage, self._queue)
                self.diagnostics.end(step, self.wiring, storage, self._queue)
        for name in self._over(progress):
            self.wiring.sources[name].release()
        return step.losses

    def _without_gradients(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        losses, _ = run_student(self.student, inputs, {}, {}, self.task_loss_weight)
        context = Context(inputs, self.input_format, self.student)
        for name, source in self.wiring.sources.items():
            if source.network is not None:  # or PreciseBN would clear the statistics of its norms
                source.prepare(self.wiring.all_source_taps[name])
                losses.update(source(context, ()).losses)
        return losses

    def _step(
        self, inputs: list[dict[str, Any]], progress: float, watched: Mapping[str, Tap]
    ) -> Step:
        """Losses of one batch and what they were made of, with the maps of the watched taps."""
        weights = {
            name: term.weight * term.schedule(progress, self.max_iter)
            for name, term in self.wiring.terms.items()
        }
        active = [name for name, weight in weights.items() if weight > 0]
        over = self._over(progress)
        taps = self.wiring.student_taps(active, over)
        inputs = labelled_first(inputs)
        uploaded = with_images_on(next(self.student.parameters()).device, inputs)
        losses, seen = run_student(
            self.student,
            inputs,
            {**watched, **taps},
            self.wiring.expected_calls,
            self.task_loss_weight,
        )
        maps = {name: seen[name] for name in taps}
        context = Context(uploaded, self.input_format, self.student, maps, progress)
        learners = {STUDENT: Learner(tuple(losses), seen, context)}

        targets: dict[str, Mapping[str, Maps]] = {}
        for name, asked in self.wiring.source_taps(active, over).items():
            source = self.wiring.sources[name]
            source.prepare(self.wiring.all_source_taps[name])
            with self.diagnostics.stopwatch.source(name):
                found = source(replace(context, targets=targets), asked)
            if clash := losses.keys() & found.losses.keys():
                raise ValueError(
                    f"Source '{name}' has losses of its own called {', '.join(sorted(clash))}, as "
                    "the step has already: it must give them other names."
                )
            losses.update(found.losses)
            targets[name] = found.maps
            if found.learner is not None:
                learners[name] = Learner(tuple(found.losses), found.maps, found.learner)

        step = Step(losses, {}, weights, learners, targets)
        for name, term in self.wiring.terms.items():
            if name in active:
                learner, of = learners[self.wiring.learner_of[name]], self.wiring.source_of[name]
                step.values[name] = term(
                    learner.context.student_maps,
                    targets[of] if term.moves_target else detached(targets[of]),
                    learner.context,
                    self.wiring.sources[of],
                )
            losses[f"loss_kd_{name}"] = self._total(name, weights[name], step.values.get(name))
        return step

    def _total(self, name: str, weight: float, values: dict[str, Tensor] | None) -> Tensor:
        """
        Weight * sum_l value_l; an idle term still touches its parameters and those of its source,
        or DDP would stall.
        """
        term = self.wiring.terms[name]
        if values is not None:
            return (
                weight
                * torch.stack(
                    [term.level_weight(level) * value for level, value in values.items()]
                ).sum()
            )
        device = next(self.student.parameters()).device
        zero = torch.zeros((), device=device)
        source = self.wiring.sources[self.wiring.source_of[name]]
        idle = chain(term.parameters(), () if source.is_learner else source.parameters())
        return zero + sum(0 * p.sum() for p in idle if p.requires_grad)

    def prepare(self) -> None:
        """
        Read and check the weights of every source now, instead of when a term first needs them.

        Raises:
            SourceUnavailable: if a file of a source is missing.
            ValueError: if a file is not what it should be.
        """
        if self.wiring.unavailable is not None:
            raise self.wiring.unavailable
        for name, source in self.wiring.sources.items():
            source.prepare(self.wiring.all_source_taps[name])

    def _start(self, iteration: int | None) -> None:
        """Once, before the first training step: check a resumed run, or let a new one inherit."""
        if self._started:
            return
        self.prepare()
        resuming = self.check_resume(iteration)
        for name, source in self.wiring.sources.items():
            self.check_fingerprint(name, source)
        if self.inherit is not None and not resuming:
            self.inherit(self.student, self.wiring.sources[self.inherit.source])
        if not resuming:
            warn_of_twins(self.networks)
        if self.on_start is not None:
            self.on_start(self)
        self._started = True

    def _progress_at(self, iteration: int | None) -> float:
        if self._progress is not None:
            return self._progress
        if iteration is not None and self.max_iter:
            return min(iteration / self.max_iter, 1.0)
        if any(term.schedule.needs_clock for term in self.wiring.terms.values()):
            raise ValueError(
                "A term has a schedule, but the Distiller has no clock: give it max_iter=... under "
                "Detectron2's EventStorage, or call distiller.set_progress(x) with x in [0, 1] "
                "before every step."
            )
        return 0.0

    def set_progress(self, progress: float) -> None:
        """Tell how much of the run is done, in [0, 1], in a loop without an EventStorage."""
        if not 0 <= progress <= 1:
            raise ValueError(f"Progress is in [0, 1], but got {progress}.")
        self._progress = float(progress)

    def flush(self, wait: bool = False) -> None:
        """
        Write the ``kd/...`` scalars that have arrived from the device to the EventStorage that they
        were measured under. Every training forward does so first; a hook may, after each step, to
        write them in the iteration that they are from, and at the end of a run.

        Args:
            wait: wait for those that are still on their way.
        """
        self._queue.flush(wait)

    def explain_non_finite(self) -> str:
        """
        Which values of the last step are not finite: a sentence for each term and level, with whose
        map it is and what to do; empty when all are finite. Waits for the device.
        """
        return "" if self._last is None else self._last.explain()

    def _over(self, progress: float) -> list[str]:
        """Names of the sources that nobody needs until the end of the run."""
        return self.wiring.over(
            name
            for name, term in self.wiring.terms.items()
            if not term.schedule.finished(progress, self.max_iter)
        )


def find_distiller(model: nn.Module) -> Distiller | None:
    """The Distiller inside of wrappers such as DDP, or ``None``."""
    return next((m for m in model.modules() if isinstance(m, Distiller)), None)
