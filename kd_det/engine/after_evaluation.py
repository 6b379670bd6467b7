"""What is done together after every evaluation of a run."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class AfterEvaluation(HookBase):
    """
    The base of hooks that all processes run after every evaluation of the trainer's model.

    They stand behind `EvalHook` and before `PeriodicWriter`, on all processes, in a trainer that
    keeps ``_last_eval_results`` as `DefaultTrainer` does. The other processes may have no results,
    where the evaluation is one of ``TEST.EVAL_PERIOD`` or the last.

    Args:
        cfg: of the run.
    """

    without_boxes = "The evaluation has no box AP."
    """What is said of such an evaluation, which is not followed."""

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self._seen: Any = None
        self._said: set[str] = set()

    def applies(self) -> bool:
        """Whether there is something to do; alike on all processes."""
        raise NotImplementedError

    def evaluated(self, results: Mapping[str, dict[str, float]], datasets: list[str]) -> None:
        """
        A new evaluation.

        Args:
            results: flat box results (``bbox/AP``...), by dataset; those of the main process.
            datasets: that the main process has results of, on all processes.
        """
        raise NotImplementedError

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
        if not (is_new or due):
            return
        self._seen = latest
        if not self.applies():
            return
        results = boxes(latest, self._cfg.DATASETS.TEST)
        # Only the main process has results, and all must take the same way.
        is_new, datasets = comm.all_gather((is_new, list(results)))[0]
        if is_new and datasets:
            self.evaluated(results, datasets)
        elif is_new:
            self.say(self.without_boxes)

    def say(self, sentence: str) -> None:
        """Warn, once."""
        if sentence not in self._said:
            logger.warning(sentence)
        self._said.add(sentence)

    def key_of(self, dataset: str) -> str:
        """What stands before ``bbox`` in a scalar's name: nothing where there is one dataset."""
        return f"{dataset}/" if len(self._cfg.DATASETS.TEST) > 1 else ""


def boxes(results: Any, datasets: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """
    The flat box results of each dataset that has them.

    Args:
        results: of `DefaultTrainer.test`.
        datasets: ``DATASETS.TEST``.
    """
    by_dataset = {datasets[0]: results} if len(datasets) == 1 else results
    if not isinstance(by_dataset, Mapping):
        return {}
    found = {}
    for name in datasets:
        one = by_dataset.get(name)
        if isinstance(one, Mapping) and isinstance(one.get("bbox"), Mapping):
            found[name] = flatten_results_dict({"bbox": one["bbox"]})
    return found
