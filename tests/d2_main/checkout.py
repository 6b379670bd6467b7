"""A Detectron2 main checkout, and how its scripts are run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
CHECKOUT = Path(os.environ.get("D2_CHECKOUT", ""))

needed = [
    pytest.mark.d2_main,
    pytest.mark.skipif(
        not os.environ.get("D2_CHECKOUT"), reason="D2_CHECKOUT names no Detectron2 main checkout"
    ),
    pytest.mark.skipif(
        not (DATA / "coco").is_dir(), reason="the 27-image COCO stand-in is not beside the checkout"
    ),
]


def with_two_lines(script: str, folder: Path) -> Path:
    """A script of the checkout with `import kd_det` and `add_kd_config`, else as it is."""
    lines = (CHECKOUT / script).read_text().splitlines(keepends=True)
    assert lines.count("    cfg = get_cfg()\n") == 1, f"{script} builds its config in another way"
    at = lines.index("    cfg = get_cfg()\n") + 1
    lines.insert(at, "    kd_det.add_kd_config(cfg)\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("import "))
    lines.insert(first, "import kd_det\n")
    path = folder / Path(script).name
    path.write_text("".join(lines))
    return path


def call(script: Path, *words: str) -> str:
    """Output of a script that ends well."""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'integration' / 'scripts'}"
    environment = {**os.environ, "DETECTRON2_DATASETS": str(DATA), "PYTHONPATH": paths}
    child = subprocess.run(
        [sys.executable, str(script), *words],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-3000:]
    return child.stdout + child.stderr
