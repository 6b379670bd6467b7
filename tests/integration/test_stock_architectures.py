"""
Every stock architecture distils from a toy teacher of its own kind, evaluates, and leaves files
with which stock Detectron2, where kd_det cannot be imported, predicts the very same.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from torch import Tensor, nn

from kd_det import Distiller, Teacher
from kd_det.terms import CWD
from tests import architectures as a
from tests.integration.scripts.predictions import predictions
from tests.toys import distiller_cfg, randomize_norms

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
STEPS = 3
FPN = {"FPN": {"TYPE": "CWD", "TAP": "features", "WEIGHT": 5.0}}

# A row builds a config with its keyword arguments: a CfgNode, or the text of a LazyConfig file.
# The teacher differs from the student in those of the second dict.
ARCHITECTURES: dict[str, tuple[Callable[..., CfgNode | str], dict[str, Any], dict[str, Any]]] = {
    "retinanet": (a.retinanet, {}, {"fpn": 16}),
    "faster_rcnn_fpn": (a.rcnn, {}, {"fpn": 16}),
    "mask_rcnn_fpn": (a.rcnn, {"mask": True}, {"fpn": 16}),
    "cascade_rcnn_fpn": (a.rcnn, {"cascade": True, "mask": True}, {"fpn": 16}),
    "faster_rcnn_c4": (a.rcnn_without_pyramid, {}, {"width": 8}),
    "faster_rcnn_dc5": (a.rcnn_without_pyramid, {"dilated": True}, {"width": 8}),
    "semantic_segmentor": (a.semantic, {}, {"fpn": 16}),
    "panoptic_fpn": (a.semantic, {"arch": "PanopticFPN"}, {"fpn": 16}),
    "fcos_lazy": (a.lazy, {"kind": "fcos"}, {"fpn": 16}),
    "vitdet_lazy": (a.lazy, {"kind": "vitdet"}, {"fpn": 16, "order": "RGB"}),
    "swin_lazy": (a.lazy, {"kind": "swin"}, {"fpn": 16}),
    "mvit_lazy": (a.lazy, {"kind": "mvit"}, {"fpn": 16}),
}
ON_MAIN = ("vitdet_lazy", "swin_lazy", "mvit_lazy")
NAMES = [pytest.param(n, marks=a.needs_vit if n in ON_MAIN else ()) for n in ARCHITECTURES]
# What a row detects at least, over both images: nothing would be equal to nothing.
KINDS = {
    "mask_rcnn_fpn": "instances.pred_masks",
    "cascade_rcnn_fpn": "instances.pred_masks",
    "semantic_segmentor": "sem_seg",
    "panoptic_fpn": "sem_seg",
}


def build(config: CfgNode | str, folder: Path) -> tuple[str, nn.Module]:
    """A config file in the folder and a model of it, stock Detectron2's alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(config, str):
        file = folder / "model.py"
        file.write_text(config)
        return str(file), instantiate(LazyConfig.load(str(file)).model)
    plain = config.clone()
    del plain["KD"]
    file = folder / "model.yaml"
    file.write_text(plain.dump())
    return str(file), build_model(plain)


def distiller(name: str, folder: Path) -> Distiller:
    """The student beside a teacher of its kind, by the door that its config is for."""
    make, student, more = ARCHITECTURES[name]
    file, teacher = build(make(**student, **more), folder / "teacher")
    randomize_norms(teacher)
    weights = str(folder / "teacher" / "model.pth")
    torch.save({"model": teacher.state_dict()}, weights)
    config = make(**student)
    if isinstance(config, str):
        (folder / "student.py").write_text(config)
        return Distiller(
            student=build(config, folder / "plain")[1],
            sources={"teacher": Teacher(config_file=file, weights=weights)},
            terms={"fpn": CWD(tap="features", weight=5.0)},
            max_iter=STEPS,
        )
    cfg = distiller_cfg((file, weights), FPN)
    kd = cfg.KD
    cfg = config.clone()
    cfg.KD = kd
    cfg.KD.STUDENT.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.OUTPUT_DIR = str(folder)
    return build_model(cfg)


def train(model: Distiller) -> list[dict[str, float]]:
    """Three steps on one batch; the losses of each."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    batch, history = a.full_batch(), []
    for step in range(STEPS):
        model.set_progress(step / STEPS)
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({k: float(v.detach()) for k, v in losses.items()})
    return history


class Run:
    """A distilled student, and what it was before and predicts after."""

    def __init__(self, name: str, folder: Path, inputs: list[dict[str, Any]]) -> None:
        torch.manual_seed(0)
        model = distiller(name, folder)
        self.folder = folder
        self.before = {k: v.clone() for k, v in model.student.state_dict().items()}
        self.history = train(model)
        self.predictions = predictions(model, inputs)
        DetectionCheckpointer(model, str(folder)).save("model_final")

    @property
    def saved(self) -> dict[str, Tensor]:
        return torch.load(self.folder / "model_final.pth", weights_only=False)["model"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every architecture that this Detectron2 has, and one process that predicts with all."""
    root = tmp_path_factory.mktemp("runs")
    inputs = [
        {k: x[k] for k in ("image", "height", "width")} for x in a.full_batch(((64, 64), (48, 64)))
    ]
    torch.save(inputs, root / "inputs.pt")
    missing = a.needs_vit.args[0]
    names = [name for name in ARCHITECTURES if not (missing and name in ON_MAIN)]
    found = {}
    for name in names:
        (root / name).mkdir()
        found[name] = Run(name, root / name, inputs)
    paths = [str(SCRIPTS), *(str(p) for p in sys.path if p == str(a.STAND_INS))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    script = [SCRIPTS / "stock_predictions.py", ROOT / "kd_det" / "_stub_C.py", root]
    child = subprocess.run(
        [sys.executable, *map(str, script)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_move_the_student(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    for losses in run.history:
        assert losses["loss_kd_fpn"] > 0
        assert all(0 <= value < float("inf") for value in losses.values())
    assert len(run.history[0]) >= 2  # its own losses too
    assert list(run.saved) == list(run.before)
    assert any(not torch.equal(v, run.before[k]) for k, v in run.saved.items() if "backbone" in k)


@pytest.mark.parametrize("name", NAMES)
def test_stock_detectron2_predicts_the_same_bit_by_bit(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    stock = torch.load(run.folder / "stock.pt")
    ours = run.predictions
    assert len(ours) == len(stock) == 2
    kind = KINDS.get(name, "instances.pred_boxes")
    assert sum(len(output[kind]) for output in ours) >= 5
    for found, expected in zip(ours, stock, strict=True):
        assert list(found) == list(expected)
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
