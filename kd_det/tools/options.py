"""What the commands share: which config, whose weights, and a user's own modules."""

import argparse
import importlib
import os
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from torch import nn

from kd_det.build import network_config
from kd_det.engine import load_config
from kd_det.kd_state import network_weights
from kd_det.registry import did_you_mean
from kd_det.sources import STUDENT
from kd_det.sources.strict import load_strictly

Extension = Callable[[CfgNode], object]
"""What adds a project's keys to a config, in place."""


def add_command(
    commands: Any, name: str, what: str, *, takes: str, gives: str, example: str
) -> argparse.ArgumentParser:
    """
    Register a command whose ``--help`` says what goes in, what comes out, and one line to copy.

    Args:
        commands: of `argparse.ArgumentParser.add_subparsers`.
        name: the command.
        what: it does, in a line.
        takes: what goes in.
        gives: what comes out.
        example: its arguments.
    """
    said = (f"{what[0].upper()}{what[1:]}.", f"In: {takes}", f"Out: {gives}")
    return commands.add_parser(
        name,
        help=what,
        description="\n\n".join(textwrap.fill(text, 88) for text in said),
        epilog=f"example:\n  python -m kd_det {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config-file`` or ``--run``, ``--import``, and ``KEY VALUE`` pairs: see `run_config`."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config-file", metavar="FILE", help="YAML, as for train_net.py")
    which.add_argument(
        "--run",
        dest="run_folder",  # `run` is the function behind the command
        metavar="DIR",
        help="output folder of a run, distilled or not: its config.yaml (or student.yaml) and its "
        "model_final.pth, or the last checkpoint of one that has not ended",
    )
    add_import_argument(parser)
    add_overrides(parser)


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """``--import``: see `imported`."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE[:FUNCTION]",
        help="import a module of yours first, which registers your meta-architecture, heads or "
        "datasets; with a function, call it with the config before files are read: my_project"
        ":add_my_config. May be given several times",
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """``KEY VALUE`` pairs, last on the command line as in Detectron2's scripts."""
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="change the config; these come last",
    )


def imported(names: Sequence[str]) -> list[Extension]:
    """
    Import a user's modules, in order; the working directory is looked in, as by ``python -m``.

    Args:
        names: ``module`` or ``module:function``.

    Returns:
        The functions.

    Raises:
        ValueError: if there is no such module, or no such function in it. What a module itself
            raises passes.
    """
    functions = []
    for word in names:
        name, _, function = word.partition(":")
        try:
            module = importlib.import_module(name)
        except (ModuleNotFoundError, ValueError, TypeError) as e:
            is_path = name[:1] in ("", ".")  # which Python refuses by errors of its own
            missing = isinstance(e, ModuleNotFoundError) and f"{name}.".startswith(f"{e.name}.")
            if not (is_path or missing):
                raise  # it is there, and what it does itself fails
            raise ValueError(
                f"--import {word}: there is no module '{name}' (working directory {os.getcwd()}). "
                "It is a dotted name, without .py, of a file here or on PYTHONPATH."
            ) from e
        if not function:
            continue
        found = getattr(module, function, None)
        if not callable(found):
            near = did_you_mean(function, [k for k, v in vars(module).items() if callable(v)])
            raise ValueError(f"--import {word}: '{name}' has no function '{function}'.{near}")
        functions.append(found)
    return functions


def run_config(args: argparse.Namespace) -> CfgNode:
    """
    The config that a command was given, on the CPU where there is no GPU.

    Args:
        args: of `add_run_arguments`; with ``--run``, ``MODEL.WEIGHTS`` are the run's.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: of `imported` and `kd_det.engine.load_config`.
    """
    extend = imported(args.imports)
    file, overrides = args.config_file, list(args.opts)
    if getattr(args, "run_folder", None):
        file = _config_of(Path(args.run_folder))
        overrides = ["MODEL.WEIGHTS", _weights_of(Path(args.run_folder)), *overrides]
    cfg = load_config(file, overrides, extend)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def trained_network(cfg: CfgNode, name: str = "") -> nn.Module:
    """
    The plain student or a peer of a run with its trained weights, every one of them, in eval mode.

    Args:
        cfg: of a run, distilled or not; ``MODEL.WEIGHTS`` is a checkpoint of it, or holds the
            weights of that network alone.
        name: of a peer, or `STUDENT`; empty for what the run exports.

    Raises:
        KeyError: if the run has no such network.
        ValueError: if there are no weights, or they are not all of this network's.
    """
    name = name.lower()
    plain = network_config(cfg, name)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError(
            "MODEL.WEIGHTS is empty: append MODEL.WEIGHTS and the trained student's checkpoint, or "
            "give --run and the folder of its training."
        )
    model = build_model(plain)
    what = "The student" if name in ("", STUDENT) else f"The peer '{name}'"
    pick = partial(network_weights, name=name) if name else None
    load_strictly(model, cfg.MODEL.WEIGHTS, what=f"{what} (MODEL.WEIGHTS)", pick=pick)
    return model.eval()


def made_folder(folder: Path) -> Path:
    """
    A folder to write to, with those above it.

    Raises:
        ValueError: if it is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--output: the folder {folder} cannot be made: {e.strerror}.") from e
    return folder


def read_pixels(file: str, form: str) -> np.ndarray:
    """
    An image as ``(H, W, 3)`` uint8.

    Args:
        file: its path.
        form: ``"RGB"`` or ``"BGR"``.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is no image.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"There is no image '{file}' (working directory {os.getcwd()}). KEY VALUE pairs cannot "
            "follow --images directly: put another option between."
        )
    try:
        return read_image(file, format=form)
    except OSError as e:
        raise ValueError(f"'{file}' cannot be read as an image: {e}.") from e


def _config_of(run: Path) -> str:
    # config.yaml has the teacher too; scripts without Detectron2's default_setup do not write it.
    for name in ("config.yaml", "student.yaml"):
        if (run / name).is_file():
            return str(run / name)
    raise FileNotFoundError(
        f"--run {run}: there is no config.yaml and no student.yaml in this folder (working "
        f"directory {os.getcwd()}): name the OUTPUT_DIR of a training, or give --config-file."
    )


def _weights_of(run: Path) -> str:
    last = run / "last_checkpoint"
    names = ["model_final.pth"]  # first: BestCheckpointer's last one is not the end of the run
    if last.is_file():
        names.append(last.read_text().strip())
    for name in names:
        if (run / name).is_file():
            return str(run / name)
    raise FileNotFoundError(
        f"--run {run}: there is no {' and no '.join(names)} in this folder: has the run saved a "
        "checkpoint? Name one with --config-file ... MODEL.WEIGHTS FILE."
    )
