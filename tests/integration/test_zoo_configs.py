"""What the zoo has too: equal values; and its strongest pairs, built with random weights."""

import os
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.model_zoo import get_config_file
from detectron2.modeling import build_model
from torch import nn

import kd_det
from kd_det.paths import CONFIGS
from kd_det.plan import plan_table
from kd_det.sources.model_config import ModelConfig
from tests.toys import batch, randomize_norms

# What Detectron2's main branch has under the same name, with the same values.
SHARED = [
    "Base-RCNN-FPN.yaml",
    "Base-RetinaNet.yaml",
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
    "COCO-Detection/retinanet_R_101_FPN_3x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_3x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml",
]
LSJ = "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"
STUDENTS = {"retinanet": "RetinaNet", "faster_rcnn": "GeneralizedRCNN"}
PAIRS = [(s, t) for s in STUDENTS for t in ("mask_X_101", "mask_R_101_LSJ")]


@pytest.mark.d2_main
@pytest.mark.parametrize("file", SHARED)
def test_values_equal_those_of_detectron2(file: str) -> None:
    checkout = os.environ.get("D2_CHECKOUT")
    if not checkout:
        pytest.skip("D2_CHECKOUT names no Detectron2 main checkout (make test-d2-main)")
    theirs, ours = get_cfg(), get_cfg()
    theirs.merge_from_file(str(Path(checkout) / "configs" / file), allow_unsafe=True)
    ours.merge_from_file(str(CONFIGS / file))
    assert ours == theirs


def config(student: str, teacher: str, *overrides: object) -> CfgNode:
    file = CONFIGS / "COCO-Detection" / f"{student}_R_50_FPN_1x_cwd_{teacher}.yaml"
    cfg = get_cfg()
    kd_det.add_kd_config(cfg)
    cfg.merge_from_file(str(file))
    cfg.merge_from_list(["OUTPUT_DIR", "", *overrides])
    return cfg


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_the_plan_of_four_lines(student: str, teacher: str) -> None:
    file = CONFIGS / "COCO-Detection" / f"{student}_R_50_FPN_1x_cwd_{teacher}.yaml"
    lines = file.read_text().splitlines()
    assert len([line for line in lines if not line.startswith("#")]) == 4
    with torch.device("meta"):
        model = build_model(config(student, teacher, "MODEL.DEVICE", "meta"))
    assert type(model.student).__name__ == STUDENTS[student]
    rows = [line.split() for line in plan_table(model, (2, 800, 1344)).splitlines()[2:5]]
    assert [row[:9] for row in rows] == [
        [*f"teacher fpn features.p{i} features.p{i} 1/{2**i} 256 -> 256 -".split()]
        for i in (3, 4, 5)
    ]
    assert model.sources["teacher"].input_format == model.input_format == "BGR"
    assert not list(model.terms.parameters())


def test_the_lsj_teacher_is_detectron2s() -> None:
    """Names, shapes and types of all modules; only main brings the original."""
    try:
        theirs = get_config_file(LSJ)
    except RuntimeError:
        pytest.skip("this Detectron2 comes without its configs")
    assert os.path.abspath(theirs) != str(CONFIGS / LSJ)
    ours = ModelConfig(LSJ, what="teacher")
    assert ours.path == str(CONFIGS / LSJ)
    with torch.device("meta"):
        original = instantiate(LazyConfig.load(theirs).model)
    model = ours.build("meta")
    shapes = {name: x.shape for name, x in original.state_dict().items()}
    assert {name: x.shape for name, x in model.state_dict().items()} == shapes
    for (name, a), (other, b) in zip(model.named_modules(), original.named_modules(), strict=True):
        assert (name, type(a)) == (other, type(b))
        assert getattr(a, "stride", None) == getattr(b, "stride", None)
    assert (model.input_format, ours.input_format) == (original.input_format, "BGR")
    train = LazyConfig.load(theirs).dataloader.train
    assert train.mapper.image_format == ours.input_format


THIN = """
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec

# An R-18 with thin heads that reads RGB; everything else is the LSJ teacher's.
_cfg = LazyConfig.load({file!r})
model, dataloader = _cfg.model, _cfg.dataloader
del model.backbone.bottom_up.stages.stride_in_1x1
model.backbone.bottom_up.stages.depth = 18
model.roi_heads.box_head.conv_dims = model.roi_heads.mask_head.conv_dims = [8]
model.roi_heads.box_head.fc_dims = [8]
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=8)
model.input_format = dataloader.train.mapper.image_format = "RGB"
"""


def test_a_step_with_random_weights_and_folded_sync_batch_norm(tmp_path: Path) -> None:
    file, weights = tmp_path / "thin.py", tmp_path / "thin.pth"
    file.write_text(THIN.format(file=str(CONFIGS / LSJ)))
    teacher = instantiate(LazyConfig.load(str(file)).model)
    randomize_norms(teacher)
    kinds = {type(m) for m in teacher.modules() if "SyncBatchNorm" in type(m).__name__}
    assert kinds == {nn.SyncBatchNorm, NaiveSyncBatchNorm}
    torch.save({"model": teacher.state_dict()}, weights)
    source = "KD.SOURCES.TEACHER"
    overrides = (f"{source}.CONFIG_FILE", str(file), f"{source}.WEIGHTS", str(weights))
    cfg = config("retinanet", "mask_R_101_LSJ", *overrides, "MODEL.DEVICE", "cpu")
    cfg.merge_from_list(["MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", 18])
    cfg.merge_from_list(["MODEL.RESNETS.RES2_OUT_CHANNELS", 64])
    model = build_model(cfg).train()
    losses = model(batch(((64, 64), (48, 64))))
    assert 0 < float(losses["loss_kd_fpn"].detach()) < float("inf")
    held = model.sources["teacher"].hidden.held
    assert model.sources["teacher"].input_format == "RGB"
    left = [n for n, m in held.named_modules() if "BatchNorm" in type(m).__name__]
    assert left == []
