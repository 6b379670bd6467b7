"""The configs in the pages on learning without a trained teacher."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model

import kd_det
from tests.toys import toy_cfg

DOCS = Path(kd_det.__file__).parent.parent / "docs"
BLOCKS = [
    (page, i, block)
    for page in ("self.md", "peers.md")
    for i, block in enumerate(re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.S))
]


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS)
def test_a_block_builds(page: str, number: int, block: str) -> None:
    content: dict[str, Any] = yaml.safe_load(block)
    cfg = toy_cfg()
    cfg.merge_from_other_cfg(CfgNode(content))
    sources = cfg.KD.SOURCES
    for node in sources.values():
        if node.TYPE == "Teacher":  # its files are the reader's
            node.ENABLED = False
        elif node.TYPE == "Peer":
            node.CONFIG_FILE = ""
    for term in cfg.KD.TERMS.values():
        if term.SOURCE and not sources.get(term.SOURCE, {"ENABLED": True})["ENABLED"]:
            term.ENABLED = False
    if not sources:
        return
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.KD.ENABLED = True
    cfg.KD.STUDENT.META_ARCHITECTURE = "RetinaNet"
    model = build_model(cfg)
    assert model.wiring.unavailable is None
    assert list(model.wiring.rows) == [k.lower() for k, t in cfg.KD.TERMS.items() if t.ENABLED]


def test_every_page_has_blocks() -> None:
    assert {page for page, _, _ in BLOCKS} == {"self.md", "peers.md"}
