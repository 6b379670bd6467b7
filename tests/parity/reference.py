"""
Losses transcribed from their formulas with Python's own loops and floats.

Nothing here uses tensors, so that an error in the package cannot hide in a shared operator.
"""

import math

Row = list[float]
Map = list[list[Row]]
"""``[n][c][i]``: images, channels, positions of the grid in row-major order."""


def golden_map(a: float, b: float, o: float, shape: tuple[int, int, int]) -> Map:
    """``x[k] = sin(a k + o) + b ((k mod 7) - 3)``, k the flat index of (N, C, M)."""
    images, channels, positions = shape
    flat = [math.sin(a * k + o) + b * ((k % 7) - 3) for k in range(images * channels * positions)]
    return [
        [
            flat[(n * channels + c) * positions : (n * channels + c + 1) * positions]
            for c in range(channels)
        ]
        for n in range(images)
    ]


def distribution(row: Row, tau: float, region: Row) -> Row:
    """``w_i exp(x_i / tau) / sum_j w_j exp(x_j / tau)``."""
    top = max(row)
    e = [w * math.exp((x - top) / tau) for x, w in zip(row, region, strict=True)]
    total = math.fsum(e)
    return [x / total for x in e]


def channel_wise_kl(
    student: Map,
    teacher: Map,
    tau: float = 1.0,
    region: list[Row] | None = None,
    channel_weight: list[Row] | None = None,
) -> float:
    """
    CWD (https://arxiv.org/abs/2011.13256, eq. 4 and 5), the mean over images of the (weighted) mean
    over channels of tau^2 KL(teacher || student).

    Args:
        student: the student's map.
        teacher: the teacher's map.
        tau: temperature.
        region: ``[n][i]`` weights of the positions; every image has a positive one.
        channel_weight: ``[n][c]`` weights of the channels; every image has a positive one.
    """
    per_image = []
    for n in range(len(student)):
        cells = region[n] if region else [1.0] * len(student[n][0])
        weights = channel_weight[n] if channel_weight else [1.0] * len(student[n])
        weighted = []
        for s_row, t_row, weight in zip(student[n], teacher[n], weights, strict=True):
            q = distribution(s_row, tau, cells)
            p = distribution(t_row, tau, cells)
            kl = math.fsum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True) if pi > 0)
            weighted.append(weight * kl)
        per_image.append(math.fsum(weighted) / math.fsum(weights))
    return tau**2 * math.fsum(per_image) / len(per_image)
