"""A teacher of which there is nothing but a TorchScript file."""

import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import nn

from kd_det.detectors import Declared
from kd_det.registry import SOURCES
from kd_det.sources.origin import Origin
from kd_det.sources.strict import expected_file
from kd_det.sources.teacher import Teacher
from kd_det.sources.weights_file import check_sha256, check_whole


@SOURCES.register()
class ScriptedTeacher(Teacher):
    """
    A frozen network in a file of `torch.jit.save`, which needs neither its config nor its code.
    What it returns is declared, and is all that can be tapped; the rest is as in `Teacher`.

    Its file is read once when the Distiller is built, to measure what it returns. It must compute
    its maps from images alone, whatever their number and size.

    Args:
        weights: the file.
        outputs: names of what it returns, see `kd_det.detectors.Declared`.
        sha256: see `Teacher`.
        input_format: channel order of its images, ``"BGR"`` or ``"RGB"``.
        pixel_mean: see `kd_det.detectors.Declared`; empty where it normalises by itself.
        pixel_std: likewise.
        size_divisibility: likewise.
        precision: see `Teacher`. A frozen script (`torch.jit.freeze`) keeps its own.
        scale: see `Teacher`.
        classes: what its classes are called, in its own order: with them ``cls_logits`` are matched
            by name.

    Raises:
        ValueError: if no file is named or a value is unknown.
    """

    def __init__(
        self,
        *,
        weights: Annotated[str, "path"],
        outputs: tuple[str, ...] = ("features",),
        sha256: str = "",
        input_format: str = "BGR",
        pixel_mean: tuple[float, ...] = (),
        pixel_std: tuple[float, ...] = (),
        size_divisibility: int = 32,
        precision: str = "float32",
        scale: float = 1.0,
        classes: tuple[str, ...] = (),
    ) -> None:
        if not weights:
            raise ValueError("A ScriptedTeacher needs WEIGHTS, a file of torch.jit.save.")
        script = FromScript(
            weights,
            outputs,
            check_sha256(sha256),
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            size_divisibility=size_divisibility,
            num_classes=len(classes),
        )
        super().__init__(
            origin=script,
            input_format=input_format or "BGR",
            precision=precision,
            fold_batch_norm=False,  # its convolutions cannot be rewritten
            scale=scale,
            classes=classes,
        )


class FromScript(Origin):
    """
    A file of `torch.jit.save`.

    Args:
        weights: the file.
        outputs: see `kd_det.detectors.Declared`.
        sha256: of the file, or its leading digits in lower case.
        declared: the rest of what `kd_det.detectors.Declared` wants to know.
    """

    def __init__(self, weights: str, outputs: Sequence[str], sha256: str, **declared: Any) -> None:
        Declared(nn.Identity(), outputs, **declared)  # its mistakes are found before the file is
        self._weights = weights
        self._outputs = outputs
        self._sha256 = sha256
        self._declared = declared

    @property
    def weights(self) -> str:  # noqa: D102  # as in the base
        return self._weights

    def architecture(self) -> nn.Module:  # noqa: D102  # as in the base
        return self.load()[0]

    def load(self) -> tuple[nn.Module, str]:  # noqa: D102  # as in the base
        what = "The scripted teacher"
        local, fingerprint = expected_file(self._weights, what=what, sha256=self._sha256)
        try:
            check_whole(local)
            with warnings.catch_warnings():
                # TorchScript is deprecated, but what was saved in it remains.
                warnings.simplefilter("ignore", DeprecationWarning)
                script = torch.jit.load(local, map_location="cpu")
        except Exception as e:  # a damaged archive raises almost anything
            reason = " ".join(str(e).split())[:200]
            raise ValueError(
                f"{what}: '{self._weights}' cannot be read as a file of torch.jit.save "
                f"({type(e).__name__}: {reason}). Weights alone are for TYPE: Teacher."
            ) from e
        return Declared(script, self._outputs, **self._declared), fingerprint
