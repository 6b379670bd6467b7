"""
Taps: which tensors inside a detector a term reads, and the Recorder that reads them.

A tap is a module path plus a rule that turns what the module returned, over all its calls in one
forward, into *maps*: an ordered ``{level name: (N, C, H, W) tensor}``. Where a detector looks at
regions of interest there are rows instead, one per region. References are kept, never clones: a
tensor that its owner later changes in place must be tapped before that (RetinaNet and FCOS change
their logits during inference, which is why sources stop at the head).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd_det.registry import did_you_mean

Maps = dict[str, Tensor]
"""
Level name to ``(N, C, H, W)`` tensor, in the order of the detector's levels; of a tap whose kind is
in `ROWS`, stage name to ``(R, C)`` tensor.
"""

ROWS = ("proposals", "roi_scores", "roi_deltas")
"""
Kinds of taps, and the presets of these names, that give a row per region of interest: how many, R,
differs from step to step.
"""


@dataclass(frozen=True)
class Tap:
    """
    Where a term looks.

    Attributes:
        name: what the user calls it: a preset of the detector, or the module path itself.
        path: dotted path of a module inside the detector; ``""`` is the detector.
        key: picks one element of what the module returns (position or name); ``None`` takes all.
        levels: names of the levels, in order; empty: dict keys, else positions ``"0"``, ``"1"``...
        kind: ``"feature"`` maps may be bridged by a connector; ``"logits"`` (and ``"deltas"``)
            have channels with a meaning, which no connector can invent; those of `ROWS` are no
            maps. ``"proposals"`` are ``(R, 5)`` rows of image index and box, XYXY in pixels.
        origins: for each level, what made it (a pyramid's extra levels name their top block):
            levels of one stride but different origin are not paired by default.
        also: further modules, whose calls follow those of ``path``: one module per stage.
        inputs: whether what the module is given counts, its positional arguments, and not what it
            returns.
        units: of deltas, what the box transform multiplies (dx, dy, dw, dh) with.
        per_anchor: how many channels belong to one anchor of a cell (the classes, or 4
            coordinates): channels are anchors x these, anchor by anchor. 0 where that is unknown.
        names: what those channels are called, in order, or the field of a dataset's metadata that
            says so (``"thing_classes"``); empty where that is unknown.
    """

    name: str
    path: str
    key: int | str | None = None
    levels: tuple[str, ...] = ()
    kind: str = "feature"
    origins: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    inputs: bool = False
    units: tuple[float, ...] = ()
    per_anchor: int = 0
    names: str | tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All modules of the tap, in the order of its levels."""
        return (self.path, *self.also)

    def first(self, stages: int) -> "Tap":
        """The same tap without the levels behind the first so many, and without their modules."""
        return replace(self, levels=self.levels[:stages], also=self.also[: stages - 1])

    def maps(self, calls: list[Any]) -> Maps:
        """
        The maps out of everything that the module returned in one forward.

        Args:
            calls: the module's outputs (or inputs), one entry per call. A module called several
                times (a head shared over levels) gives one level per call.

        Raises:
            ValueError: if there is something else than 4-D tensors (2-D for `ROWS`), another number
                of levels than names, or nothing under the key or a level's name.
        """
        picked = [self._pick(output) for output in calls]
        found = picked[0] if len(picked) == 1 else picked
        if isinstance(found, Tensor):
            found = [found]
        if isinstance(found, Mapping):
            maps = dict(found)
            if missing := [level for level in self.levels if level not in maps]:
                raise ValueError(
                    f"Tap '{self.name}' has the levels {', '.join(self.levels)}, but module "
                    f"'{self.path}' returned no {', '.join(missing)}."
                )
            if self.levels:
                maps = {level: maps[level] for level in self.levels}
        else:
            per_call = [x if isinstance(x, (list, tuple)) else [x] for x in found]
            flat = [x for maps_of_call in per_call for x in maps_of_call]
            names = self.levels or tuple(str(i) for i in range(len(flat)))
            if len(names) != len(flat):
                raise ValueError(
                    f"Tap '{self.name}' has the levels {', '.join(names)}, but module "
                    f"'{self.path}' returned {len(flat)} maps in {len(calls)} call(s)."
                )
            maps = dict(zip(names, flat, strict=True))
        rows = self.kind in ROWS
        for level, x in maps.items():
            if not isinstance(x, Tensor) or x.dim() != (2 if rows else 4):
                what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                wanted = (
                    "(R, C) rows, one per region"
                    if rows
                    else "an (N, C, H, W) map: tap a module that returns feature maps"
                )
                raise ValueError(
                    f"Tap '{self.name}' (module '{self.path}', level '{level}') gives {what}, not "
                    f"{wanted}."
                )
        return maps

    def _pick(self, output: Any) -> Any:
        if self.key is not None:
            try:
                output = output[self.key]
            except (KeyError, IndexError, TypeError):
                side = "is given" if self.inputs else "returns"
                raise ValueError(
                    f"Tap '{self.name}' takes element {self.key!r} of what module '{self.path}' "
                    f"{side}, but that is a {type(output).__name__} without it."
                ) from None
        return as_rois(output) if self.kind == "proposals" else output


def detached(maps: Mapping[str, Maps]) -> dict[str, Maps]:
    """The same maps of taps, as constants."""
    return {
        tap: {level: x.detach() if x.requires_grad else x for level, x in levels.items()}
        for tap, levels in maps.items()
    }


def as_rois(boxes: Sequence[Boxes]) -> Tensor:
    """
    Boxes of several images in one tensor, ``(R, 5)``: image index, then the box.

    Args:
        boxes: one per image of the batch, in order.
    """
    rows = [b.tensor for b in boxes]
    return torch.cat([torch.cat([r.new_full((len(r), 1), i), r], 1) for i, r in enumerate(rows)])


class Recorder:
    """
    Records what the tapped modules return, or are given, while it is entered; its hooks are gone on
    exit.

        with Recorder(model, taps) as recorder:
            model(inputs)
        features = recorder.maps(taps["features"])

    Taps that share a module share one hook. References only: nothing is cloned.

    Args:
        model: the detector.
        taps: what to record.
        expected_calls: how often each module path fires in one forward; paths that are absent may
            fire any positive number of times.

    Raises:
        KeyError: if a path names no module, with the nearest names.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Iterable[Tap],
        expected_calls: Mapping[str, int] | None = None,
    ) -> None:
        self.calls: dict[str, list[Any]] = {}
        self.given: dict[str, list[Any]] = {}
        taps = list(taps)
        self._modules = _modules_of(model, [tap for tap in taps if not tap.inputs])
        self._entrances = _modules_of(model, [tap for tap in taps if tap.inputs])
        self._expected = dict(expected_calls or {})
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Recorder":
        self.calls = {path: [] for path in self._modules}
        self.given = {path: [] for path in self._entrances}
        for path, module in self._modules.items():
            calls = self.calls[path]  # bound below per path
            self._handles.append(
                module.register_forward_hook(lambda m, i, output, calls=calls: calls.append(output))
            )
        for path, module in self._entrances.items():
            given = self.given[path]
            self._handles.append(
                module.register_forward_pre_hook(lambda m, args, given=given: given.append(args))
            )
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def maps(self, tap: Tap) -> Maps:
        """
        The recorded maps of one tap.

        Raises:
            RuntimeError: if its module did not fire, or not as often as expected.
        """
        calls = [call for path in tap.paths for call in self._calls_of(tap, path)]
        return tap.maps(calls)

    def _calls_of(self, tap: Tap, path: str) -> list[Any]:
        calls = (self.given if tap.inputs else self.calls)[path]
        expected = self._expected.get(path)
        if not calls or (expected is not None and len(calls) != expected):
            wanted = "at least once" if expected is None else f"{expected} time(s)"
            raise RuntimeError(
                f"Tap '{tap.name}': module '{path}' was called {len(calls)} time(s) in this "
                f"forward, but should be called {wanted}. A module whose result is not used, or "
                "that is bypassed (its forward called directly), cannot be tapped."
            )
        return calls


def _modules_of(model: nn.Module, taps: Iterable[Tap]) -> dict[str, nn.Module]:
    return {path: find_module(model, path) for tap in taps for path in tap.paths}


def find_module(model: nn.Module, path: str) -> nn.Module:
    """
    ``model.get_submodule(path)`` with an answer to a wrong path.

    Raises:
        KeyError: if there is no such module, with the nearest existing paths.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in model.named_modules() if name]
        depth = path.count(".")
        near = did_you_mean(path, [k for k in known if abs(k.count(".") - depth) <= 1])
        raise KeyError(
            f"{type(model).__name__} has no tap or module '{path}'.{near} List all of them with: "
            "python -m kd_det taps --config-file ..."
        ) from None
