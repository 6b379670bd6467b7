"""What a benchmark leaves behind: a table on the terminal, JSON, and a section of the docs."""

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import detectron2
import torch
from tabulate import tabulate

import kd_det
from kd_det._compat import d2_version
from kd_det.record import commit_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks.md"


@dataclass
class Table:
    """Text cells under a title."""

    title: str
    headers: list[str]
    rows: list[list[str]]

    def text(self, style: str = "simple") -> str:
        """The table in one of tabulate's formats, under its title."""
        body = tabulate(self.rows, self.headers, style, disable_numparse=True)
        return f"{self.title}\n\n{body}"


@dataclass
class Report:
    """
    Attributes:
        tables: what people read.
        samples: every measurement that went into them, ready for JSON.
        notes: what was left out and why, and what the numbers are not.
    """

    tables: list[Table] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text(self, style: str = "simple") -> str:
        """Tables and notes."""
        return "\n\n".join([*(table.text(style) for table in self.tables), *self.notes])


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16": has_bfloat16(device),
        "gpu": gpu,
        # Above the number of threads, others were at work too.
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16, without which it only costs time."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    found = Path("/proc/cpuinfo")
    flags = found.read_text() if found.is_file() else ""
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def versions() -> dict[str, str | None]:
    """Of what was measured."""
    return {
        "kd_det": kd_det.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "detectron2": f"{detectron2.__version__} ({d2_version()})",
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
    }


def write_json(path: Path, record: dict[str, Any], report: Report) -> None:
    """The whole story of a run, by temporary file and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {**record, "commit": commit_of(str(ROOT)), "versions": versions(), **asdict(report)}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(temporary, path)


def write_docs(path: Path, name: str, command: str, report: Report, device: torch.device) -> None:
    """
    Put a report between ``<!-- NAME cpu -->`` and ``<!-- /NAME cpu -->`` (``cuda``) of a page.

    Raises:
        ValueError: if the page has no such pair.
    """
    section = f"{name} {device.type}"
    found = machine(device)
    commit = (commit_of(str(ROOT)) or {"head": "unknown"})["head"][:10]
    where = found["gpu"] or f"{found['cpu']}, {found['cores']} cores, threads: {found['threads']}"
    said = (
        f"`{command}`: {where}; torch {torch.__version__}, Detectron2 {d2_version()}, commit "
        f"{commit}{' and uncommitted changes' if _code_has_changed() else ''}."
    )
    filled = f"<!-- {section} -->\n{said}\n\n{report.text('github')}\n<!-- /{section} -->"
    pattern = rf"<!-- {section} -->\n.*?<!-- /{section} -->"
    page, times = re.subn(pattern, lambda _: filled, path.read_text(), flags=re.DOTALL)
    if times != 1:
        raise ValueError(
            f"{path} has {times} sections between <!-- {section} --> and <!-- /{section} -->, but "
            "a report goes into exactly one."
        )
    path.write_text(page)


def _code_has_changed() -> bool:
    """Whether what is measured differs from the commit; the page that is written to may."""
    command = ["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", "kd_det", "benchmarks"]
    try:
        return subprocess.run([*command, "configs"], check=False).returncode == 1
    except OSError:  # no git
        return False


def _cpu_model() -> str:
    """The model's name; ``platform.processor()`` is empty or an architecture on Linux."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text() if info.is_file() else "", re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()
