"""OKDCR: how far two predictions are apart, and an ensemble that minds how far."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_det.losses.class_scores import by_anchor, check_mode, probabilities
from kd_det.losses.reduce import mean_over_images, sum_over_cells, wide

Heads = tuple[Tensor, Tensor | None]
"""``(N, C, H, W)`` logits of a network's two heads; ``None`` where it has but one."""


def consistency(
    a: Tensor,
    b: Tensor,
    *,
    mode: str = "sigmoid",
    classes: int = 0,
    region: Tensor | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """
    Distance between two predictions of the same classes, which pulls at both: the intra-model and
    the inter-model consistency of OKDCR (Zhang, Gong, Liu, 2021), in our *reconstruction* of its
    equations.

        p = softmax_k(z_iak)  or  sigmoid(z_iak)
        d_i = sum_a 1/K sum_k | p_iak(a) - p_iak(b) |
        1/N sum_n mean_i d_ni,   or sum_{n,i} d_ni / normalizer

    Symmetric, and between 0 and the number of anchors (of a softmax, that times 2/K). An anchor's
    part is published for the softmax of a classifier; sigmoids are what a dense detector has.

    Args:
        a: ``(N, C, H, W)`` logits. Receives the gradient, 0 where both agree.
        b: of the same shape. Receives the gradient as well: detach it where it is a constant.
        mode: ``"softmax"`` over the classes of an anchor, or ``"sigmoid"`` of each.
        classes: K: channels are C / K anchors of that many classes, anchor by anchor; 0 takes all C
            for one.
        region: ``(N, 1, H, W)`` weights >= 0 of the cells; an image without one adds exactly 0.
        normalizer: what the sum is divided by, the number of positive anchors say; ``None`` takes
            the mean over the cells of an image and over images.

    Returns:
        float32 (float64 for float64 input) scalar.

    Raises:
        ValueError: if the mode is unknown, or C is no multiple of ``classes``.
    """
    cells = _distance(a, b, mode, classes).sum(1)  # (N, 1, H, W)
    if normalizer is None:
        return mean_over_images(cells, region)
    return sum_over_cells(cells, region) / normalizer


@torch.no_grad()
def ensemble_logits(
    networks: Sequence[Heads], *, mode: str = "sigmoid", classes: int = 0
) -> Tensor:
    """
    OKDCR's adaptive ensemble, anchor by anchor (*reconstruction*): the networks' mean logits, those
    more whose two heads agree.

        D_k = 1/K sum_c | p_kc(first) - p_kc(second) |,   w = softmax_k(-D_k)
        z = sum_k w_k (z_k(first) + z_k(second)) / 2

    A network with one head counts as one that agrees with itself, D = 0: without second heads the
    ensemble is the plain mean.

    Args:
        networks: of each the logits of its heads, all ``(N, C, H, W)``.
        mode: how p comes from z, see `consistency`.
        classes: K, see there.

    Returns:
        ``(N, C, H, W)`` logits, float32 (float64 for float64 input), a constant.

    Raises:
        ValueError: if the mode is unknown, or C is no multiple of ``classes``.
    """
    check_mode(mode)
    distances = [_disagreement(first, second, mode, classes) for first, second in networks]
    weights = (-torch.stack(distances)).softmax(0)  # (P, N, A, 1, H, W)
    total = torch.zeros_like(wide(networks[0][0]))
    for w, (first, second) in zip(weights, networks, strict=True):
        mean = wide(first) if second is None else (wide(first) + wide(second)) / 2
        total += (w * by_anchor(mean, classes)).flatten(1, 2)
    return total


def _distance(a: Tensor, b: Tensor, mode: str, classes: int) -> Tensor:
    """Mean over classes of the difference of two scores, ``(N, A, 1, H, W)``."""
    gap = probabilities(a, mode, classes) - probabilities(b, mode, classes)
    return gap.abs().mean(2, keepdim=True)


def _disagreement(first: Tensor, second: Tensor | None, mode: str, classes: int) -> Tensor:
    if second is None:
        return torch.zeros_like(by_anchor(wide(first), classes)[:, :, :1])  # (N, A, 1, H, W)
    return _distance(first, second, mode, classes)
