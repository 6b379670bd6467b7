"""A detector that trains beside the student."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Annotated, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.events import EventStorage
from torch import nn

from kd_det.context import Context
from kd_det.detectors import TapShape, describe, probe, running_values, set_running_values
from kd_det.labels import run_student
from kd_det.registry import SOURCES
from kd_det.rng import preserved_rng
from kd_det.sources.model_config import ModelConfig
from kd_det.sources.source import Source, Targets
from kd_det.sources.strict import local_file

logger = logging.getLogger(__name__)


@SOURCES.register()
class Peer(Source):
    """
    A detector that learns the same task from the same images and labels, beside the student: deep
    mutual learning (Zhang et al., CVPR 2018, https://arxiv.org/abs/1706.00384) is a peer, a term
    whose source it is, and one whose learner it is.

        losses of the step:  <name>/<loss> = the peer's own training losses

    All networks run on the weights of one moment and are updated by one optimizer step (the paper's
    code updates them one after the other). A term moves its learner alone: as a target, a peer's
    maps are detached.

    It starts from weights of its own, read as Detectron2 reads a student's before the first
    training step of a new run. It trains with the run's optimizer and learning rate, is in the kd
    state, and is in the checkpoint's ``model`` only where it is what the run exports.

    Args:
        config_file: YAML, LazyConfig ``.py`` or name of one in Detectron2's model zoo; empty makes
            a second detector of the student's config, which starts from other random numbers.
        weights: its initial weights; empty takes those that the config starts from.
        model: a detector that is there already, instead of both.
        student_config: text of the student's config; a KD config gives it.
        defaults: see `kd_det.sources.Teacher`.

    Raises:
        ValueError: if it is not said which network it is, or twice.
    """

    learns = True
    is_learner = True

    def __init__(
        self,
        *,
        config_file: Annotated[str, "path"] = "",
        weights: Annotated[str, "path"] = "",
        model: nn.Module | None = None,
        student_config: Any = None,
        defaults: Any = None,
    ) -> None:
        super().__init__()
        if (model is not None and (config_file or weights)) or (
            model is None and not config_file and student_config is None
        ):
            raise ValueError(
                "A Peer needs a config_file, or in Python a model=..., and not both; got "
                f"config_file '{config_file}', weights '{weights}' and model "
                f"{None if model is None else type(model).__name__}."
            )
        self.config_file = config_file
        self._weights = weights
        self._student_config = student_config
        self._defaults = defaults
        self._begun = False
        self._expected_calls: dict[str, int] = {}
        self.model: nn.Module = nn.Identity() if model is None else model
        self._is_given = model is not None

    @property
    def network(self) -> nn.Module:  # noqa: D102  # as in the base
        return self.model

    @property
    def config(self) -> ModelConfig | None:
        """What it is made by; ``None`` of a given ``model``."""
        if self._is_given:
            return None
        if "_config" not in self.__dict__:
            own = None if self.config_file else self._student_config
            path = self.config_file or "the student's config"
            self._config = ModelConfig(path, what="The peer", content=own, defaults=self._defaults)
        return self._config

    @property
    def weights_file(self) -> str:
        """The checkpoint that it starts from; empty for random weights and a given ``model``."""
        return self._weights or ("" if self.config is None else self.config.initial_weights)

    def attach(self, student: nn.Module) -> None:
        """
        Build it, where the student is.

        Raises:
            SourceUnavailable: if its config file is missing.
        """
        if self.config is not None:
            self.model = self.config.build(next(student.parameters()).device)
        for m in self.model.modules():  # its pictures would take the place of the student's
            if "vis_period" in vars(m):
                vars(m)["vis_period"] = 0

    def shapes(self, taps: tuple[str, ...]) -> dict[str, list[TapShape]]:  # noqa: D102  # as in the base
        resolved = list(map(describe(self.model).tap, taps))
        shapes = probe(self.model, resolved, self.run_classes) if resolved else {}
        for tap in resolved:
            self._expected_calls.update(dict.fromkeys(tap.paths, shapes[tap.name][0].calls))
        return shapes

    def prepare(self, taps: tuple[str, ...]) -> None:
        """Read its initial weights, unless a checkpoint has brought it further."""
        if self._begun:
            return
        if self.weights_file:
            local_file(self.weights_file, what=f"The peer '{self.run_name}'")
            with preserved_rng():
                # As Detectron2 does it for a student: what does not fit stays random, and is named.
                DetectionCheckpointer(self.model).load(self.weights_file, checkpointables=[])
        self._begun = True

    def forward(self, context: Context, taps: tuple[str, ...]) -> Targets:
        """Its losses of this batch, and the maps of the taps, with gradients."""
        detector = describe(self.model)
        side = context.seen_by(self.model)
        # What it logs would stand under the student's names. Not at 0, which every period divides.
        with EventStorage(1):
            losses, maps = run_student(
                self.model,
                side.inputs,
                {tap: detector.tap(tap) for tap in taps},
                self._expected_calls,
            )
        return Targets(
            maps,
            {f"{self.run_name}/{loss}": x for loss, x in losses.items()},
            replace(side, student_maps=maps),
        )

    def get_extra_state(self) -> dict[str, Any]:
        """Whether it has begun to train, and what it keeps outside of its weights."""
        return {"begun": self._begun, "running": running_values(self.model)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `get_extra_state`."""
        self._begun = state["begun"]
        set_running_values(self.model, dict(state["running"]))


def warn_of_twins(networks: Mapping[str, nn.Module]) -> None:
    """
    A warning for a new run's networks that have the same numbers: on the same images they make the
    same steps, so that they never differ, and have nothing to teach each other.

    Args:
        networks: by name.
    """
    for (one, a), (other, b) in combinations(networks.items(), 2):
        mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
        if mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine):
            logger.warning(
                "'%s' and '%s' start from the same weights, all of them: they will learn the same, "
                "and nothing from each other. Give the peer WEIGHTS of its own, or weights of a "
                "backbone alone, beside which the rest is random.",
                one,
                other,
            )
