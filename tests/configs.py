"""Configs with a KD node, without models."""

from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg

import kd_det

SOURCE = {"TEACHER": {"TYPE": "Teacher", "CONFIG_FILE": "teacher.yaml", "WEIGHTS": "teacher.pth"}}
FPN = {"TYPE": "CWD", "TAP": "features", "WEIGHT": 5.0}


def kd_cfg() -> CfgNode:
    cfg = get_cfg()
    kd_det.add_kd_config(cfg)
    return cfg


def merged(terms: dict, **kd: object) -> CfgNode:
    cfg = kd_cfg()
    cfg.merge_from_other_cfg(CfgNode({"KD": {"SOURCES": SOURCE, "TERMS": terms, **kd}}))
    return cfg


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def plain(node: CfgNode) -> dict:
    return yaml.safe_load(node.dump())
