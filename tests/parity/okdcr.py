"""
OKDCR transcribed from its formulas with Python's own floats, as in `tests.parity.reference`.

The equations of the paper were not to be had: this is the reconstruction that kd_det goes by,

    p_k^j = softmax(z_k^j),  D_intra^k = |p_k^1 - p_k^2|_1 / K,  D_inter^j = |p_k^j - p_m^j|_1 / K
    w_k = softmax_k(-D_intra^k),  z_ens = sum_k w_k (z_k^1 + z_k^2) / 2
    L = sum CE + lambda (sum D_intra + sum D_inter) + omega(s) T^2 sum KL(z_ens || z_k^j)
    omega(s) = min(1, 1.25 s / S)

and its form for classes that do not exclude each other, ``p = sigmoid(z)`` class by class and a KL
of Bernoullis. A sample is one anchor of one cell of one image.
"""

import math

from tests.parity.methods import sigmoid
from tests.parity.reference import Row, distribution

Sample = list[list[Row]]
"""``z[k][j][c]``: peers, their heads, classes."""


def probabilities(z: Row, mode: str, tau: float = 1.0) -> Row:
    if mode == "softmax":
        return distribution(z, tau, [1.0] * len(z))
    return [sigmoid(x / tau) for x in z]


def distance(a: Row, b: Row, mode: str) -> float:
    """Of two predictions of one sample: both D_intra and D_inter are this."""
    total = 0.0
    for p, q in zip(probabilities(a, mode), probabilities(b, mode), strict=True):
        total += p - q if p > q else q - p
    return total / len(a)


def weights(z: Sample, mode: str) -> Row:
    """Of the peers: who agrees with itself counts more."""
    shares = [math.exp(-distance(first, second, mode)) for first, second in z]
    return [x / math.fsum(shares) for x in shares]


def ensemble(z: Sample, mode: str) -> Row:
    """The logits that every head is taught with."""
    total = [0.0] * len(z[0][0])
    for w, (first, second) in zip(weights(z, mode), z, strict=True):
        for c in range(len(total)):
            total[c] += w * (first[c] + second[c]) / 2
    return total


def consistency(z: Sample, mode: str) -> tuple[float, float]:
    """Sum of D_intra over peers; sum of D_inter over heads and pairs of peers."""
    intra = math.fsum(distance(first, second, mode) for first, second in z)
    inter = 0.0
    for k in range(len(z)):
        for m in range(k):
            for j in range(2):
                inter += distance(z[k][j], z[m][j], mode)
    return intra, inter


def divergence(z: Row, target: Row, mode: str, tau: float) -> float:
    """``tau^2 KL(target || z)``; of Bernoullis, the sum over classes."""
    total = 0.0
    pairs = zip(probabilities(target, mode, tau), probabilities(z, mode, tau), strict=True)
    for p, q in pairs:
        total += p * math.log(p / q)
        if mode == "sigmoid":
            total += (1 - p) * math.log((1 - p) / (1 - q))
    return tau**2 * total


def imitation(z: Sample, mode: str, tau: float = 3.0) -> float:
    """Sum over peers and heads of the divergence from the ensemble."""
    target = ensemble(z, mode)
    return math.fsum(divergence(head, target, mode, tau) for peer in z for head in peer)


def ramp(step: int, steps: int) -> float:
    return min(1.0, 1.25 * step / steps)
