"""
Detectron2's own PointRend project, from a checkout of Detectron2 main, distils a PointRend.

Its package is imported from the checkout as it is; its ``train_net.py`` gets the two lines.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.d2_main.checkout import CHECKOUT, ROOT, call, needed, with_two_lines

pytestmark = needed

PROJECT = "projects/PointRend"
CONFIG = "configs/InstanceSegmentation/pointrend_rcnn_R_50_FPN_1x_coco.yaml"
SMALL = """
_BASE_: "{base}"
MODEL:
  DEVICE: "cpu"
  WEIGHTS: ""
  BACKBONE: {{FREEZE_AT: 0}}
  RESNETS: {{STEM_OUT_CHANNELS: 4, RES2_OUT_CHANNELS: 4, WIDTH_PER_GROUP: 4, NORM: "BN"}}
  FPN: {{OUT_CHANNELS: {channels}}}
  RPN: {{POST_NMS_TOPK_TRAIN: 20, POST_NMS_TOPK_TEST: 5}}
  ROI_HEADS: {{SCORE_THRESH_TEST: 0.0}}
  ROI_BOX_HEAD: {{FC_DIM: 8}}
  ROI_MASK_HEAD: {{CONV_DIM: 8, FC_DIM: 8}}
  POINT_HEAD: {{FC_DIM: {point_dim}, SUBDIVISION_STEPS: 3}}
INPUT: {{MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 96, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{IMS_PER_BATCH: 2, BASE_LR: 0.001, MAX_ITER: {iterations}}}
TEST: {{DETECTIONS_PER_IMAGE: 5}}
"""
DISTILLED = """
_BASE_: "student.yaml"
MODEL: {{META_ARCHITECTURE: "Distiller"}}
KD:
  ENABLED: True
  STUDENT: {{META_ARCHITECTURE: "GeneralizedRCNN"}}
  SOURCES:
    TEACHER: {{TYPE: "Teacher", CONFIG_FILE: "teacher.yaml", WEIGHTS: "{weights}"}}
  TERMS:
    FPN: {{TYPE: "CWD", TAP: "features", WEIGHT: 5.0}}
    BOXES: {{TYPE: "BoxHead"}}
"""


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    base = CHECKOUT.resolve() / PROJECT / CONFIG
    (tmp_path / "teacher.yaml").write_text(
        SMALL.format(base=base, channels=16, point_dim=16, iterations=1)
    )
    (tmp_path / "student.yaml").write_text(
        SMALL.format(base=base, channels=8, point_dim=8, iterations=3)
    )
    weights = tmp_path / "teacher" / "model_final.pth"
    (tmp_path / "distilled.yaml").write_text(DISTILLED.format(weights=weights))
    return tmp_path


def test_it_distils_and_its_own_script_evaluates(configs: Path) -> None:
    plain = CHECKOUT / PROJECT / "train_net.py"
    script, out = with_two_lines(f"{PROJECT}/train_net.py", configs), configs / "out"
    call(
        plain, "--config-file", str(configs / "teacher.yaml"), "DATASETS.TEST", "()",
        "OUTPUT_DIR", str(configs / "teacher"),
    )  # fmt: skip
    call(script, "--config-file", str(configs / "distilled.yaml"), "OUTPUT_DIR", str(out))
    lines = (out / "metrics.json").read_text().splitlines()
    found = {key: value for line in lines for key, value in json.loads(line).items()}
    assert found["loss_kd_fpn"] > 0
    assert found["loss_kd_boxes"] > 0
    assert {"loss_mask", "loss_mask_point"} <= set(found)
    model = torch.load(out / "model_final.pth", weights_only=False)["model"]
    assert not [key for key in model if key.startswith(("student", "terms", "sources"))]
    assert [key for key in model if "mask_head.point_head" in key]

    call(
        ROOT / "tests" / "integration" / "scripts" / "without_kd.py",
        str(ROOT / "kd_det" / "_stub_C.py"), str(plain), "--eval-only",
        "--config-file", str(out / "student.yaml"), "OUTPUT_DIR", str(configs / "stock"),
        "MODEL.WEIGHTS", str(out / "model_final.pth"),
    )  # fmt: skip
    results = "inference/coco_instances_results.json"
    stock, ours = (json.loads((f / results).read_text()) for f in (configs / "stock", out))
    assert len(stock) > 20
    assert stock == ours
