"""The frozen teacher: what it computes, loading, containment, pixels, precision, laziness."""

import copy
import logging
import pickle
import random

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.testing import assert_close

from kd_det.context import Context
from kd_det.detectors import describe
from kd_det.sources import Hidden, SourceUnavailable, Teacher
from kd_det.sources.strict import file_fingerprint, load_strictly
from kd_det.taps import Recorder
from tests import toys

TAPS = ("features", "cls_logits")
INPUTS = toys.batch(((64, 64), (50, 60)))


def assert_same(ours, theirs):
    """Equal up to the rounding of folded weights over 50 layers."""
    assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


class Owner(nn.Module):
    """What a Distiller is to a teacher: a module with a student and a source."""

    def __init__(self, teacher):
        super().__init__()
        self.student = nn.Linear(1, 1)
        self.teacher = teacher


def context(inputs=INPUTS, input_format="BGR"):
    return Context(inputs, input_format, nn.Identity())


def build(files):
    """The teacher's detector as stock Detectron2 builds and loads it."""
    config, weights = files
    cfg = get_cfg()
    cfg.merge_from_file(config)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(weights)["model"])
    return model


def stock_maps(files, inputs=INPUTS):
    """Features and logits as the detector itself computes them in eval mode."""
    model = build(files)
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(inputs).tensor)
        logits, _ = model.head([features[f] for f in model.head_in_features])
    return features, dict(zip(model.head_in_features, logits, strict=True))


def started(files, taps=TAPS, **kwargs):
    source = Teacher(config_file=files[0], weights=files[1], **kwargs)
    source.prepare(taps)
    return source


def altered(files, tmp_path, change):
    """The path of a copy of the weights file whose state dict was changed."""
    state = torch.load(files[1])["model"]
    change(state)
    path = tmp_path / "altered.pth"
    torch.save({"model": state}, path)
    return files[0], str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys.save_teacher(tmp_path_factory.mktemp("files"), fpn=16)


# -- what it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [False, True])
def test_maps_are_those_of_stock_detectron2(files, fold):
    maps = started(files, fold_batch_norm=fold)(context(), TAPS).maps
    features, logits = stock_maps(files)
    for level in ("p3", "p4", "p5", "p6", "p7"):
        assert_same(maps["features"][level], features[level])
        assert_same(maps["cls_logits"][level], logits[level])
        assert not maps["features"][level].requires_grad


def test_folding_is_done_and_logged(files, caplog):
    with caplog.at_level(logging.INFO, logger="kd_det"):
        held = started(files).hidden.held
    assert not any(isinstance(m, nn.BatchNorm2d) for m in held.modules())
    assert "BatchNorm layers folded" in caplog.text
    held = started(files, fold_batch_norm=False).hidden.held
    assert any(isinstance(m, nn.BatchNorm2d) for m in held.modules())


def test_a_tapped_norm_is_not_folded_away(files):
    tap = "backbone.bottom_up.res4.0.conv1.norm"
    maps = started(files, (tap,))(context(), (tap,)).maps[tap]
    model = build(files)
    with Recorder(model, [describe(model).tap(tap)]) as recorder, torch.no_grad():
        model.backbone(model.preprocess_image(INPUTS).tensor)
    expected = recorder.maps(describe(model).tap(tap))
    assert_same(maps["0"], expected["0"])


def test_a_loaded_model_is_the_other_door(files):
    model = build(files)
    before = copy.deepcopy(model.state_dict())
    source = Teacher(model=model)
    assert [s.channels for s in source.shapes(TAPS)["features"]] == [16] * 5
    source.prepare(TAPS)
    maps = source(context(), TAPS).maps
    features, _ = stock_maps(files)
    assert_same(maps["features"]["p3"], features["p3"])
    # Folding and casting are done to a copy.
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_only_what_the_taps_need_is_run(files):
    source = started(files, ("features",))
    held = source.hidden.held

    def forbidden(*_):
        raise AssertionError("the teacher ran further than its taps")

    held.head.register_forward_pre_hook(forbidden)
    held.anchor_generator.register_forward_pre_hook(forbidden)
    held.forward = held.inference = held.losses = held.forward_training = forbidden
    assert source(context(), ("features",)).maps["features"]
    with pytest.raises(AssertionError, match="further"):
        source(context(), TAPS)


def test_in_training_mode_it_writes_no_scalar_and_no_normaliser(files):
    source = started(files)
    source.train()
    with EventStorage(0) as storage:
        source(context(), TAPS)
        assert not storage.histories()
    # Detectron2's moving average of the number of positives; it comes with the first loss.
    assert not hasattr(source.hidden.held, "loss_normalizer")
    held = source.hidden.held.train()
    with EventStorage(0) as storage:
        held(INPUTS)
        assert storage.histories()
    assert hasattr(held, "loss_normalizer")


def test_batch_statistics_and_weights_never_move(files):
    source = started(files, fold_batch_norm=False)
    before = copy.deepcopy(source.hidden.held.state_dict())
    Owner(source).train()
    for _ in range(2):
        source(context(), TAPS)
    assert all(torch.equal(v, before[k]) for k, v in source.hidden.held.state_dict().items())


def test_missing_ground_truth_does_not_matter(files):
    inputs = [{"image": x["image"]} for x in INPUTS]
    assert started(files)(context(inputs), TAPS).maps["features"]


# -- pixels ---------------------------------------------------------------------------------------


def teacher_with(tmp_path, **changes):
    """A teacher whose config differs in INPUT.FORMAT, PIXEL_MEAN or PIXEL_STD."""
    config, weights = toys.save_teacher(tmp_path, fpn=16)
    cfg = get_cfg()
    cfg.merge_from_file(config)
    cfg.merge_from_list([x for pair in changes.items() for x in pair])
    with open(config, "w") as f:
        f.write(cfg.dump())
    return config, weights


@pytest.mark.parametrize("teachers", ["BGR", "RGB"])
@pytest.mark.parametrize("students", ["BGR", "RGB"])
def test_each_reads_the_image_in_its_own_channel_order(tmp_path, students, teachers):
    files = teacher_with(tmp_path, **{"INPUT.FORMAT": teachers})
    maps = started(files)(context(input_format=students), TAPS).maps["features"]
    swapped = [{**x, "image": x["image"].flip(0)} for x in INPUTS]
    right, _ = stock_maps(files, INPUTS if students == teachers else swapped)
    wrong, _ = stock_maps(files, swapped if students == teachers else INPUTS)
    assert_same(maps["p3"], right["p3"])
    assert (maps["p3"] - wrong["p3"]).abs().max() > 1e-2


def test_the_students_images_are_left_in_their_order(files):
    inputs = toys.batch()
    before = [x["image"].clone() for x in inputs]
    started(files, input_format="RGB")(context(inputs), TAPS)
    assert all(torch.equal(x["image"], b) for x, b in zip(inputs, before, strict=True))


def test_a_given_channel_order_beats_the_configs(tmp_path):
    files = teacher_with(tmp_path, **{"INPUT.FORMAT": "RGB"})
    assert Teacher(config_file=files[0]).input_format == "RGB"
    assert Teacher(config_file=files[0], input_format="BGR").input_format == "BGR"


def test_a_loaded_models_channel_order_is_its_attribute(files):
    model = build(files)
    model.input_format = "RGB"
    assert Teacher(model=model).input_format == "RGB"
    del model.input_format
    assert Teacher(model=model).input_format == "BGR"


def test_it_normalises_with_its_own_statistics(tmp_path):
    statistics = {"MODEL.PIXEL_MEAN": [10.0, 20.0, 30.0], "MODEL.PIXEL_STD": [50.0, 60.0, 70.0]}
    files = teacher_with(tmp_path, **statistics)
    maps = started(files)(context(), TAPS).maps["features"]
    expected, _ = stock_maps(files)
    assert_same(maps["p3"], expected["p3"])
    other, _ = stock_maps(toys.save_teacher(tmp_path / "plain", fpn=16))
    assert (maps["p3"] - other["p3"]).abs().max() > 1e-2


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_precision(files, precision):
    source = started(files, precision=precision)
    dtype = getattr(torch, precision)
    assert {p.dtype for p in source.hidden.held.parameters()} == {dtype}
    assert source.hidden.held.pixel_mean.dtype == torch.float32
    maps = source(context(), TAPS).maps["features"]
    features, _ = stock_maps(files)
    assert {x.dtype for x in maps.values()} == {dtype}
    error = (maps["p4"].float() - features["p4"]).norm() / features["p4"].norm()
    assert error < {"float16": 0.01, "bfloat16": 0.1, "float32": 1e-4}[precision]


def test_the_students_autocast_does_not_reach_it(files):
    source = started(files)
    plain = source(context(), TAPS).maps["features"]["p3"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = source(context(), TAPS).maps["features"]["p3"]
    assert under.dtype == torch.float32
    assert torch.equal(under, plain)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_it_follows_its_owners_dtype_and_still_runs(files, cast):
    source = started(files)
    owner = getattr(Owner(source), cast)()
    dtype = owner.student.weight.dtype
    assert {p.dtype for p in source.hidden.held.parameters()} == {dtype}
    maps = source(context(), TAPS).maps["features"]
    assert {x.dtype for x in maps.values()} == {dtype}
    assert all(x.isfinite().all() for x in maps.values())


def test_it_follows_its_owners_device(files):
    source = started(files)
    Owner(source).to("meta")  # the only other device that every machine has
    assert all(p.is_meta for p in source.hidden.held.parameters())
    late = Hidden()
    nn.Sequential(late).to("meta")
    late.hold(nn.Linear(1, 1))
    assert late.held.weight.is_meta


# -- containment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["files", "model"])
def test_nothing_of_it_shows(files, door):
    if door == "files":
        source = started(files)
    else:
        source = Teacher(model=build(files))
        source.prepare(TAPS)
    owner = Owner(source)
    assert {id(p) for p in owner.parameters()} == {id(p) for p in owner.student.parameters()}
    assert list(owner.state_dict()) == ["student.weight", "student.bias"]
    assert sum(b.numel() for b in owner.buffers()) == 0
    held = {id(m) for m in source.hidden.held.modules()}
    assert not held & {id(m) for m in owner.modules()}


def test_always_in_eval_mode_and_without_gradients(files):
    source = started(files)
    Owner(source).train()
    assert source.training
    assert not any(m.training for m in source.hidden.held.modules())
    assert not any(p.requires_grad for p in source.hidden.held.parameters())
    Owner(source).requires_grad_(True)
    assert not any(p.requires_grad for p in source.hidden.held.parameters())


def test_a_deepcopy_shares_what_is_frozen(files):
    source = started(files)
    twin = copy.deepcopy(Owner(source))
    assert twin.teacher is not source
    assert twin.teacher.hidden.held is source.hidden.held
    assert_close(
        twin.teacher(context(), TAPS).maps["features"]["p3"],
        source(context(), TAPS).maps["features"]["p3"],
    )


def test_releasing_frees_it(files):
    source = started(files)
    source.release()
    assert source.hidden.held is None
    source.release()
    source.prepare(TAPS)
    assert source(context(), TAPS).maps


def test_what_a_student_may_inherit_is_as_in_the_file(files):
    source = started(files, precision="float16")
    theirs = torch.load(files[1])["model"]
    state = source.trained_state()
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[k], theirs[k]) for k in theirs)


# -- laziness -------------------------------------------------------------------------------------


def test_shapes_read_no_weights(files, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("kd_det.sources.teacher.load_strictly", forbidden)
    source = Teacher(config_file=files[0], weights=files[1])
    shapes = source.shapes(TAPS)
    assert [(s.channels, s.stride) for s in shapes["features"]] == [
        (16, 8 * 2**i) for i in range(5)
    ]
    assert source.hidden.held is None
    with pytest.raises(AssertionError, match="weights were read"):
        source.prepare(TAPS)


def test_measured_taps_must_fire_as_often_as_measured(files):
    source = Teacher(config_file=files[0], weights=files[1])
    tap = "head.cls_score"
    assert [s.calls for s in source.shapes((tap,))[tap]] == [5] * 5
    source.prepare((tap,))
    assert len(source(context(), (tap,)).maps[tap]) == 5

    def once_more(head, args):
        head.cls_score(args[0][0])

    source.hidden.held.head.register_forward_pre_hook(once_more)
    with pytest.raises(RuntimeError, match=r"called 6 time.*should be called 5 time"):
        source(context(), (tap,))


def test_a_missing_weights_file_matters_to_training_only(files):
    source = Teacher(config_file=files[0], weights="nowhere/teacher.pth")
    assert source.shapes(TAPS)
    with pytest.raises(SourceUnavailable, match=r"no weights file 'nowhere/teacher.pth'"):
        source.prepare(TAPS)


def test_a_missing_config_file_matters_to_shapes_only(files):
    source = Teacher(config_file="nowhere/teacher.yaml", weights=files[1])
    assert source.shapes(()) == {}
    with pytest.raises(SourceUnavailable, match=r"no config file 'nowhere/teacher.yaml'.*zoo"):
        source.shapes(TAPS)


def test_preparing_twice_reads_once(files, monkeypatch):
    source = started(files)
    held = source.hidden.held
    monkeypatch.setattr(Teacher, "_load", lambda self: pytest.fail("read again"))
    source.prepare(TAPS)
    assert source.hidden.held is held


def test_no_global_random_state_is_changed(files):
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    source = Teacher(config_file=files[0], weights=files[1])
    source.shapes(TAPS)
    source.prepare(TAPS)
    source(context(), TAPS)
    source.trained_state()
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(), states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_lazyconfig_file_is_a_teacher_too(tmp_path):
    config = tmp_path / "teacher.py"
    config.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from tests.toys import toy_fcos\n"
        "model = L(toy_fcos)(fpn=16)\n"
        f"train = dict(init_checkpoint={str(tmp_path / 'teacher.pth')!r})\n"
        "dataloader = dict(train=dict(mapper=dict(image_format='RGB')))\n"
    )
    torch.manual_seed(3)
    model = toys.toy_fcos(fpn=16)
    toys.randomize_norms(model)
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")
    source = started((str(config), ""))
    assert source.input_format == "RGB"
    model.eval()
    with torch.no_grad():
        images = model.preprocess_image(INPUTS).tensor
        features = model.backbone(images)
    maps = source(context(input_format="RGB"), TAPS).maps["features"]
    assert_same(maps["p3"], features["p3"])


# -- strict loading -------------------------------------------------------------------------------


def test_everything_comes_from_the_file(files):
    source = started(files, fold_batch_norm=False)
    theirs = torch.load(files[1])["model"]
    assert all(torch.equal(v, theirs[k]) for k, v in source.hidden.held.state_dict().items())


def drop(key):
    return lambda state: state.pop(key)


def rename(key, new):
    return lambda state: state.update({new: state.pop(key)})


def put(key, value):
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("head.cls_score.bias"), r"Missing: head.cls_score.bias\."),
        (drop("backbone.bottom_up.stem.conv1.norm.running_var"), "Missing: .*running_var"),
        (
            rename("head.cls_score.bias", "head.cls_scores.bias"),
            "Missing: head.cls_score.bias. Did you mean 'head.cls_scores.bias'.*In the file only",
        ),
        (
            put("head.cls_score.bias", torch.zeros(7)),
            r"Of another shape: head.cls_score.bias \(\(7,\) in the file, \(3,\) in the model\)",
        ),
        (put("ema.decay", torch.zeros(1)), r"In the file only: ema.decay\."),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("head")], r"\(9\d %\).*and \d+ more"),
        (lambda s: s.clear(), r"0 of \d+ entries come from the file \(0 %\)"),
    ],
    ids=["missing", "statistics", "renamed", "shape", "extra", "no head", "empty"],
)
def test_less_or_more_than_all_of_it_is_an_error(files, tmp_path, change, words):
    with pytest.raises(ValueError, match=words) as e:
        started(altered(files, tmp_path, change))
    assert "Check CONFIG_FILE and WEIGHTS" in str(e.value)
    assert files[0] in str(e.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: [s.pop(k) for k in list(s) if k.endswith("num_batches_tracked")],
        put("anchor_generator.cell_anchors.0", torch.zeros(1, 4)),
        put("pixel_mean", torch.zeros(3, 1, 1)),
        put("pixel_std", torch.zeros(3, 1, 1)),
    ],
    ids=["num_batches_tracked", "cell_anchors", "pixel_mean", "pixel_std"],
)
def test_what_carries_no_training_may_differ(files, tmp_path, change):
    maps = started(altered(files, tmp_path, change))(context(), TAPS).maps
    expected, _ = stock_maps(files)  # the file's pixel statistics are not taken over either
    assert_same(maps["features"]["p3"], expected["p3"])


@pytest.mark.parametrize("difference", [{"classes": 5}, {"sizes": 2}, {"fpn": 8}])
def test_the_weights_of_another_teacher_are_an_error(files, tmp_path, difference):
    other, _ = toys.save_teacher(tmp_path, **{"fpn": 16, **difference})
    with pytest.raises(ValueError, match="Of another shape"):
        started((other, files[1]))


def test_a_backbones_weights_are_no_teacher(files, tmp_path):
    def only_backbone(state):
        for key in [k for k in state if not k.startswith("backbone.bottom_up")]:
            del state[key]

    with pytest.raises(ValueError, match="not a checkpoint of this architecture"):
        started(altered(files, tmp_path, only_backbone))


def test_shallower_weights_are_no_deeper_teacher(files, tmp_path):
    cfg = get_cfg()
    cfg.merge_from_file(files[0])
    cfg.MODEL.RESNETS.DEPTH = 101
    deeper = tmp_path / "deeper.yaml"
    deeper.write_text(cfg.dump())
    with pytest.raises(ValueError, match=r"Missing: backbone.bottom_up.res4"):
        started((str(deeper), files[1]))


def test_a_matching_heuristic_is_not_enough_either(files, tmp_path):
    # The zoo's .pkl files are matched by similar names; what is not matched stays random.
    state = {k: v.numpy() for k, v in torch.load(files[1])["model"].items()}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "x", "matching_heuristics": True}))
    assert started((files[0], str(path)))(context(), TAPS).maps
    del state["head.cls_score.bias"]
    path.write_bytes(pickle.dumps({"model": state, "__author__": "x", "matching_heuristics": True}))
    with pytest.raises(ValueError, match=r"Missing: head.cls_score.bias"):
        started((files[0], str(path)))


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "list", "yaml"])
def test_a_file_that_is_no_checkpoint_is_named(files, tmp_path, damage):
    path = tmp_path / "teacher.pth"
    with open(files[1], "rb") as f:
        whole = f.read()
    if damage == "list":
        torch.save([1, 2, 3], path)
    else:
        path.write_bytes(
            {
                "truncated": whole[: len(whole) // 2],
                "text": b"hello",
                "empty": b"",
                "yaml": b"a: 1",
            }[damage]
        )
    with pytest.raises(ValueError, match=r"teacher.pth' \(\d+ bytes\) cannot be read as a check"):
        started((files[0], str(path)))


def test_a_checkpoint_without_the_outer_dict_is_read(files, tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(torch.load(files[1])["model"], path)
    assert started((files[0], str(path)))(context(), TAPS).maps


def test_weights_come_from_the_config_when_none_are_given(files, tmp_path):
    cfg = get_cfg()
    cfg.merge_from_file(files[0])
    cfg.MODEL.WEIGHTS = files[1]
    config = tmp_path / "teacher.yaml"
    config.write_text(cfg.dump())
    assert started((str(config), ""))(context(), TAPS).maps


def test_no_weights_at_all_are_an_error(files):
    with pytest.raises(ValueError, match="has no weights: set WEIGHTS"):
        started((files[0], ""))


def test_the_fingerprint_is_that_of_the_weights(files, tmp_path):
    source = started(files)
    assert source.fingerprint() == file_fingerprint(files[1])
    assert Teacher(config_file=files[0], weights=files[1]).fingerprint() == ""  # not read yet
    other = started(altered(files, tmp_path, lambda s: s["head.cls_score.bias"].add_(1)))
    assert other.fingerprint() != source.fingerprint()
    loaded = [Teacher(model=build(files)) for _ in range(2)]
    for teacher in loaded:
        teacher.prepare(TAPS)
    assert loaded[0].fingerprint() == loaded[1].fingerprint() != ""
    with torch.no_grad():
        loaded[1]._given.module.head.cls_score.bias.add_(1)
    loaded[1].release()
    loaded[1].prepare(TAPS)
    assert loaded[0].fingerprint() != loaded[1].fingerprint()


def test_strict_loading_returns_the_fingerprint_and_fills_in_place(files):
    model = build(files)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert load_strictly(model, files[1], what="It") == file_fingerprint(files[1])
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("weight"))


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs CONFIG_FILE"),
        ({"config_file": "x.yaml", "model": nn.Identity()}, "not both; got config_file 'x.yaml'"),
        ({"config_file": "x", "precision": "fp16"}, "one of float32, float16, bfloat16"),
        ({"config_file": "x", "input_format": "rgb"}, "BGR or RGB, but got 'rgb'"),
    ],
)
def test_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        Teacher(**arguments)


@pytest.mark.parametrize("text", ["MODEL: [", "NO_SUCH_KEY: 1", "MODEL: {RETINANET: {X: 1}}"])
def test_a_config_that_cannot_be_read_is_named(tmp_path, text):
    config = tmp_path / "broken.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=r"broken.yaml' cannot be read as a Detectron2 config"):
        Teacher(config_file=str(config)).shapes(TAPS)


def test_an_unknown_tap_of_the_teacher_is_an_error(files):
    with pytest.raises(KeyError, match="Presets"):
        Teacher(config_file=files[0]).shapes(("featurs",))


def test_a_given_model_is_left_as_it_is():
    model = build_model(toys.toy_cfg()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    teacher = Teacher(model=model)
    teacher.shapes(("features",))
    teacher.prepare(("features",))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not teacher.hidden.held.training
