"""The loop of docs/runs.md, run as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import retinanet
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss

from tests.toys import distiller_cfg, save_noise

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(autouse=True)
def _no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchScript recompiles a loss after its first calls in a process, to other rounding."""
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss_jit", sigmoid_focal_loss)


def run(cfg: CfgNode, seed: int) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "runs.md").read_text(), re.DOTALL)
    (loop,) = [block for block in blocks if "RunState" in block]
    seed_all_rng(seed)
    model = build_model(cfg).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    names = {
        "DetectionCheckpointer": DetectionCheckpointer,
        "EventStorage": EventStorage,
        "build_detection_train_loader": build_detection_train_loader,
    }
    exec(loop, {"cfg": cfg, "model": model, "optimizer": optimizer, **names})


def test_the_loop_resumes_bit_for_bit(teacher, tmp_path):
    cfg = distiller_cfg(teacher)
    cfg.merge_from_other_cfg(CfgNode({"KD": {"DATASETS": {"docs_loop": save_noise(tmp_path)}}}))
    cfg.DATASETS.TRAIN = ("docs_loop",)
    cfg.INPUT.MIN_SIZE_TRAIN = (40, 48, 56, 64)
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    for folder, lengths in (("whole", (6,)), ("cut", (5, 6))):
        for seed, length in enumerate(lengths):
            cfg.OUTPUT_DIR = str(tmp_path / folder)
            (tmp_path / folder).mkdir(exist_ok=True)
            cfg.SOLVER.MAX_ITER = length
            run(cfg, seed)
    whole, cut = (torch.load(tmp_path / f / "model_0000005.pth") for f in ("whole", "cut"))
    torch.testing.assert_close(dict(cut["model"]), dict(whole["model"]), rtol=0, atol=0)
    tensors = [checkpoint["kd"]["tensors"] for checkpoint in (cut, whole)]
    assert tensors[0]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)


def test_links_of_the_docs_lead_somewhere():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
