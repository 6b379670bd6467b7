"""What a training left behind: its scores over iterations and wall-clock, from metrics.json."""

import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kd_det import record
from kd_det.registry import did_you_mean

_PREFERRED = ("bbox/AP", "segm/AP", "sem_seg/mIoU")
_SCORE = re.compile(r"(.*/)?\w+/(AP|mIoU|PQ)")
CLOCKS = {
    "train_seconds": "the steps' own seconds, added up by the quickstart's trainer",
    "time": "Detectron2's `time`, the median step of each 20 iterations, times the iterations",
}
"""Scalars of metrics.json that say how long steps took, the better one first, and what they are."""


@dataclass(frozen=True)
class RunMetrics:
    """
    A run as its folder tells it, whoever trained it.

    Attributes:
        name: what it is called in tables; runs of one name are seeds of one experiment.
        folder: its ``OUTPUT_DIR``.
        rows: of metrics.json, one per iteration, in order; of an iteration that was run twice (a
            resumed run) the later one.
        record: what ``kd_run.json`` says; empty without one.
    """

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, folder: Path) -> "RunMetrics":
        """
        Read a folder.

        Raises:
            FileNotFoundError: if there is no metrics.json.
            ValueError: if nothing in it is of Detectron2's.
        """
        path = folder / "metrics.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {path} (working directory {os.getcwd()}): name the OUTPUT_DIR of a "
                "Detectron2 training; its metrics.json is written by the JSONWriter."
            )
        rows: dict[int, dict[str, Any]] = {}
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
                rows.setdefault(row["iteration"], {}).update(row)
            except (ValueError, TypeError, KeyError):
                continue  # the last line of a run that was killed
        if not rows:
            raise ValueError(f"{path} has no line of a training: name another folder.")
        return cls(name, folder, [rows[i] for i in sorted(rows)], _record(folder))

    @cached_property
    def iterations(self) -> int:
        """How many were run."""
        # An evaluation behind the last step is written under the number of the next one.
        steps = [row for row in self.rows if "lr" in row or "total_loss" in row]
        return int((steps or self.rows)[-1]["iteration"]) + 1

    @property
    def clock(self) -> str:
        """The one of `CLOCKS` that the run has; empty for none."""
        return next((c for c in CLOCKS if any(c in row for row in self.rows)), "")

    @property
    def scores(self) -> list[str]:
        """Names of the scalars by which runs may be compared, the most common ones first."""
        found = {k for row in self.rows for k in row if _SCORE.fullmatch(k) and k[:3] != "kd/"}
        return sorted(found, key=lambda k: (k not in _PREFERRED, k))

    def curve(self, score: str) -> list[tuple[int, float | None, float]]:
        """``(iterations done, seconds or None, value)`` of every evaluation; NaN counts as 0."""
        found = []
        for row in self.rows:
            if score in row:
                done = min(int(row["iteration"]) + 1, self.iterations)
                # What COCOEvaluator says of a detector that finds nothing.
                found.append((done, self.seconds(done), float(np.nan_to_num(row[score]))))
        return found

    def final(self, key: str) -> float | None:
        """The last value of a scalar, NaN as 0; ``None`` if it was never written."""
        found = (float(np.nan_to_num(row[key])) for row in reversed(self.rows) if key in row)
        return next(found, None)

    def sources(self, score: str) -> dict[str, float]:
        """The teachers' own score, by name, where the run evaluated them; peers have no gap."""
        found = {}
        for row in self.rows:
            for key in row:
                # kd/<source>/gap/bbox/AP beside kd/<source>/bbox/AP.
                name = key[len("kd/") : -len(f"/gap/{score}")]
                if key == f"kd/{name}/gap/{score}" and f"kd/{name}/{score}" in row:
                    found[name] = float(row[f"kd/{name}/{score}"])
        return found

    def seconds(self, done: int) -> float | None:
        """Wall-clock of the first so many steps, data loading included and evaluation not."""
        if not self.clock:
            return None
        at, seconds = self._timed
        return float(np.interp(done, at, seconds))

    @cached_property
    def _timed(self) -> tuple[list[float], list[float]]:
        at, seconds = [0.0], [0.0]
        for row in self.rows:
            if self.clock in row:
                done, value = row["iteration"] + 1.0, float(row[self.clock])
                if self.clock == "time":  # per step
                    value = seconds[-1] + value * (done - at[-1])
                at.append(done)
                seconds.append(value)
        return at, seconds

    @property
    def terms(self) -> str:
        """What was distilled: ``fpn CWD 5, logits CWD 1``; empty for a plain run."""
        plan = self.record.get("plan") or {}
        return ", ".join(f"{name} {t['type']} {t['weight']:g}" for name, t in plan.items())

    @property
    def test_data(self) -> tuple[str, ...]:
        """SHA-256 of the annotations that it was evaluated on, where they are known."""
        datasets = (self.record.get("datasets") or {}).get("test") or {}
        return tuple(d.get("sha256") or "" for d in datasets.values())


def common_score(runs: list[RunMetrics], asked: str = "") -> str:
    """
    The scalar by which runs are compared.

    Args:
        runs: all of them.
        asked: the user's choice; empty takes the first that every run has.

    Raises:
        ValueError: if some run does not have it.
    """
    for run in runs:
        if not run.scores:
            raise ValueError(
                f"{run.folder}/metrics.json has no evaluation: the run has not reached its first "
                "one, or has no DATASETS.TEST (TEST.EVAL_PERIOD says how often)."
            )
    shared = [s for s in runs[0].scores if all(s in run.scores for run in runs)]
    if not asked and shared:
        return shared[0]
    every = sorted({s for run in runs for s in run.scores})
    if asked and all(run.final(asked) is not None for run in runs):
        return asked
    if asked:
        raise ValueError(
            f"--score {asked}: not every run has it.{did_you_mean(asked, every)} Scores: "
            f"{', '.join(every)}."
        )
    raise ValueError(
        "The runs have no score in common: "
        + "; ".join(f"{run.folder} has {', '.join(run.scores)}" for run in runs)
        + "."
    )


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / record.NAME).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}  # stock Detectron2's runs have none
