"""
Level (a): scripts that know nothing of kd_det but the import and `add_kd_config`.

Trained, interrupted, resumed and evaluated as subprocesses (``scripts/``), on the COCO stand-in.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

import kd_det
from kd_det.config import student_config
from tests.toys import distiller_cfg, save_teacher

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
STUB = ROOT / "kd_det" / "_stub_C.py"
DATA = ROOT.parent / "shared" / "data"

pytestmark = pytest.mark.skipif(
    not (DATA / "coco").is_dir(), reason="the 27-image COCO stand-in is not beside the checkout"
)

LAZY = """
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data import get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import LinearParamScheduler
from kd_det import Distiller, Teacher
from kd_det.schedules import Ramp
from kd_det.terms import CWD
from loops import build_from

train = dict(
    output_dir="", init_checkpoint="", max_iter=4, device="cpu",
    checkpointer=dict(period=2, max_to_keep=9),
)
model = L(Distiller)(
    student=L(build_from)(config_file={student!r}),
    sources=L("builtins.dict")(teacher=L(Teacher)(config_file={config!r}, weights={weights!r})),
    terms=L("builtins.dict")(
        fpn=L(CWD)(tap="features", weight=5.0, schedule=L(Ramp)(rate=2.0)),
        logits=L(CWD)(tap="cls_logits"),
    ),
    max_iter="${{train.max_iter}}",
    log_period=2,
)
dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
        mapper=L(DatasetMapper)(
            is_train=True,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=64, max_size=96)],
            image_format="BGR",
        ),
        total_batch_size=2,
        num_workers=0,
    )
)
optimizer = L(torch.optim.SGD)(params=L(get_default_optimizer_params)(), lr=0.001, momentum=0.9)
lr_multiplier = L(LinearParamScheduler)(start_value=1.0, end_value=1.0)
"""


def run(script: str, *words: object) -> str:
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(DATA),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{SCRIPTS}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SCRIPTS / script), *map(str, words)]
    child = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    return child.stdout + child.stderr


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "history.json").read_text())


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    """A toy student with connectors (8 channels beside 16), distilled on the COCO stand-in."""
    teacher = save_teacher(tmp_path_factory.mktemp("teacher"), classes=80, fpn=16)
    cfg = distiller_cfg(teacher, classes=80)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = 96
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 20
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 0.001, 0
    cfg.TEST.EVAL_PERIOD = 0
    cfg.KD.LOG_PERIOD = 2
    cfg.SEED = 3
    return cfg


@pytest.fixture(scope="module")
def runs(cfg: CfgNode, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output folder of every loop, stopped after two iterations and resumed to the end."""
    folder = tmp_path_factory.mktemp("runs")
    files = dict.fromkeys(("default_trainer", "plain_loop"), folder / "toy.yaml")
    files["plain_loop"].write_text(cfg.dump())
    student = folder / "student_of_lazy.yaml"
    student.write_text(student_config(cfg).dump())
    source = cfg.KD.SOURCES.TEACHER
    files["lazy_loop"] = folder / "lazy.py"
    files["lazy_loop"].write_text(
        LAZY.format(student=str(student), config=source.CONFIG_FILE, weights=source.WEIGHTS)
    )
    outputs = {}
    for loop, file in files.items():
        outputs[loop] = output = folder / loop
        if loop == "lazy_loop":
            words, first = [output], ["train.max_iter=2"]
        else:
            # The test set is evaluated below, by a stock Detectron2.
            words, first = ["OUTPUT_DIR", output, "DATASETS.TEST", "()"], ["SOLVER.MAX_ITER", 2]
        run("train.py", loop, "--config-file", file, *words, *first)
        if loop == "default_trainer":
            (output / "begin").mkdir()
            shutil.copy(output / "history.json", output / "begin")
        run("train.py", loop, "--config-file", file, "--resume", *words)
    return outputs


LOOPS = ("default_trainer", "plain_loop", "lazy_loop")


@pytest.mark.parametrize("loop", LOOPS)
def test_the_checkpoints_are_the_student(runs: dict[str, Path], cfg: CfgNode, loop: str) -> None:
    expected = build_model(student_config(cfg)).state_dict()
    for name in ("model_0000001", "model_0000003", "model_final"):
        found = torch.load(runs[loop] / f"{name}.pth", weights_only=False)["model"]
        assert list(found) == list(expected)
        assert all(found[k].shape == expected[k].shape for k in expected)


@pytest.mark.parametrize("loop", LOOPS)
def test_distillation_happened_and_went_on_after_the_resume(
    runs: dict[str, Path], loop: str
) -> None:
    if loop == "lazy_loop":
        rows = metrics(runs[loop])
        assert [r["iteration"] for r in rows if "loss_kd_fpn" in r] == [0, 1, 2, 3]
        # The ramp's clock is train.max_iter; two runs of 2 and 4 iterations begin with progress 0.
        assert rows[0]["loss_kd_fpn"] == 0
        assert all(r["loss_kd_fpn"] > 0 for r in rows[1:])
        assert "kd/fpn/p3/weighted" in rows[-1]
    else:
        rows = history(runs[loop])
        assert len(rows) == 2  # of the resumed part
        assert all(r["loss_kd_fpn"] > 0 and r["loss_kd_logits"] > 0 for r in rows)
    if loop == "default_trainer":
        assert "kd/fpn/p3" in rows[-1]
        assert (runs[loop] / "student.yaml").is_file()
    if loop != "lazy_loop":  # whose Distiller knows of no output folder
        record = json.loads((runs[loop] / "kd_run.json").read_text())
        assert [entry["iteration"] for entry in record["resumed"]] == [2]
        assert "coco_2017_train" in record["datasets"]["train"]
    # Connectors trained on from where they were.
    state = torch.load(runs[loop] / "model_final.pth", weights_only=False)["model"]
    kd = state._metadata[""]["kd"]
    weight = kd["tensors"]["terms.fpn.connectors.p3.weight"]
    earlier = torch.load(runs[loop] / "model_0000001.pth", weights_only=False)["model"]
    before = earlier._metadata[""]["kd"]["tensors"]["terms.fpn.connectors.p3.weight"]
    assert not torch.equal(weight, before)
    assert float((weight - before).abs().max()) < 0.1
    assert len(kd["sources"]["teacher"]) == 64


def test_stock_detectron2_evaluates_them_with_identical_predictions(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = runs["plain_loop"]
    student = folder / "student.yaml"
    # These runs were told to have no test set.
    text = student.read_text().replace("TEST: []", "TEST: [coco_2017_val]")
    student = tmp_path / "student.yaml"
    student.write_text(text.replace("TEST: ()", "TEST: [coco_2017_val]"))
    pairs = {to: [(runs[p] / "model_final.pth", tmp_path / to / p) for p in LOOPS] for to in "ab"}
    run("stock.py", "evaluate", STUB, student, *(word for pair in pairs["a"] for word in pair))
    words = [word for pair in pairs["b"] for word in pair]
    run("train.py", "evaluate", "--config-file", folder.parent / "toy.yaml", *words)
    for loop in LOOPS:
        name = f"{loop}/coco_instances_results.json"
        found = json.loads((tmp_path / "a" / name).read_text())
        assert len(found) > 15
        assert found == json.loads((tmp_path / "b" / name).read_text())


def test_disabled_equals_plain_detectron2_exactly(
    runs: dict[str, Path], cfg: CfgNode, tmp_path: Path
) -> None:
    """Two fresh processes: Detectron2's compiled focal loss changes its mind within one."""
    ours, stocks = tmp_path / "ours", tmp_path / "stocks"
    words = ["SOLVER.MAX_ITER", 20, "SOLVER.CHECKPOINT_PERIOD", 20, "DATASETS.TEST", "()"]
    (tmp_path / "kd.yaml").write_text(cfg.dump())
    (tmp_path / "plain.yaml").write_text(student_config(cfg).dump())
    disabled = ["OUTPUT_DIR", ours, "KD.ENABLED", False, *words]
    run("train.py", "default_trainer", "--config-file", tmp_path / "kd.yaml", *disabled)
    plain = [tmp_path / "plain.yaml", "OUTPUT_DIR", stocks, *words]
    run("stock.py", "default_trainer", STUB, *plain)

    times = {"time", "data_time", "eta_seconds", "rank_data_time"}

    def without_times(rows: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{k: v for k, v in r.items() if k not in times} for r in rows]

    assert len(history(ours)) == 20
    assert without_times(history(ours)) == without_times(history(stocks))
    assert [list(r) for r in metrics(ours)] == [list(r) for r in metrics(stocks)]
    a, b = (torch.load(f / "model_final.pth", weights_only=False) for f in (ours, stocks))
    assert list(a) == list(b)
    assert list(a["model"]) == list(b["model"])
    assert a["model"]._metadata == b["model"]._metadata
    torch.testing.assert_close(dict(a["model"]), dict(b["model"]), rtol=0, atol=0)
    # And the distilled run met the same student and the same first batch.
    first, plain_first = history(runs["default_trainer"] / "begin")[0], history(stocks)[0]
    for name in ("loss_cls", "loss_box_reg"):
        assert first[name] == plain_first[name]


def test_the_scripts_know_nothing_of_kd_det() -> None:
    lines = (SCRIPTS / "train.py").read_text().splitlines()
    used = [line.strip() for line in lines if "kd_det" in line and not line.startswith('"""')]
    assert used == ["import kd_det  # isort: skip", "kd_det.add_kd_config(cfg)"]
    assert "kd_det" not in "".join((SCRIPTS / "loops.py").read_text().splitlines()[1:])
    assert get_cfg().get("KD") is None
    assert callable(kd_det.add_kd_config)
