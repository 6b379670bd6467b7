"""
Levels and strides of mixed pairs, with numbers: after pairing, cells that meet look at the same
pixels of the student's image.
"""

import pytest
import torch
from torch.testing import assert_close

from kd_det import Distiller, Teacher
from tests.rulers import Ruler, Watch, positions

SIZES = ((70, 100), (64, 90))
P3_P7 = {f"p{i}": 2**i for i in range(3, 8)}
P2_P6 = {f"p{i}": 2**i for i in range(2, 7)}
C4 = {"res4": 16}


def compared(student, teacher, scale=1.0, **term):
    """(pairs of level names, what the term compared) for one batch of two sizes."""
    watch = Watch(**term)
    distiller = Distiller(
        student=Ruler(*student),
        sources={"teacher": Teacher(model=Ruler(*teacher), scale=scale)},
        terms={"watch": watch},
    )
    distiller([positions(*size) for size in SIZES])
    pairs = [(p.student.level, p.target.level) for p in watch.pairs]
    return pairs, list(zip(watch.pairs, watch.seen, strict=True))


def inside(region, grid, stride, margin):
    """Which cells of each image lie inside of it, ``margin`` pixels from its border."""
    cells = []
    for n, (height, width) in enumerate(SIZES):
        y, x = ((torch.arange(side) * stride) for side in grid)
        rows = (y >= margin) & (y + stride <= height - margin)
        columns = (x >= margin) & (x + stride <= width - margin)
        cells.append(rows[:, None] & columns)
        if region is not None:
            assert (region[n, 0][cells[n]] == 1).all()
    return torch.stack(cells)[:, None]  # (N, 1, H, W)


CASES = {
    "a pyramid from P3 and one from P2, padded to 128 and to 32": (
        (P3_P7, 128), (P2_P6, 32), {}, [(f"p{i}", f"p{i}") for i in range(3, 7)],
    ),
    "and the other way round": (
        (P2_P6, 32), (P3_P7, 128), {}, [(f"p{i}", f"p{i}") for i in range(3, 7)],
    ),
    "a C4 student, which pads to nothing": ((C4, 0), (P2_P6, 32), {}, [("res4", "p4")]),
    "a C4 teacher": ((P3_P7, 128), (C4, 0), {}, [("p4", "res4")]),
    "a half-resolution student: levels shift by one": (
        (P3_P7, 128), (P3_P7, 128), {"scale": 2.0},
        [("p3", "p4"), ("p4", "p5"), ("p5", "p6"), ("p6", "p7")],
    ),
    "a C4 teacher at twice the size": ((P3_P7, 32), (C4, 0), {"scale": 2.0}, [("p3", "res4")]),
    "a teacher that sees less": (
        (P2_P6, 32), (P2_P6, 64), {"scale": 0.5},
        [("p3", "p2"), ("p4", "p3"), ("p5", "p4"), ("p6", "p5")],
    ),
    "one level each, of other strides": ((C4, 0), ({"res3": 8}, 32), {}, [("res4", "res3")]),
    "and towards the coarser": (({"res3": 8}, 32), (C4, 0), {}, [("res3", "res4")]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equal_pixels_meet(case):
    student, teacher, options, pairs = CASES[case]
    found, seen = compared(student, teacher, **options)
    assert found == pairs
    cells = 0
    for pair, (s, t, region) in seen:
        assert s.shape == t.shape
        # A resized map or image is clamped at the border of what it was made from.
        resized = pair.student.stride != pair.target.stride or "scale" in options
        margin = max(pair.student.stride, pair.target.stride) if resized else 0
        where = inside(region, s.shape[-2:], pair.target.stride, margin).expand_as(s)
        assert_close(s[where], t[where], atol=1e-3, rtol=0)
        stride = pair.target.stride
        middle = (torch.arange(s.shape[-1]) + 0.5) * stride
        assert_close(t[0, 0][where[0, 0]], middle.expand_as(t[0, 0])[where[0, 0]])
        cells += int(where[:, 0].sum())
    assert cells >= 8  # or nothing was compared


def test_cells_of_other_pixels_would_be_seen():
    # The wrong level, of half the pixels: the positions differ by more than a cell.
    _, seen = compared((P3_P7, 128), (P2_P6, 32), levels=("p3",))
    ((_, (s, _, _)),) = seen
    _, shifted = compared((P2_P6, 32), (P2_P6, 32), levels=("p2",))
    ((_, (_, t, _)),) = shifted
    assert (s[..., :4, :4] - t[..., :4, :4]).abs().max() > 8


def test_a_scale_that_gives_no_whole_stride_is_an_error():
    with pytest.raises(ValueError, match=r"Source 'teacher': At scale 1.5 .* p3 \(stride 8\)"):
        compared((P3_P7, 128), (P3_P7, 128), scale=1.5)
