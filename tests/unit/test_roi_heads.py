"""Box heads: what is tapped in a student's step, and how a teacher's is run on given boxes."""

import copy

import pytest
import torch
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.testing import assert_close

from kd_det.detectors import describe, meta_copy, probe
from kd_det.detectors.roi_heads import describe_roi_head
from kd_det.taps import ROWS, Recorder, Tap, as_rois
from kd_det.tools.taps import tap_table
from tests import toys
from tests.two_stage import KINDS, boxes_seen, inputs, rcnn

STAGES = {"faster": 1, "mask": 1, "cascade": 3, "c4": 1}
INPUTS = inputs()


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return rcnn(kind)


def trained_on(model, taps):
    """A Recorder of a training step."""
    model.train()
    with EventStorage(0), Recorder(model, taps) as recorder:
        model(INPUTS)
    return recorder


def rois_of(stages):
    """Two boxes in the first image and one in the second; others in every stage."""
    first = torch.tensor([[4.0, 8, 60, 40], [30, 30, 90, 100]])
    second = torch.tensor([[10.0, 0, 50, 90]])
    return {f"stage{k}": as_rois([Boxes(first + k), Boxes(second - k)]) for k in range(stages)}


# -- taps -----------------------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_a_training_step(kind, model):
    detector = describe(model)
    taps = [detector.tap(name) for name in ROWS]
    shapes = probe(model, taps)
    recorder = trained_on(model, taps)
    stages = [f"stage{k}" for k in range(STAGES[kind])]
    for tap in taps:
        maps = recorder.maps(tap)
        assert list(maps) == [s.level for s in shapes[tap.name]] == stages
        assert [x.shape[1] for x in maps.values()] == [s.channels for s in shapes[tap.name]]
        assert {s.rows for s in shapes[tap.name]} == {16}
        assert all(len(x) <= 2 * 16 for x in maps.values())
        assert {s.kind for s in shapes[tap.name]} == {tap.kind} == {tap.name}
        assert {s.stride for s in shapes[tap.name]} == {0}
    calls = {
        path: recorder.calls.get(path) or recorder.given[path] for t in taps for path in t.paths
    }
    for tap in taps:
        assert {len(calls[path]) for path in tap.paths} == {shapes[tap.name][0].calls}
    deltas = 4 if kind == "cascade" else 12
    assert {s.channels for s in shapes["roi_deltas"]} == {deltas}
    assert {s.activation for s in shapes["roi_scores"]} == {"softmax"}


def test_every_stage_has_the_units_of_its_own_box_transform(kind, model):
    shapes = describe(model).roi_head().shapes["roi_deltas"]
    weights = [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)][: STAGES[kind]]
    assert [s.units for s in shapes] == weights


def test_proposals_are_the_boxes_that_the_pooler_was_given(model):
    seen = []
    handle = boxes_seen(model, seen)
    tap = describe(model).tap("proposals")
    proposals = trained_on(model, [tap]).maps(tap)
    handle.remove()
    assert len(proposals) == len(seen)
    for rois, boxes in zip(proposals.values(), seen, strict=True):
        assert [len(b) for b in boxes] == [int((rois[:, 0] == i).sum()) for i in (0, 1)]
        assert_close(rois[:, 1:], torch.cat(boxes), rtol=0, atol=0)
        assert not rois.requires_grad


def test_scores_and_deltas_carry_the_students_gradient(model):
    detector = describe(model)
    taps = [detector.tap("roi_scores"), detector.tap("roi_deltas")]
    recorder = trained_on(model, taps)
    for tap in taps:
        assert all(x.grad_fn is not None for x in recorder.maps(tap).values())


def test_a_predictor_that_is_not_called_is_an_error():
    model = rcnn("cascade")
    tap = describe(model).tap("roi_scores")
    with Recorder(model, [tap]) as recorder:
        model.roi_heads.box_predictor[0](torch.rand(2, 16))
    with pytest.raises(RuntimeError, match=r"'roi_heads.box_predictor.1' was called 0 time"):
        recorder.maps(tap)


def test_hooks_of_inputs_are_gone_too():
    model = nn.Linear(2, 2)
    with Recorder(model, [Tap("x", "", 0, kind="roi_scores", inputs=True)]) as recorder:
        model(torch.ones(3, 2))
    assert not model._forward_pre_hooks
    assert list(recorder.maps(Tap("x", "", 0, kind="roi_scores", inputs=True))) == ["0"]


@pytest.mark.parametrize(
    ("tap", "call", "words"),
    [
        (Tap("t", "m", kind="roi_scores"), torch.zeros(1, 2, 3, 4), r"not \(R, C\) rows"),
        (Tap("t", "m", 1, inputs=True, kind="proposals"), ([],), "what module 'm' is given"),
    ],
)
def test_what_is_no_row_is_an_error(tap, call, words):
    with pytest.raises(ValueError, match=words):
        tap.maps([call])


def test_the_first_stages_of_a_tap():
    tap = describe(rcnn("cascade")).tap("roi_scores")
    assert tap.first(3) == tap
    assert tap.first(2).paths == ("roi_heads.box_predictor.0", "roi_heads.box_predictor.1")
    assert tap.first(1).paths == ("roi_heads.box_predictor.0",)
    assert tap.first(1).levels == ("stage0",)
    proposals = describe(rcnn("cascade")).tap("proposals")
    assert proposals.first(1).paths == ("roi_heads.box_pooler",)


def test_the_tap_table_lists_them(model):
    table = tap_table(model)
    assert all(f"\n{name}" in table for name in ROWS)


@pytest.mark.parametrize("base", [StandardROIHeads, CascadeROIHeads, Res5ROIHeads])
def test_a_box_head_of_ones_own_is_not_guessed_at(base):
    kind = {StandardROIHeads: "faster", CascadeROIHeads: "cascade", Res5ROIHeads: "c4"}[base]
    model = rcnn(kind)
    method = "forward" if base is Res5ROIHeads else "_forward_box"
    own = {method: lambda self, *args: getattr(base, method)(self, *args)}
    model.roi_heads.__class__ = type("Mine", (base,), own)
    assert describe_roi_head(model.roi_heads) is None
    with pytest.raises(KeyError, match=r"GeneralizedRCNN has no tap or module 'roi_scores'"):
        describe(model).tap("roi_scores")
    assert "features" in describe(model).named_taps()
    model.roi_heads.__class__ = type("Mine", (base,), {})  # a subclass that changes nothing of it
    assert describe_roi_head(model.roi_heads) is not None


def test_rotated_boxes_and_other_predictors_are_not_guessed_at():
    model = rcnn()
    model.roi_heads.box_predictor.box2box_transform.weights = (1.0,) * 5
    assert describe_roi_head(model.roi_heads) is None
    model = rcnn()
    model.roi_heads.box_predictor = nn.Identity()
    assert describe_roi_head(model.roi_heads) is None
    assert describe(toys.toy_fcos()).roi_head() is None


# -- running --------------------------------------------------------------------------------------


def test_a_run_on_given_boxes_is_what_detectron2_computes(kind, model):
    """Its own inference from the same boxes: of a cascade, the first stage."""
    model = copy.deepcopy(model).eval()
    detector = describe(model)
    rois = rois_of(1)
    features = model.backbone(model.preprocess_image(INPUTS).tensor)
    instances = [Instances((128, 128)) for _ in INPUTS]
    for i, x in enumerate(instances):
        boxes = rois["stage0"]
        x.proposal_boxes = Boxes(boxes[boxes[:, 0] == i, 1:])
        x.objectness_logits = torch.ones(len(x.proposal_boxes))
    taps = [detector.tap(name).first(1) for name in ("roi_scores", "roi_deltas")]
    with torch.no_grad():
        with Recorder(model, taps) as theirs:
            model.roi_heads(None, features, instances)
        with Recorder(model, taps) as ours:
            detector.roi_head().run(features, rois)
    for tap in taps:
        assert len(ours.maps(tap)["stage0"]) == 3
        assert_close(ours.maps(tap)["stage0"], theirs.maps(tap)["stage0"], rtol=0, atol=0)


def test_every_stage_looks_at_its_own_boxes_with_its_own_head():
    model = rcnn("cascade").eval()
    detector = describe(model)
    features = model.backbone(model.preprocess_image(INPUTS).tensor)
    taps = [detector.tap(name) for name in ("roi_scores", "roi_deltas")]
    rois = rois_of(3)
    with torch.no_grad():
        with Recorder(model, taps) as recorder:
            detector.roi_head().run(features, rois)
        heads = model.roi_heads
        maps = [features[f] for f in heads.box_in_features]
        for k, (stage, boxes) in enumerate(rois.items()):
            per_image = [Boxes(boxes[boxes[:, 0] == i, 1:]) for i in (0, 1)]
            scores, deltas = heads.box_predictor[k](
                heads.box_head[k](heads.box_pooler(maps, per_image))
            )
            assert_close(recorder.maps(taps[0])[stage], scores, rtol=0, atol=0)
            assert_close(recorder.maps(taps[1])[stage], deltas, rtol=0, atol=0)


def test_images_without_boxes_and_no_boxes_at_all(model):
    detector = describe(model)
    features = model.backbone(model.preprocess_image(INPUTS).tensor)
    tap = detector.tap("roi_scores").first(1)
    for boxes in ([torch.rand(2, 4) * 50, torch.zeros(0, 4)], [torch.zeros(0, 4)] * 2):
        rois = {"stage0": as_rois([Boxes(b) for b in boxes])}
        with torch.no_grad(), Recorder(model, [tap]) as recorder:
            detector.roi_head().run(features, rois)
        assert recorder.maps(tap)["stage0"].shape == (len(rois["stage0"]), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_short_precision_boxes_stay_where_they_are(dtype):
    """Coordinates of a large image are pooled in float32: bfloat16 has whole 4 pixels there."""
    model = rcnn().eval()
    detector = describe(model)
    tap = detector.tap("roi_scores")
    features = {f"p{i}": torch.randn(1, 8, 2 ** (9 - i), 2 ** (9 - i)) for i in range(2, 6)}
    box = torch.tensor([[401.5, 301.5, 441.5, 331.5]])
    rois = {"stage0": as_rois([Boxes(box)])}
    seen = []
    model.roi_heads.box_head.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        detector.roi_head().run(features, rois)
        model.to(dtype)
        with Recorder(model, [tap]) as recorder:
            detector.roi_head().run({k: x.to(dtype) for k, x in features.items()}, rois)
    exact, rounded = seen
    assert rounded.dtype == recorder.maps(tap)["stage0"].dtype == dtype
    assert float((rounded.float() - exact).norm() / exact.norm()) < 0.01


def test_an_architecture_without_storage_says_the_same(model):
    detector = describe(meta_copy(model))
    assert detector.roi_head().shapes == describe(model).roi_head().shapes
    assert detector.roi_head().taps == describe(model).roi_head().taps
