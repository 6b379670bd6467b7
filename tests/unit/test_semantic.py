"""SemanticSegmentor and PanopticFPN: taps, how deep a run goes, padding, and CWD on class maps."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_model
from detectron2.utils.events import EventStorage
from torch import nn

from kd_det import Distiller, Teacher
from kd_det.context import Context
from kd_det.detectors import describe, probe
from kd_det.regions import Padding
from kd_det.taps import Recorder
from kd_det.terms import CWD
from tests.parity import reference
from tests.steps import exactly, seeded, step
from tests.toys import batch, randomize_norms, toy_cfg, with_pixels

ARCHS = ["SemanticSegmentor", "PanopticFPN"]
STAGES = ["res2", "res3", "res4", "res5"]
MAP = "sem_seg_logits"
SIZES = ((128, 128), (100, 82))  # 100 and 82 are no multiples of 4 x 2


def inputs(sizes=SIZES, **kwargs):
    return with_pixels(batch(sizes, **kwargs))


@pytest.fixture(scope="module", params=ARCHS)
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def model(arch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(toy_cfg(arch=arch))
        randomize_norms(model)
        return model


class MyHead(nn.Module):
    """A head of a project: other names, one level, and an answer at the image's size."""

    ignore_value = 255

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.classify = Conv2d(input_shape["p3"].channels, 4, 1)

    def forward(self, features, targets=None):
        x = F.interpolate(self.classify(features["p3"]), scale_factor=8)
        if self.training:
            return None, {"loss_mine": F.cross_entropy(x, targets, ignore_index=255)}
        return x.softmax(1), {}


@pytest.fixture
def with_my_head(monkeypatch):
    monkeypatch.setitem(SEM_SEG_HEADS_REGISTRY._obj_map, "MyHead", MyHead)
    cfg = toy_cfg(arch="SemanticSegmentor")
    cfg.MODEL.SEM_SEG_HEAD.NAME = "MyHead"
    return cfg


# -- presets --------------------------------------------------------------------------------------


def test_presets(arch, model):
    rpn = ["rpn_logits", "rpn_deltas"] if arch == "PanopticFPN" else []
    found = describe(model).presets()
    assert [name for name in found if not name.startswith("ro")] == ["features", *STAGES, *rpn, MAP]
    assert found[MAP].kind == "logits"
    # The segmentor's head reads no p6; with the RPN's it is a level.
    extra = ["p6"] if arch == "PanopticFPN" else []
    assert list(found["features"].levels) == ["p2", "p3", "p4", "p5", *extra]


def test_shapes_are_those_of_a_real_training_step(model):
    taps = list(describe(model).presets().values())
    shapes = probe(model, taps)
    (found,) = shapes[MAP]
    assert (found.level, found.channels, found.stride) == ("sem_seg", 4, 4)
    model.train()
    with EventStorage(0), Recorder(model, taps) as recorder:
        model(inputs())
    for tap in taps:
        maps = recorder.maps(tap)
        assert [s.level for s in shapes[tap.name]] == list(maps)
        assert [s.channels for s in shapes[tap.name]] == [x.shape[1] for x in maps.values()]
        assert [s.stride for s in shapes[tap.name]] == [128 // x.shape[3] for x in maps.values()]
        assert {s.calls for s in shapes[tap.name]} == {len(recorder.calls[tap.path])}


def test_the_common_stride_is_the_heads(arch):
    cfg = toy_cfg(arch=arch)
    cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = 8
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["p4", "p3"]
    model = build_model(cfg)
    (found,) = probe(model, [describe(model).tap(MAP)])[MAP]
    assert found.stride == 8
    if arch == "SemanticSegmentor":
        assert describe(model).tap("features").levels == ("p3", "p4")


# -- running --------------------------------------------------------------------------------------


def calls_of(module):
    count = []
    module.register_forward_hook(lambda *_: count.append(1))
    return count


@pytest.mark.parametrize("names", [["features"], ["res3"], [MAP], ["features", MAP]])
def test_a_run_goes_no_deeper_than_its_taps(model, names, monkeypatch):
    model = copy.deepcopy(model).eval()
    detector = describe(model)
    taps = [detector.tap(name) for name in names]
    deep = MAP in names
    predictions = calls_of(model.sem_seg_head.predictor)
    pyramids, res5 = calls_of(model.backbone), calls_of(model.backbone.bottom_up.res5)
    others = [calls_of(m) for n, m in model.named_children() if n in ("proposal_generator",)]
    # Its forward is what enlarges the map and what computes losses.
    monkeypatch.setattr(type(model.sem_seg_head), "losses", None)
    heads = calls_of(model.sem_seg_head)
    with Recorder(model, taps) as recorder:
        detector.run(torch.rand(1, 3, 128, 128), taps)
    assert (len(predictions), len(heads)) == (int(deep), 0)
    assert len(pyramids) == int(names != ["res3"])
    assert len(res5) == int(names != ["res3"])
    assert not any(others)
    assert all(recorder.maps(tap) for tap in taps)


def test_a_run_to_both_heads_of_a_panoptic_model_runs_the_backbone_once():
    model = build_model(toy_cfg(arch="PanopticFPN")).eval()
    detector = describe(model)
    taps = [detector.tap(name) for name in ("rpn_logits", MAP)]
    counts = [calls_of(model.get_submodule(tap.path)) for tap in taps]
    backbones = calls_of(model.backbone)
    with Recorder(model, taps) as recorder:
        detector.run(torch.rand(1, 3, 128, 128), taps)
    assert [len(count) for count in (*counts, backbones)] == [1, 1, 1]
    assert list(recorder.maps(taps[0])) == ["p2", "p3", "p4", "p5", "p6"]


def test_a_panoptic_model_on_precomputed_proposals_has_no_rpn_to_run():
    cfg = toy_cfg(arch="PanopticFPN")
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    teacher = Teacher(model=build_model(cfg), compile=True)
    teacher.prepare(("features", MAP))  # compiles whatever the deepest run reaches, once called
    deepest = describe(teacher.hidden.held).depths()[-1]
    assert deepest.reaches == ("backbone", "sem_seg_head")


def test_the_class_map_is_what_the_model_predicts(model):
    model = copy.deepcopy(model).eval()
    detector = describe(model)
    tap = detector.tap(MAP)
    one = inputs(((96, 64),))
    with torch.no_grad(), Recorder(model, [tap]) as recorder:
        detector.run(detector.preprocess(one), [tap])
        (found,) = recorder.maps(tap).values()
        predicted = model(one)[0]["sem_seg"]  # (K, 96, 64), enlarged and cropped
    enlarged = F.interpolate(found, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarged[0], predicted)


@pytest.mark.parametrize("training", [True, False])
def test_images_are_prepared_as_the_model_does_it(model, training):
    model = copy.deepcopy(model).train(training)
    model.pixel_mean = torch.tensor([10.0, 20.0, 30.0]).view(-1, 1, 1)
    model.pixel_std = torch.tensor([2.0, 3.0, 4.0]).view(-1, 1, 1)
    seen = []
    model.backbone.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with EventStorage(0), torch.no_grad():
        model(inputs())
    exactly(describe(model).preprocess(inputs()), seen[0])


def test_a_backbones_square_is_padded_to(monkeypatch):
    model = build_model(toy_cfg(arch="SemanticSegmentor")).eval()
    backbone = type(model.backbone)
    if "padding_constraints" not in inspect.getsource(type(model)):
        pytest.skip("Detectron2 0.6 pads to a divisor only")
    monkeypatch.setattr(backbone, "padding_constraints", property(lambda m: {"square_size": 192}))
    assert describe(model).preprocess(inputs()).shape == (2, 3, 192, 192)


def test_a_preprocessing_of_a_subclass_counts(monkeypatch):
    model = build_model(toy_cfg(arch="SemanticSegmentor"))
    model.preprocess_image = lambda inputs: SimpleNamespace(tensor="mine")
    assert describe(model).preprocess([]) == "mine"


# -- heads of others ------------------------------------------------------------------------------


def test_a_head_without_a_predictor_has_no_preset_but_module_paths(with_my_head):
    student = seeded(with_my_head)
    assert list(describe(student).presets()) == ["features", *STAGES]
    with pytest.raises(KeyError, match=r"no tap or module 'sem_seg_logits'.*Presets: features"):
        describe(student).tap(MAP)
    teacher = Teacher(model=seeded(with_my_head, 8))
    term = CWD(tap="sem_seg_head.classify", tau=4.0)
    model = Distiller(student=student, sources={"t": teacher}, terms={"x": term}).train()
    (row,) = model.wiring.rows["x"]
    assert (row.stride, row.student_channels, row.connector) == (8, 4, "-")
    losses = step(model, 0, inputs())
    assert set(losses) == {"loss_mine", "loss_kd_x"}
    assert losses["loss_kd_x"] > 0


def test_its_features_are_all_levels(with_my_head):
    levels = describe(build_model(with_my_head)).tap("features").levels
    assert levels == ("p2", "p3", "p4", "p5", "p6")


# -- CWD on class maps ----------------------------------------------------------------------------


def distilled(teacher, student, **term):
    terms = {"classes": CWD(**{"tap": MAP, "tau": 4.0, "weight": 3.0, **term})}
    return Distiller(student=student, sources={"t": Teacher(model=teacher)}, terms=terms).train()


def test_a_teacher_that_is_the_student_gives_zero(arch):
    student = seeded(toy_cfg(arch=arch, norm="FrozenBN"))
    model = distilled(copy.deepcopy(student), student)
    value = step(model, 0, inputs())["loss_kd_classes"]
    assert abs(float(value.detach())) < 1e-5
    other = distilled(seeded(toy_cfg(arch=arch, norm="FrozenBN"), 8), student)
    assert step(other, 0, inputs())["loss_kd_classes"] > 1e-3


def test_the_loss_is_the_papers_on_the_cells_of_the_images(arch):
    """3 * 4^2 / (N C) * sum KL(softmax(t / 4) || softmax(s / 4)), written out without tensors."""
    student, teacher = seeded(toy_cfg(arch=arch)), seeded(toy_cfg(arch=arch), 8)
    randomize_norms(teacher)
    for model in (student, teacher):  # random networks shout, and the reference has no log-softmax
        model.sem_seg_head.predictor.weight.data.mul_(0.01)
    one, seen = inputs(((64, 64), (41, 30))), []
    student.sem_seg_head.predictor.register_forward_hook(lambda m, i, x: seen.append(x.detach()))
    value = step(distilled(teacher, student), 0, one)["loss_kd_classes"]
    with torch.no_grad():
        images = describe(teacher.eval()).preprocess(one)
        target = teacher.sem_seg_head.layers(teacher.backbone(images))
    s, t = (x.double().flatten(2).tolist() for x in (seen[-1], target))
    cells = torch.zeros(2, 16, 16)  # 64 pixels
    cells[0] = 1
    cells[1, :11, :8] = 1  # a cell counts that begins inside: ceil(41 / 4), ceil(30 / 4)
    expected = reference.channel_wise_kl(s, t, tau=4.0, region=cells.flatten(1).tolist())
    assert expected > 1e-3
    assert float(value.detach()) == pytest.approx(3 * expected, rel=1e-4)


def test_the_region_of_padding_at_stride_4():
    context = Context(inputs(((64, 64), (41, 30))), "BGR", nn.Identity())
    x = torch.zeros(2, 4, 16, 16)
    found = Padding()(context, x, x, 4)
    assert found[0].sum() == 16 * 16
    assert found[1].sum() == found[1, 0, :11, :8].sum() == 11 * 8


def test_labels_of_padding_and_ignored_pixels_do_not_reach_kd(arch):
    student = seeded(toy_cfg(arch=arch, norm="FrozenBN"))
    model = distilled(seeded(toy_cfg(arch=arch, norm="FrozenBN"), 8), student)
    one, other = inputs(), inputs()
    for x in other:
        x["sem_seg"][:] = 255
        x["sem_seg"][0, 0] = 1
    found, again = step(model, 0, one), step(model, 0, other)
    exactly(again["loss_kd_classes"], found["loss_kd_classes"])
    assert again["loss_sem_seg"] != found["loss_sem_seg"]


def test_other_class_counts_are_an_error():
    small, large = (toy_cfg(arch="SemanticSegmentor", classes=k) for k in (3, 5))
    with pytest.raises(ValueError, match=r"Term 'classes': .*student has 4 channels.* 6\b"):
        distilled(build_model(large), build_model(small))


def test_other_strides_meet_on_the_targets_grid():
    cfg = toy_cfg(arch="SemanticSegmentor")
    cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = 8
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["p3", "p4", "p5"]
    model = distilled(build_model(toy_cfg(arch="SemanticSegmentor")), build_model(cfg))
    assert model.wiring.rows["classes"][0].stride == 4
    assert step(model, 0, inputs())["loss_kd_classes"] > 0


def test_a_panoptic_teacher_and_a_segmentor_meet():
    model = distilled(
        build_model(toy_cfg(arch="PanopticFPN")), build_model(toy_cfg(arch="SemanticSegmentor"))
    )
    losses = step(model, 0, inputs())
    assert set(losses) == {"loss_sem_seg", "loss_kd_classes"}


def test_gradients_reach_the_student_and_not_the_teacher(arch):
    student, teacher = seeded(toy_cfg(arch=arch)), seeded(toy_cfg(arch=arch), 8)
    model = distilled(teacher, student)
    step(model, 0, inputs())["loss_kd_classes"].backward()
    assert student.sem_seg_head.predictor.weight.grad.abs().sum() > 0
    assert student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
