"""Which term and level went wrong, and on whose side."""

import math

import torch
from torch import Tensor

from kd_det.diagnostics.step import Step
from kd_det.taps import Maps
from kd_det.wiring import Wiring


class LastValues:
    """
    The values of the last step and the sum of every map that its terms read: scalars on their
    device, nobody waits for them, and no map outlives the step.

    Args:
        step: after its forward.
        wiring: the Distiller's.
    """

    def __init__(self, step: Step, wiring: Wiring) -> None:
        self.wiring = wiring
        self.weights = step.weights
        self.values = {
            name: {level: value.detach() for level, value in levels.items()}
            for name, levels in step.values.items()
        }
        own = {
            (wiring.learner_of[name], tap)
            for name in step.values
            for tap in wiring.terms[name].student_taps()
        }
        self.learners = {
            (who, tap): _sums(step.learners[who].context.student_maps[tap]) for who, tap in own
        }
        self.targets = {
            source: {tap: _sums(maps) for tap, maps in taps.items()}
            for source, taps in step.targets.items()
        }

    def explain(self) -> str:
        """
        A sentence per term with the levels whose value is not finite: what is nan or inf, and what
        to do; levels with one reason share it. Empty if all are finite. Waits for the device.
        """
        found: dict[tuple[str, str], list[str]] = {}  # term and reason to levels
        for name, levels in self.values.items():
            for level, value in levels.items():
                number = float(value)
                weight = self.weights[name] * self.wiring.terms[name].level_weight(level)
                if not math.isfinite(number):
                    why = self._why(name, level)
                elif not math.isfinite(float(value * weight)):
                    why = f"times its weight {weight:g} it is too large: lower the weight"
                else:
                    continue
                reason = f"the value is {number:g}; {why.replace(f'.{level} ', '.<level> ')}."
                found.setdefault((name, reason), []).append(level)
        return " ".join(
            f"Term '{name}', level {levels[0]}: {reason.replace('<level>', levels[0])}"
            if len(levels) == 1
            else f"Term '{name}', levels {', '.join(levels)}: {reason}"
            for (name, reason), levels in found.items()
        )

    def _why(self, name: str, level: str) -> str:
        term = self.wiring.terms[name]
        source = self.wiring.source_of[name]
        taps = self.targets[source]
        theirs = _broken({t: taps[t] for t in term.source_taps()}, term.target_level(level))
        who = self.wiring.learner_of[name]
        ours = _broken({t: self.learners[who, t] for t in term.student_taps()}, level)
        reasons = []
        if theirs:
            reasons.append(
                f"the map {theirs} of source '{source}' is not finite: in PRECISION float16 "
                "activations overflow above 65504, so take bfloat16 or float32; else look at its "
                "weights and INPUT_FORMAT"
            )
        if ours:
            reasons.append(
                f"the {who}'s map {ours} is not finite, so the {who} itself has diverged: "
                "lower SOLVER.BASE_LR or the term's WEIGHT, warm up longer, or clip gradients"
            )
        return " and ".join(reasons) or (
            "both maps are finite, so it is the connector or the loss itself: lower the term's "
            "WEIGHT or SOLVER.BASE_LR, and look at the values of TAU and the region"
        )


def _sums(maps: Maps) -> dict[str, Tensor]:
    """
    The sum of each map, in float32: not finite iff a cell is not, or if cells are so large that
    they overflow together. A sum reads the map once and makes no copy.
    """
    return {
        level: x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))
        for level, x in maps.items()
    }


def _broken(taps: dict[str, dict[str, Tensor]], level: str) -> str:
    """The first map that is not finite, as ``tap.level``; of a tap with that level only this."""
    for tap, sums in taps.items():
        for other in [level] if level in sums else sums:
            if not math.isfinite(float(sums[other])):
                return f"{tap}.{other}"
    return ""
