"""What a run needs, beside weights and optimizer, to go on as if it had not stopped."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn

from kd_det.detectors import running_values, set_running_values
from kd_det.engine.loader import ResumableLoader
from kd_det.kd_state import KDStateMixin
from kd_det.rng import get_rng_state, preserved_rng, seed_rng, set_rng_state
from kd_det.sources.weights_file import check_whole

logger = logging.getLogger(__name__)

_ANOTHER_RUN = (
    "To begin a new run from these weights, choose another OUTPUT_DIR, set MODEL.WEIGHTS to the "
    "file, and leave out --resume."
)


class RunState:
    """
    The state of the processes of a run, as a checkpointable.

        run = RunState(model, loader)
        checkpointer.add_checkpointable("run", run)
        checkpointer.resume_or_load(...)
        for iteration in range(start, max_iter):
            run.before_step()
            ...            # the step
            with run.aside(iteration):
                ...           # evaluation, PreciseBN
                run.gather()  # every process, when the main one is about to save

    For every process: random states (Python, NumPy, CPU, its GPU), the position in the data, and
    what the student and its peers keep outside of their state_dict (RetinaNet's
    ``loss_normalizer``). A run that
    goes on with another number of processes continues the shuffle where the first process was;
    random states belong to the old number and are drawn anew.

    Args:
        model: the student, or what holds it.
        loader: `ResumableLoader`, or ``None`` when the position in the data is not known.
    """

    def __init__(self, model: nn.Module, loader: ResumableLoader | None) -> None:
        self.model = model
        self.loader = loader
        self._gathered: list[Any] = []
        self._loaded: dict[str, Any] | None = None
        self._kept: dict[str, Any] | None = None  # as the last step left it

    @contextmanager
    def aside(self, iteration: int) -> Iterator[None]:
        """
        Around what is done after a step: the random numbers that it draws, and the model's running
        values that it changes (PreciseBN trains without gradients), reach neither the next step
        nor what is saved meanwhile or at the end of the run.

        The numbers are other ones at every iteration, and those of an iteration are the same in a
        resumed run.
        """
        self._kept = {"rng": get_rng_state(), "running": self._running()}
        running = self._kept["running"]
        with preserved_rng():
            seed_rng(f"{torch.initial_seed()} {iteration}")
            yield
        self._set_running(running)

    def gather(self) -> None:
        """
        Bring the states of all processes to the main one. All of them must call it, after a step;
        it holds until the next one.
        """
        self._gathered = comm.gather(self._own())

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes, or of this one where the others' are not at hand."""
        ranks = self._gathered or [self._own()]
        return {"world_size": comm.get_world_size(), "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Continue from a state; random states are set by `before_step`.

        Raises:
            ValueError: if the training set is another one.
        """
        world, rank = comm.get_world_size(), comm.get_rank()
        ranks, same = state["ranks"], len(state["ranks"]) == state["world_size"] == world
        self._loaded = dict(ranks[rank if same else 0])
        if not same:
            logger.warning(
                "The checkpoint holds the state of %d of %d process(es), and this run has %d: the "
                "shuffle goes on where it was, random numbers (augmentation) are drawn anew.",
                len(ranks),
                state["world_size"],
                world,
            )
            self._loaded["rng"] = None
        position = self._loaded["loader"]
        if self.loader is not None and position is not None:
            if not same:
                drawn = position["drawn"] * state["world_size"] // world
                position = {**position, "drawn": drawn, "waiting": []}
            self.loader.load_state_dict(position)

    def before_step(self) -> None:
        """Set the random states of the checkpoint, once, right before the first step."""
        self._gathered, self._kept = [], None
        if self._loaded is None:
            return
        self._set_running(self._loaded["running"])
        if self._loaded["rng"] is not None:
            set_rng_state(self._loaded["rng"])
        self._loaded = None

    def _networks(self) -> list[nn.Module]:
        """What a step trains: the networks of a Distiller, or the model itself."""
        distiller = next((m for m in self.model.modules() if isinstance(m, KDStateMixin)), None)
        return [self.model] if distiller is None else list(distiller.networks.values())

    def _running(self) -> list[dict[str, Any]]:
        return [running_values(network) for network in self._networks()]

    def _set_running(self, values: list[dict[str, Any]]) -> None:
        for network, found in zip(self._networks(), values, strict=True):
            set_running_values(network, found)

    def _own(self) -> dict[str, Any]:
        # What was loaded is not taken up yet where a run is saved before its first step.
        state = self._loaded or self._kept
        return {
            "rng": get_rng_state() if state is None else state["rng"],
            "running": self._running() if state is None else state["running"],
            "loader": None if self.loader is None else self.loader.state_dict(),
        }


def check_last_checkpoint(checkpointer: Any, model: nn.Module, *, distilled: bool) -> None:
    """
    Refuse to continue from a checkpoint that is not of this run: Detectron2 skips what does not fit
    with a warning, and trains on from random weights. Only names and shapes are read.

    Args:
        checkpointer: names the folder and its last checkpoint.
        model: the student.
        distilled: whether this run distils.

    Raises:
        ValueError: if the file cannot be read, or is of another model or kind of run.
    """
    path = checkpointer.get_checkpoint_file()
    try:
        check_whole(checkpointer.path_manager.get_local_path(path))
        with checkpointer.path_manager.open(path, "rb") as f:
            found = torch.load(f, map_location="meta")
        saved = found["model"]
    except Exception as e:  # a damaged file raises almost anything
        others = sorted(
            name.rpartition("/")[2]
            for name in checkpointer.get_all_checkpoint_files()
            if name != path
        )
        raise ValueError(
            f"The last checkpoint '{path}' cannot be read ({type(e).__name__}: {e}). Write the "
            f"name of a good one into the file last_checkpoint beside it; there are: "
            f"{', '.join(others) or 'no others'}."
        ) from e
    # Without KDState in the checkpointer it is metadata of the student.
    kd = found.get("kd") or getattr(found["model"], "_metadata", {}).get("", {}).get("kd")
    if isinstance(model, KDStateMixin) and kd is not None:
        _check_exported(json.loads(kd["plan"]).get("exported", ""), model.export_peer, path)
    saved = {key.removeprefix("module."): value for key, value in saved.items()}
    wanted = model.state_dict()
    shapes = {
        key: (tuple(saved[key].shape), tuple(x.shape))
        for key, x in wanted.items()
        if key in saved and saved[key].shape != x.shape
    }
    missing = [key for key in wanted if key not in saved]
    if shapes or missing:
        key = next(iter(shapes), missing[0] if missing else "")
        example = (
            f"{key} is {shapes[key][0]} in the file and {shapes[key][1]} in this run's student"
            if shapes
            else f"it has no {key}"
        )
        raise ValueError(
            f"The folder holds the checkpoint of another run: of {len(wanted)} entries of this "
            f"run's student, {len(missing)} are not in '{path}' and {len(shapes)} have another "
            f"shape ({example}). {_ANOTHER_RUN}"
        )
    if distilled != (kd is not None):
        now, then = ("with", "without") if distilled else ("without", "with")
        raise ValueError(
            f"The folder holds the checkpoint of another run: '{path}' was written {then} "
            f"distillation, this run is {now} (KD.ENABLED is {distilled}). {_ANOTHER_RUN}"
        )
    if isinstance(model, KDStateMixin) and kd is not None:
        _check_plan(kd["plan"], model.kd_state_dict()["plan"], path)


def _check_exported(then: str, now: str, path: str) -> None:
    """First: the weights of two peers may fit each other."""
    if then != now:
        raise ValueError(
            f"The folder holds the checkpoint of another run: in '{path}' the network '{then}' is "
            f"exported, and in this run '{now}' (KD.EXPORT_PEER). Resume with the same one; at the "
            "end python -m kd_det export --peer writes any of them."
        )


_OF_TERMS = ("terms", "of", "learners")  # what a plan says of each term


def _check_plan(saved: str, wanted: str, path: str) -> None:
    """Here, because the optimizer is restored before the kd state, and knows no names."""
    then, now = json.loads(saved), json.loads(wanted)
    if then == now:
        return
    changed = [
        f"{kind} {', '.join(then[kind]) or 'none'} (this run has {', '.join(now[kind]) or 'none'})"
        for kind in ("terms", "sources")
        if then[kind].keys() != now[kind].keys()
    ] or [
        f"another tap, level, connector, source, learner or shape of term {name}"
        for name in now["terms"]
        if any(now[kind][name] != then.get(kind, {}).get(name) for kind in _OF_TERMS)
    ]
    raise ValueError(
        f"The folder holds the checkpoint of another run: '{path}' was written with "
        f"{' and '.join(changed) or 'sources of another type'}. {_ANOTHER_RUN}"
    )
