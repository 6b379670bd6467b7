"""``kd_run.json``: what a run was, for whoever finds its output folder later."""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from kd_det._compat import d2_version
from kd_det.data.unlabelled import is_unlabelled
from kd_det.distiller import Distiller
from kd_det.sources.strict import file_fingerprint

logger = logging.getLogger(__name__)

NAME = "kd_run.json"
FORMAT = 1

# Images are counted by parsing the annotation file: COCO's training split (450 MB) would take 10 s.
_MOST_BYTES_TO_PARSE = 1 << 26


def write_run_record(
    cfg: CfgNode, distiller: Distiller | None = None, *, iteration: int = 0
) -> None:
    """
    Write ``kd_run.json`` into ``OUTPUT_DIR``, in the main process, by temporary file and rename.

    A new run writes what it is made of: versions, commits, command, seed, processes, the resolved
    plan, SHA-256 of sources, annotation files, initial weights and config, and the command of the
    matched baseline. A resumed run leaves all that as it is and appends to ``resumed``: iteration,
    time, command, commits, and of the rest what has changed. What cannot be found out is null.

    Nothing is written where ``OUTPUT_DIR`` is empty or an address (``s3://``).
    A file that cannot be read is kept as ``kd_run.json.bad`` and does not stop the run.

    Args:
        cfg: the config of the run.
        distiller: after `Distiller.prepare` (before, sources have no fingerprint); ``None`` for a
            plain student.
        iteration: at which this process begins; above 0 the run is a resumed one.

    Raises:
        OSError: if the folder cannot be written to.
    """
    if not cfg.OUTPUT_DIR or "://" in cfg.OUTPUT_DIR or not comm.is_main_process():
        return
    path = os.path.join(cfg.OUTPUT_DIR, NAME)
    session = _session(cfg)
    record = _read(path)
    if record is None or iteration == 0:
        record = {"format": FORMAT, **session, **_made_of(cfg, distiller), "resumed": []}
    if iteration > 0:
        known = dict(record)
        for entry in record["resumed"]:
            known.update(entry)
        always = ("started", "command", "commit")
        changed = {k: v for k, v in session.items() if k in always or v != known.get(k)}
        record["resumed"].append({"iteration": iteration, **changed})
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(record, f, indent=2, ensure_ascii=False, default=str)
        f.write("\n")
    os.replace(path + ".tmp", path)


def _read(path: str) -> dict[str, Any] | None:
    """The record that is there; what is no record of this format is moved out of the way."""
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            record = json.load(f)
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, and not {FORMAT}")
        if not all(isinstance(entry, dict) for entry in record["resumed"]):
            raise ValueError("its list 'resumed' is none")
    except (ValueError, TypeError, KeyError) as e:
        os.replace(path, path + ".bad")
        logger.warning(
            "%s is not a record that this kd_det can continue (%s: %s): it is kept as %s.bad, and "
            "a new one is begun.",
            path,
            type(e).__name__,
            e,
            path,
        )
        return None
    return dict(record)


def _session(cfg: CfgNode) -> dict[str, Any]:
    """What is known of this process and may be different in the one that resumes."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(_command()),
        "working_directory": os.getcwd(),
        "world_size": comm.get_world_size(),
        "commit": {"working_directory": commit_of(os.getcwd()), "kd_det": _own_commit()},
        "versions": _versions(gpus=cfg.MODEL.DEVICE.startswith("cuda")),
        "config_sha256": hashlib.sha256(cfg.dump().encode()).hexdigest(),
    }


def _made_of(cfg: CfgNode, distiller: Distiller | None) -> dict[str, Any]:
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    datasets = {name: _dataset(name) for name in dict.fromkeys(names)}
    return {
        "seed": {"config": cfg.SEED, "torch": torch.initial_seed()},
        "weights": {
            "path": cfg.MODEL.WEIGHTS,
            "sha256": file_fingerprint(cfg.MODEL.WEIGHTS)
            if os.path.isfile(cfg.MODEL.WEIGHTS)
            else None,
        },
        "datasets": {
            "train": {name: datasets[name] for name in cfg.DATASETS.TRAIN},
            "test": {name: datasets[name] for name in cfg.DATASETS.TEST},
        },
        "sources": {} if distiller is None else _sources(distiller),
        "plan": {} if distiller is None else _plan(distiller),
        "baseline": _baseline(cfg, distiller),
    }


def _sources(distiller: Distiller) -> dict[str, Any]:
    return {
        name: {
            "type": type(source).__name__,
            "config_file": getattr(source, "config_file", None) or None,
            "weights": getattr(source, "weights_file", None) or None,
            "fingerprint": source.fingerprint() or None,
        }
        for name, source in distiller.wiring.sources.items()
    }


def _plan(distiller: Distiller) -> dict[str, Any]:
    wiring = distiller.wiring
    return {
        name: {
            "type": type(term).__name__,
            "source": wiring.source_of[name],
            "learner": wiring.learner_of[name],
            "weight": term.weight,
            "schedule": {"type": type(term.schedule).__name__, **vars(term.schedule)},
            "levels": [
                {**asdict(row), "level_weight": term.level_weight(row.value or row.level)}
                for row in wiring.rows.get(name, [])
            ],
        }
        for name, term in wiring.terms.items()
    }


def _dataset(name: str) -> dict[str, Any]:
    """Identity of a dataset: that of its annotation file. Images are not read."""
    path = MetadataCatalog.get(name).get("json_file")
    if path is None:
        return {"sha256": None, "reason": "It is registered without an annotation file."}
    try:
        local = PathManager.get_local_path(path)
        return {"json": path, "sha256": file_fingerprint(local), "images": _count_images(local)}
    except Exception as e:  # a download can fail in as many ways as there are handlers
        return {"json": path, "sha256": None, "reason": f"{type(e).__name__}: {e}"}


def _count_images(path: str) -> int | None:
    if os.path.getsize(path) > _MOST_BYTES_TO_PARSE:
        return None
    with open(path, encoding="utf-8") as f:
        return len(json.load(f)["images"])


def _command() -> list[str]:
    """The words that start this script anew, launcher included."""
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:
        per_node, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        launcher = ["torchrun", "--nproc-per-node", str(per_node)]
        if world > per_node:
            launcher += ["--nnodes", str(world // per_node)]
    else:
        launcher = ["python"]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return [*launcher, *sys.argv]
    return [*launcher, "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]


def _baseline(cfg: CfgNode, distiller: Distiller | None) -> dict[str, Any]:
    """The command that trains the same student on the same labels for as long, undistilled."""
    if distiller is None:
        return {"command": None, "reason": "This run is a plain student's: nothing is distilled."}
    if not any(word.split("=")[0] == "--config-file" for word in sys.argv):
        return {
            "command": None,
            "reason": "The command has no --config-file, so it may not take overrides: set "
            "KD.ENABLED to False and another OUTPUT_DIR where this script makes its config.",
        }
    labelled = tuple(name for name in cfg.DATASETS.TRAIN if not is_unlabelled(name))
    if not labelled:
        return {"command": None, "reason": "DATASETS.TRAIN has no labels to train on without KD."}
    # Overrides come last on Detectron2's command lines, and the last one of a key wins.
    overrides = ["KD.ENABLED", "False", "OUTPUT_DIR", cfg.OUTPUT_DIR.rstrip("/") + "_baseline"]
    if labelled != tuple(cfg.DATASETS.TRAIN):
        overrides += ["DATASETS.TRAIN", repr(labelled)]
    return {"command": shlex.join([*_command(), *overrides])}


def _versions(*, gpus: bool) -> dict[str, Any]:
    versions: dict[str, Any] = {
        "kd_det": sys.modules["kd_det"].__version__,  # type: ignore[attr-defined]
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "detectron2_variant": d2_version(),
        "cuda": torch.version.cuda,
        "cudnn": None,
        "gpus": [],
    }
    for package in ("torchvision", "fvcore", "pycocotools", "numpy", "Pillow"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if gpus:
        versions["cudnn"] = torch.backends.cudnn.version()
        count = torch.cuda.device_count()
        versions["gpus"] = [torch.cuda.get_device_name(i) for i in range(count)]
    return versions


def commit_of(folder: str) -> dict[str, Any] | None:
    """
    The commit that a folder's files are of: ``head``, and ``dirty`` when tracked files differ.

    ``None`` where there is no git or no repository.
    """
    head = _git(folder, "rev-parse", "HEAD")
    if head is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"head": head, "dirty": None if changes is None else bool(changes)}


def _own_commit() -> dict[str, Any] | None:
    folder, name = os.path.split(os.path.abspath(__file__))
    # Installed, it may lie in an environment inside of somebody else's repository.
    if _git(folder, "ls-files", "--error-unmatch", name) is None:
        return None
    return commit_of(folder)


def _git(folder: str, *words: str) -> str | None:
    try:
        child = subprocess.run(
            ["git", "-C", folder, *words],
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # only looking
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return child.stdout.strip() if child.returncode == 0 else None
