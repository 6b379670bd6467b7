"""What a checkpoint of several networks holds, and what comes back of it."""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from kd_det.detectors import running_values
from tests.integration.test_peers import BOTH, peer_of
from tests.selves import INPUTS, PEER, self_cfg
from tests.steps import exactly, seeded, step
from tests.toys import batch, save_teacher, toy_cfg


def exporting(name: str, folder: Path) -> CfgNode:
    config, _ = save_teacher(folder, fpn=16)
    cfg = self_cfg({"PEER": {"TYPE": "Peer", "CONFIG_FILE": config}}, BOTH)
    cfg.KD.EXPORT_PEER = name
    return cfg


@pytest.mark.parametrize("name", ["", "student", "PEER"])
def test_the_checkpoint_is_that_of_the_exported_network(tmp_path: Path, name: str) -> None:
    model = seeded(exporting(name, tmp_path)).train()
    step(model, 0, INPUTS)
    network = model.networks["peer" if name == "PEER" else "student"]
    assert model.exported is network
    exactly(dict(model.state_dict()), dict(network.state_dict()))
    beside = model.kd_state_dict()["tensors"]
    others = [k for k, m in model.networks.items() if m is not network]
    held = {"student": "student.", "peer": "sources.peer.model."}
    assert {k for k in held if any(x.startswith(held[k]) for x in beside)} == set(others)
    model.eval()
    inputs = batch(((64, 64),))
    a, b = model(inputs)[0]["instances"], network.eval()(inputs)[0]["instances"]
    exactly(a.scores, b.scores)


@pytest.mark.parametrize("name", ["", "PEER"])
def test_both_networks_come_back(tmp_path: Path, name: str) -> None:
    model = seeded(exporting(name, tmp_path)).train()
    step(model, 0, INPUTS)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = seeded(exporting(name, tmp_path), seed=99)
    found = other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    for key, network in model.networks.items():
        exactly(dict(other.networks[key].state_dict()), dict(network.state_dict()))
        assert running_values(other.networks["peer"]) == running_values(peer_of(model))


def test_a_student_with_a_peers_weights_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """An evaluation without the run's EXPORT_PEER would give the peer's AP as the student's."""
    cfg = self_cfg(PEER, {})
    saved = seeded(cfg).state_dict()
    other = seeded(cfg, seed=9)
    other.load_state_dict(saved)
    assert "another network" not in caplog.text
    cfg.KD.EXPORT_PEER = "PEER"
    other.load_state_dict(seeded(cfg).state_dict())
    assert "is given the weights of another network: 'peer'" in caplog.text


def test_another_peer_is_not_resumed(tmp_path: Path) -> None:
    """Same sources, terms and names: only the width of its head's tower differs."""
    states = []
    for fpn in (8, 16):
        config, _ = save_teacher(tmp_path / str(fpn), fpn=fpn)
        sources = {"PEER": {"TYPE": "Peer", "CONFIG_FILE": config}}
        states.append(seeded(self_cfg(sources, BOTH)))
    with pytest.raises(ValueError, match="other sources, terms or shapes"):
        states[0].load_kd_state_dict(states[1].kd_state_dict())


def test_weights_for_the_student_are_no_checkpoint_of_a_peer(tmp_path: Path) -> None:
    model = seeded(exporting("PEER", tmp_path))
    weights = build_model(toy_cfg()).state_dict()
    with pytest.raises(ValueError, match=r"that of the network 'peer'.*distiller\.starting"):
        model.load_state_dict(weights)
    peer = copy.deepcopy(dict(peer_of(model).state_dict()))
    with model.starting():
        model.load_state_dict(weights)
    exactly(dict(model.student.state_dict()), dict(weights))
    exactly(dict(peer_of(model).state_dict()), peer)


def test_an_unknown_network_is_not_exported() -> None:
    cfg = self_cfg(PEER, BOTH)
    cfg.KD.EXPORT_PEER = "PEAR"
    with pytest.raises(KeyError, match=r"no network 'pear'.*Did you mean 'peer'"):
        build_model(cfg)


def test_an_exported_peer_reads_images_in_its_own_order(tmp_path: Path) -> None:
    """An evaluation of the run gives them in the student's."""
    other = toy_cfg()
    other.INPUT.FORMAT, other.MODEL.RETINANET.SCORE_THRESH_TEST = "RGB", 0.0
    del other["KD"]
    (tmp_path / "rgb.yaml").write_text(other.dump())
    cfg = self_cfg({"PEER": {"TYPE": "Peer", "CONFIG_FILE": str(tmp_path / "rgb.yaml")}}, {})
    cfg.KD.EXPORT_PEER = "PEER"
    model = seeded(cfg).eval()
    (image,) = batch(((64, 64),))
    found = model([image])[0]["instances"]
    expected = peer_of(model)([{**image, "image": image["image"].flip(0)}])[0]["instances"]
    assert len(found) > 0
    exactly(found.scores, expected.scores)


def test_what_a_resumed_run_has_lost_is_named() -> None:
    for export, lost in [("", "peer"), ("PEER", "peer, student")]:  # the former's extra state
        cfg = self_cfg(PEER, {})
        cfg.KD.EXPORT_PEER = export
        with pytest.raises(RuntimeError, match=rf"tensors of {lost}\) cannot be restored"):
            step(seeded(cfg).train(), 5, INPUTS)
