"""Channels of class logits: which anchor and class each is, and what probability."""

import torch
from torch import Tensor

from kd_det.losses.reduce import wide

MODES = ("softmax", "sigmoid")


def check_mode(mode: str) -> None:
    """
    Refuse an unknown reading of class logits.

    Raises:
        ValueError: if it is none of `MODES`.
    """
    if mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}, but got '{mode}'.")


def by_anchor(logits: Tensor, classes: int = 0) -> Tensor:
    """
    ``(N, A * K, H, W)`` as ``(N, A, K, H, W)``.

    Args:
        logits: channels are anchors of K classes each, anchor by anchor.
        classes: K; 0 takes all channels for one anchor's.

    Raises:
        ValueError: if the channels are no multiple of K.
    """
    channels = logits.shape[1]
    if channels % (classes or channels):
        raise ValueError(
            f"there are {channels} channels, which are no whole number of anchors with "
            f"{classes} classes each."
        )
    return logits.unflatten(1, (-1, classes or channels))


def probabilities(logits: Tensor, mode: str, classes: int = 0) -> Tensor:
    """
    Class scores of every anchor, ``(N, A, K, H, W)``, in float32 (float64 for float64 input).

    Args:
        logits: ``(N, A * K, H, W)``.
        mode: ``"softmax"`` over the classes of an anchor, or ``"sigmoid"`` of each.
        classes: K, see `by_anchor`.

    Raises:
        ValueError: if the mode is unknown, or the channels are no multiple of K.
    """
    check_mode(mode)
    z = by_anchor(wide(logits), classes)  # (N, A, K, H, W)
    return z.softmax(2) if mode == "softmax" else torch.sigmoid(z)
