"""
Detectron2's own training scripts, from a checkout of Detectron2 main, run distilled.

    make test-d2-main D2=/path/to/checkout PYTHON=/path/to/python

``lazyconfig_train_net.py`` runs as it is; ``train_net.py`` and ``plain_train_net.py`` get the two
lines that a user adds.
"""

from pathlib import Path

import pytest
import torch

from tests.d2_main.checkout import CHECKOUT, call, needed, with_two_lines
from tests.toys import distiller_cfg, save_teacher

pytestmark = needed


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    cfg = distiller_cfg(save_teacher(folder / "teacher", classes=80, fpn=16), classes=80, fpn=8)
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    cfg.DATASETS.TEST = ("coco_2017_val",)
    cfg.SOLVER.MAX_ITER = 9
    cfg.SOLVER.CHECKPOINT_PERIOD = 7
    cfg.TEST.EVAL_PERIOD = 0
    (folder / "toy.yaml").write_text(cfg.dump())
    return folder / "toy.yaml"


@pytest.mark.parametrize("script", ["train_net.py", "plain_train_net.py"])
def test_yacs_scripts_train_resume_and_evaluate(script, config, tmp_path):
    path, out = with_two_lines(f"tools/{script}", tmp_path), tmp_path / "out"
    common = ("--config-file", str(config), "OUTPUT_DIR", str(out))
    call(path, *common, "SOLVER.MAX_ITER", "7")  # the plain loop writes from the 7th on
    assert "loss_kd_fpn" in (out / "metrics.json").read_text()
    # The flag comes before the overrides, which take the rest of the line.
    call(path, "--resume", *common)
    checkpoint = torch.load(out / "model_final.pth")
    assert checkpoint["iteration"] == 8
    assert not [k for k in checkpoint["model"] if k.startswith(("student", "terms", "sources"))]
    assert checkpoint["model"]._metadata[""]["kd"]["tensors"]  # the connectors
    stock = ("--config-file", str(out / "student.yaml"), "--eval-only")
    weights = ("MODEL.WEIGHTS", str(out / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "eval"))
    call(CHECKOUT / "tools" / script, *stock, *weights)


LAZY = """
import kd_det
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from kd_det import Distiller, Teacher
from kd_det.terms import CWD

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
train = model_zoo.get_config("common/train.py").train
optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = 1e-5  # random weights behind frozen norms: anything larger overflows
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
student = model_zoo.get_config("common/models/retinanet.py").model
student.backbone.bottom_up.freeze_at = 0

model = L(Distiller)(
    student=student,
    sources=L("builtins.dict")(teacher=L(Teacher)(config_file=CONFIG, weights=WEIGHTS)),
    terms=L("builtins.dict")(fpn=L(CWD)(tap="features", weight=5.0)),
    max_iter="${train.max_iter}",
)
dataloader.train.mapper.augmentations[0].short_edge_length = (64,)
dataloader.train.mapper.augmentations[0].max_size = 96
dataloader.test.mapper.augmentations[0].short_edge_length = 64
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = dataloader.test.num_workers = 0
train.init_checkpoint = ""
train.device = "cpu"
train.max_iter = 3
train.eval_period = 0
train.log_period = 1
"""


def test_the_lazyconfig_script_runs_unmodified(tmp_path):
    config, weights = save_teacher(tmp_path / "teacher", classes=80, fpn=16)
    lazy = tmp_path / "distilled.py"
    lazy.write_text(LAZY.replace("CONFIG", repr(config)).replace("WEIGHTS", repr(weights)))
    script, out = CHECKOUT / "tools" / "lazyconfig_train_net.py", tmp_path / "out"
    call(script, "--config-file", str(lazy), f"train.output_dir={out}")
    assert "loss_kd_fpn" in (out / "metrics.json").read_text()
    checkpoint = torch.load(out / "model_final.pth")
    assert not [k for k in checkpoint["model"] if k.startswith(("student", "terms", "sources"))]
    call(
        script, "--config-file", str(lazy), "--eval-only", f"train.output_dir={tmp_path / 'eval'}",
        f"train.init_checkpoint={out / 'model_final.pth'}",
    )  # fmt: skip
