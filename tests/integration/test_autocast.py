"""Mixed precision around the Distiller, connectors included."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.steps import seeded, step
from tests.toys import batch, distiller_cfg

FPN = {"TYPE": "CWD", "TAP": "features", "WEIGHT": 5.0}  # 8 channels beside 16: it has connectors
LOGITS = {"TYPE": "CWD", "TAP": "cls_logits"}
INPUTS = batch(((128, 128), (100, 120)))  # with padding


def built(teacher: tuple[str, str], standardize: bool = False, precision: str = "float32") -> Any:
    """FrozenBN: random BatchNorm layers in a row amplify any rounding until nothing is left."""
    terms = {"FPN": FPN, "LOGITS": LOGITS}
    terms = {k: {**v, "STANDARDIZE": standardize} for k, v in terms.items()}
    cfg = distiller_cfg(teacher, terms, norm="FrozenBN")
    cfg.MODEL.PIXEL_STD = [58.0, 58.0, 58.0]
    cfg.KD.SOURCES.TEACHER.PRECISION = precision
    return seeded(cfg).train()


def kd_gradients(model: nn.Module, losses: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Gradients of the KD terms alone, scaled in the backward only."""
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    kd = sum(v for k, v in losses.items() if k.startswith("loss_kd_"))
    found = torch.autograd.grad(
        kd * scale, list(named.values()), retain_graph=True, allow_unused=True
    )
    return {k: g / scale for k, g in zip(named, found, strict=True) if g is not None}


def finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors.values())


def cosine(a: dict[str, Tensor], b: dict[str, Tensor], prefix: str) -> float:
    keys = [k for k in b if k.startswith(prefix)]
    assert keys
    x, y = (torch.cat([d[k].flatten().double() for k in keys]) for d in (a, b))
    return float(F.cosine_similarity(x, y, dim=0))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "standardized"])
def exact(request: pytest.FixtureRequest, teacher: tuple[str, str]) -> tuple[Any, ...]:
    model = built(teacher, request.param)
    losses = step(model, 0, INPUTS)
    return request.param, losses, kd_gradients(model, losses, 1.0)


# The smallest cosines that were measured: 0.984 (bfloat16), 0.9989 (float16).
CASES = [
    (torch.bfloat16, "float32", 0.98),
    (torch.bfloat16, "bfloat16", 0.98),
    (torch.float16, "float32", 0.998),
    (torch.float16, "float16", 0.998),
]


@pytest.mark.parametrize(("dtype", "precision", "close"), CASES)
def test_gradients_are_near_those_of_float32(
    teacher: tuple[str, str],
    exact: tuple[Any, ...],
    dtype: torch.dtype,
    precision: str,
    close: float,
) -> None:
    standardize, exact_losses, exact_gradients = exact
    model = built(teacher, standardize, precision)
    model.prepare()
    held = model.sources["teacher"].hidden.held
    computed: set[torch.dtype] = set()
    held.backbone.fpn_output3.register_forward_hook(lambda _, __, x: computed.add(x.dtype))
    with torch.autocast("cpu", dtype):
        losses = step(model, 0, INPUTS)
    assert finite(losses)
    for name in ("loss_kd_fpn", "loss_kd_logits"):
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], exact_losses[name], rtol=0.02, atol=0)
    # As a GradScaler does: from 2^16 down, until nothing overflows.
    scale = 2.0**16 if dtype == torch.float16 else 1.0
    while not finite(found := kd_gradients(model, losses, scale)) and scale > 1:
        scale /= 2
    assert finite(found)
    assert found.keys() == exact_gradients.keys()
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert cosine(found, exact_gradients, "terms.") > close
    assert cosine(found, exact_gradients, "student.") > close
    # The teacher is held and run in its own precision, whatever autocast casts.
    assert {p.dtype for p in held.parameters()} == computed == {getattr(torch, precision)}
