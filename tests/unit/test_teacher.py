"""The frozen teacher: what it computes, from which pixels, in which precision."""

import copy
import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage
from torch import nn

from kd_det.detectors import describe
from kd_det.sources import Hidden, Teacher
from kd_det.taps import Recorder
from tests import toys
from tests.teachers import INPUTS, TAPS, Owner, assert_same, build, context, started, stock_maps

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

    for module in held.head.modules():
        module.register_forward_pre_hook(forbidden)
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
