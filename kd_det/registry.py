"""The registries that a user's own parts enter, and the spelling help of their errors."""

import difflib
from collections.abc import Iterable
from typing import Any

from fvcore.common.registry import Registry


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest known names (case ignored), or an empty string."""
    by_lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(by_lower[k]) for k in near)}?" if near else ""


class PartRegistry(Registry):
    """An fvcore `Registry` whose unknown names are answered with the known ones."""

    def get(self, name: str) -> Any:
        """
        The class registered under ``name``.

        Raises:
            KeyError: if there is none, with the nearest and all known names.
        """
        if name not in self:
            known = sorted(key for key, _ in self)
            raise KeyError(
                f"There is no {self._name} called '{name}'.{did_you_mean(str(name), known)} "
                f"Known: {', '.join(known)}. Your own is registered by importing its module first."
            )
        return super().get(name)


SOURCES = PartRegistry("source")
"""Who is imitated: `kd_det.sources.Source` classes, by class name."""
TERMS = PartRegistry("term")
"""Published methods: `kd_det.terms.Term` classes, by class name."""
CONNECTORS = PartRegistry("connector")
"""Recipes of the maps from the student's to the target's channels."""
REGIONS = PartRegistry("region")
"""Where on the grid a term counts."""
SCHEDULES = PartRegistry("schedule")
"""How a term's weight moves over a run."""
DETECTORS = PartRegistry("detector")
"""What kd_det knows of a meta-architecture, by the name of that meta-architecture."""
