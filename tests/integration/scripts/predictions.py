"""What a detector predicts, as plain tensors by name; nothing in here knows of kd_det."""

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def predictions(model: nn.Module, inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """One dict per image, of every kind of output that Detectron2 has."""
    return [dict(_tensors(output)) for output in model.eval()(inputs)]


def _tensors(output: dict[str, Any]) -> Any:
    for kind, value in output.items():
        if isinstance(value, Tensor):
            yield kind, value
        elif kind == "panoptic_seg":
            yield kind, value[0]
        else:
            for field, x in value.get_fields().items():
                yield f"{kind}.{field}", getattr(x, "tensor", x)
