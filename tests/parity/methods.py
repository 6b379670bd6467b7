"""
Published losses transcribed from their formulas with Python's own loops and floats, as in
`tests.parity.reference`: no tensor, no operator that the package uses.
"""

import math

from tests.parity.reference import Map, Row, distribution

Region = list[Row]
"""``[n][i]`` weights of the positions."""


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def mean_over_images(cells: Region, region: Region | None) -> float:
    """``1/N sum_n [sum_i w x / sum_i w]``, an image without weight 0."""
    images = []
    for n, row in enumerate(cells):
        w = region[n] if region else [1.0] * len(row)
        total = math.fsum(w)
        value = math.fsum(a * b for a, b in zip(w, row, strict=True))
        images.append(value / total if total else 0.0)
    return math.fsum(images) / len(images)


def attention_transfer(
    student: Map, teacher: Map, p: float = 2.0, region: Region | None = None, total: bool = False
) -> float:
    """Zagoruyko and Komodakis: mean over cells of (q_S - q_T)^2 of unit energy maps."""
    cells = []
    for n in range(len(student)):
        w = region[n] if region else [1.0] * len(student[n][0])
        unit = []
        for side in (student[n], teacher[n]):
            energy = [sum(abs(row[i]) ** p for row in side) / len(side) for i in range(len(w))]
            norm = math.sqrt(math.fsum(wi * e * e for wi, e in zip(w, energy, strict=True)))
            unit.append([e / norm if norm else 0.0 for e in energy])
        cells.append([(a - b) ** 2 for a, b in zip(*unit, strict=True)])
    if total:
        weights = region or [[1.0] * len(cells[0])] * len(cells)
        sums = [
            math.fsum(a * b for a, b in zip(w, row, strict=True))
            for w, row in zip(weights, cells, strict=True)
        ]
        return math.fsum(sums) / len(sums)
    return mean_over_images(cells, region)


def pixel_cells(
    student: Map, teacher: Map, mode: str, tau: float, classes: int, cross_entropy: bool
) -> Region:
    """``[n][i]``: divergence of the class scores at every position, times tau^2."""
    cells = []
    for s, t in zip(student, teacher, strict=True):
        row = []
        for i in range(len(s[0])):
            total = 0.0
            if mode == "softmax":
                for a in range(0, len(s), classes):
                    mine = distribution([x[i] for x in s[a : a + classes]], tau, [1.0] * classes)
                    theirs = distribution([x[i] for x in t[a : a + classes]], tau, [1.0] * classes)
                    for p, q in zip(theirs, mine, strict=True):
                        total += -p * math.log(q) + (0 if cross_entropy else p * math.log(p))
            else:
                for a, b in zip(s, t, strict=True):
                    q, p = sigmoid(a[i] / tau), sigmoid(b[i] / tau)
                    for x, y in ((p, q), (1 - p, 1 - q)):
                        total += -x * math.log(y) + (0 if cross_entropy else x * math.log(x))
            row.append(tau**2 * total)
        cells.append(row)
    return cells


def imitation(
    student: Map, teacher: Map, region: Region | None = None, over_channels: str = "mean"
) -> float:
    """Half of sum w (s - t)^2 over the batch, by sum w and (or not) by C."""
    above, below = [], []
    for n in range(len(student)):
        for i in range(len(student[n][0])):
            w = region[n][i] if region else 1.0
            squares = sum((a[i] - b[i]) ** 2 for a, b in zip(student[n], teacher[n], strict=True))
            above.append(w * squares / (len(student[n]) if over_channels == "mean" else 1))
            below.append(w)
    return math.fsum(above) / (math.fsum(below) or 1.0) / 2


def channel_mean(student: Map, teacher: Map, region: Region | None = None) -> float:
    """Zhou et al.: squared difference of the means over positions."""
    squares = []
    for n in range(len(student)):
        for s, t in zip(student[n], teacher[n], strict=True):
            w = region[n] if region else [1.0] * len(s)
            total = math.fsum(w) or 1.0
            means = [
                math.fsum(a * b for a, b in zip(w, row, strict=True)) / total for row in (s, t)
            ]
            squares.append((means[0] - means[1]) ** 2)
    return math.fsum(squares) / len(squares)


def pearson_distance(
    student: Map, teacher: Map, region: Region | None = None, eps: float = 1e-6
) -> float:
    """Cao et al.: half the mean of squares between channels of mean 0 and unbiased deviation 1."""
    images, channels, positions = len(student), len(student[0]), len(student[0][0])
    places = [
        (n, i)
        for n in range(images)
        for i in range(positions)
        if region is None or region[n][i] > 0
    ]
    total = 0.0
    for c in range(channels):
        scaled = []
        for side in (student, teacher):
            x = [side[n][c][i] for n, i in places]
            mean = math.fsum(x) / len(x)
            var = math.fsum((v - mean) ** 2 for v in x) / (len(x) - 1)
            scaled.append([(v - mean) / (math.sqrt(var) + eps) for v in x])
        total += math.fsum((a - b) ** 2 for a, b in zip(*scaled, strict=True)) / len(places)
    return total / channels / 2


def weighted_bce_cells(student: Map, teacher: Map, beta: float) -> Region:
    """``[n][i]``: sum over channels of |q - p|^beta BCE(q, p)."""
    cells = []
    for s, t in zip(student, teacher, strict=True):
        row = []
        for i in range(len(s[0])):
            total = 0.0
            for a, b in zip(s, t, strict=True):
                q, p = sigmoid(a[i]), sigmoid(b[i])
                bce = -p * math.log(q) - (1 - p) * math.log(1 - q)
                total += abs(q - p) ** beta * bce
            row.append(total)
        cells.append(row)
    return cells


def decode(anchor: Row, delta: Row) -> Row:
    """A box of RetinaNet's coding (weights 1) as XYXY."""
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x = anchor[0] + w / 2 + delta[0] * w
    y = anchor[1] + h / 2 + delta[1] * h
    w, h = w * math.exp(delta[2]), h * math.exp(delta[3])
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def iou(a: Row, b: Row) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    common = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if common else 0.0


def generalized_iou(a: Row, b: Row) -> float:
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    area = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    overlap = iou(a, b)
    union = area / (1 + overlap)  # iou = common / (area - common)
    return overlap - (hull - union) / hull


def attention(side: Map, tau: float, inside: Region) -> Region:
    """FKD's spatial attention: softmax over the cells of the image, times their number."""
    result = []
    for image, w in zip(side, inside, strict=True):
        mean = [sum(abs(row[i]) for row in image) / len(image) for i in range(len(w))]
        shares = distribution(mean, tau, w)
        result.append([x * sum(w) for x in shares])
    return result


def root_of_squares(student: Map, teacher: Map, region: Region | None = None) -> float:
    """The root of the total, FKD's norm."""
    total = 0.0
    for n in range(len(student)):
        for s, t in zip(student[n], teacher[n], strict=True):
            w = region[n] if region else [1.0] * len(s)
            total += sum(wi * (a - b) ** 2 for wi, a, b in zip(w, s, t, strict=True))
    return math.sqrt(total)


def non_local(image: list[Row], modules: dict[str, tuple[list[Row], Row]], real: Row) -> list[Row]:
    """``x_i + W 1/M sum_j <theta x_i, phi x_j> g x_j + b``; modules as (weight, bias)."""

    def conv(name: str, i: int, rows: list[Row]) -> Row:
        weight, bias = modules[name]
        return [
            b + sum(w * row[i] for w, row in zip(ws, rows, strict=True))
            for ws, b in zip(weight, bias, strict=True)
        ]

    cells = range(len(image[0]))
    phi = [conv("phi", j, image) for j in cells]
    g = [conv("g", j, image) for j in cells]
    gathered = []
    for i in cells:
        theta = conv("theta", i, image)
        total = [0.0] * len(theta)
        for j in cells:
            if real[j]:
                like = sum(a * b for a, b in zip(theta, phi[j], strict=True))
                total = [x + like * v for x, v in zip(total, g[j], strict=True)]
        gathered.append([x / sum(real) for x in total])
    columns = [list(row) for row in zip(*gathered, strict=True)]
    out = [conv("out", i, columns) for i in cells]
    return [[image[c][i] + out[i][c] for i in cells] for c in range(len(image))]
