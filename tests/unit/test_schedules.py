"""Schedules: the factor on a term's weight at given moments of a run of 100 iterations."""

import math

import pytest

from kd_det.registry import SCHEDULES
from kd_det.schedules import Constant, Cosine, Ramp, Schedule, Step, Warmup

RUN = 100


def at(schedule, iteration):
    return schedule(iteration / RUN, RUN)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Constant(), {0: 1, 50: 1, 100: 1}),
        (Constant(start_iter=20), {0: 0, 19: 0, 20: 1, 100: 1}),
        (Constant(stop_iter=30), {0: 1, 29: 1, 30: 0, 100: 0}),
        (Constant(start_iter=20, stop_iter=30), {19: 0, 20: 1, 29: 1, 30: 0}),
        (Constant(start_iter=29, stop_iter=30), {28: 0, 29: 1, 30: 0}),
        (Constant(every=2), {0: 1, 1: 0, 2: 1, 99: 0, 100: 1}),
        (Constant(every=5), {0: 0, 3: 1, 4: 0, 8: 1, 18: 1, 98: 1}),  # 18: logged every 20
        (Constant(every=2, start_iter=3, stop_iter=6), {2: 0, 3: 0, 4: 1, 5: 0, 6: 0}),
        (Step(steps=(50,), gamma=0.5, every=4), {2: 1, 48: 0, 50: 0.5, 51: 0}),
        (Warmup(warmup_iters=10), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 100: 1}),
        (Warmup(warmup_iters=1), {0: 1, 1: 1}),
        (Warmup(warmup_iters=10, start_iter=20), {19: 0, 20: 0.1, 29: 1, 99: 1}),
        (Ramp(), {0: 0, 40: 0.5, 80: 1, 100: 1}),
        (Ramp(rate=2.0, stop_iter=60), {25: 0.5, 59: 1, 60: 0}),
        (Ramp(rate=1.0), {0: 0, 30: 0.3, 100: 1}),  # PS-KD
        (Ramp(rate=1.0, begin=0.5), {0: 0, 50: 0, 75: 0.5, 100: 1}),
        (  # FRSKD's, of segmentation; 0.00673795 = exp(-5)
            Ramp(rate=1.0, begin=0.4, form="sigmoid"),
            {39: 0, 40: 0.00673795, 70: math.exp(-1.25), 100: 1},
        ),
        (Ramp(rate=4.0, form="sigmoid"), {0: 0.00673795, 25: 1, 50: 1}),
        (Cosine(), {0: 1, 50: 0.5, 100: 0}),
        (Cosine(end=0.2), {0: 1, 50: 0.6, 100: 0.2}),
        (Cosine(), {25: 0.5 * (1 + math.sqrt(0.5))}),
        (Step(steps=(60, 80)), {59: 1, 60: 0.1, 79: 0.1, 80: 0.01, 100: 0.01}),
        (Step(steps=(50,), gamma=0.0), {49: 1, 50: 0}),
    ],
)
def test_factors(schedule, factors):
    found = {iteration: at(schedule, iteration) for iteration in factors}
    assert found == pytest.approx(factors)


@pytest.mark.parametrize("run", [7, 90000, 123457])
def test_iterations_survive_the_way_through_progress(run):
    # The clock is iteration / max_iter in floating point; no window may be off by one.
    for iteration in {1, 2, run // 3, run // 2, run - 1}:
        schedule = Constant(start_iter=iteration, stop_iter=iteration + 1)
        moments = (iteration - 1, iteration, iteration + 1)
        assert [schedule(i / run, run) for i in moments] == [0, 1, 0]


@pytest.mark.parametrize("run", [7, 90000, 123457])
@pytest.mark.parametrize("every", [2, 3, 7])
def test_every_counts_on_through_a_long_run(run, every):
    schedule = Constant(every=every)
    for start in {0, run // 3, max(run - 2 * every, 0)}:
        active = [i for i in range(start, start + every) if schedule(i / run, run) > 0]
        assert len(active) == 1
        assert not schedule.finished(active[0] / run, run)


@pytest.mark.parametrize("cls", [cls for _, cls in SCHEDULES])
def test_a_window_cuts_every_schedule(cls):
    own = {"steps": (1000,)} if cls is Step else {}
    schedule = cls(start_iter=20, stop_iter=60, **own)
    assert at(schedule, 19) == 0
    assert at(schedule, 20) > 0
    assert at(schedule, 59) > 0
    assert at(schedule, 60) == 0
    assert not schedule.finished(0.59, RUN)
    assert schedule.finished(0.60, RUN)
    assert not cls(**own).finished(1.0, RUN)


def test_before_its_window_a_schedule_is_idle_and_not_finished():
    assert not Constant(start_iter=50, stop_iter=60).finished(0.1, RUN)


def test_a_constant_needs_no_clock():
    assert not Constant().needs_clock
    assert Constant()(0.5, None) == 1
    assert Constant(start_iter=1).needs_clock
    assert Constant(stop_iter=1).needs_clock
    assert Constant(every=2).needs_clock
    assert Ramp().needs_clock
    assert Ramp()(0.4, None) == 0.5  # speaks of progress only


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(start_iter=5),
        Constant(stop_iter=5),
        Constant(every=2),
        Warmup(),
        Step(steps=(5,)),
    ],
)
def test_iterations_need_the_length_of_the_run(schedule):
    with pytest.raises(ValueError, match=f"{type(schedule).__name__} counts iterations.*max_iter"):
        schedule(0.5, None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Constant(start_iter=-1), "got start_iter -1"),
        (lambda: Constant(stop_iter=-5), "stop_iter -5"),
        (lambda: Constant(start_iter=5, stop_iter=5), "start_iter 5 and stop_iter 5"),
        (lambda: Constant(every=0), "every is at least 1, but got 0"),
        (lambda: Warmup(warmup_iters=0), "warmup_iters >= 1, but got 0"),
        (lambda: Ramp(rate=0.0), "rate > 0"),
        (lambda: Ramp(begin=1.0), "begin 1.0"),
        (lambda: Ramp(begin=-0.1), "begin -0.1"),
        (lambda: Ramp(form="cubic"), "linear or sigmoid, but got 'cubic'"),
        (lambda: Ramp(rate=float("nan")), "rate > 0"),
        (lambda: Cosine(end=-0.1), "end >= 0"),
        (lambda: Step(), "ascending steps"),
        (lambda: Step(steps=(5, 3)), r"got steps \(5, 3\)"),
        (lambda: Step(steps=(5,), gamma=-1.0), "gamma -1.0"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_users_schedule_has_a_window_and_a_clock():
    class Half(Schedule):
        def factor(self, progress, max_iter):
            return 0.5

    schedule = Half(start_iter=10)
    assert schedule.needs_clock
    assert [at(schedule, 9), at(schedule, 10)] == [0, 0.5]
