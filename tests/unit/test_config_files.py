"""The KD node: files, copies, and what a config object has to survive."""

import copy
import pickle
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup
from detectron2.modeling import build_model

import kd_det
from kd_det import config as kd_config
from kd_det.config import KDCfgNode, check_enabled, student_config
from kd_det.paths import CONFIGS, find_file
from tests.configs import FPN, SOURCE, kd_cfg, merged, plain, write
from tests.toys import toy_cfg

# Files ----------------------------------------------------------------------------------------

BASE = """
MODEL: {META_ARCHITECTURE: Distiller}
KD:
  ENABLED: True
  STUDENT: {META_ARCHITECTURE: RetinaNet}
  SOURCES:
    TEACHER: {TYPE: Teacher, CONFIG_FILE: teacher.yaml, WEIGHTS: weights/teacher.pth}
  TERMS:
    FPN: {TYPE: CWD, TAU: 2, REGION: Ones, SCHEDULE: {TYPE: Warmup, WARMUP_ITERS: 5}}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write(tmp_path / "base" / "teacher.yaml", "MODEL: {META_ARCHITECTURE: RetinaNet}\n")
    write(tmp_path / "base" / "weights" / "teacher.pth", "")
    write(tmp_path / "base" / "base.yaml", BASE)
    return tmp_path


def test_paths_are_relative_to_the_file_that_names_them(base: Path) -> None:
    child = write(base / "child" / "a.yaml", "_BASE_: ../base/base.yaml\nSOLVER: {MAX_ITER: 7}\n")
    grandchild = write(base / "b.yaml", "_BASE_: child/a.yaml\nKD: {TERMS: {FPN: {WEIGHT: 3}}}\n")
    for file in (str(base / "base" / "base.yaml"), child, grandchild):
        cfg = kd_cfg()
        cfg.merge_from_file(file)
        assert str(base / "base" / "teacher.yaml") == cfg.KD.SOURCES.TEACHER.CONFIG_FILE
        assert str(base / "base" / "weights" / "teacher.pth") == cfg.KD.SOURCES.TEACHER.WEIGHTS
    assert cfg.KD.TERMS.FPN.WEIGHT == 3.0
    assert cfg.KD.TERMS.FPN.TAU == 2.0
    assert cfg.SOLVER.MAX_ITER == 7


def test_paths_fall_back_to_the_working_directory(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base / "base")
    cfg = kd_cfg()
    other = write(base / "other" / "a.yaml", BASE)
    cfg.merge_from_file(other)
    assert str(base / "base" / "teacher.yaml") == cfg.KD.SOURCES.TEACHER.CONFIG_FILE
    cfg.merge_from_list(["KD.SOURCES.TEACHER.WEIGHTS", "teacher.yaml"])
    assert str(base / "base" / "teacher.yaml") == cfg.KD.SOURCES.TEACHER.WEIGHTS


def test_paths_that_lead_nowhere_and_addresses_stay() -> None:
    cfg = merged({}, SOURCES={"T": {**SOURCE["TEACHER"], "WEIGHTS": "detectron2://a/b.pkl"}})
    assert cfg.KD.SOURCES.T.WEIGHTS == "detectron2://a/b.pkl"
    assert cfg.KD.SOURCES.T.CONFIG_FILE == "teacher.yaml"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("path", ["/no/such.yaml", "../no/such.yaml", "no/such.yaml", "~/no/such"])
def test_find_file_of_nothing_is_none_and_quiet(path: str) -> None:
    assert find_file(path) is None


def test_find_file_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = next(CONFIGS.rglob("*.yaml"))
    name = str(ours.relative_to(CONFIGS))
    assert find_file(name) == str(ours)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    in_cwd = write(tmp_path / "cwd" / name, "")
    assert find_file(name) == in_cwd
    beside = write(tmp_path / "beside" / name, "")
    assert find_file(name, str(tmp_path / "beside")) == beside
    assert find_file(str(ours), str(tmp_path / "beside")) == str(ours)


def test_types_change_along_a_chain_of_bases(base: Path) -> None:
    """As plain dicts, WARMUP_ITERS would meet TYPE Cosine, and the string Ones a map."""
    text = """
_BASE_: base/base.yaml
KD: {TERMS: {FPN: {SCHEDULE: {TYPE: Cosine}, REGION: {TYPE: Padding}}}}
"""
    cfg = kd_cfg()
    cfg.merge_from_file(write(base / "a.yaml", text))
    assert cfg.KD.TERMS.FPN.SCHEDULE.TYPE == "Cosine"
    assert cfg.KD.TERMS.FPN.REGION.TYPE == "Padding"
    assert cfg.KD.TERMS.FPN.TAU == 2.0


def test_a_typo_in_a_base_is_an_error(base: Path) -> None:
    write(base / "base" / "typo.yaml", BASE.replace("TAU", "TAUU"))
    file = write(base / "a.yaml", "_BASE_: base/typo.yaml\nKD: {TERMS: {FPN: {TYPE: CWD}}}\n")
    with pytest.raises(ValueError, match=r"KD\.TERMS\.FPN\.TAUU"):
        kd_cfg().merge_from_file(file)


def test_several_bases_in_order(base: Path) -> None:
    one = write(base / "one.yaml", "KD: {TERMS: {FPN: {TAU: 3, WEIGHT: 3}}}")
    two = write(base / "two.yaml", "KD: {TERMS: {FPN: {TAU: 4}}}")
    text = f"_BASE_: [base/base.yaml, {one}, {two}]\nKD: {{LOG_PERIOD: 3}}\n"
    cfg = kd_cfg()
    cfg.merge_from_file(write(base / "a.yaml", text))
    fpn = cfg.KD.TERMS.FPN
    assert (fpn.TAU, fpn.WEIGHT, cfg.KD.LOG_PERIOD) == (4.0, 3.0, 3)


def test_the_dumped_config_loads_again_and_is_equal(base: Path) -> None:
    cfg = kd_cfg()
    cfg.merge_from_file(str(base / "base" / "base.yaml"))
    cfg.merge_from_list(["KD.TERMS.FPN.WEIGHT", "0.5", "KD.TERMS.FPN.LEVELS", "[p3]"])
    cfg.OUTPUT_DIR = str(base / "out")
    cfg.MODEL.DEVICE = "cpu"
    args = default_argument_parser().parse_args([])
    cfg.freeze()
    default_setup(cfg, args)
    again = kd_cfg()
    again.merge_from_file(str(base / "out" / "config.yaml"))
    assert again.KD == cfg.KD
    # In Detectron2's own part tuples may come back as lists; a second round changes nothing.
    assert plain(again) == plain(cfg)
    third = kd_cfg()
    third.merge_from_file(write(base / "elsewhere" / "config.yaml", again.dump()))
    assert third == again
    text = (base / "out" / "config.yaml").read_text()
    assert "!!python" not in text
    assert str(base / "base" / "teacher.yaml") in text


def test_plain_detectron2_reads_the_dump_of_a_student(base: Path) -> None:
    cfg = kd_cfg()
    cfg.merge_from_file(str(base / "base" / "base.yaml"))
    file = write(base / "student.yaml", student_config(cfg).dump())
    stock = get_cfg()
    stock.merge_from_file(file)
    assert stock.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert "KD" not in stock


# The object -----------------------------------------------------------------------------------


def test_defaults_are_off_and_leave_the_rest_alone() -> None:
    cfg, stock = kd_cfg(), get_cfg()
    assert cfg.KD.ENABLED is False
    assert plain(student_config(cfg)) == plain(stock)
    assert isinstance(cfg, KDCfgNode)
    assert type(cfg.KD) is CfgNode
    assert type(stock) is CfgNode


def test_a_second_add_kd_config_does_nothing() -> None:
    cfg = merged({"FPN": FPN})
    before = cfg.dump()
    kd_det.add_kd_config(cfg)
    assert cfg.dump() == before


def test_other_keys_merge_as_ever(tmp_path: Path) -> None:
    cfg = kd_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", "7"])
    cfg.merge_from_file(write(tmp_path / "x.yaml", "SOLVER: {BASE_LR: 0.5}\nVERSION: 2\n"))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (7, 0.5)
    with pytest.raises(AssertionError, match="Non-existent"):
        cfg.merge_from_list(["SOLVER.MAXITER", "7"])
    with pytest.raises(KeyError, match="Non-existent"):
        cfg.merge_from_file(write(tmp_path / "y.yaml", "SOLVER: {MAXITER: 7}\n"))
    with pytest.raises(AssertionError, match="length"):
        cfg.merge_from_list(["SOLVER.MAX_ITER"])
    with pytest.raises(ValueError, match="KEY VALUE"):
        cfg.merge_from_list(["KD.LOG_PERIOD", "7", "SOLVER.MAX_ITER"])


def test_a_failing_merge_changes_nothing(tmp_path: Path) -> None:
    cfg = merged({"FPN": FPN})
    before = cfg.dump()
    terms = "{FPN: {TAU: 3}, NEW: {TYPE: CWD, TAUU: 1}}"
    text = f"SOLVER: {{MAX_ITER: 7}}\nKD: {{ENABLED: True, TERMS: {terms}}}\n"
    with pytest.raises(ValueError, match="TAUU"):
        cfg.merge_from_file(write(tmp_path / "x.yaml", text))
    assert cfg.dump() == before
    # Nor does a base that would do alone, nor KD when another key is wrong.
    write(tmp_path / "base.yaml", "KD: {TERMS: {FPN: {TAU: 3}}}")
    child = write(tmp_path / "child.yaml", f"_BASE_: base.yaml\nKD: {{TERMS: {terms}}}\n")
    with pytest.raises(ValueError, match="TAUU"):
        cfg.merge_from_file(child)
    other = write(tmp_path / "other.yaml", "KD: {TERMS: {FPN: {TAU: 3}}}\nSOLVER: {MAXITER: 7}\n")
    with pytest.raises(KeyError, match="MAXITER"):
        cfg.merge_from_file(other)
    assert cfg.dump() == before
    with pytest.raises(ValueError, match="TAUU"):
        cfg.merge_from_list(
            ["SOLVER.MAX_ITER", "7", "KD.TERMS.FPN.TAU", "3", "KD.TERMS.FPN.TAUU", "1"]
        )
    assert cfg.dump() == before


def test_merging_copies(tmp_path: Path) -> None:
    cfg = merged({"FPN": FPN})
    other = cfg.clone()
    other.merge_from_list(["KD.TERMS.FPN.TAU", "3", "KD.ENABLED", "True"])
    assert cfg.KD.TERMS.FPN.TAU == 1.0
    assert cfg.KD.ENABLED is False
    third = kd_cfg()
    third.merge_from_other_cfg(other)
    other.KD.TERMS.FPN.LEVELS.append("p3")
    assert third.KD.TERMS.FPN.LEVELS == []


@pytest.mark.parametrize(
    "copied",
    [lambda c: c.clone(), copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
    ids=["clone", "deepcopy", "pickle"],
)
def test_copies_are_equal_and_keep_their_rules(copied) -> None:
    cfg = merged({"FPN": FPN})
    cfg.freeze()
    other = copied(cfg)
    assert type(other) is type(cfg)
    assert other == cfg
    assert other.is_frozen()
    other.defrost()
    assert cfg.is_frozen()
    with pytest.raises(ValueError, match="Did you mean 'TAU'"):
        other.merge_from_list(["KD.TERMS.FPN.TUA", "1"])
    other.merge_from_list(["KD.TERMS.FPN.TAU", "3"])
    assert cfg.KD.TERMS.FPN.TAU == 1.0


def test_freeze_and_defrost_reach_the_terms() -> None:
    cfg = merged({"FPN": FPN})
    cfg.freeze()
    with pytest.raises(AttributeError, match="immutable"):
        cfg.KD.TERMS.FPN.TAU = 2.0
    cfg.defrost()
    cfg.KD.TERMS.FPN.TAU = 2.0


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_enabled_under_another_architecture_is_an_error(arch: str) -> None:
    cfg = merged({"FPN": FPN}, ENABLED=True)
    cfg.MODEL.META_ARCHITECTURE = arch
    for check in (cfg.freeze, lambda: check_enabled(cfg)):
        with pytest.raises(
            ValueError, match=f"'{arch}'.*Set MODEL.META_ARCHITECTURE to 'Distiller'"
        ):
            check()
    cfg.KD.ENABLED = False
    cfg.freeze()


def test_a_config_whose_kd_node_is_gone_freezes() -> None:
    cfg = kd_cfg()
    del cfg["KD"]
    cfg.freeze()


@pytest.mark.parametrize("student", ["", "Distiller"])
def test_the_student_must_be_named(student: str) -> None:
    cfg = kd_cfg()
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.KD.STUDENT.META_ARCHITECTURE = student
    with pytest.raises(ValueError, match=r"KD\.STUDENT\.META_ARCHITECTURE must name"):
        student_config(cfg)


def test_nothing_to_distil_is_an_error() -> None:
    cfg = toy_cfg()
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.merge_from_list(["KD.STUDENT.META_ARCHITECTURE", "RetinaNet", "KD.ENABLED", "True"])
    with pytest.raises(ValueError, match=r"KD\.TERMS is empty"):
        build_model(cfg)


class ProjectNode(CfgNode):
    """A project's own config class, as some frameworks on Detectron2 have."""

    def merge_from_list(self, cfg_list: list) -> None:
        super().merge_from_list(["SOLVER.GAMMA" if x == "GAMMA" else x for x in cfg_list])


def test_a_config_class_of_the_users_own_keeps_its_behaviour() -> None:
    cfg = ProjectNode(get_cfg())
    kd_det.add_kd_config(cfg)
    assert isinstance(cfg, ProjectNode)
    cfg.merge_from_list(["GAMMA", "0.5", "KD.LOG_PERIOD", "3"])
    assert (cfg.SOLVER.GAMMA, cfg.KD.LOG_PERIOD) == (0.5, 3)
    for other in (cfg.clone(), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert type(other) is type(cfg)
        assert other == cfg
        with pytest.raises(ValueError, match=r"KD\.LOGPERIOD"):
            other.merge_from_list(["KD.LOGPERIOD", "1"])
    assert type(student_config(cfg)) is ProjectNode


# Datasets -------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    calls: list[tuple] = []
    monkeypatch.setattr(kd_config, "register_coco", lambda *args, **_: calls.append(args))
    return calls


def test_datasets_of_a_file_are_registered(tmp_path: Path, registered: list[tuple]) -> None:
    write(tmp_path / "data" / "train.json", "{}")
    (tmp_path / "data" / "images").mkdir()
    text = "KD: {DATASETS: {my_train: {JSON: data/train.json, IMAGES: data/images}}}"
    cfg = kd_cfg()
    cfg.merge_from_file(write(tmp_path / "x.yaml", text))
    paths = (str(tmp_path / "data" / "train.json"), str(tmp_path / "data" / "images"))
    assert set(registered) == {("my_train", *paths)}
    assert dict(cfg.KD.DATASETS.my_train) == {"JSON": paths[0], "IMAGES": paths[1]}
    with pytest.raises(ValueError, match=r"KD\.DATASETS\.my_train\.IMAGE\..*'IMAGES'"):
        cfg.merge_from_list(["KD.DATASETS.my_train.IMAGE", "x"])
    # A dump is loaded in another folder, by absolute paths.
    registered.clear()
    kd_cfg().merge_from_file(write(tmp_path / "elsewhere" / "config.yaml", cfg.dump()))
    assert set(registered) == {("my_train", *paths)}


def test_a_failing_merge_registers_nothing(tmp_path: Path, registered: list[tuple]) -> None:
    text = "KD: {DATASETS: {a: {JSON: a.json, IMAGES: a}}, TERMS: {FPN: {TYPE: CWD, TAUU: 1}}}"
    with pytest.raises(ValueError, match="TAUU"):
        kd_cfg().merge_from_file(write(tmp_path / "x.yaml", text))
    assert registered == []
