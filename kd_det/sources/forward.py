"""Running a network beside the student, as deep as its taps need."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.detectors import TapShape, describe
from kd_det.taps import ROWS, Maps, Recorder, Tap


class PartialForward:
    """
    From a batch to the maps of taps: never target assignment, decoding or NMS. What holds it
    decides about gradients and autocast.

    Args:
        memory_format: of the images.
    """

    def __init__(self, memory_format: torch.memory_format = torch.preserve_format) -> None:
        self.memory_format = memory_format
        self._expected_calls: dict[str, int] = {}
        self._counted: set[str] = set()

    def expect(self, taps: Iterable[Tap], shapes: Mapping[str, list[TapShape]]) -> None:
        """Take note of how often the modules of these taps were called when measured."""
        for tap in taps:
            self._expected_calls.update(dict.fromkeys(tap.paths, shapes[tap.name][0].calls))

    def __call__(
        self, model: nn.Module, taps: list[Tap], inputs: list[dict[str, Any]], rois: Maps
    ) -> dict[str, Maps]:
        """
        The maps of the taps, by name.

        Args:
            model: the network.
            taps: what is asked for.
            inputs: Detectron2's batched inputs, images in the network's channel order and size.
            rois: for taps of its box head, the boxes of every stage; see `kd_det.taps.Tap`.
        """
        detector = describe(model)
        on_images = [tap for tap in taps if tap.kind not in ROWS]
        roi_head = detector.roi_head() if len(on_images) < len(taps) else None
        if roi_head is not None:
            on_images.append(roi_head.features)
        with Recorder(model, [*taps, *on_images], self._expected_calls) as recorder:
            # The weights' own: their owner may have been cast meanwhile (.half(), .double()).
            dtype = next((p.dtype for p in model.parameters()), torch.float32)
            cast = partial(Tensor.to, dtype=dtype, memory_format=self.memory_format)
            # A tap's first forward runs to its end, to see that it fires no more than expected.
            paths = {tap.path for tap in on_images}
            calls = self._expected_calls if paths <= self._counted else None
            detector.run_batch(inputs, on_images, cast, calls)
            self._counted |= paths
            if roi_head is not None:
                roi_head.run(recorder.maps(roi_head.features), rois)
        return {tap.name: recorder.maps(tap) for tap in taps}
