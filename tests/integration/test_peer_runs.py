"""Runs of several networks: what is exported changes none of them, and resume is exact."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from kd_det.build import network_config
from kd_det.data.synthetic import CLASSES, make_synthetic_coco
from kd_det.engine import Trainer
from kd_det.engine.dry_run import dry_run
from tests.selves import ENSEMBLE, HEADS, OKDCR, self_cfg
from tests.steps import exactly
from tests.toys import save_teacher, toy_cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a wider peer's config and weights, and initial weights of the student."""
    folder = tmp_path_factory.mktemp("peer_runs")
    make_synthetic_coco(folder / "data", num_train=6, num_val=2)
    save_teacher(folder / "peer", classes=len(CLASSES), fpn=16)
    torch.manual_seed(5)
    torch.save({"model": build_model(student()).state_dict()}, folder / "initial.pth")
    return folder


def student() -> CfgNode:
    return toy_cfg(classes=len(CLASSES))


def run_cfg(folder: Path, out: Path, export: str = "", iterations: int = 4) -> CfgNode:
    heads: dict[str, Any] = {
        **HEADS,
        "PEER": {
            "TYPE": "Peer",
            "CONFIG_FILE": str(folder / "peer" / "teacher.yaml"),
            "WEIGHTS": str(folder / "peer" / "teacher.pth"),
        },
    }
    now = {"SCHEDULE": {"TYPE": "Ramp", "RATE": 10.0}}
    terms = {k: {**v, **now} for k, v in OKDCR.items()}
    cfg = self_cfg({**heads, "ENSEMBLE": ENSEMBLE}, terms, classes=len(CLASSES))
    cfg.SEED = 3
    cfg.MODEL.WEIGHTS = str(folder / "initial.pth")
    cfg.OUTPUT_DIR = str(out)
    cfg.SOLVER.MAX_ITER = iterations
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.KD.EXPORT_PEER = export
    cfg.KD.VIEWS.ENABLED = True
    name = f"{folder.name}_train"
    root = folder / "data"
    json = str(root / "annotations" / "instances_train.json")
    dataset = {name: {"JSON": json, "IMAGES": str(root / "train")}}
    cfg.merge_from_other_cfg(CfgNode({"KD": {"DATASETS": dataset}}))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    return cfg


def train(cfg: CfgNode, until: int = 4, resume: bool = False, seed: int = 11) -> Any:
    seed_all_rng(seed)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.max_iter = until
    trainer.train()
    return trainer.model


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    """The whole run, exporting the one network and the other."""
    return {
        name: train(run_cfg(folder, folder / f"out_{name}", name)) for name in ("student", "peer")
    }


def test_what_is_exported_changes_no_network(runs: dict[str, Any]) -> None:
    for name in ("student", "peer"):
        a, b = (model.networks[name].state_dict() for model in runs.values())
        exactly(dict(a), dict(b))


@pytest.mark.parametrize("name", ["student", "peer"])
def test_stock_detectron2_loads_the_exported_network(
    runs: dict[str, Any], folder: Path, name: str
) -> None:
    out = folder / f"out_{name}"
    cfg = get_cfg()
    cfg.merge_from_file(str(out / "student.yaml"))
    plain = build_model(cfg)
    found = DetectionCheckpointer(plain).load(str(out / "model_final.pth"), checkpointables=[])
    assert set(found) >= {"kd", "run"}
    exactly(dict(plain.state_dict()), dict(runs[name].networks[name].state_dict()))
    assert plain.state_dict().keys() == torch.load(out / "model_final.pth")["model"].keys()
    assert {"student": 8, "peer": 16}[name] == cfg.MODEL.FPN.OUT_CHANNELS


@pytest.mark.parametrize("name", ["student", "peer"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    runs: dict[str, Any], folder: Path, name: str
) -> None:
    """Networks, second heads, running values, views and their order, to the bit."""
    out = folder / f"cut_{name}"
    train(run_cfg(folder, out, name), until=2)
    again = train(run_cfg(folder, out, name), resume=True, seed=99)
    for key, network in runs[name].networks.items():
        exactly(dict(again.networks[key].state_dict()), dict(network.state_dict()))
    a, b = (m.kd_state_dict()["tensors"] for m in (again, runs[name]))
    extra = "sources.peer._extra_state"
    assert a.pop(extra) == b.pop(extra)
    exactly(a, b)


def test_networks_start_from_their_own_weights(folder: Path) -> None:
    cfg = run_cfg(folder, folder / "first", "peer", iterations=1)
    cfg.SOLVER.BASE_LR = 0.0
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    model = train(cfg, until=1)
    for name, file in [("student", "initial.pth"), ("peer", "peer/teacher.pth")]:
        weights = torch.load(folder / file)["model"]
        ours = {k: p.detach() for k, p in model.networks[name].named_parameters()}
        exactly(ours, {k: weights[k] for k in ours})


def test_a_run_of_another_exported_network_is_not_resumed(
    runs: dict[str, Any], folder: Path
) -> None:
    cfg = run_cfg(folder, folder / "out_student", "peer")
    with pytest.raises(ValueError, match=r"'student' is exported, and in this run 'peer'"):
        train(cfg, resume=True)


def test_the_plain_baseline_has_no_peer_to_export(folder: Path) -> None:
    cfg = run_cfg(folder, folder / "any", "peer")
    cfg.KD.ENABLED = False
    assert network_config(cfg).MODEL.FPN.OUT_CHANNELS == 8


def test_the_plan_of_a_dry_run(folder: Path) -> None:
    cfg = run_cfg(folder, folder / "dry")
    cfg.OUTPUT_DIR = ""
    report = dry_run(cfg)
    assert "peer trains beside the student (Peer of a RetinaNet" in report
    assert "ensemble" in report
    assert "third: cls_logits.p3" in report
    assert "third/loss_cls" in report


def test_the_config_of_a_network(folder: Path) -> None:
    cfg = run_cfg(folder, folder / "any")
    assert network_config(cfg).dump() == network_config(cfg, "STUDENT").dump()
    peer = network_config(cfg, "PEER")
    assert "KD" not in peer
    assert peer.MODEL.FPN.OUT_CHANNELS == 16
    assert peer.DATASETS == cfg.DATASETS
    assert peer.MODEL.META_ARCHITECTURE == "RetinaNet"
    with pytest.raises(KeyError, match=r"no network 'pear'.*Did you mean 'peer'"):
        network_config(cfg, "PEAR")
