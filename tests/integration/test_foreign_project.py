"""
A project that knows nothing of kd_det (``tests/foreign``) distils with two lines in its script.

It has keys, a meta-architecture, a box head, a mapper, a dataset, an EMA of the weights, clipping
of the whole gradient, a trainer and an evaluator of its own; its teacher is its own as well.
"""

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "tests" / "foreign"
SCRIPTS = Path(__file__).parent / "scripts"
PLAIN = PROJECT / "train_net.py"
OUR_KEYS = ("student.", "sources.", "terms.")


def with_two_lines(text: str) -> str:
    """The README's two lines in their places."""
    for before, line in (
        ("import torch\n", "import kd_det\n"),
        ("    cfg = get_cfg()\n", "    kd_det.add_kd_config(cfg)\n"),
    ):
        assert text.count(before) == 1
        text = text.replace(before, line + before if "import" in line else before + line)
    return text


def run(*words: object) -> str:
    paths = (ROOT, PROJECT, SCRIPTS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    child = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    return child.stdout + child.stderr


def without_kd(*words: object) -> str:
    stub = ROOT / "kd_det" / "_stub_C.py"
    return run(SCRIPTS / "without_kd.py", stub, PLAIN, *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``teacher/`` and, distilled from it, ``out/``: each trained by one version of the script."""
    folder = tmp_path_factory.mktemp("foreign")
    script = folder / "distil_net.py"
    script.write_text(with_two_lines(PLAIN.read_text()))
    config = ("--config-file", PROJECT / "teacher.yaml", "OUTPUT_DIR", folder / "teacher")
    without_kd(*config)
    weights = ("KD.SOURCES.TEACHER.WEIGHTS", folder / "teacher" / "model_final.pth")
    config = ("--config-file", PROJECT / "distilled.yaml", "OUTPUT_DIR", folder / "out")
    run(script, *config, *weights)
    return folder


def test_two_lines_are_all_that_changes() -> None:
    lines = PLAIN.read_text().splitlines()
    diff = list(difflib.ndiff(lines, with_two_lines(PLAIN.read_text()).splitlines()))
    changed = [line for line in diff if not line.startswith("  ")]
    assert changed == ["+ import kd_det", "+     kd_det.add_kd_config(cfg)"]


def test_the_project_knows_nothing_of_kd_det() -> None:
    for file in (PLAIN, *PROJECT.glob("flock/*.py"), *PROJECT.glob("*Flock*.yaml")):
        text = file.read_text().replace('has never heard of kd_det."""', "")
        assert "kd" not in text.lower(), file


def test_it_was_distilled_from_its_own_teacher(folder: Path) -> None:
    lines = (folder / "out" / "metrics.json").read_text().splitlines()
    found = {key: value for line in lines for key, value in json.loads(line).items()}
    assert found["loss_kd_fpn"] > 0
    assert found["loss_kd_boxes"] > 0
    assert {"loss_count", "loss_rpn_cls", "flock/birds"} <= set(found)
    # The teacher's file names no BOX_DIM: the project's default counts, not the student's 12.
    teacher = torch.load(folder / "teacher" / "model_final.pth", weights_only=False)["model"]
    assert len(teacher["roi_heads.box_head.squeeze.weight"]) == 24


def test_checkpoint_and_running_mean_are_the_student(folder: Path) -> None:
    final, mean = (
        torch.load(folder / "out" / f"model_{name}.pth", weights_only=False)["model"]
        for name in ("final", "ema")
    )
    assert list(final) == list(mean)
    assert not [key for key in final if key.startswith(OUR_KEYS)]
    assert len(final["roi_heads.box_head.squeeze.weight"]) == 12
    assert any(not torch.equal(final[key], mean[key]) for key in final)


def test_where_kd_det_is_not_its_plain_script_predicts_the_same(folder: Path) -> None:
    out = folder / "stock"
    words = ("--eval-only", "--config-file", folder / "out" / "student.yaml", "OUTPUT_DIR", out)
    without_kd(*words, "MODEL.WEIGHTS", folder / "out" / "model_final.pth")
    found = json.loads((out / "birds.json").read_text())
    assert sum(len(row["boxes"]) for row in found) > 10
    assert found == json.loads((folder / "out" / "birds.json").read_text())
