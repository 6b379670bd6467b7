"""The KD node: fields and parts, and what plain yacs gets wrong."""

from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from kd_det.build import build_items
from kd_det.connectors import Auto, Conv
from kd_det.regions import Ones, Padding
from kd_det.registry import REGIONS, SOURCES, TERMS
from kd_det.schedules import Constant, Warmup
from tests.configs import FPN, kd_cfg, merged, write

# Plain yacs -----------------------------------------------------------------------------------


def test_yacs_itself_still_fails_this_way() -> None:
    """The reason for KDCfgNode. When this fails, it can go."""
    cfg = get_cfg()
    cfg.KD = CfgNode({"TERMS": {}}, new_allowed=True)
    cfg.KD.TERMS = CfgNode({}, new_allowed=True)
    cfg.merge_from_other_cfg(CfgNode({"KD": {"TERMS": {"FPN": {"WEIGTH": 50.0, "TAU": 1.0}}}}))
    assert cfg.KD.TERMS.FPN.WEIGTH == 50.0
    with pytest.raises(ValueError, match="Type mismatch"):
        cfg.merge_from_list(["KD.TERMS.FPN.TAU", "4"])


def test_a_misspelt_field_is_an_error_that_says_what_was_meant() -> None:
    with pytest.raises(ValueError, match=r"KD\.TERMS\.FPN\.WEIGTH\. Did you mean 'WEIGHT'"):
        merged({"FPN": {**FPN, "WEIGTH": 50.0}})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("KD.TERMS.FPN.WEIGTH", "1", r"KD\.TERMS\.FPN\.WEIGTH.*'WEIGHT'"),
        ("KD.TERMS.FPM.TAU", "1", r"KD\.TERMS\.FPM.*'FPN'"),
        ("KD.TERM.FPN.TAU", "1", r"KD\.TERM\..*'TERMS'"),
        ("KD.STUDENT.META_ARCH", "RetinaNet", r"KD\.STUDENT\.META_ARCH\..*'META_ARCHITECTURE'"),
        ("KD.SOURCES.TEACHER.WEIGTHS", "x", r"TEACHER\.WEIGTHS.*'WEIGHTS'"),
        ("KD.TERMS.FPN.REGION.PSI", "1", r"KD\.TERMS\.FPN\.REGION\.PSI"),
        ("KD.TERMS.FPN.TYPE", "CWDD", r"KD\.TERMS\.FPN\.TYPE: .*term.*'CWD'"),
        ("KD.SOURCES.TEACHER.TYPE", "Techer", r"SOURCES\.TEACHER\.TYPE: .*source.*'Teacher'"),
        ("KD.TERMS.FPN.CONNECTOR", "Autoo", r"CONNECTOR\.TYPE: .*connector.*'Auto'"),
        ("KD.TERMS.FPN.REGION.TYPE", "One", r"REGION\.TYPE: .*region.*'Ones'"),
        ("KD.TERMS.FPN.SCHEDULE.TYPE", "Warmupp", r"SCHEDULE\.TYPE: .*schedule.*'Warmup'"),
        ("KD.TERMS.FPN.CONNECTOR.KERNL", "3", r"CONNECTOR\.KERNL"),
        ("KD", "3", r"KD is a map"),
        ("KD.TERMS", "3", r"KD\.TERMS is a map"),
    ],
)
def test_unknown_names_on_the_command_line(key: str, value: str, message: str) -> None:
    cfg = merged({"FPN": FPN})
    before = cfg.dump()
    with pytest.raises(ValueError, match=message):
        cfg.merge_from_list([key, value])
    assert cfg.dump() == before


def test_a_new_item_says_its_type() -> None:
    with pytest.raises(ValueError, match=r"KD\.TERMS\.FPN.*needs a TYPE: .*CWD"):
        merged({"FPN": {"TAU": 1.0}})


def test_an_int_overrides_a_float_from_the_command_line() -> None:
    cfg = merged({"FPN": {**FPN, "TAU": 1.0}})
    cfg.merge_from_list(["KD.TERMS.FPN.TAU", "4"])
    assert cfg.KD.TERMS.FPN.TAU == 4.0
    assert type(cfg.KD.TERMS.FPN.TAU) is float


def test_an_int_serves_as_a_float_in_a_file(tmp_path: Path) -> None:
    cfg = merged({"FPN": FPN})
    file = write(tmp_path / "x.yaml", "KD: {TERMS: {FPN: {TAU: 4, LEVEL_WEIGHTS: [1, 0.5]}}}")
    cfg.merge_from_file(file)
    assert cfg.KD.TERMS.FPN.TAU == 4.0
    assert [type(w) for w in cfg.KD.TERMS.FPN.LEVEL_WEIGHTS] == [float, float]


def test_fields_that_the_file_does_not_spell_can_be_overridden() -> None:
    cfg = merged({"FPN": {"TYPE": "CWD"}})
    cfg.merge_from_list(["KD.TERMS.FPN.STANDARDIZE", "True", "KD.TERMS.FPN.LEVELS", "[p3, p4]"])
    assert cfg.KD.TERMS.FPN.STANDARDIZE is True
    assert cfg.KD.TERMS.FPN.LEVELS == ["p3", "p4"]
    assert cfg.KD.TERMS.FPN.WEIGHT == 1.0


@pytest.mark.parametrize("value", ["[1.0, 0.5]", "(1.0, 0.5)", "[1, 0.5]"])
def test_lists_in_block_style(tmp_path: Path, value: str) -> None:
    text = f"KD:\n  TERMS:\n    FPN:\n      TYPE: CWD\n      LEVEL_WEIGHTS: {value}\n"
    cfg = kd_cfg()
    cfg.merge_from_file(write(tmp_path / "x.yaml", text))
    assert cfg.KD.TERMS.FPN.LEVEL_WEIGHTS == [1.0, 0.5]


def test_a_flow_map_takes_lists_and_refuses_what_yaml_makes_of_a_tuple(tmp_path: Path) -> None:
    cfg = kd_cfg()
    good = write(tmp_path / "good.yaml", "KD: {TERMS: {A: {TYPE: CWD, LEVEL_WEIGHTS: [1.0, 0.5]}}}")
    cfg.merge_from_file(good)
    assert cfg.KD.TERMS.A.LEVEL_WEIGHTS == [1.0, 0.5]
    # YAML reads two entries: LEVEL_WEIGHTS: "(1.0" and "0.5)": null.
    bad = write(tmp_path / "bad.yaml", "KD: {TERMS: {B: {TYPE: CWD, LEVEL_WEIGHTS: (1.0, 0.5)}}}")
    with pytest.raises(ValueError, match=r"written \[a, b\]"):
        cfg.merge_from_file(bad)
    assert "B" not in cfg.KD.TERMS


@pytest.mark.parametrize("word", ["1e-3", "1.0e-3", "0.001"])
def test_exponents(tmp_path: Path, word: str) -> None:
    """YAML 1.1 reads 1e-3 as a string."""
    cfg = merged({"FPN": FPN})
    cfg.merge_from_file(write(tmp_path / "x.yaml", f"KD: {{TERMS: {{FPN: {{WEIGHT: {word}}}}}}}"))
    assert cfg.KD.TERMS.FPN.WEIGHT == 0.001
    cfg.merge_from_list(["KD.TERMS.FPN.TAU", word])
    assert cfg.KD.TERMS.FPN.TAU == 0.001


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ENABLED", 1),
        ("ENABLED", "on purpose"),
        ("STANDARDIZE", 0),
        ("STANDARDIZE", 1.0),
        ("TAU", True),
        ("TAU", "warm"),
        ("TAU", None),
        ("TAU", [1.0]),
        ("TAP", 3),
        ("TAP", True),
        ("LEVELS", "p3"),
        ("LEVELS", [3]),
        ("LEVEL_WEIGHTS", [True]),
        ("LEVEL_WEIGHTS", 1.0),
        ("SCHEDULE", {"TYPE": "Constant", "START_ITER": 1.0}),
        ("SCHEDULE", {"TYPE": "Constant", "START_ITER": True}),
    ],
)
def test_types_are_strict(field: str, value: object) -> None:
    where = rf"KD\.TERMS\.FPN\.{field}(\.START_ITER)? is a"
    with pytest.raises(ValueError, match=where):
        merged({"FPN": {**FPN, field: value}})


def test_the_fixed_keys_are_strict_too() -> None:
    cfg = kd_cfg()
    for key, value in [("KD.ENABLED", "1"), ("KD.LOG_PERIOD", "2.0"), ("KD.STUDENT", "RetinaNet")]:
        with pytest.raises(ValueError, match=f"{key} is a"):
            cfg.merge_from_list([key, value])
    cfg.merge_from_list(["KD.STUDENT.INIT_MODULES", "['head']", "KD.LOG_PERIOD", "5"])
    assert (cfg.KD.STUDENT.INIT_MODULES, cfg.KD.LOG_PERIOD) == (["head"], 5)


@pytest.mark.parametrize("kd", ["KD: 3", "KD: [a]", "KD: {TERMS: 3}", "KD: {TERMS: {1: CWD}}"])
def test_nonsense_is_answered_with_a_sentence(tmp_path: Path, kd: str) -> None:
    cfg = kd_cfg()
    with pytest.raises(ValueError, match=r"KD.*(is a map|names are words)"):
        cfg.merge_from_file(write(tmp_path / "x.yaml", kd))


def test_an_empty_node_changes_nothing(tmp_path: Path) -> None:
    cfg = merged({"FPN": FPN})
    before = cfg.dump()
    cfg.merge_from_file(write(tmp_path / "x.yaml", "KD:\n"))
    assert cfg.dump() == before


# Parts ----------------------------------------------------------------------------------------


def test_nested_parts_and_their_shorthand() -> None:
    cfg = merged(
        {
            "A": {"TYPE": "CWD", "REGION": "Ones", "CONNECTOR": {"TYPE": "Conv", "KERNEL": 3}},
            "B": {"TYPE": "CWD", "SCHEDULE": {"TYPE": "Warmup", "WARMUP_ITERS": 7}},
            "C": "CWD",
        }
    )
    terms = build_items(cfg.KD.TERMS, TERMS, "KD.TERMS")
    assert list(terms) == ["a", "b", "c"]
    assert isinstance(terms["a"].region, Ones)
    assert isinstance(terms["a"].connector, Conv)
    assert terms["a"].connector.kernel == 3
    assert isinstance(terms["b"].region, Padding)
    assert isinstance(terms["b"].schedule, Warmup)
    assert terms["b"].schedule.warmup_iters == 7
    assert isinstance(terms["c"].connector, Auto)
    assert type(terms["c"].schedule) is Constant


def test_nested_fields_from_the_command_line() -> None:
    cfg = merged({"A": "CWD"})
    cfg.merge_from_list(["KD.TERMS.A.SCHEDULE.START_ITER", "400", "KD.TERMS.A.REGION", "Ones"])
    cfg.merge_from_list(["KD.TERMS.A.CONNECTOR.TYPE", "Conv", "KD.TERMS.A.CONNECTOR.KERNEL", "3"])
    term = build_items(cfg.KD.TERMS, TERMS, "KD.TERMS")["a"]
    assert term.schedule.start_iter == 400
    assert isinstance(term.region, Ones)
    assert term.connector.kernel == 3


def test_a_change_of_type_keeps_what_was_said_and_still_exists() -> None:
    cfg = merged({"A": {"TYPE": "CWD", "SCHEDULE": {"TYPE": "Warmup", "START_ITER": 5}}})
    cfg.merge_from_list(["KD.TERMS.A.SCHEDULE.WARMUP_ITERS", "9"])
    cfg.merge_from_list(["KD.TERMS.A.SCHEDULE.TYPE", "Cosine"])
    assert dict(cfg.KD.TERMS.A.SCHEDULE) == {
        "TYPE": "Cosine",
        "START_ITER": 5,
        "STOP_ITER": 0,
        "EVERY": 1,
        "END": 0.0,
    }


def test_a_later_file_changes_single_fields(tmp_path: Path) -> None:
    cfg = merged({"A": {"TYPE": "CWD", "TAU": 2.0, "REGION": "Ones"}})
    cfg.merge_from_file(write(tmp_path / "x.yaml", "KD: {TERMS: {A: {WEIGHT: 3}}}"))
    assert (cfg.KD.TERMS.A.TAU, cfg.KD.TERMS.A.WEIGHT, cfg.KD.TERMS.A.REGION.TYPE) == (2, 3, "Ones")


def test_a_part_of_the_users_own_with_a_required_field(monkeypatch: pytest.MonkeyPatch) -> None:
    class Corner(Ones):
        def __init__(self, *, cells: int) -> None:
            self.cells = cells

    monkeypatch.setitem(REGIONS._obj_map, "Corner", Corner)
    with pytest.raises(ValueError, match=r"KD\.TERMS\.A\.REGION\.CELLS has no default"):
        merged({"A": {"TYPE": "CWD", "REGION": "Corner"}})
    cfg = merged({"A": {"TYPE": "CWD", "REGION": {"TYPE": "Corner", "CELLS": 2}}})
    assert build_items(cfg.KD.TERMS, TERMS, "KD.TERMS")["a"].region.cells == 2


def test_disabled_items_are_not_built() -> None:
    cfg = merged({"A": "CWD", "B": {"TYPE": "CWD", "ENABLED": False}})
    assert list(build_items(cfg.KD.TERMS, TERMS, "KD.TERMS")) == ["a"]
    cfg.merge_from_list(["KD.TERMS.B.ENABLED", "true", "KD.TERMS.A.ENABLED", "False"])
    assert list(build_items(cfg.KD.TERMS, TERMS, "KD.TERMS")) == ["b"]


def test_names_that_collide_in_lower_case() -> None:
    cfg = merged({"A": "CWD", "a": "CWD"})
    with pytest.raises(ValueError, match=r"KD\.TERMS has two items called 'a'"):
        build_items(cfg.KD.TERMS, TERMS, "KD.TERMS")


def test_a_value_that_the_part_refuses_names_the_item() -> None:
    cfg = merged({"A": {"TYPE": "CWD", "TAU": 0.0}})
    with pytest.raises(ValueError, match=r"KD\.TERMS\.A: .*tau > 0"):
        build_items(cfg.KD.TERMS, TERMS, "KD.TERMS")
    cfg = kd_cfg()
    cfg.merge_from_list(["KD.SOURCES.T.TYPE", "Teacher"])
    with pytest.raises(ValueError, match=r"KD\.SOURCES\.T: .*CONFIG_FILE"):
        build_items(cfg.KD.SOURCES, SOURCES, "KD.SOURCES")
