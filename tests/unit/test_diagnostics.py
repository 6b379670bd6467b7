"""Diagnostics: measures against independent transcriptions, the queue, the clock, the advice."""

import copy
import logging
import math
import pickle
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from kd_det.diagnostics import Diagnostics, ScalarQueue
from kd_det.diagnostics.measures import channel_agreement, gradient_norm, top_overlap
from kd_det.diagnostics.panel import panel
from kd_det.diagnostics.stopwatch import Stopwatch

# Likeness -------------------------------------------------------------------------------------


def maps(n: int = 2, c: int = 3, h: int = 12, w: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    s = torch.randn(n, c, h, w)
    return s, 0.5 * s + torch.randn(n, c, h, w)


def rectangles(h: int = 12, w: int = 17) -> torch.Tensor:
    region = torch.zeros(2, 1, h, w)
    region[0, :, :7, :9] = 1
    region[1, :, :, :5] = 0.25  # a weight, not a mask: any positive weight is inside
    return region


@pytest.mark.parametrize("region", [None, rectangles()], ids=["all", "region"])
def test_channel_agreement_is_numpys_correlation(region: torch.Tensor | None) -> None:
    s, t = maps()
    expected = []
    for i in range(2):
        inside = np.ones((12, 17), bool) if region is None else region[i, 0].numpy() > 0
        expected += [np.corrcoef(s[i, j][inside], t[i, j][inside])[0, 1] for j in range(3)]
    assert float(channel_agreement(s, t, region)) == pytest.approx(np.mean(expected), abs=1e-5)


@pytest.mark.parametrize(("scale", "expected"), [(3.0, 1.0), (-0.1, -1.0)])
def test_channel_agreement_of_affine_maps(scale: float, expected: float) -> None:
    s, _ = maps()
    assert float(channel_agreement(s, scale * s + 100)) == pytest.approx(expected, abs=1e-4)


def test_constant_channels_agree_in_nothing() -> None:
    s, _ = maps()
    assert float(channel_agreement(s, torch.full_like(s, 0.1))) == 0
    assert float(top_overlap(s, torch.full_like(s, 0.1))) == 0
    half = s.clone()
    half[:, :1] = 0.1
    assert float(channel_agreement(s, half)) == pytest.approx(2 / 3, abs=1e-5)
    assert float(top_overlap(s, half)) == pytest.approx(2 / 3, abs=1e-5)
    nowhere = torch.zeros(2, 1, 12, 17)
    assert float(channel_agreement(s, s, nowhere)) == float(top_overlap(s, s, nowhere)) == 0


@pytest.mark.parametrize("region", [None, rectangles()], ids=["all", "region"])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.4])
def test_top_overlap_by_sorting(region: torch.Tensor | None, share: float) -> None:
    s, t = maps()
    expected = []
    for i in range(2):
        inside = np.ones(12 * 17, bool) if region is None else region[i, 0].numpy().ravel() > 0
        k = min(max(1, int(share * 12 * 17)), inside.sum())
        for j in range(3):
            top = []
            for x in (s, t):
                values = np.where(inside, x[i, j].numpy().ravel(), -np.inf)
                top.append(set(np.argsort(-values, kind="stable")[:k]))
            expected.append(len(top[0] & top[1]) / k)
    found = float(top_overlap(s, t, region, share=share))
    assert found == pytest.approx(np.mean(expected), abs=1e-6)


def test_top_overlap_of_equal_and_of_opposite_maps() -> None:
    s, _ = maps()
    assert float(top_overlap(s, s.exp())) == 1
    assert float(top_overlap(s, -s)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_likeness_of_other_dtypes_and_of_nothing(dtype: torch.dtype) -> None:
    s, t = maps()
    found = channel_agreement(s.to(dtype), t.to(dtype))
    assert float(found) == pytest.approx(float(channel_agreement(s, t)), abs=0.01)
    assert found.dtype == torch.float32
    for empty in (s[:0], s[..., :0]):
        assert float(channel_agreement(empty, empty)) == float(top_overlap(empty, empty)) == 0


# Gradients ------------------------------------------------------------------------------------


def test_gradient_norm_over_several_maps() -> None:
    p = torch.nn.Parameter(torch.ones(()))
    x, y, unused = (p * torch.ones(2, 2), p * torch.ones(3), p * torch.ones(5))
    loss = 2 * x.sum() + 3 * y.sum()
    assert float(gradient_norm(loss, [x, y, unused])) == pytest.approx(math.sqrt(4 * 4 + 3 * 9))
    assert p.grad is None
    loss.backward()  # the graph is still there
    assert float(p.grad) == 2 * 4 + 3 * 3


def test_gradient_norm_of_what_does_not_pull_is_zero() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    assert float(gradient_norm((p * 1).sum(), [torch.ones(3)])) == 0
    assert float(gradient_norm(torch.ones(()), [p * 1])) == 0
    assert float(gradient_norm(p.sum(), [p * 1])) == 0


def test_float16_gradients_that_would_underflow_count() -> None:
    x = torch.nn.Parameter(torch.ones(1000, dtype=torch.float16))
    y = x * 1
    tiny = gradient_norm((y.float() * 1e-9).sum(), [y])  # 1e-9 is 0 in float16
    assert float(tiny) > 0
    assert float(gradient_norm((y.float() * 4e-7).sum(), [y]) / tiny) == pytest.approx(400, rel=0.1)


# Pictures -------------------------------------------------------------------------------------


def test_a_panel_shows_both_maps_scaled_each() -> None:
    s, t = torch.zeros(4, 10, 20), torch.zeros(2, 10, 20)
    s[:, 0, 0], t[:, 9, 19] = -1e-3, 1e6
    picture = panel(s, t)
    assert picture.dtype == torch.uint8
    channels, height, width = picture.shape
    factor = height // 10
    assert (channels, height) == (3, 10 * factor)
    assert width >= 2 * 20 * factor > 256
    assert picture[:, 0, 0].tolist() == picture[:, -1, -1].tolist() == [255] * 3
    assert picture[:, -1, 0].tolist() == picture[:, 0, -1].tolist() == [0] * 3


def test_a_panel_of_broken_or_constant_maps_is_a_picture() -> None:
    broken = torch.full((2, 3, 3), float("nan"))
    assert panel(broken, torch.ones(2, 3, 3)).float().isfinite().all()


# The queue ------------------------------------------------------------------------------------


class Late:
    """A CUDA event that has not happened until somebody waits."""

    def __init__(self) -> None:
        self.waited = False

    def query(self) -> bool:
        return self.waited

    def synchronize(self) -> None:
        self.waited = True


def test_scalars_are_written_where_and_as_they_were_put() -> None:
    queue, value = ScalarQueue(), torch.tensor(2.0)
    with EventStorage(5) as storage:
        queue.put(storage, {"a": value, "b": value.double() * 2}, lambda x: {"c": x["a"] + x["b"]})
        queue.put(storage, {})
    value.fill_(7.0)  # what was put is a copy
    assert not storage.latest()
    storage.iter = 6
    with EventStorage(0) as another:
        queue.flush()
        assert not another.latest()
    assert storage.latest() == {"c": (6.0, 6)}
    queue.flush()
    assert len(storage.history("c").values()) == 1


def test_what_has_not_arrived_stays_and_nothing_overtakes_it() -> None:
    queue, storage = ScalarQueue(), EventStorage(0)
    for i in range(3):
        queue.put(storage, {"x": torch.tensor(float(i))})
    queue._pending[1].arrived = late = Late()
    queue.flush()
    assert [v for v, _ in storage.history("x").values()] == [0]
    assert not late.waited
    queue.flush(wait=True)
    assert late.waited
    assert [v for v, _ in storage.history("x").values()] == [0, 1, 2]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_queue_and_stopwatch_start_empty(clone: object) -> None:
    queue, storage, watch = ScalarQueue(), EventStorage(0), Stopwatch()
    queue.put(storage, {"x": torch.tensor(1.0)}, lambda x: x)
    watch.start(storage, torch.device("cpu"))
    other, second = clone(queue), clone(watch)
    other.flush(wait=True)
    second.stop()
    assert not storage.latest()
    queue.flush()
    assert storage.latest()


def test_the_stopwatch_gives_seconds_and_the_share_of_the_step() -> None:
    watch, storage = Stopwatch(), EventStorage(0)
    with watch.source("early"):
        pass
    watch.stop()
    assert not storage.latest()
    watch.start(storage, torch.device("cpu"))
    with watch.source("teacher"):
        time.sleep(0.02)
    time.sleep(0.02)
    watch.stop()
    watch.stop()
    latest = {k: v for k, (v, _) in storage.latest().items()}
    assert set(latest) == {"kd/time/teacher", "kd/time_share/teacher"}
    assert 0.02 <= latest["kd/time/teacher"] < 0.5
    assert 0.05 < latest["kd/time_share/teacher"] < 0.95


# When, and the advice -------------------------------------------------------------------------


def test_when_it_measures() -> None:
    due = [i for i in range(600) if Diagnostics(period=100).due(i)]
    assert due == [*range(18, 200, 20), 298, 398, 498, 598]
    assert [i for i in range(20) if Diagnostics(period=5).due(i)] == [3, 8, 13, 18]
    assert not any(Diagnostics(period=0).due(i) for i in range(600))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"period": -1}, "period -1"),
        ({"vis_period": -1}, "vis_period -1"),
        ({"target_ratio": 0}, "target_ratio > 0"),
        ({"target_ratio": float("nan")}, "target_ratio > 0"),
    ],
)
def test_arguments(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Diagnostics(**wrong)


def report(
    diagnostics: Diagnostics, iterations: range, kd: float = 3.0, task: float = 2.0
) -> dict[str, float]:
    terms = {"fpn": SimpleNamespace(weight=5.0)}
    scalars: dict[str, float] = {}
    for i in iterations:
        weights = {"fpn": 5.0 * (0.5 if i < 100 else 1)}  # a schedule
        norms = {"fpn": kd * weights["fpn"] / 5, "fpn/task": task}
        scalars = diagnostics._report(i, weights, terms, norms)
    return scalars


def test_the_suggested_weight_gives_the_stated_ratio(caplog: pytest.LogCaptureFixture) -> None:
    diagnostics = Diagnostics(target_ratio=0.5)
    with caplog.at_level(logging.INFO, logger="kd_det"):
        assert report(diagnostics, range(18, 198, 20)) == {"kd/fpn/grad_ratio": 1.5}
        assert not caplog.records
        scalars = report(diagnostics, range(198, 199))
    # Ratio 1.5 at weight 5 is 0.3 at weight 1; 0.5 / 0.3.
    assert scalars["kd/fpn/suggested_weight"] == pytest.approx(0.5 / 0.3)
    (line,) = [r.getMessage() for r in caplog.records]
    assert "Term 'fpn'" in line
    assert "1.5 times" in line
    assert "at weight 5" in line
    assert "KD.TERMS.FPN.WEIGHT 1.67" in line
    assert report(diagnostics, range(298, 299)) == {"kd/fpn/grad_ratio": 1.5}


def test_too_few_measurements_or_a_resumed_run_suggest_nothing() -> None:
    assert set(report(Diagnostics(), range(178, 199, 20))) == {"kd/fpn/grad_ratio"}
    assert set(report(Diagnostics(), range(298, 699, 100))) == {"kd/fpn/grad_ratio"}
    assert "kd/fpn/suggested_weight" in report(Diagnostics(), range(158, 199, 20))


def test_ratios_of_nothing() -> None:
    at = range(298, 299)
    assert report(Diagnostics(), at, kd=0, task=0) == {"kd/fpn/grad_ratio": 0}
    assert report(Diagnostics(), at, kd=1, task=0) == {}
    assert report(Diagnostics(), at, kd=float("nan")) == {}
    zero = Diagnostics()
    assert set(report(zero, range(18, 199, 20), kd=0)) == {"kd/fpn/grad_ratio"}
