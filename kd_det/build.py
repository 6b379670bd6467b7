"""The wiring diagram: how a config becomes a Distiller."""

import copy
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from torch import nn

from kd_det._compat import get_event_storage_or_none
from kd_det.config import NAME, before_merging, check_enabled, student_config
from kd_det.data.unlabelled import is_unlabelled
from kd_det.diagnostics import Diagnostics
from kd_det.distiller import Distiller
from kd_det.fields import arguments_of, fields_of
from kd_det.inherit import Inherit
from kd_det.record import write_run_record
from kd_det.registry import SOURCES, TERMS, PartRegistry, did_you_mean
from kd_det.rng import preserved_rng
from kd_det.sources import STUDENT, Peer


def build_distiller(cfg: CfgNode) -> nn.Module:
    """
    What Detectron2's `build_model` calls for ``MODEL.META_ARCHITECTURE: "Distiller"``.

    Returns:
        The plain student when ``KD.ENABLED`` is False, else a `Distiller` around it. Either way the
        student is built first, from the random state that it would meet without distillation.

    Raises:
        ValueError: if the config cannot work; the message names the key.
    """
    plain = student_config(cfg)
    architecture = plain.MODEL.META_ARCHITECTURE
    if architecture not in META_ARCH_REGISTRY:
        known = sorted(name for name, _ in META_ARCH_REGISTRY if name != NAME)
        raise ValueError(
            f"KD.STUDENT.META_ARCHITECTURE is '{architecture}', which no class is registered under."
            f"{did_you_mean(architecture, known)} Known: {', '.join(known)}."
        )
    student = META_ARCH_REGISTRY.get(architecture)(plain)
    if not cfg.KD.ENABLED:
        return student
    check_enabled(cfg)
    kd = cfg.KD
    init_from = kd.STUDENT.INIT_FROM.lower()
    learners = (SOURCES.get(node.TYPE) for node in kd.SOURCES.values() if node.ENABLED)
    if not (kd.TERMS or init_from or any(source.is_learner for source in learners)):
        raise ValueError(
            "KD.ENABLED is True, but KD.TERMS is empty: there is nothing to distil. Add a term, "
            "FPN: {TYPE: CWD, TAP: features, WEIGHT: 5.0} say, or set KD.ENABLED to False."
        )
    with preserved_rng():
        return Distiller(
            student=student,
            sources=build_items(
                kd.SOURCES,
                SOURCES,
                "KD.SOURCES",
                defaults=project_defaults(cfg),
                student_config=plain.dump(),
            ),
            terms=build_items(kd.TERMS, TERMS, "KD.TERMS"),
            max_iter=cfg.SOLVER.MAX_ITER,
            input_format=cfg.INPUT.FORMAT,
            export_peer=kd.EXPORT_PEER.lower(),
            classes=_with_classes(cfg),
            task_loss_weight=kd.TASK_LOSS_WEIGHT,
            inherit=Inherit(init_from, kd.STUDENT.INIT_MODULES) if init_from else None,
            log_period=kd.LOG_PERIOD,
            diagnostics=_diagnostics(cfg),
            on_start=partial(begin_run, cfg),
        )


def _with_classes(cfg: CfgNode) -> str:
    """The first dataset that says what the student's classes are; empty if none is named."""
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    return next((name for name in names if not is_unlabelled(name)), "")


def _diagnostics(cfg: CfgNode) -> Diagnostics | None:
    node = cfg.KD.DIAGNOSTICS
    if not node.ENABLED:
        return None
    try:
        return Diagnostics(
            period=node.PERIOD, target_ratio=node.TARGET_RATIO, vis_period=cfg.VIS_PERIOD
        )
    except ValueError as e:
        raise ValueError(f"KD.DIAGNOSTICS: {e}") from None


# A function under the name of the class: with KD.ENABLED False there is nothing to wrap.
META_ARCH_REGISTRY._do_register(NAME, build_distiller)


def build_items(
    nodes: CfgNode, registry: PartRegistry, where: str, **offered: Any
) -> dict[str, Any]:
    """
    The named items of a node, each built by the class of its TYPE; names in lower case.

    Args:
        nodes: by name.
        registry: of their TYPEs.
        where: the node's key, for errors.
        offered: what no config can carry, for constructors that have an argument of that name.

    Raises:
        ValueError: if a value does not fit, or two names differ only in case.
    """
    items: dict[str, Any] = {}
    for name, node in nodes.items():
        if not node.ENABLED:
            continue
        if name.lower() in items:
            raise ValueError(f"{where} has two items called '{name.lower()}' in lower case.")
        try:
            items[name.lower()] = build_part(node, registry, **offered)
        except ValueError as e:
            raise ValueError(f"{where}.{name}: {e}") from None
    return items


def build_part(node: Mapping[str, Any], registry: PartRegistry, **offered: Any) -> Any:
    """Call the constructor that a node's TYPE names with the node's fields and what is offered."""
    cls = registry.get(node["TYPE"])
    arguments = {k: v for k, v in offered.items() if k in arguments_of(cls)}
    for key, field in fields_of(cls).items():
        value = node[key]
        if field.nested is not None:
            value = build_part(value, field.nested)
        elif isinstance(value, list):
            value = tuple(x.lower() for x in value) if field.is_name else tuple(value)
        elif field.is_name:
            value = value.lower()
        arguments[key.lower()] = value
    return cls(**arguments)


def project_defaults(cfg: CfgNode) -> CfgNode:
    """
    What the file of a teacher is read onto: Detectron2's defaults, and the keys that the project
    has added to this config with the values that they had before anything was merged into it.
    """
    defaults = get_cfg()
    _add_unknown(defaults, before_merging(cfg))
    defaults.pop("KD", None)
    return defaults


def _add_unknown(to: CfgNode, cfg: CfgNode) -> None:
    for key, value in cfg.items():
        if key not in to:
            to[key] = copy.deepcopy(value)
        elif isinstance(value, CfgNode) and isinstance(to[key], CfgNode):
            _add_unknown(to[key], value)


def begin_run(cfg: CfgNode, distiller: Distiller | None) -> None:
    """
    What a run leaves in ``OUTPUT_DIR`` before its first step: ``student.yaml``, ``kd_run.json``.

    See ``on_start`` of the `Distiller`, and `kd_det.record.write_run_record`.

    Args:
        cfg: the config of the run.
        distiller: ``None`` for a plain student.
    """
    storage = get_event_storage_or_none()
    write_student_config(cfg)
    write_run_record(cfg, distiller, iteration=0 if storage is None else int(storage.iter))


def network_config(cfg: CfgNode, name: str = "") -> CfgNode:
    """
    The config of one of the networks that a run trains, without ``KD``: what stock Detectron2 tests
    it with.

    Args:
        cfg: of the run.
        name: of a peer, or `STUDENT`; empty for what the run exports.

    Raises:
        KeyError: if there is no such network.
        ValueError: if it has no YAML config.
    """
    plain = student_config(cfg)
    kd = cfg.get("KD")
    name = (name or (kd.EXPORT_PEER if kd is not None and kd.ENABLED else "")).lower() or STUDENT
    if name == STUDENT:
        return plain
    nodes = {key.lower(): node for key, node in cfg.KD.SOURCES.items() if node.ENABLED}
    peers = {key: node for key, node in nodes.items() if issubclass(SOURCES.get(node.TYPE), Peer)}
    if name not in peers:
        raise KeyError(
            f"This run has no network '{name}'.{did_you_mean(name, [STUDENT, *peers])} Networks: "
            f"{', '.join([STUDENT, *peers])}."
        )
    peer: Peer = build_part(
        peers[name], SOURCES, defaults=project_defaults(cfg), student_config=plain.dump()
    )
    assert peer.config is not None, "a peer of a config has one"
    return peer.config.in_place_of(plain)


def write_student_config(cfg: CfgNode) -> None:
    """
    Write ``student.yaml`` into ``OUTPUT_DIR``: the config, without ``KD``, of what the run exports,
    with which stock Detectron2 evaluates ``model_final.pth`` where kd_det is not installed.
    """
    if not cfg.OUTPUT_DIR or not comm.is_main_process():
        return
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    path = os.path.join(cfg.OUTPUT_DIR, "student.yaml")
    with open(path + ".tmp", "w") as f:
        f.write(network_config(cfg).dump())
    os.replace(path + ".tmp", path)
