"""
The fields that a part's constructor has, as config fields: one declaration, two doors.

``tau: float = 1.0`` in the constructor of a term is ``TAU: 1.0`` under ``KD.TERMS.<NAME>``. A
``**kwargs`` in a signature means that the base class's fields are fields too.
"""

import ast
import inspect
import typing
from dataclasses import dataclass
from typing import Any

import yaml

from kd_det.connectors import Connector
from kd_det.regions import Region
from kd_det.registry import CONNECTORS, REGIONS, SCHEDULES, PartRegistry
from kd_det.schedules import Schedule

NESTED: dict[type, PartRegistry] = {
    Connector: CONNECTORS,
    Region: REGIONS,
    Schedule: SCHEDULES,
}
"""Constructor arguments of these types are config nodes with a TYPE of their own."""

_LEAVES = (bool, int, float, str)


@dataclass(frozen=True)
class Field:
    """
    One field of a part.

    Attributes:
        default: its value when a config does not name it.
        type: bool, int, float, str, a tuple of one of them, or a key of `NESTED`.
        is_path: whether it names a file.
        is_name: whether it names sources, which are in lower case behind the config.
    """

    default: Any
    type: Any
    is_path: bool = False
    is_name: bool = False

    @property
    def nested(self) -> PartRegistry | None:
        """The registry of the parts that may stand here, for a nested field."""
        return NESTED.get(self.type)


def fields_of(cls: type) -> dict[str, Field]:
    """
    The config fields of a part, upper case, in the order of its constructor and then of its bases.

    Arguments that no config can carry (modules, callables) are left out.
    """
    fields: dict[str, Field] = {}
    for name, (p, hint) in arguments_of(cls).items():
        kind, marks = _kind(hint)
        if kind is not None:
            fields[name.upper()] = Field(p.default, kind, "path" in marks, "name" in marks)
    return fields


def arguments_of(cls: type) -> dict[str, tuple[inspect.Parameter, Any]]:
    """The keyword-only arguments of a part with their annotations, its own and then its bases'."""
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None:
            continue
        hints = typing.get_type_hints(init, include_extras=True)
        parameters = inspect.signature(init).parameters.values()
        for p in parameters:
            if p.kind is p.KEYWORD_ONLY:
                found.setdefault(p.name, (p, hints.get(p.name)))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def literal(text: str) -> Any:
    """A word of the command line, or what YAML took for one: 1e-3, [p3, p4]."""
    for parse in (ast.literal_eval, yaml.safe_load):
        try:
            return parse(text)
        except (ValueError, SyntaxError, yaml.YAMLError):
            continue
    return text


def coerce(value: Any, field: Field, where: str) -> Any:
    """
    Check a config value against a field, letting ints serve as floats and lists as tuples.

    Args:
        value: as YAML or the command line gave it.
        field: a leaf field.
        where: the full key, for errors.

    Raises:
        ValueError: if the type does not fit.
    """
    item = _item_type(field.type)
    if item is None:
        return _leaf(value, field.type, where)
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"{where} is a list of {item.__name__}, written [a, b], but got {value!r}."
        )
    return [_leaf(x, item, where) for x in value]


def _leaf(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    if type(value) is kind:
        return value
    raise ValueError(f"{where} is a {kind.__name__}, but got {value!r} ({type(value).__name__}).")


def _kind(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """(type, marks) of an annotation; (None, no marks) for what configs cannot carry."""
    marks: tuple[str, ...] = ()
    if typing.get_origin(hint) is typing.Annotated:
        marks, hint = hint.__metadata__, hint.__origin__
    if hint in _LEAVES or hint in NESTED or _item_type(hint) in _LEAVES:
        return hint, marks
    return None, ()


def _item_type(kind: Any) -> type | None:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    return None
