"""What sums over anchors are divided by."""

from kd_det.context import Context

NORMALIZERS = ("cells", "positives")
"""
``cells``: mean over the cells of an image and over images, level by level. ``positives``: the
student's own running number of foreground anchors, by which its losses are divided as well, for
all levels together; of this process, as there.
"""


def check_normalizer(term: str, normalizer: str) -> None:
    """
    Refuse an unknown normaliser.

    Raises:
        ValueError: if it is none of `NORMALIZERS`.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(
            f"{term}'s normalizer is one of {', '.join(NORMALIZERS)}, but got '{normalizer}'."
        )


def divisor(normalizer: str, context: Context) -> float | None:
    """
    The number to divide by; ``None`` for the mean over cells.

    Raises:
        ValueError: if the student keeps no number of foreground anchors.
    """
    return context.positives if normalizer == "positives" else None
