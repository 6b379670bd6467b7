"""Toy students that are their own teachers."""

from typing import Any

import torch
from detectron2.config import CfgNode

from tests.steps import step
from tests.toys import batch, distiller_cfg


def two_views(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """A batch with a second view of every image."""
    inputs = batch(*args, **kwargs)
    return [{**x, "view_2": (x["image"] * 0.8 + 20).to(x["image"].dtype)} for x in inputs]


INPUTS = two_views(((128, 128), (100, 120)))  # with padding
AT = {"TYPE": "AT", "TAP": "features", "SOURCE_TAP": "refined", "WEIGHT": 100.0}
PI = {"TYPE": "PI", "TAP": "cls_logits", "MODE": "sigmoid", "NORMALIZER": "positives"}
FPN = {"TYPE": "CWD", "TAP": "features"}
EMA = {"MEAN": {"TYPE": "EMA"}}
FRSKD = {"SELF": {"TYPE": "FRSKD"}}
PEER = {"PEER": {"TYPE": "Peer"}}
DML = {
    "LOGITS": {**PI, "SOURCE": "PEER"},
    "BACK": {**PI, "SOURCE": "STUDENT", "LEARNER": "PEER"},
    "FPN": {**FPN, "SOURCE": "PEER"},
}
HEADS = {"SECOND": {"TYPE": "SecondHead"}, **PEER, "THIRD": {"TYPE": "SecondHead", "OF": "PEER"}}
ENSEMBLE = {
    "TYPE": "Ensemble",
    "HEADS": ["STUDENT", "PEER"],
    "SECOND_HEADS": ["SECOND", "THIRD"],
}
ALIKE = {"TYPE": "Consistency"}
FROM_ALL = {**PI, "SOURCE": "ENSEMBLE", "TAU": 3.0}
OKDCR = {
    "INTRA": {**ALIKE, "SOURCE": "SECOND"},
    "INTRA_PEER": {**ALIKE, "SOURCE": "THIRD", "LEARNER": "PEER"},
    "INTER": {**ALIKE, "SOURCE": "PEER"},
    "INTER_SECOND": {**ALIKE, "SOURCE": "THIRD", "LEARNER": "SECOND"},
    "LOGITS": FROM_ALL,
    "SECOND": {**FROM_ALL, "LEARNER": "SECOND"},
    "PEER": {**FROM_ALL, "LEARNER": "PEER"},
    "THIRD": {**FROM_ALL, "LEARNER": "THIRD"},
}
SELVES = {  # sources and terms of each
    "EMA": (EMA, {"LOGITS": PI, "FPN": FPN}),
    "FRSKD": (FRSKD, {"LOGITS": PI, "FPN": AT}),
    "DML": (PEER, DML),
    "OKDCR": ({**HEADS, "ENSEMBLE": ENSEMBLE}, {**OKDCR, "FPN": {**FPN, "SOURCE": "PEER"}}),
}


def self_cfg(sources: dict[str, Any], terms: dict[str, Any], **student: Any) -> CfgNode:
    cfg = distiller_cfg(("", ""), {}, **student)
    cfg.KD.SOURCES.clear()
    cfg.merge_from_other_cfg(CfgNode({"KD": {"SOURCES": sources, "TERMS": terms}}))
    return cfg


def train(model: Any, optimizer: torch.optim.Optimizer, iterations: range) -> list[dict[str, Any]]:
    """The losses of steps on images of their own."""
    values = []
    for iteration in iterations:
        losses = step(model, iteration, two_views(((128, 128), (96, 128)), seed=iteration))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        values.append({k: float(v.detach()) for k, v in losses.items()})
    return values
