"""A frozen, trained detector beside the student."""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_det.classes import class_names, dataset_classes
from kd_det.context import Context
from kd_det.detectors import Detector, TapShape, describe, probe
from kd_det.registry import SOURCES
from kd_det.rng import preserved_rng
from kd_det.sources.compiled import compile_between_taps
from kd_det.sources.fold import fold_batch_norm
from kd_det.sources.forward import PartialForward
from kd_det.sources.hidden import Hidden
from kd_det.sources.origin import FromFiles, Given, Origin
from kd_det.sources.source import Source, Targets
from kd_det.sources.weights_file import check_sha256
from kd_det.taps import ROWS, Maps, Tap

logger = logging.getLogger(__name__)

_PRECISIONS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@SOURCES.register()
class Teacher(Source):
    """
    A frozen detector, run in eval mode and without gradients only as deep as its taps need: never
    target assignment, decoding or NMS. It normalises and pads the images itself, in its own channel
    order. Its box head (taps `roi_scores` and `roi_deltas`) looks at the boxes that the student's
    looks at in the same step, stage by stage. It is a lazy handle: its architecture is measured on
    the meta device, its weights are read, checked and folded before the first training step, and
    evaluation touches neither.

    It is in no ``parameters()``, ``state_dict()``, DDP or optimizer, stays in eval mode whatever
    its owner does, and follows ``.to()``.

    Args:
        config_file: YAML or LazyConfig ``.py`` of the teacher, or the name of one in Detectron2's
            model zoo; empty takes the config that the checkpoint carries, see
            `kd_det.sources.carried.carried_config`.
        weights: its checkpoint, loaded strictly; empty takes what the zoo trained with its config,
            or else what the config file names.
        sha256: SHA-256 that the checkpoint must have, or at least 8 leading digits of it; empty for
            any.
        input_format: channel order of its images, ``"BGR"`` or ``"RGB"``; empty takes what the
            config file (or the model's attribute) says.
        precision: in which its weights are held and its maps come, ``"float32"``, ``"float16"`` or
            ``"bfloat16"``. It is run outside of autocast, which would cast frozen weights anew at
            every call.
        fold_batch_norm: fold BatchNorm into the convolutions (same maps up to rounding).
        channels_last: run its convolutions in that memory format (same maps up to rounding).
        compile: give what lies between its taps to `torch.compile` (same maps up to rounding): pays
            in long runs; the first steps, and those of new image sizes, wait for the compiler.
        scale: size of its images relative to the student's; below 1 it costs ``scale ** 2`` as
            much. Levels are paired by the pixels of the student's image that a cell covers: at 0.5
            the teacher's P3 meets the student's P4. It is gated and evaluated at full size.
        classes: what its classes are called, in its own order; empty takes the names of the dataset
            that its config file was trained on, if that is registered here. Class logits of a
            student with other classes are matched by name.
        min_ap: refuse to train when its box AP, 0 to 100, is below that; 0 checks nothing. See
            `kd_det.engine.check_gates`, which `TrainerMixin` calls.
        gate_images: on how many images of the first test set that AP is measured.
        model: an already loaded detector, instead of ``config_file`` and ``weights``; or any
            function, see `kd_det.detectors.Declared`.
        origin: where its network comes from, instead of all of these.
        defaults: a config with the keys of your project, before files are merged, for a YAML
            ``config_file`` with keys that Detectron2 does not know; a KD config gives its own.

    Raises:
        ValueError: if it is not said which network it is, or twice, or a value is unknown.
    """

    def __init__(
        self,
        *,
        config_file: Annotated[str, "path"] = "",
        weights: Annotated[str, "path"] = "",
        sha256: str = "",
        input_format: str = "",
        precision: str = "float32",
        fold_batch_norm: bool = True,
        channels_last: bool = True,
        compile: bool = False,
        scale: float = 1.0,
        classes: tuple[str, ...] = (),
        min_ap: float = 0.0,
        gate_images: int = 500,
        model: nn.Module | None = None,
        origin: Origin | None = None,
        defaults: Any = None,
    ) -> None:
        super().__init__()
        if [bool(config_file or weights), model is not None, origin is not None].count(True) != 1:
            raise ValueError(
                "A Teacher needs CONFIG_FILE (and WEIGHTS), WEIGHTS that carry their config, or in "
                f"Python a loaded model=..., and not both; got config_file '{config_file}', "
                f"weights '{weights}' and model {None if model is None else type(model).__name__}."
            )
        if model is not None and sha256:
            raise ValueError("A Teacher's sha256 is that of a file, but it was given a model.")
        if precision not in _PRECISIONS:
            raise ValueError(
                f"A Teacher's precision is one of {', '.join(_PRECISIONS)}, but got '{precision}'."
            )
        if input_format not in ("", "BGR", "RGB"):
            raise ValueError(f"A Teacher's input_format is BGR or RGB, but got '{input_format}'.")
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"A Teacher's scale is a finite number > 0, but got {scale}.")
        if not 0 <= min_ap <= 100:
            raise ValueError(
                f"A Teacher's min_ap is an AP between 0 and 100 (0: no check), but got {min_ap}."
            )
        if gate_images < 1:
            raise ValueError(f"A Teacher's gate_images is at least 1, but got {gate_images}.")
        sha256 = check_sha256(sha256)
        self.precision = precision
        self.fold_batch_norm = fold_batch_norm
        self.run = PartialForward(torch.channels_last if channels_last else torch.contiguous_format)
        self.compile_forward = compile  # not `compile`, which is a method of nn.Module
        self.scale = float(scale)
        self.classes = tuple(classes)
        self.min_ap = min_ap
        self.gate_images = gate_images
        self.ap_checked = False  # set by the gate
        self.hidden = Hidden()
        self._input_format = input_format
        self._fingerprint = ""
        self._stages: int | None = None  # of the student's box head, which gives the boxes
        if origin is None:
            files = FromFiles(config_file, weights, sha256, defaults)
            origin = files if model is None else Given(model)
        self._origin = origin

    @property
    def input_format(self) -> str:
        """Channel order that the teacher wants."""
        return self._input_format or self._origin.input_format

    @property
    def config_file(self) -> str:
        """The config that says what it is; empty for a given ``model`` and for a script."""
        return self._origin.config_file

    @property
    def weights_file(self) -> str:
        """The checkpoint that is loaded; empty for a given ``model``, or if none is named."""
        return self._origin.weights

    def student_taps(self, taps: tuple[str, ...]) -> tuple[str, ...]:  # noqa: D102  # as in the base
        return ("proposals",) if set(taps) & set(ROWS) else ()

    def wire(self, student: Mapping[str, list[TapShape]]) -> None:  # noqa: D102  # as in the base
        if "proposals" in student:
            self._stages = len(student["proposals"])

    def shapes(self, taps: tuple[str, ...]) -> dict[str, list[TapShape]]:  # noqa: D102  # as in the base
        if not taps:
            return {}
        architecture = self._origin.architecture()
        resolved = self._resolved(describe(architecture), taps)
        shapes = probe(architecture, resolved, class_names(self.classes or self._origin.dataset))
        self.run.expect(resolved, shapes)
        return {
            name: [self._in_students_pixels(s) for s in found] for name, found in shapes.items()
        }

    def prepare(self, taps: tuple[str, ...]) -> None:  # noqa: D102  # as in the base
        if self.hidden.held is not None:
            return
        if self.min_ap > 0 and not self.ap_checked:
            logger.warning(
                "The teacher's MIN_AP %g has not been checked: kd_det.TrainerMixin does so before "
                "the first step, and kd_det.engine.check_gates(cfg, distiller) in any other loop.",
                self.min_ap,
            )
        with preserved_rng():
            model, self._fingerprint = self._origin.load()
        model.eval().requires_grad_(False)
        detector = describe(model)
        tapped = [path for name in taps for path in detector.tap(name).paths]
        if self.fold_batch_norm:
            folded, left = fold_batch_norm(model, keep=tapped)
            logger.info("Teacher: %d BatchNorm layers folded.", len(folded))
            if left:
                logger.info(
                    "Teacher: not owned by one convolution, left alone: %s", ", ".join(left)
                )
        _cast(model, _PRECISIONS[self.precision])
        if self.compile_forward:
            compile_between_taps(model, detector.depths()[-1].reaches, tapped)
        # PyTorch's stubs know no Module.to() of a memory format alone.
        self.hidden.hold(model.to(memory_format=self.run.memory_format))  # type: ignore[call-overload]

    def forward(self, context: Context, taps: tuple[str, ...]) -> Targets:
        """
        Maps of the taps for the batch, in the teacher's precision, detached.

        Args:
            context: the step; its images are in ``context.input_format``.
            taps: names of taps.
        """
        model = self.hidden.held
        assert model is not None, "prepare() comes before forward()"
        resolved = self._resolved(describe(model), taps)
        rois = self._rois(context) if any(tap.kind in ROWS for tap in resolved) else {}
        # Inference mode spares the bookkeeping of views and versions, but autograd refuses to save
        # what comes out of it.
        no_grad = torch.no_grad if self.targets_saved else torch.inference_mode
        with no_grad(), torch.autocast(self.hidden._place.device.type, enabled=False):
            return Targets(self.run(model, resolved, self._inputs(context), rois))

    def _resolved(self, detector: Detector, taps: tuple[str, ...]) -> list[Tap]:
        """Taps by name; of the box head the stages that the student has too."""
        found = [detector.tap(name) for name in taps]
        return [t.first(self._stages) if self._stages and t.kind in ROWS else t for t in found]

    def _rois(self, context: Context) -> Maps:
        """The student's boxes in pixels of the teacher's images."""
        rois = context.student_maps["proposals"]
        if self.scale == 1.0:
            return rois
        factors = [1.0, *[self.scale] * 4]  # not the index of the image
        return {stage: x * x.new_tensor(factors) for stage, x in rois.items()}

    def _inputs(self, context: Context) -> list[dict[str, Any]]:
        """The step's images in the teacher's channel order and size."""
        inputs = context.inputs_in(self.input_format)
        if self.scale != 1.0:
            inputs = [{**x, "image": self._resized(x["image"])} for x in inputs]
        return inputs

    def _resized(self, image: Tensor) -> Tensor:
        # By the factor and not to a size: a pixel then covers exactly 1 / scale of the student's.
        resized = F.interpolate(
            image[None].float(), scale_factor=self.scale, mode="bilinear", antialias=True
        )
        return resized[0]  # (3, H * scale, W * scale)

    def _in_students_pixels(self, shape: TapShape) -> TapShape:
        stride = shape.stride / self.scale
        if stride != int(stride):
            raise ValueError(
                f"At scale {self.scale:g} a cell of the teacher's level {shape.level} (stride "
                f"{shape.stride}) covers {stride:.4g} of the student's pixels, which is no whole "
                "number: take a scale of 0.5, 0.25 or 2."
            )
        return replace(shape, stride=int(stride))

    def release(self) -> None:  # noqa: D102  # as in the base
        if self.hidden.held is not None:
            logger.info("The teacher is no longer needed and is freed.")
        self.hidden.hold(None)

    def trained_state(self) -> dict[str, Tensor]:
        """The weights as the file has them, before folding and casting, on the CPU."""
        with preserved_rng():
            model, _ = self._origin.load()
        return {k: v.cpu() for k, v in model.state_dict().items()}

    def detector(self) -> nn.Module:
        """
        All of the detector, as its files define it: a copy of its own, neither folded nor cast, in
        float32 and eval mode, where the teacher is.

        Raises:
            SourceUnavailable: if a file is missing.
            ValueError: if a file is not what it should be, or no longer what it was; or if it is a
                function whose outputs are maps.
        """
        with preserved_rng():
            model, fingerprint = self._origin.load()
        if not describe(model).gives_boxes:
            raise ValueError("This teacher returns maps and no boxes: it has no AP.")
        if self._fingerprint not in ("", fingerprint):
            raise ValueError(
                f"The teacher's weights '{self.weights_file}' have changed since this run read "
                f"them: SHA-256 {self._fingerprint} then, {fingerprint} now."
            )
        self._fingerprint = fingerprint
        return model.eval().requires_grad_(False).float().to(self.hidden._place.device)

    @property
    def num_classes(self) -> int | None:
        """How many classes its boxes are of; ``None`` when its architecture does not say."""
        return describe(self._origin.architecture()).num_classes

    @property
    def class_names(self) -> list[str] | None:
        """
        Its classes in its own order, where they are known: ``classes``, else those of the first
        dataset that its config names.
        """
        return list(self.classes) or dataset_classes(self._origin.dataset)

    def test_mapper(self) -> Callable[[dict[str, Any]], Any] | None:
        """From a dataset's record to the input of `detector`; ``None`` for a given ``model``."""
        return self._origin.test_mapper(self.input_format)

    def identity(self) -> str:
        """SHA-256 of what decides its predictions: weights, config and channel order."""
        if not self._fingerprint:
            self.detector()
        parts = (self._fingerprint, self.input_format, self._origin.recipe)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def fingerprint(self) -> str:  # noqa: D102  # as in the base
        return self._fingerprint


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the weights in ``dtype``, but the pixel statistics in float32: images are 0 to 255."""
    kept: dict[str, Any] = {
        name: buffer.float()
        for name, buffer in model.named_buffers()
        if name.split(".")[-1] in ("pixel_mean", "pixel_std")
    }
    model.to(dtype)
    for name, buffer in kept.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
