"""Detector descriptions: presets, shapes measured on the meta device, how deep a run goes."""

import copy
import random

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from detectron2.utils.events import EventStorage
from torch import nn

from kd_det.detectors import describe, meta_copy, probe
from kd_det.detectors.pieces import in_turn, stages
from kd_det.taps import Recorder, Tap
from tests import toys

BUILDERS = {
    "RetinaNet": lambda: build_model(toys.toy_cfg(sizes=2)),
    "FCOS": toys.toy_fcos,
    "GeneralizedRCNN": lambda: build_model(toys.toy_cfg(arch="GeneralizedRCNN")),
}
STAGES = ["res2", "res3", "res4", "res5"]
PRESETS = {
    "RetinaNet": ["features", *STAGES[1:], "cls_logits", "box_deltas"],
    "FCOS": ["features", *STAGES[1:], "cls_logits", "box_deltas"],
    "GeneralizedRCNN": ["features", *STAGES, "rpn_logits", "rpn_deltas"],
}
INPUTS = toys.batch(((128, 128), (100, 120)))


@pytest.fixture(scope="module", params=list(BUILDERS))
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def model(arch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILDERS[arch]()


def fingerprint(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def calls_of(module):
    """Counts the calls of a module from now on."""
    count = []
    module.register_forward_hook(lambda *_: count.append(1))
    return count


# -- presets --------------------------------------------------------------------------------------


def test_presets(arch, model):
    assert list(describe(model).presets()) == PRESETS[arch]


def test_shapes_of_every_preset_are_those_of_a_real_training_step(model):
    taps = list(describe(model).presets().values())
    shapes = probe(model, taps)
    model.train()
    with EventStorage(0), Recorder(model, taps) as recorder:
        model(INPUTS)
    for tap in taps:
        maps = recorder.maps(tap)
        found = shapes[tap.name]
        assert [s.level for s in found] == list(maps)
        assert [s.channels for s in found] == [x.shape[1] for x in maps.values()]
        assert [s.stride for s in found] == [128 // x.shape[3] for x in maps.values()]
        assert {s.calls for s in found} == {len(recorder.calls[tap.path])}
        assert {s.kind for s in found} == {tap.kind}


def test_channels_and_strides_are_as_configured(arch, model):
    shapes = probe(model, describe(model).presets().values())
    anchors = {"RetinaNet": 2, "FCOS": 1, "GeneralizedRCNN": 1}[arch]
    logits = "rpn_logits" if arch == "GeneralizedRCNN" else "cls_logits"
    classes = 1 if arch == "GeneralizedRCNN" else 3
    strides = [4, 8, 16, 32, 64] if arch == "GeneralizedRCNN" else [8, 16, 32, 64, 128]
    assert [(s.channels, s.stride) for s in shapes["features"]] == [(8, s) for s in strides]
    assert [(s.channels, s.stride) for s in shapes[logits]] == [
        (anchors * classes, s) for s in strides
    ]
    assert [(s.level, s.channels, s.stride) for s in shapes["res4"]] == [("res4", 16, 16)]


def test_kinds_tell_meaningful_channels(model):
    kinds = {name: tap.kind for name, tap in describe(model).presets().items()}
    assert {k for n, k in kinds.items() if n.endswith("logits")} == {"logits"}
    assert {k for n, k in kinds.items() if n.endswith("deltas")} == {"deltas"}
    assert kinds["features"] == kinds["res4"] == "feature"


def test_extra_levels_name_what_made_them(arch, model):
    features = describe(model).presets()["features"]
    origins = dict(zip(features.levels, features.origins, strict=True))
    if arch == "GeneralizedRCNN":
        assert origins["p6"] == "LastLevelMaxPool on pyramid"
    else:
        assert origins["p6"] == origins["p7"] == "LastLevelP6P7 on bottom-up"
    assert {origins[level] for level in ("p3", "p4", "p5")} == {""}


def test_a_shared_heads_inner_module_has_a_level_per_call():
    model = build_model(toys.toy_cfg())
    tap = describe(model).tap("head.cls_subnet.0")
    shapes = probe(model, [tap])["head.cls_subnet.0"]
    assert [(s.level, s.stride) for s in shapes] == [(str(i), 8 * 2**i) for i in range(5)]
    assert {s.calls for s in shapes} == {5}


def test_a_backbone_without_a_pyramid_has_features_too():
    cfg = toys.toy_cfg(arch="GeneralizedRCNN")
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    cfg.MODEL.RPN.IN_FEATURES = ["res4"]
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    model = build_model(cfg)
    presets = describe(model).presets()
    assert list(presets) == ["features", "res4", "rpn_logits", "rpn_deltas"]
    (shape,) = probe(model, [presets["features"]])["features"]
    assert (shape.level, shape.channels, shape.stride) == ("res4", 16, 16)


# -- names ----------------------------------------------------------------------------------------


def test_a_module_path_is_a_tap(model):
    assert describe(model).tap("backbone.fpn_lateral4").path == "backbone.fpn_lateral4"


def test_a_wrong_tap_names_the_nearest_modules_and_the_presets(model):
    with pytest.raises(
        KeyError, match=r"backbone.fpn_latral4'. Did you mean 'backbone.fpn_lateral"
    ):
        describe(model).tap("backbone.fpn_latral4")
    with pytest.raises(KeyError, match=r"Presets: features, res.* Did you mean 'features'"):
        describe(model).tap("featurs")


def test_subclasses_are_described_by_their_base(model):
    class Mine(type(model)):
        pass

    mine = Mine.__new__(Mine)
    nn.Module.__init__(mine)
    assert type(describe(mine)) is type(describe(model))


# -- running --------------------------------------------------------------------------------------


def head_of(model):
    return getattr(model, "head", None) or model.proposal_generator.rpn_head


def last_module(model):
    """What a run to the head's second output calls last."""
    return model.head.bbox_pred if hasattr(model, "head") else head_of(model)


@pytest.mark.parametrize(
    ("names", "depth", "pyramids"),
    [
        (["features"], 4, 1),
        (["backbone.fpn_output4"], 4, 1),
        (["res4", "features"], 4, 1),
        (["res5"], 4, 0),  # the bottom-up network alone
        (["res4"], 3, 0),
        (["res3", "res4"], 3, 0),
        (["backbone.bottom_up.res4.0.conv1"], 3, 0),
        (["backbone.bottom_up.stem"], 0, 0),
    ],
)
def test_a_run_goes_no_deeper_than_its_taps(model, names, depth, pyramids):
    model = copy.deepcopy(model).eval()
    detector = describe(model)
    taps = [detector.tap(name) for name in names]
    heads, backbones = calls_of(head_of(model)), calls_of(model.backbone)
    within = [calls_of(module) for module in head_of(model).children()]
    bottom_up = [calls_of(getattr(model.backbone.bottom_up, stage)) for stage in STAGES]
    with Recorder(model, taps) as recorder:
        detector.run(torch.rand(1, 3, 128, 128), taps)
    assert [len(calls) for calls in bottom_up] == [1] * depth + [0] * (4 - depth)
    assert len(backbones) == pyramids
    assert not heads
    assert not any(within)
    assert all(recorder.maps(tap) for tap in taps)


BRANCH = {"cls_logits": ["cls_subnet", "cls_score"], "box_deltas": ["bbox_subnet", "bbox_pred"]}


@pytest.mark.parametrize("tap", BRANCH)
@pytest.mark.parametrize("builder", ["RetinaNet", "FCOS"])
def test_one_branch_of_a_head_runs_without_the_other(builder, tap):
    model = BUILDERS[builder]().eval()
    detector = describe(model)
    counts = {name: calls_of(module) for name, module in model.head.named_children()}
    with Recorder(model, [detector.tap(tap)]) as recorder, torch.no_grad():
        detector.run(model.preprocess_image(INPUTS).tensor, [detector.tap(tap)])
    assert {name for name, count in counts.items() if count} == set(BRANCH[tap])
    assert all(len(counts[name]) == 5 for name in BRANCH[tap])
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(INPUTS).tensor)
        both = model.head([features[level] for level in model.head_in_features])
    expected = both[list(BRANCH).index(tap)]
    for found, wanted in zip(recorder.maps(detector.tap(tap)).values(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=0, rtol=0)


def test_a_head_or_backbone_with_a_forward_of_its_own_is_run_whole():
    model = BUILDERS["RetinaNet"]().eval()
    head, bottom_up = type(model.head), type(model.backbone.bottom_up)
    model.head.__class__ = type("Head", (head,), {"forward": lambda self, x: head.forward(self, x)})
    model.backbone.bottom_up.__class__ = type(
        "Net", (bottom_up,), {"forward": lambda self, x: bottom_up.forward(self, x)}
    )
    detector = describe(model)
    taps = [detector.tap("cls_logits"), detector.tap("res3")]
    heads, nets = calls_of(model.head), calls_of(model.backbone.bottom_up)
    assert [(tap.path, tap.key) for tap in taps] == [("head", 0), ("backbone.bottom_up", "res3")]
    with Recorder(model, taps) as recorder:
        detector.run(torch.rand(1, 3, 128, 128), taps[:1])
        detector.run(torch.rand(1, 3, 128, 128), taps[1:])
    assert (len(heads), len(nets)) == (1, 2)
    assert list(recorder.calls) == ["head", "backbone.bottom_up"]


def test_a_regnet_stops_at_its_stages_too():
    params = {"depth": 3, "w_a": 8.0, "w_0": 8, "w_m": 2.0, "group_width": 8, "norm": "BN"}
    net = RegNet(
        stem_class=SimpleStem, stem_width=8, block_class=ResBottleneckBlock, **params
    ).eval()
    names, modules = zip(*stages(net), strict=True)
    assert names[:2] == ("stem", "s1")
    last = calls_of(modules[-1])
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        shallow = in_turn(modules[:-1])(x)
        assert not last
        torch.testing.assert_close(modules[-1](shallow), net(x)[names[-1]], atol=0, rtol=0)


def test_levels_of_logits_have_no_origin(model):
    for name, tap in describe(model).presets().items():
        assert not tap.origins or name == "features"


def test_a_run_goes_to_the_head_once_and_not_into_anchors_losses_or_nms(model):
    model = copy.deepcopy(model).eval()
    detector = describe(model)
    taps = [detector.tap("features"), list(detector.presets().values())[-1]]
    heads = calls_of(last_module(model))
    beyond = [
        calls_of(m)
        for name, m in model.named_modules()
        if name.endswith("anchor_generator") or name.startswith("roi_heads")
    ]
    assert beyond
    with Recorder(model, taps) as recorder:
        detector.run(torch.rand(1, 3, 128, 128), taps)
    assert len(heads) == (1 if hasattr(model, "roi_heads") else 5)  # levels
    assert not any(beyond)
    assert all(recorder.maps(tap) for tap in taps)


def test_a_run_gives_what_the_model_itself_computes(model):
    model.eval()
    detector = describe(model)
    taps = list(detector.presets().values())
    with torch.no_grad():
        with Recorder(model, taps) as ours:
            detector.run(model.preprocess_image(INPUTS).tensor, taps)
        features = model.backbone(model.preprocess_image(INPUTS).tensor)
    for level, x in ours.maps(detector.tap("features")).items():
        torch.testing.assert_close(x, features[level], atol=0, rtol=0)


def test_a_tap_beyond_the_head_is_an_error():
    model = BUILDERS["GeneralizedRCNN"]()
    tap = describe(model).tap("roi_heads.box_head")
    with pytest.raises(
        ValueError, match=r"'roi_heads.box_head'.*outside of backbone, proposal_generator.rpn_head"
    ):
        probe(model, [tap])


def test_a_module_with_the_heads_name_as_prefix_is_not_in_it():
    model = BUILDERS["RetinaNet"]()
    model.header = nn.Identity()
    with pytest.raises(ValueError, match="outside of"):
        probe(model, [describe(model).tap("header")])


def test_anchors_are_one_box_per_cell_and_anchor(arch, model):
    detector = describe(model)
    features = model.backbone(torch.rand(1, 3, 128, 128))
    maps = [features[level] for level in detector.tap("features").levels]
    anchors = detector.anchors(maps)
    per_cell = 2 if arch == "RetinaNet" else 1
    assert [len(boxes) for boxes in anchors] == [x.shape[2] * x.shape[3] * per_cell for x in maps]


# -- measuring ------------------------------------------------------------------------------------


def test_a_meta_copy_has_no_storage_and_leaves_the_model_as_it_is(model):
    model.train()
    before = fingerprint(model)
    grads = [p.requires_grad for p in model.parameters()]
    copy = meta_copy(model)
    assert all(p.is_meta for p in copy.parameters())
    assert all(b.is_meta for b in copy.buffers())
    assert not any(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert [p.requires_grad for p in model.parameters()] == grads
    assert {k: v.shape for k, v in copy.state_dict().items()} == {
        k: v.shape for k, v in before.items()
    }
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_meta_copy_keeps_what_is_shared():
    shared = nn.Conv2d(1, 1, 1)
    copy = meta_copy(nn.ModuleList([shared, shared]))
    assert copy[0].weight is copy[1].weight
    tied = nn.ModuleList([nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)])
    tied[1].weight = tied[0].weight
    copy = meta_copy(tied)
    assert copy[0].weight is copy[1].weight


def test_probing_changes_neither_the_model_nor_any_random_state(model):
    model.train()
    before = fingerprint(model)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    probe(model, describe(model).presets().values())
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(), states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # BN statistics
    assert model.training
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_an_architecture_without_storage_is_measured_too(model):
    taps = list(describe(model).presets().values())
    assert probe(meta_copy(model), taps) == probe(model, taps)


@pytest.mark.parametrize("constraint", ["size_divisibility", "padding_constraints"])
def test_the_canvas_obeys_the_backbones_constraints(monkeypatch, constraint):
    model = BUILDERS["RetinaNet"]()
    seen = []
    value = {"size_divisibility": 96, "padding_constraints": {"square_size": 640}}[constraint]
    monkeypatch.setattr(
        type(model.backbone), constraint, property(lambda self: value), raising=False
    )
    model.backbone.bottom_up.register_forward_pre_hook(
        lambda m, args: seen.append(tuple(args[0].shape[-2:]))
    )
    shapes = probe(model, [describe(model).tap("features")])["features"]
    ((height, width),) = seen
    assert height == width
    assert height % 96 == 0 if constraint == "size_divisibility" else height == 640
    assert [s.stride for s in shapes] == [8, 16, 32, 64, 128]


def test_a_module_that_does_not_run_cannot_be_tapped():
    model = BUILDERS["RetinaNet"]()
    model.head.spare = nn.Identity()
    with pytest.raises(RuntimeError, match=r"'head.spare' was called 0 time"):
        probe(model, [Tap("spare", "head.spare")])
