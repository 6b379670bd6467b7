"""How far the student is from its teacher, class by class, at every evaluation."""

import logging
import math
from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate

from kd_det.distiller import Distiller
from kd_det.engine.after_evaluation import AfterEvaluation
from kd_det.engine.teacher_ap import evaluate_teacher
from kd_det.sources import Teacher

logger = logging.getLogger(__name__)

_AP, _CLASS = "bbox/AP", "bbox/AP-"


class TeacherGap(AfterEvaluation):
    """
    After every evaluation of the student, scalars of each teacher: its own ``kd/<source>/bbox/AP``
    (AP50, ..., AP-<class>), and ``kd/<source>/gap/bbox/AP`` and ``.../gap/bbox/AP-<class>``,
    teacher minus student in AP points; and a table in the log. With several test sets
    ``<dataset>/`` stands before ``bbox``, as in the student's keys, which stay as they are.

    The teacher is evaluated once per run and dataset, beside the student's first evaluation (see
    `evaluate_teacher` for the cache between runs). What cannot be compared is left out with one
    line in the log. For its place see `AfterEvaluation`.

    Args:
        cfg: of the run; without ``KD.EVAL_TEACHER`` the hook does nothing.
    """

    without_boxes = "The evaluation has no box AP: there is nothing to compare a teacher with."

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self._enabled = "KD" in cfg and cfg.KD.EVAL_TEACHER
        self._measured: dict[tuple[str, str], dict[str, float]] = {}

    def applies(self) -> bool:  # noqa: D102  # as in the base
        return self._enabled and bool(self._teachers())

    def evaluated(  # noqa: D102  # as in the base
        self, results: Mapping[str, dict[str, float]], datasets: list[str]
    ) -> None:
        for name, teacher in self._teachers().items():
            for dataset in datasets:
                measured = self._evaluated(name, teacher, dataset)
                if measured and comm.is_main_process():
                    self._report(name, dataset, results[dataset], measured)

    def _teachers(self) -> dict[str, Teacher]:
        return {
            name: source
            for module in self.trainer.model.modules()
            if isinstance(module, Distiller)
            for name, source in module.wiring.sources.items()
            if isinstance(source, Teacher)
        }

    def _evaluated(self, name: str, teacher: Teacher, dataset: str) -> dict[str, float]:
        if (name, dataset) not in self._measured:
            results = {}
            try:
                results = evaluate_teacher(self._cfg, teacher, dataset, name=name)
            except (ValueError, FileNotFoundError) as e:  # a report is not worth a run
                self.say(f"The gap to the teacher '{name}' on {dataset} is left out: {e}")
            self._measured[name, dataset] = results
        return self._measured[name, dataset]

    def _report(
        self, name: str, dataset: str, student: dict[str, float], teacher: dict[str, float]
    ) -> None:
        gaps = gap(student, teacher)
        where = self.key_of(dataset)
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
