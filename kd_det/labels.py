"""What of a batch is labelled, and what its images give to the student's own losses."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from torch import Tensor, nn

from kd_det.detectors import running_values, set_running_values
from kd_det.taps import ROWS, Maps, Recorder, Tap

# What Detectron2's mapper leaves of a record without annotations, and its second view.
_NO_LABELS = {"image", "view_2", "height", "width", "file_name", "image_id"}


def is_labelled(image: Mapping[str, Any]) -> bool:
    """
    Whether an element of Detectron2's batched inputs carries ground truth, be it of nothing: it is
    not marked as ``unlabelled`` (`kd_det.data.register_unlabelled` does so), and has something
    beside pixels, sizes and names; what a project's own keys mean is not known, so they count.
    """
    return not image.get("unlabelled") and bool(image.keys() - _NO_LABELS)


def labelled_first(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same batch with its unlabelled images behind the labelled ones, each in their order."""
    return sorted(inputs, key=lambda x: not is_labelled(x))


def run_student(
    student: nn.Module,
    inputs: list[dict[str, Any]],
    taps: Mapping[str, Tap],
    expected_calls: Mapping[str, int],
    weight: float = 1.0,
) -> tuple[dict[str, Tensor], dict[str, Maps]]:
    """
    The student's training forward where some images, or all, have no labels.

    A batch of labelled images is one forward. Unlabelled ones have a forward of their own, with
    ground truth of no objects, of which nothing but the maps is used: an image of which nobody says
    what is on it must not teach that nothing is. So the losses of a mixed batch are those of its
    labelled images by themselves, to the bit; a BatchNorm sees, and counts, the two parts one after
    the other; and moving averages of the labels (RetinaNet's number of foreground anchors) do not
    see the second. A batch without labelled images, or a weight of 0, has losses of exactly 0 whose
    gradient is 0 in every parameter, so that DDP never waits.

    Args:
        student: the detector, in training mode.
        inputs: of `labelled_first`.
        taps: what is recorded, by name.
        expected_calls: see `Recorder`; of one forward.
        weight: factor on the student's losses.

    Returns:
        Its losses, and for every tap the maps of all images in order, in the size of the larger of
        the two parts' canvases, with zeros at the bottom and on the right of the other's.

    Raises:
        ValueError: for a mixed batch where a synchronised BatchNorm would wait for other processes.
    """
    labelled = [x for x in inputs if is_labelled(x)]
    others = [without_objects(x) for x in inputs[len(labelled) :]]
    losses: dict[str, Tensor] = {}
    maps: dict[str, Maps] = {}
    if labelled:
        losses, maps = _recorded(student, labelled, taps, expected_calls)
    if others:
        if labelled:
            _check_norms(student)
        kept = running_values(student)
        names, behind = _recorded(student, others, taps, expected_calls)
        set_running_values(student, kept)
        losses = losses or dict.fromkeys(names, _zero(student))
        maps = {k: joined(taps[k], maps[k], behind[k], len(labelled)) for k in maps} or behind
    if weight == 0:
        losses = dict.fromkeys(losses, _zero(student))
    elif weight != 1:
        losses = {name: weight * loss for name, loss in losses.items()}
    return losses, maps


def without_objects(image: Mapping[str, Any]) -> dict[str, Any]:
    """An unlabelled image with ground truth that every meta-architecture can compute with."""
    h, w = image["image"].shape[-2:]
    nothing = Instances((h, w))
    nothing.gt_boxes = Boxes(torch.zeros(0, 4))
    nothing.gt_classes = torch.zeros(0, dtype=torch.long)
    nothing.gt_masks = BitMasks(torch.zeros(0, h, w, dtype=torch.bool))
    # Not the value that is ignored: the mean over no pixel is NaN.
    return {**image, "instances": nothing, "sem_seg": torch.zeros(h, w, dtype=torch.long)}


def joined(tap: Tap, first: Maps, second: Maps, images: int) -> Maps:
    """
    The maps of two parts of a batch as those of the whole.

    Args:
        tap: what they are of.
        first: maps of the first part.
        second: maps of the second part, of the same levels.
        images: in the first part.
    """
    result = {}
    for level, a in first.items():
        b = second[level]
        if tap.kind == "proposals":
            b = b + b.new_tensor([images, 0, 0, 0, 0])  # (R, 5), the index of the image first
        elif tap.kind not in ROWS:
            h, w = max(a.shape[2], b.shape[2]), max(a.shape[3], b.shape[3])
            a, b = (F.pad(x, (0, w - x.shape[3], 0, h - x.shape[2])) for x in (a, b))
        result[level] = torch.cat([a, b])
    return result


def _recorded(
    student: nn.Module,
    inputs: list[dict[str, Any]],
    taps: Mapping[str, Tap],
    expected_calls: Mapping[str, int],
) -> tuple[dict[str, Tensor], dict[str, Maps]]:
    with Recorder(student, taps.values(), expected_calls) as recorder:
        losses = student(inputs)
    return losses, {name: recorder.maps(tap) for name, tap in taps.items()}


def _zero(student: nn.Module) -> Tensor:
    """0, with a gradient of 0 in every parameter."""
    first = next(student.parameters())
    zero = torch.zeros((), device=first.device)
    return zero + sum(0 * p.sum() for p in student.parameters() if p.requires_grad)


def _check_norms(student: nn.Module) -> None:
    kinds = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
    if comm.get_world_size() > 1 and any(isinstance(m, kinds) for m in student.modules()):
        raise ValueError(
            "This batch has images without labels, which have a forward of their own, and the "
            "student has synchronised BatchNorm layers, which would wait for a process whose batch "
            'has none: set its norms to "BN", "FrozenBN" or "GN".'
        )
