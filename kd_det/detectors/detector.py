"""The base of detector descriptions, and the measuring of a detector's taps without running it."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from detectron2.structures import Boxes, ImageList
from torch import Tensor, nn

from kd_det.classes import ClassNames, unknown
from kd_det.detectors.images import image_tensor, size_divisibility
from kd_det.detectors.shapes import Depth, RoiHead, TapShape
from kd_det.registry import DETECTORS, did_you_mean
from kd_det.taps import Maps, Recorder, Tap, find_module


class Detector:
    """
    What kd_det knows of one meta-architecture. Subclasses are small and hold no state: they read
    the model that they are given.

    Args:
        model: the detector; may live on the meta device.
    """

    gives_boxes: bool = True
    """Whether the model, called in eval mode, predicts what can be evaluated."""
    running: tuple[str, ...] = ()
    """Attributes, plain numbers, that a training step changes and no state_dict holds."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # attributes are those of the meta-architecture

    @property
    def num_classes(self) -> int | None:
        """How many classes its boxes are of; ``None`` when the architecture does not say."""
        return getattr(self.model, "num_classes", None)

    def presets(self) -> dict[str, Tap]:
        """The named taps that give maps, ``features`` first."""
        raise NotImplementedError

    def depths(self) -> list[Depth]:
        """
        How deep a forward can go, from cheap to dear; the last one reaches all that the others do.
        Never target assignment, losses, decoding or NMS.
        """
        raise NotImplementedError

    def roi_head(self) -> RoiHead | None:
        """What looks at regions of interest; ``None`` for detectors of one stage."""
        return None

    def anchors(self, features: list[Tensor]) -> list[Boxes]:
        """
        One `Boxes` of ``(H * W * A, 4)`` per level, XYXY in pixels of the padded input.

        Raises:
            ValueError: if the architecture has no anchors.
        """
        raise ValueError(f"{type(self.model).__name__} has no anchors that kd_det knows of.")

    def dense_head(self) -> nn.Module:
        """
        The head that predicts at every cell: from a list of maps, one per level of ``features``, to
        lists of maps, the class logits and box deltas first.

        Raises:
            ValueError: if the architecture has none.
        """
        raise ValueError(
            f"{type(self.model).__name__} has no dense head that could be had a second time "
            "(RetinaNet, FCOS and other DenseDetectors have)."
        )

    def dense_losses(
        self, inputs: list[dict[str, Any]], features: list[Tensor], predictions: Any
    ) -> dict[str, Tensor]:
        """
        The detector's own training losses of maps and predictions that are not its own. Its running
        values stay as they are.

        Args:
            inputs: Detectron2's batched inputs, with ground truth.
            features: what a head like `dense_head` was given.
            predictions: what that head returned.

        Raises:
            ValueError: as in `dense_head`.
        """
        raise ValueError(f"{type(self.model).__name__} has no losses of a dense head.")

    def dense_predictions(
        self, inputs: list[dict[str, Any]]
    ) -> tuple[ImageList, list[Tensor], list[list[Tensor]]]:
        """
        The first half of the detector's inference, up to its `dense_head`.

        Args:
            inputs: Detectron2's batched inputs, images in the model's channel order.

        Returns:
            The padded images; the maps that the head is given, one per level; and what it predicts:
            lists with a raw map per level, ``(N, A * K, H, W)``, class logits and box deltas first.

        Raises:
            ValueError: as in `dense_head`.
        """
        raise ValueError(f"{type(self.model).__name__} has no predictions of a dense head.")

    def dense_inference(
        self,
        inputs: list[dict[str, Any]],
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
    ) -> list[dict[str, Any]]:
        """
        The second half: decoding, NMS and rescaling, as the detector's own inference does them.

        Args:
            inputs: as in `dense_predictions`.
            images: of `dense_predictions`.
            features: the same.
            predictions: like those; they are overwritten.

        Returns:
            For each image its ``instances``.

        Raises:
            ValueError: as in `dense_head`.
        """
        raise ValueError(f"{type(self.model).__name__} has no inference of a dense head.")

    def named_taps(self) -> dict[str, Tap]:
        """The presets, and behind them those of the box head."""
        roi_head = self.roi_head()
        return {**self.presets(), **(roi_head.taps if roi_head else {})}

    def tap(self, name: str) -> Tap:
        """
        The preset of that name, or the module at that path.

        Raises:
            KeyError: if it is neither, with the nearest names.
        """
        presets = self.named_taps()
        if name in presets:
            return presets[name]
        try:
            find_module(self.model, name)
        except KeyError as e:
            near = did_you_mean(name, presets)
            known = ", ".join(presets) or "none"
            raise KeyError(f"{e.args[0]} Presets: {known}.{near}") from None
        return Tap(name=name, path=name)

    def measurable(self) -> nn.Module:
        """What `probe` runs in place of the model: its architecture without storage."""
        return meta_copy(self.model).eval()

    def preprocess(self, inputs: list[dict[str, Any]]) -> Tensor:
        """
        What `run` takes of a batch: ``(N, 3, H, W)``, see `kd_det.detectors.images.image_tensor`.

        Args:
            inputs: Detectron2's batched inputs, images in the model's channel order.
        """
        return image_tensor(self.model, inputs)

    def run_batch(
        self,
        inputs: list[dict[str, Any]],
        taps: Iterable[Tap],
        cast: Callable[[Tensor], Tensor],
        calls: Mapping[str, int] | None = None,
    ) -> None:
        """
        `preprocess`, cast, `run`: what a source does with a batch.

        Args:
            inputs: as in `preprocess`.
            taps: as in `run`.
            cast: brings the image tensor to the dtype and memory format of the weights.
            calls: as in `run`.
        """
        self.run(cast(self.preprocess(inputs)), taps, calls)

    def run(
        self, images: Tensor, taps: Iterable[Tap], calls: Mapping[str, int] | None = None
    ) -> None:
        """
        Run the detector as deep as the taps need, and no deeper.

        Args:
            images: ``(N, 3, H, W)``, normalised and padded by the model itself.
            taps: what a surrounding Recorder wants to see.
            calls: how often the tapped modules fire, by path: lets a forward that goes on behind
                the taps stop there. The explicit `depths` need no stop.

        Raises:
            ValueError: if a tap lies deeper than that (in a ROI head, say).
        """
        paths = {tap.path: tap for tap in taps}
        if not paths:
            return
        depths = self.depths()
        for depth in depths:
            if all(map(depth.has, paths)):
                depth.forward(images)
                return
        reaches = depths[-1].reaches
        tap = next(tap for path, tap in paths.items() if not depths[-1].has(path))
        raise ValueError(
            f"Tap '{tap.name}' (module '{tap.path}') of {type(self.model).__name__} lies outside "
            f"of {', '.join(reaches)}, the parts that a source runs."
        )


def describe(model: nn.Module) -> Detector:
    """
    The description of a model, by the name of its class or of the nearest base class; what no
    description is for is described as `kd_det.detectors.AnyModule`.

    Raises:
        ValueError: if it is no `nn.Module`.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in DETECTORS:
            return DETECTORS.get(cls.__name__)(model)
    raise ValueError(f"A detector is an nn.Module, but got a {type(model).__name__}.")


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the architecture without storage: parameters and buffers on the meta device."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


def probe(
    model: nn.Module, taps: Iterable[Tap], classes: ClassNames = unknown
) -> dict[str, list[TapShape]]:
    """
    Measure taps on a meta-device copy of a model, at no cost in memory or arithmetic (or on what
    its description gives instead, `Detector.measurable`); those of a box head are as it says
    itself.

    Args:
        model: the detector; it is not run and not changed.
        taps: what to measure.
        classes: what its classes are called; asked for taps of class logits and scores only.

    Returns:
        For each tap's name its levels in order.

    Raises:
        ValueError: of ``classes``; or if something tapped is not channels-first, or cannot be
            reached.
    """
    taps = list(taps)
    architecture = describe(model).measurable()
    detector = describe(architecture)
    roi_head = detector.roi_head()
    known = roi_head.shapes if roi_head else {}
    measured = [tap for tap in taps if tap.name not in known]
    backbone = getattr(architecture, "backbone", None)
    # A square canvas that every stride up to 128 and the model's own constraint divide.
    side = int(getattr(backbone, "padding_constraints", {}).get("square_size", 0)) or math.lcm(
        512, size_divisibility(architecture) or 1
    )
    first = next(chain(architecture.parameters(), architecture.buffers()))
    canvas = torch.zeros(1, 3, side, side, device=first.device, dtype=first.dtype)
    with torch.no_grad(), Recorder(architecture, measured) as recorder:
        detector.run(canvas, measured)
    shapes = {
        t.name: [_scored(x, classes) for x in known[t.name][: len(t.levels)]]
        for t in taps
        if t.name in known
    }
    for tap in measured:
        maps = recorder.maps(tap)
        _check_layout(architecture, tap, maps)
        calls = len(recorder.calls[tap.path])
        origins = tap.origins or ("",) * len(maps)
        shapes[tap.name] = [
            TapShape(
                level,
                channels=x.shape[1],
                stride=max(round(side / x.shape[3]), 1),
                origin=origin,
                kind=tap.kind,
                calls=calls,
                units=tap.units,
                **_anchors_and_names(tap, x.shape[1], classes),
            )
            for (level, x), origin in zip(maps.items(), origins, strict=True)
        ]
    return shapes


def _check_layout(model: nn.Module, tap: Tap, maps: Maps) -> None:
    """Of a square image every ``(N, C, H, W)`` map is square; a transformer's rarely is."""
    for level, x in maps.items():
        if x.shape[2] != x.shape[3]:
            last = ", so its channels come last" if x.shape[1] == x.shape[2] else ""
            presets = ", ".join(describe(model).presets()) or "none"
            raise ValueError(
                f"Tap '{tap.name}' (module '{tap.path}', level '{level}') gives {tuple(x.shape)} "
                f"for a square image{last}: a term compares (N, C, H, W) maps. Blocks of a "
                "transformer cannot be tapped; its backbone brings its output into that shape. "
                f"Presets of this {type(model).__name__}: {presets}."
            )


def _scored(shape: TapShape, classes: ClassNames) -> TapShape:
    """With the names of the classes that a box head scores, the background left out."""
    if shape.kind != "roi_scores":
        return shape
    return replace(shape, names=tuple(classes("thing_classes", shape.channels - 1) or ()))


def _anchors_and_names(tap: Tap, channels: int, classes: ClassNames) -> dict[str, Any]:
    if not tap.per_anchor or channels % tap.per_anchor:  # a head of another make
        return {}
    names = classes(tap.names, tap.per_anchor) if isinstance(tap.names, str) else tap.names
    return {"anchors": channels // tap.per_anchor, "names": tuple(names or ())}


def running_values(model: nn.Module) -> dict[str, Any]:
    """
    What the detector inside of ``model`` keeps from step to step outside of its state_dict, by
    attribute name; empty for meta-architectures that keep nothing that kd_det knows of.
    """
    found = _with_running_values(model)
    if found is None:
        return {}
    return {k: getattr(found.model, k) for k in found.running if hasattr(found.model, k)}


def set_running_values(model: nn.Module, values: dict[str, Any]) -> None:
    """The counterpart of `running_values`: what is not among the values has not begun to run."""
    found = _with_running_values(model)
    if found is not None:
        for name in found.running:
            vars(found.model).pop(name, None)
        vars(found.model).update(values)


def _with_running_values(model: nn.Module) -> Detector | None:
    return next((d for d in map(describe, model.modules()) if d.running), None)
