"""The values of terms, level by level."""

from collections.abc import Mapping

from detectron2.utils.events import EventStorage

from kd_det.diagnostics.scalars import ScalarQueue
from kd_det.diagnostics.step import Step
from kd_det.wiring import Wiring


def put_levels(step: Step, wiring: Wiring, storage: EventStorage, queue: ScalarQueue) -> None:
    """
    Send the value of each level of the active terms on its way: ``kd/<term>/<level>``, unweighted,
    and ``kd/<term>/<level>/weighted``, whose sum over levels is ``loss_kd_<term>``.
    """
    values, factors = {}, {}
    for name, levels in step.values.items():
        for level, value in levels.items():
            key = f"kd/{name}/{level}"
            values[key] = value
            factors[key] = step.weights[name] * wiring.terms[name].level_weight(level)

    def report(numbers: Mapping[str, float]) -> dict[str, float]:
        weighted = {f"{key}/weighted": factors[key] * x for key, x in numbers.items()}
        return {**numbers, **weighted}

    queue.put(storage, values, report)
