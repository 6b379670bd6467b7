"""Class maps distilled: whole runs, their evaluation, what is said of the teacher, and export."""

import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, hooks
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

import kd_det
import train_net
from kd_det.config import student_config
from kd_det.data.synthetic import CLASSES, make_synthetic_coco
from kd_det.data.synthetic_masks import make_synthetic_masks, register_synthetic_masks
from kd_det.engine import build_evaluator, check_data
from kd_det.terms import CWD
from kd_det.tools import runs, semantic
from tests.steps import step
from tests.toys import batch, distiller_cfg, save_teacher, with_pixels

SCRIPTS = Path(__file__).parent / "scripts"
STUB = Path(kd_det.__file__).parent / "_stub_C.py"
TERM = {"CLASSES": {"TYPE": "CWD", "TAP": "sem_seg_logits", "TAU": 4.0, "WEIGHT": 3.0}}
TRAIN, VAL = "semantic_test_train", "semantic_test_val"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    make_synthetic_coco(folder, num_train=8, num_val=3)
    make_synthetic_masks(folder)
    for name, split in ((TRAIN, "train"), (VAL, "val")):
        register_synthetic_masks(name, folder, split)
    yield folder
    for name in (TRAIN, VAL):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return save_teacher(folder, arch="SemanticSegmentor", classes=len(CLASSES), fpn=12)


@pytest.fixture
def cfg(data, teacher, tmp_path):
    cfg = distiller_cfg(teacher, TERM, arch="SemanticSegmentor", classes=len(CLASSES))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (TRAIN,), (VAL,)
    cfg.SOLVER.MAX_ITER = cfg.SOLVER.CHECKPOINT_PERIOD = cfg.TEST.EVAL_PERIOD = 3
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.KD.LOG_PERIOD = cfg.KD.DIAGNOSTICS.PERIOD = cfg.VIS_PERIOD = 2
    cfg.SEED = 1
    Path(cfg.OUTPUT_DIR).mkdir()
    return cfg


LAZY = """
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.meta_arch.semantic_seg import SemanticSegmentor, SemSegFPNHead

stages = ["res2", "res3", "res4", "res5"]
model = L(SemanticSegmentor)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="BN"),
            stages=L(ResNet.make_default_stages)(depth=18, norm="BN"),
            out_features=stages,
        ),
        in_features=stages,
        out_channels=8,
    ),
    sem_seg_head=L(SemSegFPNHead)(
        input_shape={f"p{i}": L(ShapeSpec)(channels=8, stride=2**i) for i in (2, 3, 4, 5)},
        num_classes=4,
        conv_dims=8,
        common_stride=4,
        norm="BN",
        ignore_value=255,
    ),
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[57.375, 57.12, 58.395],
)
"""


class Trainer(kd_det.TrainerMixin, DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return build_evaluator(cfg, dataset_name)


def stock_masks(folder, inputs):
    torch.save(inputs, folder / "inputs.pt")
    files = ("student.yaml", "model_final.pth", "inputs.pt", "masks.pt")
    words = [sys.executable, SCRIPTS / "predict.py", STUB, *(folder / f for f in files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS)}
    child = subprocess.run(
        [str(word) for word in words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return torch.load(folder / "masks.pt")


def test_a_run_trains_evaluates_and_is_the_plain_student_to_stock_detectron2(cfg, caplog):
    trainer = Trainer(cfg)
    best = hooks.BestCheckpointer(cfg.TEST.EVAL_PERIOD, trainer.checkpointer, "sem_seg/mIoU")
    trainer.register_hooks([best])
    with caplog.at_level(logging.WARNING, "kd_det"):
        trainer.train()
    found = trainer._last_eval_results["sem_seg"]
    assert 0 < found["mIoU"] <= 100
    assert "IoU-background" in found
    # The gap to the teacher is one of boxes; of class maps one sentence is said.
    assert caplog.text.count("has no box AP") == 1
    folder = Path(cfg.OUTPUT_DIR)
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    last = {key: value for row in rows for key, value in row.items()}
    assert {"loss_sem_seg", "loss_kd_classes", "sem_seg/mIoU"} <= set(last)
    assert last["kd/classes/sem_seg/weighted"] == pytest.approx(3 * last["kd/classes/sem_seg"])
    assert last["kd/classes/grad_ratio"] > 0
    plain = build_model(student_config(cfg))
    for file in ("model_final.pth", "model_best.pth"):
        saved = torch.load(folder / file, weights_only=False)["model"]
        assert set(saved) == set(plain.state_dict())
    record = json.loads((folder / "kd_run.json").read_text())
    assert record["datasets"]["train"][TRAIN]["images"] == 8

    inputs = batch(((64, 64), (48, 80)))
    model = trainer.model.eval()
    with torch.no_grad():
        ours = [x["sem_seg"] for x in model(inputs)]
    for mine, theirs in zip(ours, stock_masks(folder, inputs), strict=True):
        assert torch.equal(mine, theirs)


def test_a_gate_on_class_maps_is_a_sentence(cfg):
    cfg.KD.SOURCES.TEACHER.MIN_AP = 10.0
    with pytest.raises(ValueError, match=f"COCO format, but '{VAL}' is of type 'sem_seg'"):
        Trainer(cfg).train()


def test_the_dry_run_prints_the_plan(cfg, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(cfg.dump())
    report = train_net.main(
        train_net.argument_parser().parse_args(["--config-file", str(file), "--dry-run"])
    )
    (row,) = [line for line in report.splitlines() if "sem_seg_logits" in line]
    for word in ("classes", "CWD", "Padding"):
        assert word in row
    assert "peak memory" in report


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("NUM_CLASSES", 6, "NUM_CLASSES is 6, but the pixels of 'semantic_test_train' are of 7"),
        ("IGNORE_VALUE", 254, "IGNORE_VALUE is 254, .* do not count are 255"),
    ],
)
def test_a_head_that_does_not_fit_the_data_is_refused(cfg, key, value, says):
    check_data(cfg, training=True)
    cfg.MODEL.SEM_SEG_HEAD[key] = value
    with pytest.raises(ValueError, match=says):
        check_data(cfg, training=True)


def test_boxes_alone_are_refused(cfg, data):
    kd_det.data.register_coco(
        "semantic_boxes", str(data / "annotations" / "instances_val.json"), str(data / "val")
    )
    cfg.DATASETS.TEST = ("semantic_boxes",)
    with pytest.raises(ValueError, match="'semantic_boxes' has boxes only"):
        check_data(cfg, training=True)


def test_a_lazyconfig_teacher_and_student(tmp_path):
    file, weights = tmp_path / "lazy.py", tmp_path / "lazy.pth"
    file.write_text(LAZY)
    cfg = LazyConfig.load(str(file))
    torch.save({"model": instantiate(cfg.model).state_dict()}, weights)
    term = L(CWD)(tap="sem_seg_logits", tau=4.0, weight=3.0)
    cfg.model = L(kd_det.Distiller)(
        student=cfg.model,
        sources=L("builtins.dict")(
            t=L(kd_det.Teacher)(config_file=str(file), weights=str(weights))
        ),
        terms=L("builtins.dict")(classes=term),
    )
    model = instantiate(cfg.model).train()
    losses = step(model, 0, with_pixels(batch()))
    assert set(losses) == {"loss_sem_seg", "loss_kd_classes"}
    assert losses["loss_kd_classes"] > 0


# -- PanopticFPN ----------------------------------------------------------------------------------


def test_a_panoptic_student_distils_features_and_class_maps(tmp_path):
    files = save_teacher(tmp_path / "teacher", arch="PanopticFPN", fpn=12)
    terms = {**TERM, "FPN": {"TYPE": "CWD", "TAP": "features"}}
    cfg = distiller_cfg(files, terms, arch="PanopticFPN")
    model = build_model(cfg).train()
    assert [row.level for row in model.wiring.rows["fpn"]] == ["p2", "p3", "p4", "p5", "p6"]
    assert [row.level for row in model.wiring.rows["classes"]] == ["sem_seg"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = with_pixels(batch())
    with EventStorage(0):
        for _ in range(3):
            losses = model(inputs)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            assert all(torch.isfinite(x) for x in losses.values())
    assert {"loss_sem_seg", "loss_mask", "loss_kd_fpn", "loss_kd_classes"} <= set(losses)
    assert losses["loss_kd_classes"] > 0
    (found,) = model.eval()(inputs[:1])
    assert set(found) == {"sem_seg", "instances", "panoptic_seg"}


def test_panoptic_data_are_scored_by_what_the_student_predicts(cfg, monkeypatch):
    monkeypatch.setitem(vars(MetadataCatalog.get(VAL)), "evaluator_type", "coco_panoptic_seg")
    assert isinstance(build_evaluator(cfg, VAL), COCOEvaluator)
    cfg.KD.STUDENT.META_ARCHITECTURE = "PanopticFPN"
    both = build_evaluator(cfg, VAL)
    names = [type(x).__name__ for x in both._evaluators]
    assert names == ["COCOEvaluator", "SemSegEvaluator"]


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    config_of = semantic.config_of

    def shrunk(name, output, seed, iterations=None):
        cfg = config_of(name, output, seed, iterations)
        cfg.defrost()
        cfg.SOLVER.MAX_ITER = 3
        cfg.SOLVER.CHECKPOINT_PERIOD = cfg.TEST.EVAL_PERIOD = 3
        cfg.SOLVER.IMS_PER_BATCH = 2
        cfg.freeze()
        return cfg

    monkeypatch.setattr(semantic, "config_of", shrunk)
    drawn = partial(make_synthetic_coco, num_train=8, num_val=4)
    monkeypatch.setattr(semantic, "make_synthetic_coco", drawn)
    monkeypatch.setattr(runs, "step_ratio", lambda *_: 1.0)


def test_the_command_compares_four_runs(small, tmp_path, capsys):
    from kd_det.__main__ import main

    main(["quickstart", "--task", "semantic", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(results) == list(runs.RUNS)
    assert list(results["distilled"]) == [
        "mIoU", "mACC", "pACC", "parameters", "iterations", "seconds", "seconds_per_iteration"
    ]  # fmt: skip
    assert results["distilled"]["parameters"] == results["student"]["parameters"]
    assert "mIoU" in printed
    assert "distilled" in printed
    assert (tmp_path / "out" / "summary.png").stat().st_size > 10_000
    for name in ("train", "val"):
        DatasetCatalog.remove(f"{semantic.DATASET}_{name}")
        MetadataCatalog.remove(f"{semantic.DATASET}_{name}")


def test_the_distilled_config_is_the_students_and_the_papers_setting(tmp_path):
    plain, distilled = (semantic.config_of(n, tmp_path, 1) for n in ("student", "distilled"))
    term = distilled.KD.TERMS.CLASSES
    assert (term.TYPE, term.TAP, term.TAU, term.WEIGHT) == ("CWD", "sem_seg_logits", 4.0, 3.0)
    assert distilled.KD.ENABLED
    assert not plain.KD.ENABLED
    assert student_config(plain).MODEL == student_config(distilled).MODEL
    teacher = semantic.config_of("teacher", tmp_path, 1)
    assert teacher.SOLVER.MAX_ITER > plain.SOLVER.MAX_ITER


def test_nothing_is_promised_of_class_maps(capsys):
    from kd_det.__main__ import main

    with pytest.raises(SystemExit):
        main(["quickstart", "--task", "semantic", "--check"])
    assert "--check is of the detection task" in capsys.readouterr().err
