"""
What a Distiller saves: one network as ``model``, the student unless a peer is exported in its
place, and what trains beside it as the *kd state*.

The kd state (connectors, auxiliary networks, fingerprints) is a checkpointable of its own where the
training script adds it (`KDState`), and otherwise travels inside ``model``, as metadata of the
state_dict: no extra key, and PyTorch's safe loader reads it.
"""

import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from kd_det.sources import STUDENT, Source

if TYPE_CHECKING:
    from kd_det.wiring import Wiring

logger = logging.getLogger(__name__)

_OF = "kd network"  # metadata of a peer's state_dict
_HOW = (
    "To resume exactly, train with kd_det.TrainerMixin (class Trainer(kd_det.TrainerMixin, "
    "DefaultTrainer)), or add KDState(distiller) to your checkpointer under 'kd'."
)


class KDStateMixin(nn.Module):
    """The part of the Distiller that turns it into checkpoints and back."""

    student: nn.Module
    sources: nn.ModuleDict
    terms: nn.ModuleDict
    wiring: "Wiring"
    export_peer: str

    def __init__(self) -> None:
        super().__init__()
        self.kd_in_metadata = True
        self._restored = False
        self._starting = False
        self._then: dict[str, str] = {}  # fingerprints of the sources when the checkpoint was made
        self._not_restored = "no kd state came with the student's weights"

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The detectors that learn, by name: ``student``, and every peer."""
        return self.wiring.networks

    @property
    def exported(self) -> nn.Module:
        """The network that eval mode runs, and that the checkpoint is of."""
        return self.student if self._starting else self.networks[self.export_peer]

    @contextmanager
    def starting(self) -> Iterator[None]:
        """
        While a new run loads its initial weights: they are the student's, whoever is exported
        (peers have ``WEIGHTS`` of their own).
        """
        self._starting = True
        try:
            yield
        finally:
            self._starting = False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """
        The exported network's state_dict, key by key, wherever the Distiller sits (DDP,
        AveragedModel).

        The kd state is metadata of it, unless ``kd_in_metadata`` is off; of a peer the metadata
        says whose state_dict it is.
        """
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        result = self.exported.state_dict(*args, **kwargs)
        if self.kd_in_metadata:
            result._metadata[prefix[:-1]]["kd"] = self.kd_state_dict()
        if self.exported is not self.student:
            result._metadata[prefix[:-1]][_OF] = self.export_peer
        return result

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """
        Load what is exported: same missing and unexpected keys as that network alone would report.

        A kd state in the metadata is taken over when it belongs to the same sources, terms and
        shapes; otherwise it is left, which only matters to a run that resumes.

        Raises:
            ValueError: if a peer is exported and these weights are no checkpoint of that.
        """
        metadata = getattr(state_dict, "_metadata", {}).get("", {})
        self._check_whose(metadata)
        self._restore(metadata.get("kd"))
        return self.exported.load_state_dict(state_dict, strict=strict, assign=assign)

    def _check_whose(self, metadata: Mapping[str, Any]) -> None:
        """Weights for a new student would fit a peer in part, and nobody would see it."""
        whose = metadata.get(_OF, "")
        if self.exported is self.student:
            if whose:
                logger.warning(
                    "The student is given the weights of another network: '%s', which the run that "
                    "saved them exported (KD.EXPORT_PEER).",
                    whose,
                )
        elif whose != self.export_peer:
            raise ValueError(
                f"The checkpoint of this run is that of the network '{self.export_peer}' "
                "(KD.EXPORT_PEER), and these weights are no such checkpoint: to start the student "
                "from them, train with kd_det.TrainerMixin, load them inside of "
                "`with distiller.starting():`, or leave KD.EXPORT_PEER empty and export the peer "
                "at the end (python -m kd_det export --peer). The plain weights of a network are "
                "evaluated with its own config, student.yaml or what export writes."
            )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Reached when a wrapper is loaded: loads what is exported, under the wrapper's names."""
        self._check_whose(local_metadata)
        self._restore(local_metadata.get("kd"))
        own = OrderedDict(
            (key[len(prefix) :], x) for key, x in state_dict.items() if key.startswith(prefix)
        )
        for key in own:  # or a name under student. would be loaded a second time, as a child's
            del state_dict[prefix + key]
        found = self.exported.load_state_dict(
            own, strict=False, assign=local_metadata.get("assign_to_params_buffers", False)
        )
        student_missing = [prefix + key for key in found.missing_keys]
        unexpected_keys.extend(prefix + key for key in found.unexpected_keys)

        def report(module: nn.Module, incompatible: Any) -> None:
            # PyTorch went on to look for the children under their own names; only the student's
            # names count.
            children = tuple(f"{prefix}{name}." for name, _ in self.named_children())
            keys = [k for k in incompatible.missing_keys if not k.startswith(children)]
            incompatible.missing_keys[:] = keys + student_missing
            handle.remove()

        handle = self.register_load_state_dict_post_hook(report)

    def kd_state_dict(self) -> dict[str, Any]:
        """
        The kd state: strings and tensors only.

        * ``plan``: sources, terms and shapes that it belongs to;
        * ``sources``: fingerprints of the sources that have been read;
        * ``tensors``: everything that trains beside the student.
        """
        fingerprints = {
            name: source.fingerprint() or self._then.get(name, "")
            for name, source in self.wiring.sources.items()
        }
        return {"plan": self._plan(), "sources": fingerprints, "tensors": self._tensors()}

    def load_kd_state_dict(self, state: dict[str, Any]) -> None:
        """
        Take over a kd state.

        Raises:
            ValueError: if it belongs to other sources, terms or shapes.
        """
        self._restore(state)
        if not self._restored:
            raise ValueError(
                f"The kd state cannot be restored: {self._not_restored}. A run resumes with the "
                "sources and terms that it was started with; for other ones start a new run with "
                "MODEL.WEIGHTS set to the checkpoint."
            )

    def check_resume(self, iteration: int | None) -> bool:
        """
        Find out whether the first step of this process continues a run, and refuse to continue one
        whose connectors or auxiliary networks are lost.

        Args:
            iteration: of the first step; ``None`` in a loop without a clock, where a run continues
                if a kd state was loaded.

        Returns:
            Whether the run continues.

        Raises:
            RuntimeError: if it does, and something that trains beside the student is not restored.
        """
        resuming = self._restored if iteration is None else iteration > 0
        if not resuming:
            self._then = {}  # a new run from an older checkpoint: other teachers are fine
        elif not self._restored and (lost := self._tensors()):
            paths = (k.removeprefix("sources.").removeprefix("terms.") for k in lost)
            owners = dict.fromkeys(path.split(".")[0] for path in paths)
            raise RuntimeError(
                f"This run resumes, but what trains beside the student ({len(lost)} tensors of "
                f"{', '.join(owners)}) cannot be restored: {self._not_restored}. " + _HOW
            )
        return resuming

    def check_fingerprint(self, name: str, source: Source) -> None:
        """
        Refuse to continue a run with another teacher.

        Raises:
            ValueError: if a resumed run's source is not the one that the run began with.
        """
        then, now = self._then.get(name, ""), source.fingerprint()
        if then and now and then != now:
            raise ValueError(
                f"Source '{name}' is not the one that this run began with: its weights have the "
                f"fingerprint {now[:12]}, the checkpoint names {then[:12]}. Restore the file, or "
                "start a new run."
            )

    def _restore(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self._restored = False
        self._then = dict(state["sources"])
        tensors = self._tensors()
        if state["plan"] != self._plan() or _looks(state["tensors"]) != _looks(tensors):
            self._not_restored = "the checkpoint was written with other sources, terms or shapes"
            logger.info("Its kd state is left alone: %s.", self._not_restored)
            return
        self._beside().load_state_dict(state["tensors"], strict=False)  # compared above
        self._restored = True
        logger.info("Restored what trains beside the student: %d tensors.", len(tensors))

    def _beside(self) -> nn.ModuleDict:
        return nn.ModuleDict({"sources": self.sources, "terms": self.terms, STUDENT: self.student})

    def _tensors(self) -> dict[str, Any]:
        """Everything of `_beside` but what is exported, by name."""
        beside, exported = self._beside(), self.networks[self.export_peer]
        held = next(name for name, m in beside.named_modules() if m is exported)
        return {k: x for k, x in beside.state_dict().items() if not k.startswith(held + ".")}

    def _plan(self) -> str:
        rows = {name: [asdict(r) for r in rows] for name, rows in self.wiring.rows.items()}
        sources = {name: type(source).__name__ for name, source in self.sources.items()}
        return json.dumps(
            {
                "sources": sources,
                "of": self.wiring.source_of,
                "learners": self.wiring.learner_of,
                "exported": self.export_peer,
                "terms": rows,
            }
        )


def network_weights(checkpoint: Mapping[str, Any], name: str) -> dict[str, Any]:
    """
    The plain weights of one network out of a checkpoint of a run, wherever they are in it.

    Args:
        checkpoint: what its file holds; one without a kd state is taken to be of that network.
        name: of the network, ``student`` or a peer's.

    Raises:
        ValueError: if it does not hold that network.
    """
    model = checkpoint.get("model", checkpoint)
    kd = checkpoint.get("kd") or getattr(model, "_metadata", {}).get("", {}).get("kd") or {}
    best = checkpoint.get("kd_best", {})  # of `kd_det.engine.BestNetwork`
    held = json.loads(kd["plan"]).get("exported", STUDENT) if kd else best.get("network", name)
    if held == name:
        return dict(model)
    prefix = f"{STUDENT}." if name == STUDENT else f"sources.{name}.model."
    tensors = kd.get("tensors", {})
    found = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    if not found:
        raise ValueError(f"it holds the network '{held}', and none called '{name}'")
    return found


def _looks(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(x, "shape", None) for name, x in tensors.items()}


class KDState:
    """The kd state as a checkpointable: ``checkpointer.add_checkpointable("kd", KDState(m))``."""

    def __init__(self, distiller: KDStateMixin) -> None:
        distiller.kd_in_metadata = False
        self.distiller = distiller

    def state_dict(self) -> dict[str, Any]:
        """See `KDStateMixin.kd_state_dict`."""
        return self.distiller.kd_state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `KDStateMixin.load_kd_state_dict`."""
        self.distiller.load_kd_state_dict(state)
