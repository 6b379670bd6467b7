"""The teacher's box head on the student's boxes: scaled, once, stage by stage, and no more."""

import pytest
import torch
from detectron2.structures import Boxes
from torch import nn
from torch.testing import assert_close

from kd_det import Teacher
from kd_det.context import Context
from kd_det.detectors import describe, probe
from kd_det.sources import Source
from kd_det.taps import as_rois
from tests.toys import toy_fcos
from tests.two_stage import KINDS, boxes_seen, exact, inputs, pair, poolers, rcnn, save_rcnn

TAPS = ("roi_scores", "roi_deltas")
INPUTS = inputs()
BOXES = torch.tensor([[4.0, 8, 60, 40], [30, 30, 90, 100], [11, 13, 47, 91]])


def context(stages=1, batched_inputs=INPUTS):
    rois = {
        f"stage{k}": as_rois([Boxes(BOXES[:2] + k), Boxes(BOXES[2:] + k)]) for k in range(stages)
    }
    return Context(batched_inputs, "BGR", nn.Identity(), {"proposals": rois})


def student_of(stages):
    """What a student with so many stages looks like to `Teacher.wire`."""
    kind = "cascade" if stages == 3 else "faster"
    model = rcnn(kind)
    return probe(model, describe(model).roi_head().taps.values())


def wired(model, stages=1, taps=TAPS, **kwargs):
    source = exact(model, **kwargs)
    source.wire(student_of(stages))
    source.shapes(taps)
    source.prepare(taps)
    return source


def count(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_only_taps_of_the_box_head_need_the_students_boxes():
    source = exact(rcnn())
    assert source.student_taps(("features", "rpn_logits")) == ()
    assert source.student_taps(("features", "roi_scores")) == ("proposals",)
    assert source.student_taps(TAPS) == ("proposals",)
    assert Source().student_taps(TAPS) == ()


def test_asking_reads_no_file():
    source = Teacher(config_file="none.yaml", weights="none.pth")
    assert source.student_taps(TAPS) == ("proposals",)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_deltas_of_the_given_boxes(kind):
    model = rcnn(kind).eval()
    stages = 3 if kind == "cascade" else 1
    source = wired(model, stages)
    maps = source(context(stages), TAPS).maps
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(INPUTS).tensor)
        heads = model.roi_heads
        for k in range(stages):
            rois = [Boxes(BOXES[:2] + k), Boxes(BOXES[2:] + k)]
            pooled = poolers(model)([features[f] for f in heads.in_features], rois)
            if kind == "c4":
                scores, deltas = heads.box_predictor(heads.res5(pooled).mean((2, 3)))
            elif kind == "cascade":
                scores, deltas = heads.box_predictor[k](heads.box_head[k](pooled))
            else:
                scores, deltas = heads.box_predictor(heads.box_head(pooled))
            assert_close(maps["roi_scores"][f"stage{k}"], scores, rtol=0, atol=0)
            assert_close(maps["roi_deltas"][f"stage{k}"], deltas, rtol=0, atol=0)
    assert list(maps["roi_scores"]) == [f"stage{k}" for k in range(stages)]
    assert not any(x.requires_grad for of in maps.values() for x in of.values())


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_boxes_are_scaled_as_the_images_are(scale):
    source = wired(rcnn(), scale=scale)
    seen = []
    boxes_seen(source.hidden.held, seen)
    source(context(), TAPS)
    ((first, second),) = seen
    assert_close(first, BOXES[:2] * scale)
    assert_close(second, BOXES[2:] * scale)


def test_at_half_size_it_is_the_teacher_of_half_size_images_and_boxes():
    model = rcnn()
    source = wired(model, scale=0.5)
    maps = source(context(), TAPS).maps
    halves = [{"image": source._resized(x["image"])} for x in INPUTS]
    small = Context(halves, "BGR", nn.Identity())
    rois = {"stage0": as_rois([Boxes(BOXES[:2] / 2), Boxes(BOXES[2:] / 2)])}
    small.student_maps = {"proposals": rois}
    expected = wired(model)(small, TAPS).maps
    for tap in TAPS:
        assert_close(maps[tap]["stage0"], expected[tap]["stage0"], rtol=0, atol=0)


def test_the_backbone_runs_once_whatever_is_asked():
    for taps, heads in [
        (TAPS, 0),
        (("features", *TAPS), 0),
        (("features", "rpn_logits", "res3", *TAPS), 1),
    ]:
        source = wired(rcnn(), taps=taps)
        held = source.hidden.held
        backbones, rpns = count(held.backbone), count(held.proposal_generator.rpn_head)
        beyond = count(held.proposal_generator), count(held.roi_heads)
        poolings = count(held.roi_heads.box_pooler)
        maps = source(context(), taps).maps
        assert list(maps) == list(taps)
        assert (len(backbones), len(rpns), len(poolings)) == (1, heads, 1)
        assert beyond == ([], [])
    source = wired(rcnn(), taps=("features",))
    poolings = count(source.hidden.held.roi_heads.box_pooler)
    source(context(), ("features",))
    assert not poolings


@pytest.mark.parametrize(
    ("kind", "stages", "run"), [("cascade", 1, 1), ("faster", 3, 1), ("cascade", 3, 3)]
)
def test_stages_without_a_partner_are_not_run(kind, stages, run):
    source = wired(rcnn(kind), stages)
    shapes = source.shapes(TAPS)
    assert [s.level for s in shapes["roi_scores"]] == [f"stage{k}" for k in range(run)]
    poolings = count(source.hidden.held.roi_heads.box_pooler)
    maps = source(context(stages), TAPS).maps
    assert len(poolings) == run
    assert list(maps["roi_scores"]) == [f"stage{k}" for k in range(run)]


def test_bfloat16_is_near(tmp_path):
    model = rcnn()
    maps, rounded = (
        wired(model, precision=p)(context(), TAPS).maps for p in ("float32", "bfloat16")
    )
    for tap in TAPS:
        x, y = maps[tap]["stage0"], rounded[tap]["stage0"]
        assert y.dtype == torch.bfloat16
        assert 0 < float((y.float() - x).norm() / x.norm()) < 0.05


@pytest.mark.parametrize("saved", [True, False])
def test_it_runs_in_inference_mode_where_nobody_saves(saved):
    source = wired(rcnn())
    source.targets_saved = saved
    maps = source(context(), TAPS).maps
    assert all(x.is_inference() is not saved for of in maps.values() for x in of.values())


def test_folded_and_channels_last_it_says_the_same(tmp_path):
    config, weights = save_rcnn(tmp_path, "c4", norm="BN")
    found = []
    for fast in (False, True):
        source = Teacher(
            config_file=config, weights=weights, fold_batch_norm=fast, channels_last=fast
        )
        source.wire(student_of(1))
        source.prepare(TAPS)
        found.append(source(context(), TAPS).maps)
    for tap in TAPS:
        assert_close(found[1][tap]["stage0"], found[0][tap]["stage0"], rtol=1e-3, atol=1e-4)


def test_a_teacher_without_a_box_head_is_an_error():
    with pytest.raises(KeyError, match=r"Source 'teacher': FCOS has no tap .*'roi_scores'"):
        pair(rcnn(), exact(toy_fcos()))


def test_a_student_without_a_box_head_is_an_error():
    with pytest.raises(KeyError, match=r"Term 'box': FCOS has no tap .*'roi_scores'"):
        pair(toy_fcos(), rcnn())
