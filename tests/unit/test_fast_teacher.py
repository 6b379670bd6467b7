"""What makes the teacher cheap: nothing is copied, run too deep, or too large."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_det.sources import Teacher
from kd_det.sources.compiled import compile_between_taps
from tests import toys
from tests.teachers import INPUTS, TAPS, assert_same, build, context, started, stock_maps

BRANCHES = ("cls_subnet", "bbox_subnet", "cls_score", "bbox_pred")


class Ops(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# -- nothing else ---------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [True, False])
def test_maps_are_the_detectors_own_tensors(files, saved):
    source = started(files)
    source.targets_saved = saved
    made = {}
    held = source.hidden.held
    held.backbone.register_forward_hook(lambda _, __, x: made.update(x))
    held.head.cls_score.register_forward_hook(lambda _, __, x: made.update({len(made): x}))
    maps = source(context(), TAPS).maps
    assert {x.data_ptr() for of in maps.values() for x in of.values()} <= {
        x.data_ptr() for x in made.values()
    }
    assert all(x.is_inference() is not saved for of in maps.values() for x in of.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_forward_is_convolutions_and_what_stands_between_them(files, precision):
    source = started(files, precision=precision)
    with Ops() as ops:
        tensor = source.hidden.held.preprocess_image(INPUTS).tensor
    before = len(ops.names)
    assert tensor.dtype == torch.float32
    with Ops() as ops:
        source(context(), TAPS)
    run = ops.names[before:]
    backbone = source.hidden.held.backbone.modules()
    branch = 2 * 5  # the class branch of the head: two convolutions on every level
    assert run.count("convolution") == sum(isinstance(m, nn.Conv2d) for m in backbone) + branch
    assert not {x for x in run if "batch_norm" in x or x in ("clone", "contiguous", "mul", "div")}
    # The image, once, to the network's precision and memory format.
    assert sum(x in ("_to_copy", "copy_") for x in run) == 1


# -- precision ------------------------------------------------------------------------------------


def test_bfloat16_is_within_two_percent_on_every_level(files):
    model = build(files)
    for m in model.modules():  # thin random blocks amplify rounding, trained ones do not
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.mul_(0.5)
    exact, rounded = (Teacher(model=model, precision=p) for p in ("float32", "bfloat16"))
    for source in (exact, rounded):
        source.prepare(TAPS)
    expected, found = (source(context(), TAPS).maps for source in (exact, rounded))
    for tap in TAPS:
        for level, x in expected[tap].items():
            error = (found[tap][level].float() - x).norm() / x.norm()
            assert 1e-5 < error < 0.02


# -- compiling ------------------------------------------------------------------------------------


class Backend:
    """Runs graphs as they are, and counts them."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


@pytest.mark.parametrize(
    ("taps", "units"),
    [
        (["backbone"], ["backbone", "head"]),
        (
            ["backbone", "head.cls_score"],
            ["backbone", *(f"head.{x}" for x in BRANCHES)],
        ),
    ],
)
def test_what_lies_between_taps_is_compiled(files, taps, units):
    model = build(files)
    found = compile_between_taps(model, ["backbone", "head"], taps, backend="eager")
    assert found == units
    changed = [name for name, m in model.named_modules() if "forward" in vars(m)]
    assert sorted(changed) == sorted(units)


def test_a_tap_inside_splits_what_is_compiled(files):
    model = build(files)
    found = compile_between_taps(model, ["backbone"], ["backbone.bottom_up.res4"], backend="eager")
    assert "backbone.bottom_up.res3" in found
    assert "backbone.bottom_up.res4" in found  # its hook stays outside of its graph
    assert not {"backbone", "backbone.bottom_up"} & set(found)


def test_a_compiled_teacher_gives_the_same_maps(files, monkeypatch):
    backend, compiler = Backend(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=backend))
    source = started(files, compile=True)
    source.targets_saved = False
    assert backend.runs == 0
    for inputs in (INPUTS, toys.batch(((96, 64),))):  # another size
        before = backend.runs
        maps = source(context(inputs), TAPS).maps
        assert backend.runs > before
        features, logits = stock_maps(files, inputs)
        assert_same(maps["features"]["p3"], features["p3"])
        assert_same(maps["cls_logits"]["p7"], logits["p7"])


# -- smaller images -------------------------------------------------------------------------------


def test_at_half_size_each_level_stands_for_twice_the_pixels(files):
    source = Teacher(config_file=files[0], weights=files[1], scale=0.5)
    assert [s.stride for s in source.shapes(TAPS)["features"]] == [16, 32, 64, 128, 256]
    source.prepare(TAPS)
    inputs = toys.batch(((128, 192), (127, 190)))
    maps = source(context(inputs), TAPS).maps["features"]
    halves = [
        {"image": F.interpolate(x["image"][None].float(), scale_factor=0.5, mode="bilinear",
                                antialias=True)[0]}
        for x in inputs
    ]  # fmt: skip
    assert [tuple(x["image"].shape[-2:]) for x in halves] == [(64, 96), (63, 95)]
    assert_same(maps["p3"], stock_maps(files, halves)[0]["p3"])
    assert inputs[0]["image"].shape[-2:] == (128, 192)


def test_a_small_image_is_seen_where_the_large_one_is(files):
    """A square on black: its cells at half size are those of the student's next level."""
    image = torch.zeros(3, 256, 256, dtype=torch.uint8)
    image[:, 128:160, 64:96] = 255
    source = Teacher(config_file=files[0], weights=files[1], scale=0.5)
    (small,) = [source._resized(image).mean(0)]
    rows, columns = (small > 100).nonzero().T
    assert (rows.min(), rows.max() + 1) == (64, 80)
    assert (columns.min(), columns.max() + 1) == (32, 48)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_is_positive(scale):
    with pytest.raises(ValueError, match=rf"scale is a finite number > 0, but got {scale}"):
        Teacher(config_file="x.yaml", scale=scale)


def test_a_scale_whose_cells_are_no_whole_pixels_is_an_error(files):
    source = Teacher(config_file=files[0], weights=files[1], scale=0.6)
    with pytest.raises(ValueError, match=r"level p3 \(stride 8\) covers 13.33 .* take a scale of"):
        source.shapes(("features",))
