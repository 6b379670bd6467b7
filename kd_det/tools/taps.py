"""``python -m kd_det taps``: what a detector can be tapped at."""

import argparse
from typing import Any

from detectron2.config import get_cfg
from tabulate import tabulate
from torch import nn

from kd_det.detectors import describe, probe
from kd_det.sources.model_config import ModelConfig
from kd_det.taps import Tap
from kd_det.tools.options import add_command, add_import_argument, imported


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "taps",
        "list the taps of a detector with shapes, strides and calls",
        takes="the config of a detector, teacher or student. No weights are read.",
        gives="its presets, the words for TAP, and with --all every module whose output can be "
        "tapped, with channels, stride, and calls per forward.",
        example="--config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="YAML or LazyConfig .py"
    )
    parser.add_argument("--all", action="store_true", help="module paths too, not only presets")
    add_import_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    defaults = get_cfg()
    for add in imported(args.imports):
        add(defaults)
    config = ModelConfig(args.config_file, what="taps", defaults=defaults)
    print(tap_table(config.build("meta"), all_modules=args.all))


def tap_table(model: nn.Module, *, all_modules: bool = False) -> str:
    """
    The taps of a detector as text, one line per level.

    Args:
        model: the detector, on any device; its meta copy is run once.
        all_modules: also the modules that give feature maps; a detector without presets lists
            them in any case.
    """
    detector = describe(model)
    taps = list(detector.named_taps().values())
    rows = []
    if all_modules or not taps:
        presets = {tap.path for tap in taps}
        reached = detector.depths()[-1].reaches
        taps += [
            Tap(name, name)
            for name, module in model.named_modules()
            if name not in presets and name.startswith(reached) and not isinstance(module, nn.ReLU)
        ]
    for tap in taps:
        try:
            shapes = probe(model, [tap])[tap.name]
        except (ValueError, RuntimeError):  # gives no maps, or is not called: cannot be tapped
            continue
        rows += [
            [tap.name, s.level, s.channels, s.stride or "-", s.calls, tap.kind, s.origin or "-"]
            for s in shapes
        ]
    headers = ["tap", "level", "channels", "stride", "calls", "kind", "origin"]
    return tabulate(rows, headers=headers, disable_numparse=[0, 1])  # a path may read like a number
