"""How far the student is from its teacher, class by class, at every evaluation."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from tabulate import tabulate

from kd_det.distiller import Distiller
from kd_det.engine.teacher_ap import evaluate_teacher
from kd_det.sources import Teacher

logger = logging.getLogger(__name__)

_AP, _CLASS = "bbox/AP", "bbox/AP-"


class TeacherGap(HookBase):
    """
    After every evaluation of the student, scalars of each teacher: its own ``kd/<source>/bbox/AP``
    (AP50, ..., AP-<class>), and ``kd/<source>/gap/bbox/AP`` and ``.../gap/bbox/AP-<class>``,
    teacher minus student in AP points; and a table in the log. With several test sets
    ``<dataset>/`` stands before ``bbox``, as in the student's keys, which stay as they are.

    The teacher is evaluated once per run and dataset, beside the student's first evaluation (see
    `evaluate_teacher` for the cache between runs). What cannot be compared is left out with one
    line in the log. It stands behind `EvalHook` and before `PeriodicWriter`, on all processes, in a
    trainer that keeps ``_last_eval_results`` as `DefaultTrainer` does. The other processes may have
    no results, where the evaluation is one of ``TEST.EVAL_PERIOD`` or the last.

    Args:
        cfg: of the run; without ``KD.EVAL_TEACHER`` the hook does nothing.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self._enabled = "KD" in cfg and cfg.KD.EVAL_TEACHER
        self._seen: Any = None
        self._teachers: dict[tuple[str, str], dict[str, float]] = {}
        self._said: set[str] = set()

    def before_train(self) -> None:  # noqa: D102  # as in the base
        self._seen = getattr(self.trainer, "_last_eval_results", None)

    def after_step(self) -> None:  # noqa: D102  # as in the base
        done, period = self.trainer.iter + 1, self._cfg.TEST.EVAL_PERIOD
        self._follow(due=period > 0 and done % period == 0)

    def after_train(self) -> None:
        """After the last evaluation, which a failed training does not have."""
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._follow(due=True)

    def _follow(self, *, due: bool) -> None:
        latest = getattr(self.trainer, "_last_eval_results", None)
        is_new = latest is not self._seen
        # Where only the main process evaluates, None follows None on the others.
        if not self._enabled or not (is_new or due):
            return
        self._seen = latest
        teachers = {
            name: source
            for module in self.trainer.model.modules()
            if isinstance(module, Distiller)
            for name, source in module.wiring.sources.items()
            if isinstance(source, Teacher)
        }
        if not teachers:
            return
        student = _boxes(latest, self._cfg.DATASETS.TEST)
        # Only the main process has results, and all must evaluate the teacher.
        is_new, datasets = comm.all_gather((is_new, list(student)))[0]
        if not is_new:
            return
        if not datasets:
            self._say("The evaluation has no box AP: there is nothing to compare a teacher with.")
        for name, teacher in teachers.items():
            for dataset in datasets:
                results = self._evaluated(name, teacher, dataset)
                if results and comm.is_main_process():
                    self._report(name, dataset, student[dataset], results)

    def _evaluated(self, name: str, teacher: Teacher, dataset: str) -> dict[str, float]:
        if (name, dataset) not in self._teachers:
            results = {}
            try:
                results = evaluate_teacher(self._cfg, teacher, dataset, name=name)
            except (ValueError, FileNotFoundError) as e:  # a report is not worth a run
                self._say(f"The gap to the teacher '{name}' on {dataset} is left out: {e}")
            self._teachers[name, dataset] = results
        return self._teachers[name, dataset]

    def _report(
        self, name: str, dataset: str, student: dict[str, float], teacher: dict[str, float]
    ) -> None:
        gaps = gap(student, teacher)
        where = f"{dataset}/" if len(self._cfg.DATASETS.TEST) > 1 else ""
        scalars = {f"kd/{name}/{where}{key}": value for key, value in teacher.items()}
        scalars |= {f"kd/{name}/gap/{where}{key}": value for key, value in gaps.items()}
        self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        rows = [
            (key.removeprefix(_CLASS) if key != _AP else "all", student[key], teacher[key], value)
            for key, value in sorted(gaps.items(), key=lambda item: -item[1])
        ]
        if not rows:  # a student that predicts nothing yet
            return
        headers = ("class", "student AP", f"{name} AP", "gap")
        table = tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".1f")
        logger.info("Student and teacher '%s' on %s:\n%s", name, dataset, table)

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            logger.warning(sentence)
        self._said.add(sentence)


def gap(student: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, float]:
    """
    Teacher minus student, in AP points.

    Args:
        student: Detectron2's flat results: ``bbox/AP``, ``bbox/AP-<class>``, ...; may hold NaN.
        teacher: of `evaluate_teacher`.

    Returns:
        ``bbox/AP`` and ``bbox/AP-<class>``, where both have a number. Where the teacher does not
        know all classes of the student, ``bbox/AP`` is the mean over those that it knows.
    """
    measured = {k: v for k, v in student.items() if math.isfinite(v)}
    per_class = {
        k: teacher[k] - v for k, v in measured.items() if k.startswith(_CLASS) and k in teacher
    }
    if any(k.startswith(_CLASS) and k not in teacher for k in measured):
        overall = {_AP: sum(per_class.values()) / len(per_class)} if per_class else {}
    else:
        overall = {_AP: teacher[_AP] - measured[_AP]} if _AP in measured else {}
    return {**overall, **per_class}


def _boxes(results: Any, datasets: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The flat box results of each dataset that has them, of `DefaultTrainer.test`'s results."""
    by_dataset = {datasets[0]: results} if len(datasets) == 1 else results
    if not isinstance(by_dataset, Mapping):
        return {}
    found = {}
    for name in datasets:
        one = by_dataset.get(name)
        if isinstance(one, Mapping) and isinstance(one.get("bbox"), Mapping):
            found[name] = flatten_results_dict({"bbox": one["bbox"]})
    return found
