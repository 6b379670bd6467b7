"""Taps and the Recorder: what is recorded, that nothing stays behind or goes wrong in silence."""

import pytest
import torch
from torch import nn

from kd_det.taps import Recorder, Tap, find_module


class Toy(nn.Module):
    """A trunk with two levels, and a head that is called once per level."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.ModuleDict({"stem": nn.Conv2d(3, 2, 1)})
        self.head = nn.Conv2d(2, 4, 1)
        self.idle = nn.Conv2d(2, 2, 1)

    def forward(self, x, heads=2):
        p3 = self.trunk["stem"](x)
        levels = [p3, p3[..., ::2, ::2], p3[..., ::4, ::4]]
        return [self.head(p) for p in levels[:heads]]


class Gives(nn.Module):
    """Returns what it is given."""

    def forward(self, x):
        return x


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


IMAGE = torch.rand(1, 3, 8, 8)
HEAD = Tap("logits", "head")
STEM = Tap("stem", "trunk.stem")


# -- the Recorder ---------------------------------------------------------------------------------


def test_hooks_live_inside_the_block_only():
    model = Toy()
    with Recorder(model, [HEAD, STEM]):
        assert hooks(model) == 2
        model(IMAGE)
    assert hooks(model) == 0


def test_hooks_are_gone_after_an_exception():
    model = Toy()
    with pytest.raises(RuntimeError), Recorder(model, [HEAD, STEM]):
        model(torch.rand(1, 5, 8, 8))
    assert hooks(model) == 0


def test_the_users_own_hooks_stay():
    model = Toy()
    seen = []
    model.head.register_forward_hook(lambda m, i, o: seen.append(o))
    with Recorder(model, [HEAD]):
        model(IMAGE)
    model(IMAGE)
    assert len(seen) == 4


def test_taps_of_one_module_share_a_hook():
    model = Toy()
    again = Tap("again", "head", levels=("p3", "p4"))
    with Recorder(model, [HEAD, again]) as recorder:
        assert hooks(model) == 1
        model(IMAGE)
    assert list(recorder.maps(HEAD)) == ["0", "1"]
    assert list(recorder.maps(again)) == ["p3", "p4"]


def test_a_shared_head_keeps_every_level_by_reference():
    model = Toy()
    with Recorder(model, [HEAD]) as recorder:
        outputs = model(IMAGE)
    maps = recorder.maps(HEAD)
    assert [tuple(x.shape[-2:]) for x in maps.values()] == [(8, 8), (4, 4)]
    assert all(found is made for found, made in zip(maps.values(), outputs, strict=True))
    assert all(x.grad_fn is not None for x in maps.values())


def test_a_recorder_starts_anew_each_time_it_is_entered():
    model = Toy()
    recorder = Recorder(model, [HEAD])
    for _ in range(2):
        with recorder:
            model(IMAGE)
    assert len(recorder.maps(HEAD)) == 2


def test_a_recorder_does_not_change_what_the_model_returns():
    model = Toy()
    plain = model(IMAGE)
    with Recorder(model, [HEAD, STEM]):
        recorded = model(IMAGE)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_a_tap_that_does_not_fire_is_an_error():
    model = Toy()
    idle = Tap("mine", "idle")
    with Recorder(model, [idle]) as recorder:
        model(IMAGE)
    with pytest.raises(
        RuntimeError, match=r"'mine': module 'idle' was called 0 time.*at least once"
    ):
        recorder.maps(idle)


@pytest.mark.parametrize("heads", [0, 1, 3])
def test_a_tap_that_fires_another_number_of_times_than_expected_is_an_error(heads):
    model = Toy()
    with Recorder(model, [HEAD], {"head": 2}) as recorder:
        model(IMAGE, heads)
    with pytest.raises(RuntimeError, match=rf"called {heads} time.*should be called 2 time"):
        recorder.maps(HEAD)


def test_forwards_that_share_a_recorder_are_told_apart_by_the_expected_number():
    model = Toy()
    with Recorder(model, [HEAD], {"head": 2}) as recorder:
        model(IMAGE)
        model(IMAGE)
    with pytest.raises(RuntimeError, match="called 4 time"):
        recorder.maps(HEAD)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("trunk.stm", r"Toy has no tap or module 'trunk.stm'. Did you mean 'trunk.stem'"),
        ("Head", r"Did you mean 'head'\?"),
        ("trunk.stem.conv", "kd_det taps"),
        ("head.weight", "no tap or module 'head.weight'"),  # a parameter, no module
    ],
)
def test_a_wrong_path_is_an_error_before_anything_runs(path, words):
    with pytest.raises(KeyError, match=words):
        Recorder(Toy(), [Tap("x", path)])


def test_the_empty_path_is_the_model():
    model = Toy()
    assert find_module(model, "") is model


# -- what a module returned, as maps --------------------------------------------------------------

A, B = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)


@pytest.mark.parametrize(
    ("tap", "calls", "maps"),
    [
        (Tap("t", "m"), [A], {"0": A}),
        (Tap("t", "m"), [A, B], {"0": A, "1": B}),
        (Tap("t", "m"), [[A, B]], {"0": A, "1": B}),
        (Tap("t", "m"), [(A, B)], {"0": A, "1": B}),
        (Tap("t", "m"), [{"p3": A, "p4": B}], {"p3": A, "p4": B}),
        (Tap("t", "m", levels=("p4", "p3")), [{"p3": A, "p4": B}], {"p4": B, "p3": A}),
        (Tap("t", "m", levels=("p3",)), [{"p3": A, "p4": B}], {"p3": A}),
        (Tap("t", "m", levels=("p3", "p4")), [[A, B]], {"p3": A, "p4": B}),
        (Tap("t", "m", levels=("p3", "p4")), [A, B], {"p3": A, "p4": B}),
        (Tap("t", "m", key=1), [([A], [B])], {"0": B}),
        (Tap("t", "m", key=0, levels=("p3", "p4")), [([A, B], [B, A])], {"p3": A, "p4": B}),
        (Tap("t", "m", key=1), [(A, B), (B, A)], {"0": B, "1": A}),
        (Tap("t", "m", key="res4"), [{"res3": A, "res4": B}], {"0": B}),
        (Tap("t", "m", key="res4", levels=("res4",)), [{"res4": B}], {"res4": B}),
    ],
)
def test_maps(tap, calls, maps):
    found = tap.maps(calls)
    assert list(found) == list(maps)
    assert all(found[level] is maps[level] for level in maps)


@pytest.mark.parametrize(
    ("tap", "calls", "words"),
    [
        (Tap("t", "m", levels=("p3", "p4")), [A], r"levels p3, p4.*returned 1 maps in 1 call"),
        (Tap("t", "m", levels=("p3",)), [A, B], r"'m' returned 2 maps in 2 call"),
        (Tap("t", "m"), [torch.zeros(3, 4)], r"gives \(3, 4\), not an \(N, C, H, W\) map"),
        (Tap("t", "m"), [{"p3": "text"}], "level 'p3'.* gives str"),
        (Tap("t", "m"), [[A, None]], "gives NoneType"),
        (Tap("t", "m", levels=("p3", "p9")), [{"p3": A}], "p9"),
    ],
)
def test_what_is_no_map_is_an_error(tap, calls, words):
    with pytest.raises(ValueError, match=words):
        tap.maps(calls)


@pytest.mark.parametrize(
    "tap", [Tap("t", "", key="p9"), Tap("t", "", key=3)], ids=["name", "position"]
)
@pytest.mark.parametrize("output", [{"p3": A}, [A]], ids=["dict", "list"])
def test_a_key_that_the_output_does_not_have_is_an_error_that_names_the_tap(tap, output):
    model = Gives()
    with Recorder(model, [tap]) as recorder:
        model(output)
    with pytest.raises(ValueError, match=r"Tap 't'"):
        recorder.maps(tap)
