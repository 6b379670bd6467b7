"""Memory that runs out in the middle of a run: what was saved is whole, and the run goes on."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.engine import Trainer
from tests.synthetic import synthetic_run

OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


@pytest.fixture
def cfg(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    cfg = synthetic_run(tmp_path_factory.mktemp("out_of_memory"))
    cfg.OUTPUT_DIR = str(tmp_path_factory.mktemp("out"))
    cfg.TEST.EVAL_PERIOD = 0
    yield cfg
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("where", ["student.head", "terms.fpn.connectors.p3"])
def test_the_last_checkpoint_is_there_and_the_run_goes_on(cfg: CfgNode, where: str) -> None:
    trainer = Trainer(cfg)
    calls = 0

    def run_out(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OUT_OF_MEMORY("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.model.get_submodule(where).register_forward_hook(run_out)
    trainer.resume_or_load(resume=False)
    with pytest.raises(OUT_OF_MEMORY, match="Tried to allocate"):
        trainer.train()
    assert trainer.iter == 3

    folder = Path(cfg.OUTPUT_DIR)
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    assert [p.name for p in folder.glob("*.pth")] == ["model_0000001.pth"]
    assert not list(folder.glob("*.tmp"))
    saved = torch.load(folder / "model_0000001.pth")
    assert saved["kd"]["tensors"]

    again = Trainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    torch.testing.assert_close(
        again.model.kd_state_dict()["tensors"], saved["kd"]["tensors"], rtol=0, atol=0
    )
    again.train()
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    record = json.loads((folder / "kd_run.json").read_text())
    assert [entry["iteration"] for entry in record["resumed"]] == [2]
