"""
Schedules: a term's weight over a run.

A schedule is a function of *progress* in [0, 1], as in `fvcore.common.param_scheduler`, so it
survives a change of the batch size. ``start_iter`` and ``stop_iter`` cut a window out of it in
iterations, which is how papers state them; ``every`` leaves out iterations of the window.
"""

import math
from typing import Any

from kd_det.registry import SCHEDULES


class Schedule:
    """
    A window in iterations, and a factor inside of it.

    Args:
        start_iter: the term is idle before this iteration.
        stop_iter: the term is over from this iteration on: its source no longer runs and is freed
            when no other term needs it. 0 means never.
        every: the term imitates in every so many-th iteration only. In between it is idle (its loss
            an attached zero) and its source is not run, unless for another term. The weight stays
            as it is: over the run the term then pulls ``1 / every`` as hard.

    Raises:
        ValueError: if the window is negative or empty, or ``every`` is below 1.
    """

    def __init__(self, *, start_iter: int = 0, stop_iter: int = 0, every: int = 1) -> None:
        if start_iter < 0 or stop_iter < 0 or 0 < stop_iter <= start_iter:
            raise ValueError(
                f"A schedule's window needs 0 <= start_iter < stop_iter (or stop_iter 0 for 'to "
                f"the end'), but got start_iter {start_iter} and stop_iter {stop_iter}."
            )
        if every < 1:
            raise ValueError(f"A schedule's every is at least 1, but got {every}.")
        self.start_iter = start_iter
        self.stop_iter = stop_iter
        self.every = every

    def __call__(self, progress: float, max_iter: int | None) -> float:
        """
        The factor on the term's weight.

        Args:
            progress: in [0, 1], the share of the run that is done.
            max_iter: length of the run; only needed by schedules that speak of iterations.

        Raises:
            ValueError: if the schedule speaks of iterations and ``max_iter`` is unknown.
        """
        if not self.needs_clock:
            return 1.0
        if self.start_iter and self._iteration(progress, max_iter) < self.start_iter:
            return 0.0
        if self.finished(progress, max_iter):
            return 0.0
        # Not counted from start_iter: terms of one source share their iterations, and the source
        # its runs. 2 as in the diagnostics and logged values, which fall on these iterations.
        if self.every > 1 and (self._iteration(progress, max_iter) + 2) % self.every:
            return 0.0
        return self.factor(progress, max_iter)

    def finished(self, progress: float, max_iter: int | None) -> bool:
        """Whether the factor stays 0 until the end of the run."""
        return self.stop_iter > 0 and self._iteration(progress, max_iter) >= self.stop_iter

    @property
    def needs_clock(self) -> bool:
        """Whether the factor depends on progress at all."""
        return (
            type(self) is not Constant
            or self.start_iter > 0
            or self.stop_iter > 0
            or self.every > 1
        )

    def factor(self, progress: float, max_iter: int | None) -> float:
        """The factor inside the window."""
        return 1.0

    def _iteration(self, progress: float, max_iter: int | None) -> int:
        if max_iter is None:
            raise ValueError(
                f"The schedule {type(self).__name__} counts iterations, but the length of the run "
                "is unknown: give the Distiller max_iter=..."
            )
        return round(progress * max_iter)


@SCHEDULES.register()
class Constant(Schedule):
    """Factor 1 inside the window."""


@SCHEDULES.register()
class Warmup(Schedule):
    """Linear from 0 to 1 over the first ``warmup_iters`` iterations of the window, then 1."""

    def __init__(self, *, warmup_iters: int = 1000, **window: Any) -> None:
        super().__init__(**window)
        if warmup_iters < 1:
            raise ValueError(f"Warmup needs warmup_iters >= 1, but got {warmup_iters}.")
        self.warmup_iters = warmup_iters

    def factor(self, progress: float, max_iter: int | None) -> float:  # noqa: D102  # as in the base
        done = self._iteration(progress, max_iter) - self.start_iter
        return min(1.0, (done + 1) / self.warmup_iters)


@SCHEDULES.register()
class Ramp(Schedule):
    """
    Up to 1, and then 1.

        linear: t,   sigmoid: exp(-5 (1 - t)^2),
        t = min(1, rate * (progress - begin) / (1 - begin))

    OKDCR's is the default, which reaches 1 at 80 % of the run; PS-KD's is ``rate=1`` (with its 0.8
    as the term's weight); FRSKD's for segmentation, silent for 40 of 60 epochs, is ``rate=1,
    begin=2/3, form="sigmoid"``.

    Args:
        rate: how fast, > 0; 1 reaches the top at the end of the run.
        begin: share of the run, in [0, 1), before which the factor is 0.
        form: ``"linear"`` or ``"sigmoid"``.

    Raises:
        ValueError: if a value is out of range or unknown.
    """

    def __init__(
        self, *, rate: float = 1.25, begin: float = 0.0, form: str = "linear", **window: Any
    ) -> None:
        super().__init__(**window)
        if not (rate > 0 and 0 <= begin < 1):
            raise ValueError(
                f"Ramp needs rate > 0 and 0 <= begin < 1, but got rate {rate} and begin {begin}."
            )
        if form not in ("linear", "sigmoid"):
            raise ValueError(f"Ramp's form is linear or sigmoid, but got '{form}'.")
        self.rate = rate
        self.begin = begin
        self.form = form

    def factor(self, progress: float, max_iter: int | None) -> float:  # noqa: D102  # as in the base
        if progress < self.begin:
            return 0.0
        t = min(1.0, self.rate * (progress - self.begin) / (1 - self.begin))
        return t if self.form == "linear" else math.exp(-5 * (1 - t) ** 2)


@SCHEDULES.register()
class Cosine(Schedule):
    """From 1 down to ``end`` along half a cosine over the whole run."""

    def __init__(self, *, end: float = 0.0, **window: Any) -> None:
        super().__init__(**window)
        if not end >= 0:
            raise ValueError(f"Cosine needs end >= 0, but got {end}.")
        self.end = end

    def factor(self, progress: float, max_iter: int | None) -> float:  # noqa: D102  # as in the base
        return self.end + (1 - self.end) * 0.5 * (1 + math.cos(math.pi * progress))


@SCHEDULES.register()
class Step(Schedule):
    """Multiplied by ``gamma`` at each of the ``steps`` (iterations, ascending)."""

    def __init__(self, *, steps: tuple[int, ...] = (), gamma: float = 0.1, **window: Any) -> None:
        super().__init__(**window)
        if not steps or list(steps) != sorted(steps) or not gamma >= 0:
            raise ValueError(
                f"Step needs ascending steps and gamma >= 0, but got steps {tuple(steps)} and "
                f"gamma {gamma}."
            )
        self.steps = tuple(steps)
        self.gamma = gamma

    def factor(self, progress: float, max_iter: int | None) -> float:  # noqa: D102  # as in the base
        iteration = self._iteration(progress, max_iter)
        return self.gamma ** sum(iteration >= step for step in self.steps)
