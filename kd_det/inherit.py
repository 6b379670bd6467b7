"""Inheritance: a new student starts from those weights of its teacher that fit."""

import fnmatch
import logging
from collections.abc import Sequence

import torch
from torch import nn

from kd_det.sources import Source

logger = logging.getLogger(__name__)

DEFAULT_MODULES = ("head", "backbone.fpn_output*")


class Inherit:
    """
    Copy trained weights of a source into the student, where name and shape agree.

    Args:
        source: name of the source.
        modules: module paths, with ``*`` as in file names; everything under a path is copied.
    """

    def __init__(self, source: str, modules: Sequence[str] = DEFAULT_MODULES) -> None:
        self.source = source
        self.modules = tuple(modules)

    def check(self, student: nn.Module) -> None:
        """
        Before anything is read: every pattern matches something.

        Raises:
            ValueError: if one does not.
        """
        ours = student.state_dict()
        for pattern in self.modules:
            if not any(_matches(name, pattern) for name in ours):
                raise ValueError(
                    f"INIT_MODULES: '{pattern}' matches nothing in {type(student).__name__}, whose "
                    f"modules are {', '.join(sorted({n.split('.')[0] for n in ours}))}."
                )

    @torch.no_grad()
    def __call__(self, student: nn.Module, source: Source) -> list[str]:
        """
        Copy, and log what was copied and what did not fit.

        Returns:
            Names of the copied entries.

        Raises:
            ValueError: if nothing fits, or a pattern matches nothing.
        """
        self.check(student)
        theirs, ours = source.trained_state(), student.state_dict()
        wanted = [n for n in ours if any(_matches(n, pattern) for pattern in self.modules)]
        fits = [n for n in wanted if n in theirs and theirs[n].shape == ours[n].shape]
        if not fits:
            raise ValueError(
                f"The student inherits nothing from '{self.source}': of {len(wanted)} entries "
                f"under {', '.join(self.modules)} none has a partner of the same name and shape. "
                "Change INIT_MODULES, or leave INIT_FROM empty."
            )
        for name in fits:
            ours[name].copy_(theirs[name])
        left = [n for n in wanted if n not in fits]
        logger.info("Inherited from '%s': %d of %d entries.", self.source, len(fits), len(wanted))
        if left:
            logger.info("Without a partner of the same name and shape: %s", ", ".join(left))
        return fits


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")
