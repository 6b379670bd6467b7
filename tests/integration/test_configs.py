"""The files under configs/: they load, say what their names say, and build."""

import itertools
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from omegaconf import ListConfig
from torch import nn

import kd_det
from kd_det.config import add_kd_config, student_config
from kd_det.inherit import Inherit
from kd_det.paths import CONFIGS
from kd_det.sources.model_config import ModelConfig
from tests.toys import batch, save_teacher

YAMLS = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))
LAZY = sorted(p.name for p in (CONFIGS / "lazy").glob("*.py"))
DISTILLED = [f for f in YAMLS if "_cwd_" in f and not f.startswith("KD/")]
DISTILLED_LAZY = [f for f in LAZY if "_cwd_" in f]
P3_P5 = ["p3", "p4", "p5"]
P3_P6 = ["p3", "p4", "p5", "p6"]
P3_P7 = [*P3_P6, "p7"]
PLANS = {
    "cwd_R_101": {"fpn": P3_P6, "logits": P3_P7},
    "cwd_R_101_features": {"fpn": P3_P6},
    "cwd_R_101_logits": {"logits": P3_P7},
    "cwd_R_101_inherit": {"fpn": P3_P6, "logits": P3_P7},
    "cwd_X_101": {"fpn": P3_P5},
    "cwd_mask_X_101": {"fpn": P3_P5},
    "cwd_mask_R_101_LSJ": {"fpn": P3_P5},
}
TEACHERS = {
    "cwd_R_101": "COCO-Detection/retinanet_R_101_FPN_3x.yaml",
    "cwd_X_101": "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
    "cwd_mask_X_101": "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml",
    "cwd_mask_R_101_LSJ": "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py",
}


@cache
def _load(file: str) -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_file(str(CONFIGS / file))
    return cfg


def load(file: str, *overrides: Any) -> CfgNode:
    cfg = _load(file).clone()
    cfg.merge_from_list(list(overrides))
    return cfg


@cache
def on_meta(file: str) -> nn.Module:
    """The model of a config without storage: an R-101 costs a fraction of a second."""
    with torch.device("meta"):
        if file.endswith(".py"):
            return instantiate(LazyConfig.load(str(CONFIGS / file)).model)
        return build_model(load(file, "MODEL.DEVICE", "meta"))


def levels_of(model: nn.Module) -> dict[str, list[str]]:
    assert model.wiring.unavailable is None
    return {name: [row.level for row in rows] for name, rows in model.wiring.rows.items()}


def student_and_recipe(file: str) -> tuple[str, str]:
    """``COCO-Detection/x_cwd_y.yaml`` -> (``COCO-Detection/x.yaml``, ``cwd_y``)."""
    stem, suffix = os.path.splitext(file)
    student, _, recipe = stem.partition("_cwd_")
    return student + suffix, "cwd_" + recipe


def test_every_promised_config_is_there() -> None:
    students = [f"retinanet_R_{d}_FPN_{s}" for d in (18, 34, 50) for s in ("1x", "3x")]
    masks = [recipe for recipe in PLANS if "_mask_" in recipe]
    pairs = [
        *itertools.product(students, PLANS.keys() - masks),
        *itertools.product(["retinanet_R_50_FPN_1x", "faster_rcnn_R_50_FPN_1x"], masks),
    ]
    assert sorted(DISTILLED) == sorted(f"COCO-Detection/{s}_{recipe}.yaml" for s, recipe in pairs)
    assert len(DISTILLED_LAZY) == 3
    # A file of another kind would be seen by no test.
    others = {p.suffix for p in CONFIGS.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert others == {".yaml", ".py"}


@pytest.mark.parametrize("file", YAMLS)
def test_yaml_loads_without_running_code(file: str, tmp_path: Path) -> None:
    assert "!!python" not in (CONFIGS / file).read_text()
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_file(str(CONFIGS / file), allow_unsafe=False)
    for source in cfg.KD.SOURCES.values():
        if source.get("CONFIG_FILE"):  # a peer without one is of the student's config
            assert os.path.isabs(source.CONFIG_FILE)
            assert os.path.isfile(source.CONFIG_FILE)
    # What a run dumps is a config again.
    again = get_cfg()
    add_kd_config(again)
    dumped = tmp_path / "config.yaml"
    dumped.write_text(cfg.dump())
    again.merge_from_file(str(dumped), allow_unsafe=False)
    assert again.KD == cfg.KD
    # As text: tuples come back as lists.
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


@pytest.mark.parametrize("file", DISTILLED)
def test_distilled_config_is_its_student_plus_kd(file: str) -> None:
    student, recipe = student_and_recipe(file)
    cfg, plain = load(file), load(student)
    assert cfg.MODEL.META_ARCHITECTURE == "Distiller"
    assert cfg.KD.ENABLED
    assert student_config(cfg) == student_config(plain)
    assert "KD" not in student_config(cfg)
    # The matched baseline: the same file with KD.ENABLED False.
    cfg.merge_from_list(["KD.ENABLED", False])
    assert student_config(cfg) == student_config(plain)
    # And the recipe is what the name says.
    fragment = load(f"KD/{recipe}.yaml")
    if "_mask_" in recipe:  # for students of any kind: each file says its own
        assert fragment.KD.STUDENT.META_ARCHITECTURE == ""
        fragment.KD.STUDENT.META_ARCHITECTURE = plain.MODEL.META_ARCHITECTURE
    assert load(file).KD == fragment.KD
    assert {n.lower() for n, t in fragment.KD.TERMS.items() if t.ENABLED} == set(PLANS[recipe])
    assert bool(fragment.KD.STUDENT.INIT_FROM) == recipe.endswith("_inherit")


def test_disabled_config_builds_the_plain_student() -> None:
    file = "COCO-Detection/retinanet_R_50_FPN_1x_cwd_R_101.yaml"
    with torch.device("meta"):
        model = build_model(load(file, "KD.ENABLED", False, "MODEL.DEVICE", "meta"))
    assert type(model) is RetinaNet
    assert list(model.state_dict()) == list(on_meta(student_and_recipe(file)[0]).state_dict())


# The two teachers come as 3x only.
@pytest.mark.parametrize(
    "file", [f for f in YAMLS if "_FPN_3x" in f and f not in TEACHERS.values()]
)
def test_3x_is_1x_with_a_longer_schedule(file: str) -> None:
    long, short = load(file), load(file.replace("_3x", "_1x"))
    assert (long.SOLVER.MAX_ITER, long.SOLVER.STEPS) == (270000, (210000, 250000))
    assert (short.SOLVER.MAX_ITER, short.SOLVER.STEPS) == (90000, (60000, 80000))
    long.SOLVER.MAX_ITER, long.SOLVER.STEPS = short.SOLVER.MAX_ITER, short.SOLVER.STEPS
    assert long == short


# 3x builds the same model, as the test above shows.
@pytest.mark.parametrize("file", [f for f in DISTILLED if "_1x" in f])
def test_distiller_builds_with_the_expected_levels(file: str) -> None:
    recipe = student_and_recipe(file)[1]
    model = on_meta(file)
    assert levels_of(model) == PLANS[recipe]
    strides = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    rows = [row for rows in model.wiring.rows.values() for row in rows]
    assert all(row.stride == strides[row.level] for row in rows)
    assert all(row.target.endswith(row.level) for row in rows)
    # 256 channels (or 720) on both sides: these configs train no connectors.
    assert not list(model.terms.parameters())


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_all_that_should_be_inherited_fits(depth: int) -> None:
    file = f"COCO-Detection/retinanet_R_{depth}_FPN_1x_cwd_R_101_inherit.yaml"
    teacher = ModelConfig(TEACHERS["cwd_R_101"], what="teacher").build("meta").state_dict()
    model = on_meta(file)
    inherit: Inherit = model.inherit
    assert inherit.source == "teacher"
    copied = inherit(model.student, SimpleNamespace(trained_state=lambda: teacher))
    wanted = [
        name
        for name in model.student.state_dict()
        if name.startswith(("head.", "backbone.fpn_output"))
    ]
    assert copied == wanted
    assert "head.cls_score.weight" in copied


@pytest.mark.parametrize("recipe", ["cwd_R_101_features", "cwd_R_101_logits"])
def test_inheritance_can_be_asked_for_on_the_command_line(recipe: str) -> None:
    file = f"COCO-Detection/retinanet_R_18_FPN_1x_{recipe}.yaml"
    cfg = load(file, "KD.STUDENT.INIT_FROM", "TEACHER", "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        model = build_model(cfg)
    assert model.inherit.source == "teacher"
    assert levels_of(model) == PLANS[recipe]


def test_literal_anchors_are_the_computed_ones() -> None:
    computed = [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in [32, 64, 128, 256, 512]]
    literal = load("Base-RetinaNet.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    assert literal == computed
    assert repr(literal) == repr(computed)  # ints stay ints


@pytest.mark.parametrize("recipe", sorted(TEACHERS))
def test_teacher_weights_are_the_zoo_s(recipe: str) -> None:
    config_file = TEACHERS[recipe]
    source = load(f"KD/{recipe}.yaml").KD.SOURCES.TEACHER
    assert str(CONFIGS / config_file) == source.CONFIG_FILE
    address = source.WEIGHTS.removeprefix("detectron2://")
    assert model_zoo.get_checkpoint_url(config_file).endswith("/" + address)


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A thin RetinaNet whose features and logits have the shapes of the zoo's."""
    return save_teacher(
        tmp_path_factory.mktemp("teacher"), fpn=256, classes=80, sizes=3, ratios=(0.5, 1.0, 2.0)
    )


def one_step(model: nn.Module) -> dict[str, float]:
    """Losses of a training step on one small image; every trained parameter gets a gradient."""
    model.train()
    losses = model(batch(((64, 64),)))
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    return {name: float(loss.detach()) for name, loss in losses.items()}


@pytest.mark.parametrize("depth", [18, 50])  # RGB and BGR students of a BGR teacher
def test_yaml_config_trains_a_step(
    small_teacher: tuple[str, str], depth: int, tmp_path: Path
) -> None:
    config, weights = small_teacher
    cfg = load(
        f"COCO-Detection/retinanet_R_{depth}_FPN_1x_cwd_R_101_inherit.yaml",
        *("KD.SOURCES.TEACHER.CONFIG_FILE", config, "KD.SOURCES.TEACHER.WEIGHTS", weights),
        *("KD.STUDENT.INIT_MODULES", ["head.cls_score", "backbone.fpn_output*"]),
        *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path)),
    )
    model = build_model(cfg)
    losses = one_step(model)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_kd_fpn", "loss_kd_logits"}
    assert all(0 < value < float("inf") for value in losses.values())
    theirs = torch.load(weights, map_location="cpu", weights_only=True)["model"]
    ours = model.student.state_dict()
    assert torch.equal(ours["head.cls_score.weight"], theirs["head.cls_score.weight"])


# ---------------------------------------------------------------------------- LazyConfig


@pytest.mark.parametrize("file", LAZY)
def test_lazy_config_has_what_the_official_tool_asks_for(file: str) -> None:
    cfg = LazyConfig.load(str(CONFIGS / "lazy" / file))
    # And nothing else: an override of a left-over name would be accepted and do nothing.
    assert set(cfg) == {"dataloader", "lr_multiplier", "model", "optimizer", "train"}
    assert {"train", "test", "evaluator"} == set(cfg.dataloader)
    for key in ("output_dir", "init_checkpoint", "max_iter", "eval_period", "log_period", "device"):
        assert key in cfg.train
    assert cfg.train.amp.enabled is False
    assert {"period", "max_to_keep"} == set(cfg.train.checkpointer)
    length = cfg.train.max_iter
    assert length == (270000 if "_3x" in file else 90000)
    multiplier = instantiate(cfg.lr_multiplier)
    steps = load(f"COCO-Detection/retinanet_R_50_FPN_{length // 90000}x.yaml").SOLVER.STEPS
    at = {0: 1e-3, 500: 0.5005, 1000: 1.0, steps[0] - 1: 1.0, steps[0]: 0.1, steps[1]: 0.01}
    for iteration, factor in at.items():
        assert multiplier(iteration / length) == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("file", DISTILLED_LAZY)
def test_distilled_lazy_config_is_its_student_plus_a_distiller(file: str) -> None:
    student = student_and_recipe(file)[0].replace("_3x", "_1x")
    cfg = LazyConfig.load(str(CONFIGS / "lazy" / file))
    plain = LazyConfig.load(str(CONFIGS / "lazy" / student))
    assert cfg.model.student == plain.model
    assert cfg.dataloader == plain.dataloader
    assert cfg.optimizer == plain.optimizer
    if "_3x" not in file:
        assert cfg.lr_multiplier == plain.lr_multiplier
        assert cfg.train == plain.train


@pytest.mark.parametrize("file", DISTILLED_LAZY)
def test_lazy_distiller_is_the_yaml_s(file: str) -> None:
    model = on_meta(f"lazy/{file}")
    assert levels_of(model) == PLANS["cwd_R_101"]
    other = on_meta("COCO-Detection/retinanet_R_50_FPN_1x_cwd_R_101.yaml")
    for name, term in other.terms.items():
        mine = model.terms[name]
        for key in ("tap", "levels", "tau", "weight", "standardize", "channel_weight"):
            assert getattr(mine, key) == getattr(term, key)
        for key in ("connector", "region", "schedule"):
            assert type(getattr(mine, key)) is type(getattr(term, key))
    assert model.sources["teacher"].weights_file == other.sources["teacher"].weights_file


def test_lazy_R_50_is_the_yaml_s() -> None:
    lazy = on_meta("lazy/retinanet_R_50_FPN_1x.py")
    yaml_ = on_meta("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    shapes = {name: (x.shape, x.dtype) for name, x in lazy.state_dict().items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in yaml_.state_dict().items()}
    trained = [name for name, p in lazy.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in yaml_.named_parameters() if p.requires_grad]
    for part in ("", "head", "box2box_transform", "anchor_matcher", "anchor_generator"):
        assert _settings(lazy, part) == _settings(yaml_, part), part
    cfg = LazyConfig.load(str(CONFIGS / "lazy/retinanet_R_50_FPN_1x.py"))
    solver = load("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    assert cfg.train.init_checkpoint == solver.MODEL.WEIGHTS
    assert list(cfg.model.pixel_mean) == solver.MODEL.PIXEL_MEAN
    assert list(cfg.model.pixel_std) == solver.MODEL.PIXEL_STD
    assert cfg.dataloader.train.total_batch_size == solver.SOLVER.IMS_PER_BATCH
    assert cfg.optimizer.lr == solver.SOLVER.BASE_LR
    assert cfg.optimizer.momentum == solver.SOLVER.MOMENTUM
    assert cfg.optimizer.weight_decay == solver.SOLVER.WEIGHT_DECAY
    assert cfg.optimizer.params.weight_decay_norm == solver.SOLVER.WEIGHT_DECAY_NORM
    train, test = cfg.dataloader.train.mapper, cfg.dataloader.test.mapper
    assert tuple(train.augmentations[0].short_edge_length) == solver.INPUT.MIN_SIZE_TRAIN
    assert train.augmentations[0].max_size == solver.INPUT.MAX_SIZE_TRAIN
    assert test.augmentations[0].short_edge_length == solver.INPUT.MIN_SIZE_TEST
    assert train.image_format == test.image_format == solver.INPUT.FORMAT
    assert (cfg.dataloader.train.dataset.names,) == solver.DATASETS.TRAIN
    assert (cfg.dataloader.evaluator.dataset_name,) == solver.DATASETS.TEST


def _settings(model: nn.Module, part: str) -> dict[str, Any]:
    """The plain values that a part was built with."""
    thing = getattr(model, part) if part else model
    return {
        key: list(value) if isinstance(value, (list, tuple, ListConfig)) else value
        for key, value in vars(thing).items()
        if isinstance(value, (bool, int, float, str, list, tuple, ListConfig))
    }


def test_lazy_config_trains_a_step(small_teacher: tuple[str, str]) -> None:
    config, weights = small_teacher
    cfg = LazyConfig.load(str(CONFIGS / "lazy/retinanet_regnetx_4gf_FPN_1x_cwd_R_101.py"))
    teacher = "model.sources.teacher"
    overrides = [f"{teacher}.config_file={config}", f"{teacher}.weights={weights}"]
    cfg = LazyConfig.apply_overrides(cfg, [*overrides, "train.max_iter=12"])
    model = instantiate(cfg.model)
    assert model.max_iter == 12
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    before = model.student.backbone.bottom_up.s4.b1.f.a.weight.clone()
    losses = one_step(model)
    optimizer.step()
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_kd_fpn", "loss_kd_logits"}
    assert all(0 < value < float("inf") for value in losses.values())
    assert not torch.equal(before, model.student.backbone.bottom_up.s4.b1.f.a.weight)


def test_every_part_of_a_term_can_be_lazy(tmp_path: Path) -> None:
    """Parts inside of parts, and a config that was saved and loaded again, as a run does."""
    cfg = LazyConfig.load(str(CONFIGS / "lazy/retinanet_R_50_FPN_1x_cwd_R_101.py"))
    cfg.model.terms.fpn = L(kd_det.terms.CWD)(
        levels=["p3", "p4"],
        level_weights=[1.0, 0.25],
        connector=L(kd_det.connectors.Conv)(kernel=3),
        region=L(kd_det.regions.Ones)(),
        schedule=L(kd_det.schedules.Step)(steps=[100, 200], gamma=0.5),
    )
    cfg.model.terms.logits.schedule = L(kd_det.schedules.Warmup)(warmup_iters=10)
    cfg.model.inherit = L(Inherit)(source="teacher", modules=["head"])
    saved = tmp_path / "config.yaml"
    LazyConfig.save(cfg, str(saved))
    for each in (cfg, LazyConfig.load(str(saved))):
        with torch.device("meta"):
            model = instantiate(each.model)
        term = model.terms["fpn"]
        assert (term.levels, term.level_weights) == (("p3", "p4"), (1.0, 0.25))
        assert model.terms["logits"].schedule.warmup_iters == 10
        assert term.schedule(0.5, 300) == 0.5
        assert sorted(n for n, _ in term.named_parameters()) == [
            f"connectors.{level}.{kind}" for level in ("p3", "p4") for kind in ("bias", "weight")
        ]
        assert model.inherit.modules == ("head",)
        assert model.max_iter == 90000
