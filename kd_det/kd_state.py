"""
What a Distiller saves: the student as ``model``, and what trains beside it as the *kd state*.

The kd state (connectors, auxiliary networks, fingerprints) is a checkpointable of its own where the
training script adds it (`KDState`), and otherwise travels inside ``model``, as metadata of the
state_dict: no extra key, and PyTorch's safe loader reads it.
"""

import json
import logging
from collections import OrderedDict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from kd_det.sources import Source

if TYPE_CHECKING:
    from kd_det.wiring import Wiring

logger = logging.getLogger(__name__)

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

    def __init__(self) -> None:
        super().__init__()
        self.kd_in_metadata = True
        self._restored = False
        self._then: dict[str, str] = {}  # fingerprints of the sources when the checkpoint was made
        self._not_restored = "no kd state came with the student's weights"

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """
        The student's state_dict, key by key, wherever the Distiller sits (DDP, AveragedModel).

        The kd state is metadata of it, unless ``kd_in_metadata`` is off.
        """
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        result = self.student.state_dict(*args, **kwargs)
        if self.kd_in_metadata:
            result._metadata[prefix[:-1]]["kd"] = self.kd_state_dict()
        return result

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """
        Load a student: same missing and unexpected keys as the student alone would report.

        A kd state in the metadata is taken over when it belongs to the same sources, terms and
        shapes; otherwise it is left, which only matters to a run that resumes.
        """
        metadata = getattr(state_dict, "_metadata", {})
        self._restore(metadata.get("", {}).get("kd"))
        return self.student.load_state_dict(state_dict, strict=strict, assign=assign)

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
        """Reached when a wrapper is loaded: loads the student, under the wrapper's names."""
        self._restore(local_metadata.get("kd"))
        own = OrderedDict(
            (key[len(prefix) :], x) for key, x in state_dict.items() if key.startswith(prefix)
        )
        for key in own:  # or a name under student. would be loaded a second time, as a child's
            del state_dict[prefix + key]
        found = self.student.load_state_dict(
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
        elif not self._restored and self._tensors():
            raise RuntimeError(
                f"This run resumes, but what trains beside the student ({len(self._tensors())} "
                f"tensors of {', '.join(self.terms)}) cannot be restored: {self._not_restored}. "
                + _HOW
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
        if state["plan"] != self._plan() or state["tensors"].keys() != tensors.keys():
            self._not_restored = "the checkpoint was written with other sources, terms or shapes"
            logger.info("Its kd state is left alone: %s.", self._not_restored)
            return
        beside = nn.ModuleDict({"sources": self.sources, "terms": self.terms})
        beside.load_state_dict(state["tensors"])
        self._restored = True
        logger.info("Restored what trains beside the student: %d tensors.", len(tensors))

    def _tensors(self) -> dict[str, Any]:
        return dict(nn.ModuleDict({"sources": self.sources, "terms": self.terms}).state_dict())

    def _plan(self) -> str:
        rows = {name: [asdict(r) for r in rows] for name, rows in self.wiring.rows.items()}
        sources = {name: type(source).__name__ for name, source in self.sources.items()}
        return json.dumps({"sources": sources, "of": self.wiring.source_of, "terms": rows})


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
