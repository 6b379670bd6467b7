"""
The ``KD`` node of a Detectron2 config.

`add_kd_config` gives a config every key with its default. Sources and terms are named items whose
fields depend on their TYPE, which plain yacs cannot express (it accepts a misspelt field in silence
or refuses every field, and never takes 4 for 4.0); so the config object becomes a `KDCfgNode`, a
`CfgNode` that merges what is under ``KD`` itself. Detectron2's class is untouched.
"""

import inspect
import os
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

from kd_det.data.coco import register_coco
from kd_det.data.unlabelled import forget_unlabelled, register_unlabelled
from kd_det.fields import Field, coerce, fields_of, literal
from kd_det.inherit import DEFAULT_MODULES
from kd_det.paths import find_file
from kd_det.registry import SOURCES, TERMS, PartRegistry, did_you_mean

NAME = "Distiller"
"""``MODEL.META_ARCHITECTURE`` of a config with distillation."""

_ITEMS: dict[str, PartRegistry] = {"SOURCES": SOURCES, "TERMS": TERMS}
_BEFORE = "before merging"  # attribute of a config
_LAYER = "KD of "  # + file name: keys under which the KD nodes of a file and its bases travel
_ENABLED = Field(True, bool)  # every named item can be switched off
_DATASET = {"JSON": Field("", str, is_path=True), "IMAGES": Field("", str, is_path=True)}


def add_kd_config(cfg: CfgNode) -> None:
    """
    Add the ``KD`` node to a config, in place. A second call does nothing.

    Args:
        cfg: of `detectron2.config.get_cfg`, before files are merged.
    """
    if isinstance(cfg, _KDMixin):
        return
    cfg.KD = kd = CfgNode()
    # False builds the plain student, without a wrapper: the matched baseline of the same file.
    kd.ENABLED = False
    # Who is imitated: NAME: {TYPE: a class of kd_det.sources, and its fields}.
    kd.SOURCES = CfgNode()
    # What is imitated and how: NAME: {TYPE: a class of kd_det.terms, and its fields}. The loss of
    # NAME is loss_kd_name. WEIGHT 0 or ENABLED False removes a term, its taps and its source.
    kd.TERMS = CfgNode()

    # Factor on the student's own losses. 0: it learns from its sources alone, and images need no
    # labels. Images without labels never count for these losses, whatever the factor.
    kd.TASK_LOSS_WEIGHT = 1.0

    kd.STUDENT = CfgNode()
    # What MODEL.META_ARCHITECTURE would be without distillation.
    kd.STUDENT.META_ARCHITECTURE = ""
    # Name of the source whose trained weights a new student starts from, where they fit; or "".
    kd.STUDENT.INIT_FROM = ""
    # Module paths (with *) that are inherited: the head and what feeds it, not the backbone.
    kd.STUDENT.INIT_MODULES = list(DEFAULT_MODULES)

    # Name of the peer whose network is exported in the student's place: what an evaluation runs and
    # a checkpoint holds as "model". "" is the student. `python -m kd_det export --peer` writes any.
    kd.EXPORT_PEER = ""

    # COCO-format datasets that this config brings along: NAME: {JSON: file, IMAGES: folder}. They
    # are registered under NAME, for DATASETS.TRAIN and DATASETS.TEST. IMAGES alone: images without
    # labels, for DATASETS.TRAIN.
    kd.DATASETS = CfgNode()
    # Two photometric views of every training image, for a SecondHead (docs/peers.md): factors on
    # brightness, contrast and saturation are drawn in 1 -+ these. TrainerMixin makes them of any
    # loader of Detectron2's; for another trainer, wrap the mapper in kd_det.data.PhotometricViews.
    kd.VIEWS = CfgNode({"ENABLED": False, "BRIGHTNESS": 0.4, "CONTRAST": 0.4, "SATURATION": 0.4})
    # Every so many iterations the value of each term and level is written; Detectron2's own
    # writers run every 20.
    kd.LOG_PERIOD = 20
    # Whether TrainerMixin evaluates the teachers (once; cached) to report what is left to gain.
    kd.EVAL_TEACHER = True
    # Whether it evaluates peers and their ensemble too: each time a pass over the data for each.
    kd.EVAL_PEERS = True

    # What is measured of a run now and then, see docs/diagnostics.md; it changes no loss.
    kd.DIAGNOSTICS = CfgNode()
    kd.DIAGNOSTICS.ENABLED = True
    # Iterations between measurements, 20 at most within the first 200; one costs about a backward
    # of the head. 0 measures never.
    kd.DIAGNOSTICS.PERIOD = 100
    # Gradient of a term : gradient of the student's losses at which a weight is suggested.
    kd.DIAGNOSTICS.TARGET_RATIO = 1.0
    _change_class(cfg, _kd_class(type(cfg)))


def student_config(cfg: CfgNode) -> CfgNode:
    """
    The config of the plain student: no ``KD`` node, its own meta-architecture, Detectron2's class.

    Raises:
        ValueError: if the config does not say what the student is.
    """
    plain = cfg.clone()
    plain.defrost()
    kd = plain.pop("KD", None)
    if isinstance(plain, _KDMixin):
        _change_class(plain, type(plain).plain_class)
    if plain.MODEL.META_ARCHITECTURE == NAME:
        student = kd.STUDENT.META_ARCHITECTURE if kd is not None else ""
        if student in ("", NAME):
            raise ValueError(
                f"MODEL.META_ARCHITECTURE is '{NAME}', so KD.STUDENT.META_ARCHITECTURE must name "
                f"the student's own meta-architecture (RetinaNet, say), but it is '{student}'."
            )
        plain.MODEL.META_ARCHITECTURE = student
    return plain


def before_merging(cfg: CfgNode) -> CfgNode:
    """The config as it was before anything was merged into it: a project's defaults."""
    return cfg.__dict__.get(_BEFORE, cfg)


def check_enabled(cfg: CfgNode) -> None:
    """
    Refuse a config that asks for distillation and would not get it.

    Raises:
        ValueError: if ``KD.ENABLED`` is set under another meta-architecture.
    """
    arch = cfg.MODEL.META_ARCHITECTURE
    if "KD" in cfg and cfg.KD.ENABLED and arch != NAME:
        raise ValueError(
            f"KD.ENABLED is True, but MODEL.META_ARCHITECTURE is '{arch}', which trains without "
            f"distillation. Set MODEL.META_ARCHITECTURE to '{NAME}' and "
            f"KD.STUDENT.META_ARCHITECTURE to '{arch}'."
        )


class _KDMixin(CfgNode):
    """Merges what is under ``KD`` by its own rules, and everything else as its base class does."""

    plain_class: type[CfgNode] = CfgNode

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """
        As the base class; the ``KD`` of every file comes under a key of its own, in order.

        Paths in it are resolved relative to the file naming them.
        """
        loaded = super().load_yaml_with_base(filename, allow_unsafe=allow_unsafe)
        kd = loaded.pop("KD", None)
        if kd is not None:
            if "://" not in filename:
                _resolve_paths(kd, os.path.dirname(os.path.abspath(filename)))
            # The base class merges a file into its _BASE_ as plain dicts: the fields of one TYPE
            # would meet another TYPE, and REGION: Ones could not become a map.
            loaded[_LAYER + filename] = kd
        return loaded

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        """As the base class; ``KD`` is merged by `merge_kd`, first: a bad one changes nothing."""
        self._remember()
        rest = cfg_other.clone()
        kd = self.KD.clone()
        for key in [k for k in rest if k == "KD" or str(k).startswith(_LAYER)]:
            layer = rest.pop(key)
            if layer is not None:
                merge_kd(kd, layer)
        super().merge_from_other_cfg(rest)
        self.KD.update(kd)

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """As the base class; ``KD.…`` keys are merged by `merge_kd`, first."""
        self._remember()
        pairs = list(zip(cfg_list[0::2], cfg_list[1::2], strict=False))
        ours = [(k, v) for k, v in pairs if k.split(".")[0] == "KD"]
        if ours and len(cfg_list) % 2:
            raise ValueError(f"Overrides are pairs of KEY VALUE, but got {len(cfg_list)} words.")
        kd = self.KD.clone()
        for key, value in ours:
            tree: Any = value
            for part in reversed(key.split(".")[1:]):
                tree = {part: tree}
            merge_kd(kd, tree)
        rest = [x for k, v in pairs if (k, v) not in ours for x in (k, v)]
        super().merge_from_list(rest + cfg_list[2 * len(pairs) :])
        self.KD.update(kd)

    def _remember(self) -> None:
        if _BEFORE not in self.__dict__:
            self.__dict__[_BEFORE] = self.clone()

    def freeze(self) -> None:
        """As the base class, after `check_enabled`."""
        check_enabled(self)
        super().freeze()

    # Nodes that a file brings are of the base class, as those that they are merged into.
    @classmethod
    def _create_config_tree_from_dict(cls, dic: Any, key_list: Any) -> Any:
        return cls.plain_class._create_config_tree_from_dict(dic, key_list)

    @classmethod
    def _decode_cfg_value(cls, value: Any) -> Any:
        return cls.plain_class._decode_cfg_value(value)

    def __reduce__(self) -> Any:
        # `_kd_class` of a user's class is no module's attribute, by which pickle finds classes.
        return _unpickle, (self.plain_class, dict(self), self.__dict__)


class KDCfgNode(_KDMixin):
    """Detectron2's `CfgNode` with a ``KD`` node."""


_CLASSES: dict[type[CfgNode], type[CfgNode]] = {CfgNode: KDCfgNode}


def _kd_class(base: type[CfgNode]) -> type[CfgNode]:
    """One class per class of configs: a project may have its own."""
    if base not in _CLASSES:
        _CLASSES[base] = type(f"KD{base.__name__}", (_KDMixin, base), {"plain_class": base})
    return _CLASSES[base]


def _unpickle(base: type[CfgNode], nodes: dict[str, Any], state: dict[str, Any]) -> CfgNode:
    cfg = _kd_class(base)()
    dict.update(cfg, nodes)
    cfg.__dict__.update(state)
    return cfg


def _change_class(cfg: CfgNode, cls: type[CfgNode]) -> None:
    object.__setattr__(cfg, "__class__", cls)  # CfgNode's own __setattr__ sets keys


def merge_kd(kd: CfgNode, new: Mapping[str, Any], where: str = "KD") -> None:
    """
    Merge a tree into the ``KD`` node, in place. Nothing is changed when an error is raised.

    Raises:
        ValueError: if a key or a type does not exist or a value does not fit; the message names
            the full key, what was found and what there is.
    """
    result = kd.clone()
    for key, value in _node(new, where).items():
        full = f"{where}.{key}"
        if key not in kd:
            raise ValueError(f"There is no config key {full}.{did_you_mean(str(key), kd)}")
        if key in _ITEMS:
            for name, item in _node(value, full).items():
                _merge_item(result[key], name, item, _ITEMS[key], f"{full}.{name}")
        elif key == "DATASETS":
            for name, item in _node(value, full).items():
                node = result[key].setdefault(name, CfgNode(dict.fromkeys(_DATASET, "")))
                _merge_leaves(node, _node(item, f"{full}.{name}"), _DATASET, f"{full}.{name}")
        elif isinstance(kd[key], CfgNode):
            fields = {k: _field_of(v) for k, v in kd[key].items()}
            _merge_leaves(result[key], _node(value, full), fields, full)
        else:
            _merge_leaves(result, {key: value}, {key: _field_of(kd[key])}, where)
    for name, node in result.DATASETS.items():
        if node.JSON and node.IMAGES:
            # A later layer, or the command line, may say otherwise.
            before = kd.DATASETS.get(name, node)
            forget_unlabelled(name)
            register_coco(name, node.JSON, node.IMAGES, instead_of=(before.JSON, before.IMAGES))
        elif node.IMAGES:
            register_unlabelled(name, node.IMAGES)
    kd.update(result)


def _merge_item(
    parent: CfgNode, name: str, new: Any, registry: PartRegistry, where: str, nested: bool = False
) -> None:
    """Merge one typed item; a new one is filled with the defaults of its TYPE first."""
    if isinstance(new, str):  # REGION: Ones, or on the command line REGION "{TYPE: Ones}"
        new = literal(new) if new.lstrip().startswith("{") else {"TYPE": new}
    new = _node(new, where)
    if not isinstance(name, str):
        raise ValueError(f"{where}: names are words, but YAML read {name!r}; put it in quotes.")
    old = parent.get(name)
    if "TYPE" not in new and old is None:
        raise ValueError(
            f"There is no {where}.{did_you_mean(name, parent)} A new {registry._name} needs a "
            f"TYPE: {', '.join(sorted(k for k, _ in registry))}."
        )
    kind = new.get("TYPE", old.TYPE if old is not None else "")
    try:
        cls = registry.get(kind)
    except KeyError as e:
        raise ValueError(f"{where}.TYPE: {e.args[0]}") from None
    fields = fields_of(cls) if nested else {"ENABLED": _ENABLED, **fields_of(cls)}
    node = _defaults(kind, fields)
    if old is not None:
        before = old if kind == old.TYPE else _changed(old, registry, nested)
        for key in before:
            if key in node and key != "TYPE":
                node[key] = before[key]
    leaves = {}
    for key, value in new.items():
        if key in fields and (inner := fields[key].nested) is not None:
            _merge_item(node, key, value, inner, f"{where}.{key}", nested=True)
        elif key != "TYPE":
            leaves[key] = value
    _merge_leaves(node, leaves, fields, where)
    for key, value in node.items():
        if value is inspect.Parameter.empty:
            raise ValueError(f"{where}.{key} has no default: say what it is.")
    parent[name] = node


def _defaults(kind: str, fields: Mapping[str, Field]) -> CfgNode:
    node = CfgNode({"TYPE": kind})
    for key, field in fields.items():
        if field.nested is None:
            default = field.default
            node[key] = list(default) if isinstance(default, tuple) else default
        else:
            # A default part, Auto() say, keeps its constructor's arguments under their names.
            part = field.default
            own = fields_of(type(part))
            node[key] = _defaults(type(part).__name__, own)
            for name in own:
                value = getattr(part, name.lower())
                node[key][name] = list(value) if isinstance(value, tuple) else value
    return node


def _changed(old: CfgNode, registry: PartRegistry, nested: bool) -> dict[str, Any]:
    """What an item says beyond the defaults of its TYPE: that outlives a change of TYPE."""
    fields = fields_of(registry.get(old.TYPE))
    defaults = _defaults(old.TYPE, fields if nested else {"ENABLED": _ENABLED, **fields})
    return {key: value for key, value in old.items() if value != defaults.get(key)}


def _merge_leaves(
    node: CfgNode, new: Mapping[str, Any], fields: Mapping[str, Field], where: str
) -> None:
    for key, value in new.items():
        full = f"{where}.{key}"
        if key not in fields:
            raise ValueError(
                f"There is no field {full}.{did_you_mean(str(key), fields)} Fields: "
                f"{', '.join(fields)}. (In a YAML flow map, lists are written [a, b], not (a, b).)"
            )
        field = fields[key]
        if isinstance(value, str) and field.type is not str:
            value = literal(value)
        value = coerce(value, field, full)
        node[key] = _resolved(value) if field.is_path else value


def _field_of(default: Any) -> Field:
    if isinstance(default, list):
        return Field(default, tuple[str, ...])
    return Field(default, type(default))


def _node(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is a map of keys and values, but got {value!r}.")
    return value


def _resolve_paths(tree: Any, folder: str) -> None:
    """Make paths absolute that exist relative to the file that names them, in place."""
    keys = {
        name
        for registry in _ITEMS.values()
        for _, cls in registry
        for name, field in fields_of(cls).items()
        if field.is_path
    } | set(_DATASET)
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if isinstance(value, dict):
            _resolve_paths(value, folder)
        elif key in keys and isinstance(value, str) and value:
            tree[key] = _resolved(value, folder)


def _resolved(path: str, folder: str = "") -> str:
    if not path or "://" in path:
        return path
    candidate = os.path.join(folder, os.path.expanduser(path))
    if os.path.isdir(candidate):
        return os.path.abspath(candidate)
    return find_file(path, folder) or path
