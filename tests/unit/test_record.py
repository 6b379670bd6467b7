"""kd_run.json: what it says, and what happens to it when a run resumes."""

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from kd_det.data.coco import register_coco
from kd_det.data.unlabelled import forget_unlabelled, register_unlabelled
from kd_det.record import NAME, commit_of, write_run_record
from tests.configs import kd_cfg, plain
from tests.steps import step
from tests.toys import distiller_cfg


@pytest.fixture
def dataset(tmp_path: Path) -> Any:
    """The annotation file of a registered dataset with two images."""
    file = tmp_path / "toy.json"
    file.write_text(json.dumps({"images": [{"id": 1}, {"id": 2}]}))
    register_coco("toy_of_record", str(file), str(tmp_path))
    yield file
    DatasetCatalog.remove("toy_of_record")
    MetadataCatalog.remove("toy_of_record")


@pytest.fixture
def cfg(teacher: tuple[str, str], tmp_path: Path, dataset: Path) -> CfgNode:
    cfg = distiller_cfg(teacher)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_of_record",), ("nowhere",)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.SEED = 5
    return cfg


def read(cfg: CfgNode) -> dict[str, Any]:
    return json.loads((Path(cfg.OUTPUT_DIR) / NAME).read_text("utf-8"))


def started(cfg: CfgNode, iteration: int = 0) -> nn.Module:
    """A Distiller after one step, without connectors' state where it resumes."""
    model = build_model(cfg)
    model._restored = iteration > 0
    step(model, iteration)
    return model


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_run_says_what_it_is_made_of(
    cfg: CfgNode, teacher: tuple[str, str], dataset: Path, tmp_path: Path
) -> None:
    cfg.MODEL.WEIGHTS = str(tmp_path / "init.pth")
    Path(cfg.MODEL.WEIGHTS).write_bytes(b"weights")
    cfg.merge_from_list(["KD.TERMS.FPN.SCHEDULE.START_ITER", "3"])
    started(cfg)
    record = read(cfg)
    source = record["sources"]["teacher"]
    assert source["fingerprint"] == sha256(teacher[1])
    assert [source["config_file"], source["weights"]] == list(teacher)
    assert record["weights"] == {"path": cfg.MODEL.WEIGHTS, "sha256": sha256(cfg.MODEL.WEIGHTS)}
    assert record["seed"]["config"] == 5
    assert record["seed"]["torch"] == torch.initial_seed()
    assert record["world_size"] == 1
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["detectron2_variant"] in ("0.6", "main")
    assert record["versions"]["numpy"]
    assert record["started"].endswith("+00:00")
    assert record["command"].endswith(shlex.join(sys.argv[1:]))
    assert record["config_sha256"] == hashlib.sha256(cfg.dump().encode()).hexdigest()

    fpn = record["plan"]["fpn"]
    assert (fpn["source"], fpn["type"], fpn["weight"]) == ("teacher", "CWD", 5.0)
    assert fpn["schedule"] == {"type": "Constant", "start_iter": 3, "stop_iter": 0, "every": 1}
    assert [level["level"] for level in fpn["levels"]] == ["p3", "p4", "p5", "p6", "p7"]
    assert fpn["levels"][0]["connector"] == "conv1x1"
    assert fpn["levels"][0]["target_channels"] == 16
    assert record["resumed"] == []
    assert not list(Path(cfg.OUTPUT_DIR).glob("*.tmp"))

    train = record["datasets"]["train"]["toy_of_record"]
    assert train == {"json": str(dataset), "sha256": sha256(dataset), "images": 2}
    test = record["datasets"]["test"]["nowhere"]
    assert test["sha256"] is None
    assert "without an annotation file" in test["reason"]


def test_the_hash_of_a_dataset_is_that_of_its_file(cfg: CfgNode, dataset: Path) -> None:
    hashes = []
    for images in ([], [{"id": 1}]):
        dataset.write_text(json.dumps({"images": images}))
        write_run_record(cfg)
        hashes.append(read(cfg)["datasets"]["train"]["toy_of_record"]["sha256"])
    assert hashes[0] != hashes[1]
    dataset.unlink()
    write_run_record(cfg)
    entry = read(cfg)["datasets"]["train"]["toy_of_record"]
    assert entry["sha256"] is None
    assert "FileNotFoundError" in entry["reason"]


def test_resuming_keeps_the_first_record_and_appends(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(cfg)
    first = read(cfg)
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--resume"])
    started(cfg, 7)
    monkeypatch.setattr(torch, "__version__", "99.0")
    started(cfg, 9)
    started(cfg, 11)
    record = read(cfg)
    resumed = record.pop("resumed")
    assert {**record, "resumed": []} == first
    assert [entry["iteration"] for entry in resumed] == [7, 9, 11]
    assert set(resumed[0]) == {"iteration", "started", "command", "commit"}
    assert resumed[0]["command"].endswith(" --resume")
    assert resumed[1]["versions"]["torch"] == "99.0"
    assert "versions" not in resumed[2]  # compared with what was known last

    started(cfg)  # a new run into the same folder
    assert read(cfg)["resumed"] == []


def test_a_run_that_resumes_without_a_record_begins_one(cfg: CfgNode) -> None:
    write_run_record(cfg, iteration=4)
    assert [entry["iteration"] for entry in read(cfg)["resumed"]] == [4]


@pytest.mark.parametrize(
    "content", [b'{"format": 1, "resu', b"\xff\xfe", b"[]", b'{"format": 2}', b"", b"3"]
)
@pytest.mark.parametrize("iteration", [0, 3])
def test_a_damaged_record_is_put_aside(
    cfg: CfgNode, content: bytes, iteration: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir()
    (folder / NAME).write_bytes(content)
    write_run_record(cfg, iteration=iteration)
    assert (folder / f"{NAME}.bad").read_bytes() == content
    assert read(cfg)["format"] == 1
    assert f"{NAME}.bad" in caplog.text


def test_the_baselines_command_is_a_config(
    cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a b.yaml"
    file.write_text(cfg.dump())
    out = str(tmp_path / "out/")
    argv = ["train_net.py", "--config-file", str(file), "OUTPUT_DIR", out, "SEED", "6"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    cfg.merge_from_list(["OUTPUT_DIR", out, "SEED", "6"])
    started(cfg)
    words = shlex.split(read(cfg)["baseline"]["command"])
    assert words[:2] == ["python", "train_net.py"]
    args = default_argument_parser().parse_args(words[2:])
    baseline = kd_cfg()
    baseline.merge_from_file(args.config_file)
    baseline.merge_from_list(args.opts)
    folder, enabled = baseline.OUTPUT_DIR, baseline.KD.ENABLED
    assert (folder, enabled) == (str(tmp_path / "out_baseline"), False)
    baseline.OUTPUT_DIR, baseline.KD.ENABLED = cfg.OUTPUT_DIR, True
    assert plain(baseline) == plain(cfg)


def test_where_there_is_no_baseline_a_sentence_says_why(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run_record(cfg, None)
    assert "plain student" in read(cfg)["baseline"]["reason"]
    monkeypatch.setattr(sys, "argv", ["train.py", "train.max_iter=3"])
    started(cfg)
    baseline = read(cfg)["baseline"]
    assert baseline["command"] is None
    assert "--config-file" in baseline["reason"]


def test_the_baseline_trains_on_what_has_labels(
    cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_unlabelled("bare_of_record", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", "a.yaml"])
    try:
        cfg.DATASETS.TRAIN = ("bare_of_record", "toy_of_record")
        started(cfg)
        words = shlex.split(read(cfg)["baseline"]["command"])
        other = cfg.clone()
        other.merge_from_list(words[words.index("a.yaml") + 1 :])
        assert other.DATASETS.TRAIN == ("toy_of_record",)
        cfg.DATASETS.TRAIN = ("bare_of_record",)
        started(cfg)
        baseline = read(cfg)["baseline"]
        assert baseline["command"] is None
        assert "no labels" in baseline["reason"]
    finally:
        forget_unlabelled("bare_of_record")


def test_commands_of_modules_and_of_several_processes(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", "x"])
    monkeypatch.setattr(
        sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "p.__main__"})
    )
    write_run_record(cfg)
    assert read(cfg)["command"] == "python -m p x"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    write_run_record(cfg)
    expected = "torchrun --nproc-per-node 2 --nnodes 2 /somewhere/__main__.py x"
    assert read(cfg)["command"] == expected


def test_only_the_main_process_writes_and_only_into_a_folder(
    cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    write_run_record(cfg)
    assert not Path(cfg.OUTPUT_DIR).exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.iterdir())
    for address in ("", "s3://bucket/out"):
        cfg.OUTPUT_DIR = address
        write_run_record(cfg)
    assert list(tmp_path.iterdir()) == before


def test_nothing_is_written_when_the_run_cannot_start(cfg: CfgNode, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"no checkpoint")
    cfg.KD.SOURCES.TEACHER.WEIGHTS = str(bad)
    cfg.KD.TERMS.FPN.SCHEDULE.START_ITER = 50  # a teacher that is not needed for a while, too
    cfg.KD.TERMS.LOGITS.WEIGHT = 0.0
    with pytest.raises(ValueError, match=r"bad\.pth"):
        started(cfg)
    assert not Path(cfg.OUTPUT_DIR).exists()


def test_a_resumed_run_with_another_teacher_leaves_the_record(cfg: CfgNode) -> None:
    started(cfg)
    before = (Path(cfg.OUTPUT_DIR) / NAME).read_bytes()
    model = build_model(cfg)
    model._restored, model._then = True, {"teacher": "another"}
    with pytest.raises(ValueError, match="not the one that this run began with"):
        step(model, 3)
    assert (Path(cfg.OUTPUT_DIR) / NAME).read_bytes() == before


def test_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit_of(str(tmp_path)) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    head = commit_of(str(tmp_path))
    assert head is not None
    assert len(head["head"]) == 40
    assert head["dirty"] is False
    (tmp_path / "untracked").write_text("1")
    assert commit_of(str(tmp_path)) == head
    (tmp_path / "file").write_text("2")
    assert commit_of(str(tmp_path)) == {**head, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert commit_of(str(tmp_path)) is None
