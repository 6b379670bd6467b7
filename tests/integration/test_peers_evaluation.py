"""Every network of a run: evaluated beside the exported one, kept where best, exported, drawn."""

import kd_det  # isort: skip  # first, in the spawned processes too

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from kd_det.__main__ import main
from kd_det.config import student_config
from kd_det.data.synthetic import CLASSES, make_synthetic_coco
from kd_det.engine import PeerEvaluation, Trainer
from tests.distributed.test_ddp import spawned
from tests.selves import DML, PEER, self_cfg
from tests.toys import save_teacher

assert kd_det


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data/``, ``other/`` (a peer's config) and ``run/``: three iterations, two evaluations."""
    folder = tmp_path_factory.mktemp("networks")
    make_synthetic_coco(folder / "data", num_train=4, num_val=3)
    save_teacher(folder / "other", classes=len(CLASSES), fpn=16)
    cfg = run_cfg(folder)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    Trainer(cfg).train()
    return folder


def run_cfg(folder: Path) -> CfgNode:
    """Two networks of different width; the peer reads RGB."""
    other = get_cfg()
    other.merge_from_file(str(folder / "other" / "teacher.yaml"))
    other.INPUT.FORMAT = "RGB"
    other.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # or so young a network finds nothing
    (folder / "other" / "peer.yaml").write_text(other.dump())
    peer = {**PEER["PEER"], "CONFIG_FILE": str(folder / "other" / "peer.yaml")}
    cfg = self_cfg({"PEER": peer}, {"BACK": DML["BACK"]}, classes=len(CLASSES))
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    datasets = {
        f"{folder.name}_{split}": {
            "JSON": str(folder / "data" / "annotations" / f"instances_{split}.json"),
            "IMAGES": str(folder / "data" / split),
        }
        for split in ("train", "val")
    }
    cfg.merge_from_other_cfg(type(cfg)({"KD": {"DATASETS": datasets}}))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(datasets)[:1], tuple(datasets)[1:]
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.SEED = 3, 2, 1
    cfg.OUTPUT_DIR = str(folder / "run")
    return cfg


@pytest.fixture
def trained(folder: Path) -> Any:
    """The Distiller at the end of the run."""
    cfg = run_cfg(folder)
    model = build_model(cfg)
    content = torch.load(folder / "run" / "model_final.pth", weights_only=False)
    model.load_state_dict(content["model"])
    model.load_kd_state_dict(content["kd"])
    return model


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "run" / "metrics.json").read_text().splitlines())
    return [row for row in lines if "bbox/AP" in row]


def test_every_network_mean_and_ensemble_are_evaluated(folder: Path, trained: Any) -> None:
    found = rows(folder)
    assert [row["iteration"] for row in found] == [1, 3]
    for row in found:
        assert row["kd/student/bbox/AP"] == row["bbox/AP"]
        pair = (row["kd/student/bbox/AP"], row["kd/peer/bbox/AP"])
        assert row["kd/mean/bbox/AP"] == pytest.approx(sum(pair) / 2)
        assert "kd/ensemble/bbox/AP50" in row
    # By hand, on its own channel order: the peer of the last row.
    cfg = student_config(run_cfg(folder))
    cfg.INPUT.FORMAT, cfg.OUTPUT_DIR = "RGB", str(folder / "alone")
    assert Trainer.test(cfg, trained.networks["peer"])["bbox"]["AP"] == pytest.approx(
        found[-1]["kd/peer/bbox/AP"], abs=1e-6
    )
    written = {f: (folder / "run" / f).read_bytes() for f in predictions()}
    assert len(set(written.values())) == 3  # nobody has overwritten another's


def predictions() -> list[str]:
    file = "inference/coco_instances_results.json"
    return [file, f"peer/{file}", f"ensemble/{file}"]


def test_the_best_network_is_kept_as_plain_weights(folder: Path, trained: Any) -> None:
    content = torch.load(folder / "run" / "best_network.pth")
    assert set(content) == {"model", "kd_best"}
    best = content["kd_best"]
    scores = {
        (name, row["iteration"]): row[f"kd/{name}/bbox/AP"]
        for row in rows(folder)
        for name in trained.networks
    }
    assert best["AP"] == pytest.approx(max(scores.values()))
    assert scores[best["network"], best["iteration"]] == pytest.approx(best["AP"])
    trained.networks[best["network"]].load_state_dict(content["model"])  # strictly


def standing(folder: Path, out: Path, scores: list[dict[str, float]], **model: Any) -> Any:
    """A hook whose trainer stands still, and tests give these scores in turn."""
    cfg = run_cfg(folder)
    cfg.OUTPUT_DIR = str(out)
    hook = PeerEvaluation(cfg)
    given = iter(scores)
    hook.trainer = SimpleNamespace(
        model=model.get("model") or build_model(cfg),
        storage=EventStorage(4),
        iter=1,
        max_iter=9,
        start_iter=model.get("start_iter", 0),
        test=lambda *_: {"bbox": next(given)} if comm.is_main_process() else {},
    )
    hook.before_train()
    return hook


def follow(hook: Any, ap: float) -> dict[str, float]:
    hook.trainer._last_eval_results = {"bbox": {"AP": ap}}
    hook.after_step()
    return {k: v for k, (v, _) in hook.trainer.storage.latest().items()}


def kept(out: Path) -> dict[str, Any]:
    return torch.load(out / "best_network.pth")["kd_best"]


def test_only_a_higher_ap_replaces_the_best_also_of_a_resumed_run(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ensemble = {"AP": 90.0}  # is no network
    aps = [{"AP": 30.0}, ensemble, {"AP": math.nan}, ensemble]
    with caplog.at_level(logging.INFO, "kd_det"):
        hook = standing(folder, tmp_path, aps)
        found = follow(hook, 20.0)
    assert (found["kd/mean/bbox/AP"], found["kd/ensemble/bbox/AP"]) == (25.0, 90.0)
    assert kept(tmp_path) == {"network": "peer", "iteration": 4, "AP": 30.0}
    assert "| peer " in caplog.text
    hook.trainer.storage = EventStorage(5)
    found = follow(hook, 30.0)
    assert "kd/mean/bbox/AP" not in found  # without the AP of one of them
    assert kept(tmp_path)["network"] == "peer"

    later = standing(folder, tmp_path, [{"AP": 29.0}, ensemble], start_iter=2)
    follow(later, 29.5)
    assert kept(tmp_path)["AP"] == 30.0
    follow(standing(folder, tmp_path, [{"AP": 1.0}, ensemble]), 2.0)  # another run
    assert kept(tmp_path) == {"network": "student", "iteration": 4, "AP": 2.0}


def test_networks_that_cannot_be_averaged_have_no_ensemble(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = build_model(run_cfg(folder))
    model.networks["peer"].box2box_transform.weights = (10.0, 10.0, 5.0, 5.0)
    hook = standing(folder, tmp_path, [{"AP": 3.0}, {"AP": 4.0}], model=model)
    for _ in range(2):
        found = follow(hook, 5.0)
    assert not [k for k in found if "ensemble" in k]
    assert found["kd/peer/bbox/AP"] == 4.0
    assert caplog.text.count("The ensemble of the networks is left out of evaluations") == 1


def test_without_peers_or_switched_off_nothing_is_evaluated(folder: Path, tmp_path: Path) -> None:
    plain = build_model(student_config(run_cfg(folder)))
    assert not follow(standing(folder, tmp_path, [], model=plain), 5.0)
    hook = standing(folder, tmp_path, [])
    hook._enabled = False
    assert not follow(hook, 5.0)
    assert not list(tmp_path.iterdir())


def test_no_peer_is_called_as_all_of_them(folder: Path, tmp_path: Path) -> None:
    for name in ("ensemble", "mean"):
        model: Any = build_model(run_cfg(folder))
        model.networks[name] = model.networks.pop("peer")
        with pytest.raises(ValueError, match=f"peer cannot be called '{name}'"):
            standing(folder, tmp_path, [], model=model)


def on_a_rank(rank: int, folder: Path, out: Path) -> dict[str, float]:
    hook = standing(folder, out, [{"AP": 30.0}, {"AP": 40.0}])
    hook.trainer._last_eval_results = {"bbox": {"AP": 20.0}} if rank == 0 else None
    hook.after_step()
    return {k: v for k, (v, _) in hook.trainer.storage.latest().items()}


@pytest.mark.dist
def test_all_processes_evaluate_and_the_main_one_writes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    first, second = spawned(on_a_rank, tmp_path, folder, tmp_path / "out")
    assert first["kd/mean/bbox/AP"] == 25.0
    assert first["kd/ensemble/bbox/AP"] == 40.0
    assert not second
    assert kept(tmp_path / "out")["AP"] == 30.0


@pytest.mark.parametrize("name", ["peer", "student"])
def test_export_gives_each_network_as_it_was_trained(
    folder: Path, trained: Any, tmp_path: Path, name: str
) -> None:
    words = ["export", "--run", str(folder / "run"), "--output", str(tmp_path)]
    assert main([*words, "--peer", name.upper()]) == 0
    exported = torch.load(tmp_path / f"{name}.pth")["model"]
    expected = dict(trained.networks[name].state_dict())
    torch.testing.assert_close(dict(exported), expected, rtol=0, atol=0)
    cfg = get_cfg()  # without kd_det's keys
    cfg.merge_from_file(str(tmp_path / f"{name}.yaml"))
    reads = {"peer": "RGB", "student": "BGR"}
    assert reads[name] == cfg.INPUT.FORMAT
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, own = (m.eval()([{"image": image}])[0] for m in (model, trained.networks[name]))
    assert len(found["instances"]) > 0
    assert torch.equal(found["instances"].scores, own["instances"].scores)


@pytest.mark.parametrize("form", ["kd", "metadata"])
def test_export_where_the_checkpoint_holds_the_peer(
    folder: Path, trained: Any, tmp_path: Path, form: str
) -> None:
    networks = {n: copied(m) for n, m in trained.networks.items()}
    cfg = run_cfg(folder)
    cfg.KD.EXPORT_PEER = "PEER"
    model = build_model(cfg)
    for name, network in model.networks.items():
        network.load_state_dict(networks[name])
    checkpoint = {"model": model.state_dict()}
    if form == "kd":
        model.kd_in_metadata = False
        checkpoint = {"model": model.state_dict(), "kd": model.kd_state_dict()}
    weights = str(tmp_path / "all.pth")
    torch.save(checkpoint, weights)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    for name in ("student", "peer", ""):
        words = ["--config-file", str(tmp_path / "run.yaml"), "--output", str(tmp_path)]
        assert main(["export", *words, "--peer", name, "MODEL.WEIGHTS", weights]) == 0
        exported = torch.load(tmp_path / f"{name or 'model'}.pth")["model"]
        torch.testing.assert_close(dict(exported), networks[name or "peer"], rtol=0, atol=0)


def copied(model: Any) -> dict[str, torch.Tensor]:
    return {k: x.clone() for k, x in model.state_dict().items()}


def test_an_exported_peer_predicts_on_its_own_channel_order(folder: Path) -> None:
    cfg = run_cfg(folder)
    cfg.KD.EXPORT_PEER = "PEER"
    model: Any = build_model(cfg).eval()
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (found,) = model([{"image": image}])
        (own,) = model.networks["peer"]([{"image": image.flip(0)}])
    assert len(found["instances"]) > 0
    assert torch.equal(found["instances"].scores, own["instances"].scores)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--peer", "pear"], "no network 'pear'. Did you mean 'peer'? Networks: student, peer."),
        (["--peer", "peer", "MODEL.WEIGHTS", "alone.pth"], "it holds the network 'student'"),
    ],
)
def test_export_says_which_networks_there_are(
    folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    best = {"network": "student", "iteration": 1, "AP": 1.0}
    torch.save({"model": {}, "kd_best": best}, "alone.pth")
    with pytest.raises(SystemExit) as e:
        main(["export", "--run", str(folder / "run"), "--output", ".", *words])
    assert e.value.code == 2
    assert says in capsys.readouterr().err


def test_visualise_draws_the_peers(folder: Path, tmp_path: Path, capsys: Any) -> None:
    image = str(next((folder / "data" / "val").iterdir()))
    words = ["--run", str(folder / "run"), "--images", image, "--output", str(tmp_path / "a.png")]
    assert main(["visualise", *words]) == 0
    assert "student, peer" in capsys.readouterr().out
