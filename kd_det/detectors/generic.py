"""Any module that nothing more is known of: taps are its module paths, and its forward is run."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.detectors.dense import backbone_depths, backbone_presets
from kd_det.detectors.detector import Detector
from kd_det.detectors.shapes import Depth
from kd_det.registry import DETECTORS
from kd_det.taps import Tap, find_module


class AnyModule(Detector):
    """
    What holds for any module. A meta-architecture with a description of its own never comes here.

    *Taps* are module paths. A ``backbone`` with Detectron2's ``output_shape()`` adds the presets
    ``features`` and its bottom-up stages.

    *What is run.* Taps inside of the backbone: the backbone, as deep as they need. Any other: the
    model's own forward, in the mode that it is in (a teacher's is eval), which is stopped at the
    end of the part (a child of the model, or of its ModuleLists) in which the last of them fired.
    The numbers that modules count in attributes, a `CycleBatchNormList`'s position say, are then
    put back to what they were: a stopped forward leaves the model as it found it.

    *What is fed.* A model with ``preprocess_image`` or ``pixel_mean`` reads Detectron2's batched
    inputs: its forward gets a list of dicts of ``image`` (``(3, H, W)``, 0 to 255, in its channel
    order), ``height`` and ``width`` (those of that image), and normalises and pads by itself. Any
    other model is a plain network: its forward gets the images as one float ``(N, 3, H, W)``, 0 to
    255, padded with zeros at the bottom and on the right; a normalisation belongs into the network.

    *Measuring* runs that forward in eval mode on the meta device, where values do not exist. It may
    fail behind the taps (inference selects boxes by their scores), but not before them.
    """

    def presets(self) -> dict[str, Tap]:  # noqa: D102  # as in the base
        backbone = self._backbone()
        return {} if backbone is None else backbone_presets(backbone)

    def depths(self) -> list[Depth]:  # noqa: D102  # as in the base
        whole = tuple(name for name, _ in self.model.named_children())
        return [*self._parts(), Depth(whole, self.model)]

    def run_batch(  # noqa: D102  # as in the base
        self,
        inputs: list[dict[str, Any]],
        taps: Iterable[Tap],
        cast: Callable[[Tensor], Tensor],
        calls: Mapping[str, int] | None = None,
    ) -> None:
        taps = list(taps)
        if self._batched() and not self._within_parts(taps):
            self._through_forward(_only_images(x["image"] for x in inputs), taps, calls)
        else:
            super().run_batch(inputs, taps, cast, calls)

    def run(
        self, images: Tensor, taps: Iterable[Tap], calls: Mapping[str, int] | None = None
    ) -> None:
        """
        See the base; a forward that reads batched inputs gets ``images`` as such.

        Raises:
            ValueError: if the forward fails on the meta device before every tap has fired.
        """
        taps = list(taps)
        if self._within_parts(taps):
            super().run(images, taps, calls)
        else:
            inputs = _only_images(images) if self._batched() else images
            self._through_forward(inputs, taps, calls)

    def _backbone(self) -> Any:
        backbone = getattr(self.model, "backbone", None)
        return backbone if hasattr(backbone, "output_shape") else None

    def _batched(self) -> bool:
        return hasattr(self.model, "preprocess_image") or hasattr(self.model, "pixel_mean")

    def _parts(self) -> list[Depth]:
        backbone = self._backbone()
        return [] if backbone is None else backbone_depths(backbone)

    def _within_parts(self, taps: list[Tap]) -> bool:
        parts = self._parts()
        return all(parts and parts[-1].has(tap.path) for tap in taps)

    def _through_forward(
        self, inputs: Any, taps: list[Tap], calls: Mapping[str, int] | None
    ) -> None:
        fired: Counter[str] = Counter()
        paths = {tap.path for tap in taps}

        def count(path: str, *_: Any) -> None:
            fired[path] += 1

        def stop(*_: Any) -> None:
            if calls is not None and all(fired[path] >= calls[path] for path in paths):
                raise _Stop

        hooks = [
            find_module(self.model, path).register_forward_hook(partial(count, path))
            for path in paths
        ]
        # After those that count: a part may be tapped itself.
        hooks += [part.register_forward_hook(stop) for part in _called_parts(self.model)]
        first = next(self.model.parameters())
        numbers = _numbers(self.model)
        try:
            with _autocast(first):
                self.model(inputs)
        except _Stop:
            for module, values in numbers:
                vars(module).update(values)
        except Exception as e:
            if not first.is_meta:
                raise
            if missing := sorted(path for path in paths if not fired[path]):
                raise ValueError(self._cannot_measure(missing, e)) from e
        finally:
            for hook in hooks:
                hook.remove()

    def _cannot_measure(self, missing: list[str], error: Exception) -> str:
        name = type(self.model).__name__
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return (
            f"{name} is no meta-architecture that kd_det knows, so what its modules return is "
            "measured by running its forward without storage (meta device); that failed before "
            f"reaching {', '.join(missing)} ({why}). Register a kd_det.detectors.Detector under "
            f"the name {name} in kd_det.registry.DETECTORS, whose depths() run the parts on the "
            "way there and nothing that needs values: docs/detectors.md."
        )


# The last class but `object` of every model's MRO: found when nothing nearer is registered.
DETECTORS._do_register(nn.Module.__name__, AnyModule)


class _Stop(BaseException):
    """Ends a forward; no ``except Exception`` of the model may catch it."""


def _only_images(images: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Batched inputs of inference, to be described at the size of the images themselves."""
    return [{"image": x, "height": x.shape[-2], "width": x.shape[-1]} for x in images]


def _called_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The children that a forward calls: a ModuleList is none, what is in it is."""
    for child in model.children():
        if type(child).forward is nn.Module.forward:
            yield from _called_parts(child)
        else:
            yield child


def _numbers(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    return [
        (m, {k: v for k, v in vars(m).items() if isinstance(v, (int, float))})
        for m in model.modules()
    ]


def _autocast(weight: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A forward that makes its own float32 images meets weights of half precision."""
    if weight.is_meta or weight.dtype not in (torch.float16, torch.bfloat16):
        return contextlib.nullcontext()
    return torch.autocast(weight.device.type, dtype=weight.dtype)
