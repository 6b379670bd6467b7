"""One declaration, two doors: constructor arguments as config fields."""

from typing import Annotated, Any

import pytest
from torch import nn

from kd_det.connectors import Auto, Connector, Conv
from kd_det.fields import Field, coerce, fields_of
from kd_det.registry import CONNECTORS, REGIONS, SCHEDULES
from kd_det.schedules import Schedule, Warmup
from kd_det.sources import Teacher
from kd_det.terms import CWD


class Base:
    def __init__(self, *, weight: float = 1.0, source: str = "", connector: Connector = Auto()):
        pass


class Middle(Base):
    def __init__(self, *, levels: tuple[str, ...] = (), weight: float = 2.0, **base: Any) -> None:
        super().__init__(weight=weight, **base)


class Leaf(Middle):
    """Has no constructor of its own."""


class Closed(Middle):
    def __init__(self, *, tau: int = 3) -> None:
        super().__init__()


class Strange:
    def __init__(
        self,
        positional: float = 1.0,
        *,
        model: nn.Module | None = None,
        maybe: float | None = None,
        folder: Annotated[str, "path"] = "x",
        flag: bool = True,
        needed: int,
    ) -> None:
        pass


def test_own_fields_come_first_and_hide_the_bases() -> None:
    fields = fields_of(Middle)
    assert list(fields) == ["LEVELS", "WEIGHT", "SOURCE", "CONNECTOR"]
    assert fields["WEIGHT"] == Field(2.0, float)
    assert fields["LEVELS"] == Field((), tuple[str, ...])
    assert fields_of(Leaf) == fields


def test_without_kwargs_the_bases_have_no_say() -> None:
    assert fields_of(Closed) == {"TAU": Field(3, int)}


def test_what_no_config_can_carry_is_left_out() -> None:
    fields = fields_of(Strange)
    assert set(fields) == {"FOLDER", "FLAG", "NEEDED"}
    assert fields["FOLDER"].is_path
    assert not fields["FLAG"].is_path


def test_nested_fields_know_their_registry() -> None:
    fields = fields_of(CWD)
    assert fields["CONNECTOR"].nested is CONNECTORS
    assert fields["REGION"].nested is REGIONS
    assert fields["SCHEDULE"].nested is SCHEDULES
    assert fields["TAU"].nested is None


def test_published_parts_have_their_arguments_as_fields() -> None:
    assert {"TAU", "CHANNEL_WEIGHT", "TAP", "LEVELS", "WEIGHT", "SOURCE"} <= set(fields_of(CWD))
    assert {"CONFIG_FILE", "WEIGHTS"} == {k for k, f in fields_of(Teacher).items() if f.is_path}
    assert "MODEL" not in fields_of(Teacher)
    assert set(fields_of(Conv)) == {"KERNEL", "NORM", "RELU"}
    assert set(fields_of(Warmup)) == {"WARMUP_ITERS", "START_ITER", "STOP_ITER", "EVERY"}
    assert fields_of(Auto) == {}
    assert set(fields_of(Schedule)) == {"START_ITER", "STOP_ITER", "EVERY"}


@pytest.mark.parametrize(
    ("value", "kind", "result"),
    [
        (4, float, 4.0),
        (4.5, float, 4.5),
        (4, int, 4),
        (True, bool, True),
        ("4", str, "4"),
        ([1, 2.5], tuple[float, ...], [1.0, 2.5]),
        ((1, 2), tuple[int, ...], [1, 2]),
        ([], tuple[str, ...], []),
    ],
)
def test_what_fits(value: object, kind: Any, result: object) -> None:
    found = coerce(value, Field(None, kind), "KD.X")
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, float),
        (True, int),
        (1, bool),
        (1.0, int),
        (1, str),
        (None, str),
        ("1", float),
        (1.0, tuple[float, ...]),
        ("p3", tuple[str, ...]),
        ([True], tuple[int, ...]),
        ([[1]], tuple[int, ...]),
    ],
)
def test_what_does_not_fit_names_the_key_and_the_value(value: object, kind: Any) -> None:
    with pytest.raises(ValueError, match=r"^KD\.X is a .* but got "):
        coerce(value, Field(None, kind), "KD.X")
