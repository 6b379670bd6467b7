"""The Triton kernel without a GPU: its cases in the interpreter, its compilation, its refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kd_det
from kd_det.losses import channel_wise_kl

ROOT = Path(kd_det.__file__).parent.parent
MAP = torch.zeros(1, 2, 3, 4)


def test_the_kernel_in_the_interpreter():
    # In a process of its own: Triton looks at the variable when it is imported.
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x"]
    result = subprocess.run(
        [*command, "tests/triton_cases.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_on_the_gpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [*command, "tests/triton_cases.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout


# The interpreter takes Python that the compiler refuses (a name that only a loop defines). Compiled
# to PTX for an A100 and an H100; no GPU is asked.
COMPILE = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kd_det.losses.channel_wise_triton import _row

kinds = ["*{0}", "*{0}", "*fp32", "*fp32", "*{0}", "*fp32", "i32", "i32", "fp32"]
for sm, dtype, one, on in [(80, "fp32", 0, 1), (90, "fp16", 1, 1), (90, "bf16", 0, 0)]:
    signature = [*(k.format(dtype) for k in kinds), *["constexpr"] * 5]
    constants = dict.fromkeys(["HAS_WEIGHT", "HAS_STEP"], bool(on)) | {
        "HAS_GRAD": True, "ONE_BLOCK": bool(one), "BLOCK": 1024}
    source = ASTSource(_row, dict(zip(_row.arg_names, signature, strict=True)), constants)
    kernel = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": 8})
    ptx = kernel.asm["ptx"]
    assert ".local" not in ptx, "registers are spilled"
    print("compiled", sm)
"""


def test_the_kernel_compiles_for_gpus(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("compiled") == 3


# -- refusals -------------------------------------------------------------------------------------


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="one of auto, eager, triton, but got 'cuda'"):
        channel_wise_kl(MAP, MAP, backend="cuda")


def test_maps_on_the_cpu():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="needs maps on a CUDA device, but they are on 'cpu'"):
        channel_wise_kl(MAP, MAP, backend="triton")


def test_triton_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kd_det.losses.channel_wise_triton", raising=False)
    monkeypatch.delattr(kd_det.losses, "channel_wise_triton", raising=False)
    with pytest.raises(RuntimeError, match="needs the package triton, which does not import here"):
        channel_wise_kl(MAP, MAP, backend="triton")
    assert channel_wise_kl(MAP, MAP) == 0
