"""Backbones of every kind under the detectors: presets, depth of a run, padding, layout."""

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from torch import nn
from torch.testing import assert_close

from kd_det import Distiller, Teacher, terms
from kd_det.context import Context
from kd_det.detectors import describe, probe
from kd_det.sources.model_config import ModelConfig
from kd_det.taps import Recorder
from tests import architectures, toys

needs_vit = architectures.needs_vit
RPN = ["rpn_logits", "rpn_deltas"]


def from_lazy(folder: Path, kind: str, **values: object) -> nn.Module:
    file = folder / f"{kind}.py"
    file.write_text(architectures.lazy(kind, **values))
    return instantiate(LazyConfig.load(str(file)).model)


def build(name: str, folder: Path) -> nn.Module:
    if name in ("vitdet", "swin", "mvit"):
        return from_lazy(folder, name)
    configs = {
        "mask": lambda: architectures.rcnn(mask=True),
        "cascade": lambda: architectures.rcnn(cascade=True),
        "c4": architectures.rcnn_without_pyramid,
        "dc5": lambda: architectures.rcnn_without_pyramid(dilated=True),
    }
    return build_model(configs[name]())


RESNET = ["res2", "res3", "res4", "res5"]
PRESETS = {
    "mask": RESNET,
    "cascade": RESNET,
    "c4": ["res4"],
    "dc5": ["res5"],
    "vitdet": ["last_feat"],
    "swin": ["p0", "p1", "bottom_up.p2", "bottom_up.p3"],
    "mvit": ["scale2", "scale3", "scale4", "scale5"],
}
NAMES = [
    pytest.param(n, marks=needs_vit if n in ("vitdet", "swin", "mvit") else ()) for n in PRESETS
]


def calls_of(module: nn.Module) -> list[int]:
    count: list[int] = []
    module.register_forward_hook(lambda *_: count.append(1))
    return count


@pytest.mark.parametrize("name", NAMES)
def test_presets_and_their_shapes(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    presets = describe(model).presets()
    assert list(presets) == ["features", *PRESETS[name], *RPN]
    shapes = probe(model, presets.values())
    declared = model.backbone.output_shape()
    assert [(s.level, s.channels, s.stride) for s in shapes["features"]] == [
        (level, shape.channels, shape.stride) for level, shape in declared.items()
    ]
    assert [s.stride for s in shapes["rpn_logits"]] == [s.stride for s in shapes["features"]]
    for stage in PRESETS[name]:
        (shape,) = shapes[stage]
        assert shape.level == stage.removeprefix("bottom_up.")
        bottom_up = getattr(model.backbone, "bottom_up", getattr(model.backbone, "net", None))
        spec = (bottom_up or model.backbone).output_shape()[shape.level]
        assert (shape.channels, shape.stride) == (spec.channels, spec.stride)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_no_deeper_than_its_taps_and_gives_the_models_own_maps(
    name: str, tmp_path: Path
) -> None:
    model = build(name, tmp_path).eval()
    detector = describe(model)
    pyramid = calls_of(model.backbone)
    rpn = calls_of(model.proposal_generator.rpn_head)
    heads = [calls_of(m) for m in model.roi_heads.modules()]
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.backbone(x)
        pyramid.clear()
        for tap, depth in ((PRESETS[name][-1], (0, 0)), ("features", (1, 0)), (RPN[0], (2, 1))):
            with Recorder(model, [detector.tap(tap)]) as recorder:
                detector.run(x, [detector.tap(tap)])
            assert (len(pyramid), len(rpn)) == depth
            if tap == "features":
                for level, found in recorder.maps(detector.tap(tap)).items():
                    assert_close(found, expected[level], rtol=0, atol=0)
    assert not any(heads)


def test_fast_rcnn_with_precomputed_proposals_has_no_rpn() -> None:
    cfg = architectures.rcnn()
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    model = build_model(cfg)
    presets = describe(model).presets()
    assert list(presets) == ["features", *RESNET]
    assert len(probe(model, presets.values())["features"]) == 5


# -- ViTDet ---------------------------------------------------------------------------------------


@needs_vit
@pytest.mark.parametrize("path", ["backbone.net.blocks.1", "backbone.net.patch_embed"])
def test_blocks_of_a_vit_have_their_channels_last_which_is_an_error(
    path: str, tmp_path: Path
) -> None:
    model = build("vitdet", tmp_path)
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 16\) for a square image.*channels come last"):
        probe(model, [describe(model).tap(path)])
    with pytest.raises(ValueError, match="Presets of this GeneralizedRCNN: features, last_feat"):
        probe(model, [describe(model).tap(path)])


@needs_vit
@pytest.mark.parametrize("kind", ["vitdet", "swin", "mvit"])
def test_a_transformer_is_built_without_storage(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its drop rates are values that the constructor reads."""
    (tmp_path / "x.py").write_text(architectures.lazy(kind))
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)  # a detour would need it
    config = ModelConfig(str(tmp_path / "x.py"), what="teacher")
    model = config.build("meta")
    assert all(x.is_meta for x in model.parameters())


@needs_vit
def test_a_vit_teacher_drops_nothing_and_sees_rgb(tmp_path: Path) -> None:
    model = from_lazy(tmp_path, "vitdet", order="RGB").train()  # drop_path_rate is 0.5
    source = Teacher(model=model)
    source.shapes(("last_feat",))
    source.prepare(("last_feat",))
    source.train()  # whatever its owner does
    context = Context(toys.batch(), "BGR", nn.Identity())
    maps = [source(context, ("last_feat",)).maps["last_feat"]["last_feat"] for _ in range(2)]
    rgb = [{**x, "image": x["image"].flip(0)} for x in context.inputs]
    with torch.no_grad():
        expected = model.eval().backbone.net(model.preprocess_image(rgb).tensor)["last_feat"]
    for found in maps:
        assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@needs_vit
@pytest.mark.parametrize("vit_teaches", [True, False])
def test_a_square_canvas_meets_a_padded_one_in_their_common_part(
    vit_teaches: bool, tmp_path: Path
) -> None:
    """A ViTDet pads to 128 x 128, a RetinaNet 64 x 96 images to themselves."""
    vit = from_lazy(tmp_path, "vitdet", order="RGB", square=128)
    retinanet = build_model(toys.toy_cfg(fpn=16))
    teacher, student = (vit, retinanet) if vit_teaches else (retinanet, vit)
    model = Distiller(
        student=student,
        sources={"teacher": Teacher(model=teacher)},
        terms={"fpn": terms.CWD(tap="features")},
    )
    assert [row.level for row in model.wiring.rows["fpn"]] == ["p3", "p4", "p5"]
    compared = {}
    term = model.wiring.terms["fpn"]
    aligned = term.aligned

    def seen(*args: object) -> object:
        for level, s, t, region in aligned(*args):
            compared[level] = (tuple(s.shape), tuple(t.shape))
            yield level, s, t, region

    term.aligned = seen
    losses = model.train()(toys.batch(((64, 96), (64, 96))))
    assert 0 < float(losses["loss_kd_fpn"].detach()) < float("inf")
    channels = 8 if vit_teaches else 16
    assert compared == {
        level: ((2, channels, 64 // stride, 96 // stride),) * 2
        for level, stride in {"p3": 8, "p4": 16, "p5": 32}.items()
    }
    losses["loss_kd_fpn"].backward()
    grads = [p.grad for p in student.backbone.parameters() if p.grad is not None]
    assert any(g.abs().max() > 0 for g in grads)
