"""A function of images as a network: what it returns is what can be tapped."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kd_det.detectors.detector import Detector
from kd_det.detectors.shapes import Depth
from kd_det.registry import DETECTORS
from kd_det.taps import Tap

# Outputs of these names mean what presets of these names mean in every detector.
_KINDS = {"cls_logits": "logits", "sem_seg_logits": "logits", "box_deltas": "deltas"}
_NAMES = {"cls_logits": "thing_classes", "sem_seg_logits": "stuff_classes"}


class Declared(nn.Module):
    """
    Any function from images to maps, to be imitated: ``Teacher(model=Declared(fn, ["features"]))``.

    The function is called without gradients with one float tensor ``(N, 3, H, W)``, in
    ``input_format``, padded with zeros at the bottom and on the right until H and W are multiples
    of ``size_divisibility``. It returns a dict with every output by name, a tuple or list in their
    order, or, of a single output, that itself. An output is one ``(N, C, H / s, W / s)`` map, a
    list of maps (levels ``"0"``, ``"1"``, ...), or a dict of maps by level. Strides and channels
    are measured by calling it once with a black image.

    Outputs called ``cls_logits``, ``sem_seg_logits`` and ``box_deltas`` mean what they mean in any
    detector, channels being anchors x classes, anchor by anchor; all others are features.

    Args:
        function: of images; an `nn.Module` moves and is cast with its owner, anything else gets
            the images where the student is.
        outputs: what it returns, by name: these are the taps.
        pixel_mean: of each channel, of values from 0 to 255; empty: the images stay as they are.
        pixel_std: likewise; the function then sees ``(image - mean) / std``.
        size_divisibility: see above.
        input_format: channel order, ``"BGR"`` or ``"RGB"``.
        num_classes: K, by which class logits are told from anchors; 0 where that is unknown.

    Raises:
        ValueError: if no output is declared, or one of mean and std is given without the other.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        outputs: Sequence[str],
        *,
        pixel_mean: Sequence[float] = (),
        pixel_std: Sequence[float] = (),
        size_divisibility: int = 32,
        input_format: str = "BGR",
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if not outputs or isinstance(outputs, str) or len(set(outputs)) != len(outputs):
            raise ValueError(
                "The outputs of a function are declared by a list of names, each once, "
                f"['features', 'cls_logits'] say, but got {outputs!r}."
            )
        if (len(pixel_mean), len(pixel_std)) not in ((0, 0), (3, 3)) or not all(pixel_std):
            raise ValueError(
                "Images are normalised by a pixel_mean and a pixel_std, not 0, of three channels "
                f"each, or by none; got {tuple(pixel_mean)} and {tuple(pixel_std)}."
            )
        self.function = function
        self.outputs = tuple(outputs)
        self.size_divisibility = size_divisibility
        self.input_format = input_format
        self.num_classes = num_classes
        # A function that is no module has no parameter that says where images belong.
        self.register_buffer("_place", torch.empty(0), persistent=False)
        if pixel_mean:
            for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
                self.register_buffer(name, torch.tensor(values).view(3, 1, 1).float(), False)

    def forward(self, images: Tensor) -> dict[str, Any]:
        """
        The declared outputs, by name and detached.

        Args:
            images: ``(N, 3, H, W)``, normalised and padded.

        Raises:
            ValueError: if the function does not return them.
        """
        found = self.function(images)
        if isinstance(found, Mapping):
            missing = [name for name in self.outputs if name not in found]
            if missing:
                raise ValueError(
                    f"The declared outputs are {', '.join(self.outputs)}, but {self._name} "
                    f"returned {', '.join(map(str, found)) or 'an empty dict'}: there is no "
                    f"{', '.join(missing)}."
                )
            named = {name: found[name] for name in self.outputs}
        elif len(self.outputs) == 1:
            single = isinstance(found, (tuple, list)) and len(found) == 1
            named = {self.outputs[0]: found[0] if single else found}
        elif isinstance(found, (tuple, list)) and len(found) == len(self.outputs):
            named = dict(zip(self.outputs, found, strict=True))
        else:
            count = len(found) if isinstance(found, (tuple, list)) else 1
            raise ValueError(
                f"{len(self.outputs)} outputs are declared ({', '.join(self.outputs)}), but "
                f"{self._name} returned {count} ({type(found).__name__}), without names."
            )
        return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, named)

    @property
    def _name(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))


class _Declared(Detector):
    """The outputs of a `Declared`."""

    gives_boxes = False

    def presets(self) -> dict[str, Tap]:  # as in the base
        return {
            name: Tap(
                name,
                "",
                name,
                kind=_KINDS.get(name, "feature"),
                per_anchor=self.model.num_classes if name in _NAMES else 0,
                names=_NAMES.get(name, ()),
            )
            for name in self.model.outputs
        }

    @property
    def num_classes(self) -> int | None:
        """See the base."""
        return self.model.num_classes or None

    def depths(self) -> list[Depth]:  # as in the base
        return [Depth(("",), self.model)]

    def measurable(self) -> nn.Module:
        """
        The function itself, in eval mode: nothing is known of how it computes, and on the meta
        device most functions do not.
        """
        return copy.deepcopy(self.model).eval()


DETECTORS._do_register(Declared.__name__, _Declared)
