"""What comparisons of many runs say of them: gains paired by seed, in words, and a chart."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt

from benchmarks.scaling import student_t


class Gain(NamedTuple):
    """Mean of differences paired by seed, and half of its 95 % interval; of one seed infinite."""

    mean: float
    half: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes 0, else 0."""
        return (self.mean > self.half) - (self.mean < -self.half)

    def text(self) -> str:
        """``+1.2 ± 0.3``."""
        return f"{self.mean:+.1f}" + (f" ± {self.half:.1f}" if self.half < float("inf") else "")


def paired(values: Sequence[float], over: Sequence[float]) -> Gain:
    """Of values by seed over others."""
    gaps = [a - b for a, b in zip(values, over, strict=True)]
    n = len(gaps)
    if n == 1:
        return Gain(gaps[0], float("inf"))
    return Gain(statistics.mean(gaps), student_t(n - 1) * statistics.stdev(gaps) / n**0.5)


def by_sign(gains: Mapping[str, Gain]) -> dict[int, str]:
    """Under 1, -1 and 0 the names of those whose `Gain.sign` it is, in words."""
    return {sign: listed([n for n, g in gains.items() if g.sign == sign]) for sign in (1, -1, 0)}


def listed(names: Sequence[str]) -> str:
    """Of methods, in words."""
    return ", ".join(f"`{name}`" for name in names) or "none"


def caution(intervals: int) -> str:
    """What the intervals are, and how many of them exclude 0 for no reason."""
    return (
        "Gains are means of differences paired by seed with 95 % intervals (Student's t). Of "
        f"{intervals} such intervals about one in twenty excludes 0 by chance."
    )


class Bars(NamedTuple):
    """One bar per row, of the mean of its values by seed."""

    label: str
    color: str
    values: Sequence[Sequence[float]]


def draw_bars(
    path: Path, rows: Sequence[str], bars: Sequence[Bars], lines: Mapping[str, tuple[str, float]]
) -> None:
    """
    Bars beside each other in every row, a dot per seed, and lines for the controls.

    Args:
        path: of the picture.
        rows: their names.
        bars: one kind after the other; a row without values has none of it.
        lines: color and value by label.
    """
    figure, ax = plt.subplots(figsize=(9, 0.55 * len(rows) + 1.5))
    width = 0.72 / len(bars)
    for i, (label, color, values) in enumerate(bars):
        at = [place + width * i for place in range(len(rows))]
        means = [statistics.mean(each) if each else 0.0 for each in values]
        ax.barh(at, means, width - 0.02, color=color, label=label, zorder=2)
        for place, each in zip(at, values, strict=True):
            ax.plot(each, [place] * len(each), "k.", markersize=4, zorder=3)
    for label, (color, value) in lines.items():
        ax.axvline(value, color=color, label=label, zorder=4)
    ax.set_yticks([place + 0.36 - width / 2 for place in range(len(rows))], list(rows))
    ax.invert_yaxis()
    seeds = max(len(each) for bar in bars for each in bar.values)
    ax.set_xlabel("AP of one seed: no ranking" if seeds == 1 else f"AP, mean of {seeds} seeds")
    ax.grid(axis="x", alpha=0.3, zorder=0)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=90)
    plt.close(figure)
