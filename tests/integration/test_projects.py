"""Every shape of a project: what docs/projects.md shows, run as it stands there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.engine import DefaultTrainer
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.solver import build_optimizer
from detectron2.utils.events import get_event_storage
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import kd_det
from kd_det import Distiller, Teacher, terms
from tests.integration.scripts.predictions import predictions
from tests.steps import exactly, gradients, step
from tests.toys import batch, distiller_cfg, save_teacher, toy_cfg

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "projects.md").read_text()
INPUTS = batch(seed=9)


def block(words: str, language: str = "python") -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    (found,) = [b for b in blocks if words in b]
    return found


def student(**kwargs: Any) -> nn.Module:
    """A toy that predicts something."""
    cfg = toy_cfg(**kwargs)
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 20
    return build_model(cfg)


def distilled() -> Distiller:
    return Distiller(
        student=student(),
        sources={"teacher": Teacher(model=student(fpn=16))},
        terms={"fpn": terms.CWD(tap="features", weight=5.0)},
    )


def loaded(file: str) -> nn.Module:
    """The plain student with a checkpoint's weights, every one of them."""
    model = student()
    model.load_state_dict(torch.load(file)["model"])
    return model


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class MyRetinaNet(RetinaNet):
    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        assert cfg.MODEL.MINE == 3
        return RetinaNet.from_config(cfg)


class MyTrainer(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return [batch()] * cfg.SOLVER.MAX_ITER

    @classmethod
    def test(cls, *args: Any) -> dict:
        return {}


def add_my_config(cfg: CfgNode) -> None:
    cfg.MODEL.MINE = 3


@pytest.fixture
def mine() -> Iterator[None]:
    META_ARCH_REGISTRY.register(MyRetinaNet)
    yield
    del META_ARCH_REGISTRY._obj_map["MyRetinaNet"]


def save_mine(name: str, **kwargs: Any) -> CfgNode:
    """``name.yaml`` and ``name.pth``; MINE is left to the project's default."""
    config, weights = save_teacher(Path("files"), **kwargs)
    Path(weights).rename(f"{name}.pth")
    text = Path(config).read_text().replace("RetinaNet\n", "MyRetinaNet\n")
    Path(f"{name}.yaml").write_text(text.replace("MAX_ITER: 100", "MAX_ITER: 2"))


def test_a_script_with_a_yacs_config(mine: None, tmp_path: Path) -> None:
    save_mine("my_student")
    save_mine("my_teacher", fpn=16)
    (tmp_path / "distilled.yaml").write_text(block("my_student.yaml", "yaml") + "OUTPUT_DIR: out")
    names = {
        "kd_det": kd_det,
        "get_cfg": get_cfg,
        "add_my_config": add_my_config,
        "MyTrainer": MyTrainer,
    }
    exec(block("add_my_config(cfg)"), names)
    trainer = names["trainer"]
    assert type(trainer.model) is Distiller
    assert trainer.storage.latest()["loss_kd_fpn"][0] > 0
    cfg = get_cfg()
    add_my_config(cfg)
    cfg.merge_from_file("out/student.yaml")
    plain = build_model(cfg)
    plain.load_state_dict(torch.load("out/model_final.pth", weights_only=False)["model"])
    assert type(plain) is MyRetinaNet
    exactly(dict(plain.state_dict()), dict(trainer.model.student.state_dict()))


MY_CONFIG = """
from detectron2.config import LazyCall as L
from tests.integration.test_projects import student

model = L(student)()
train = dict(max_iter=7)
dataloader = optimizer = lr_multiplier = dict()
"""


def test_a_lazyconfig_project(tmp_path: Path) -> None:
    save_teacher(tmp_path / "files", fpn=16)
    for end in ("yaml", "pth"):
        (tmp_path / "files" / f"teacher.{end}").rename(f"my_teacher.{end}")
    (tmp_path / "my_config.py").write_text(MY_CONFIG)
    (tmp_path / "distilled.py").write_text(block("from .my_config import"))
    model = instantiate(LazyConfig.load("distilled.py").model)
    assert model.max_iter == 7
    assert step(model, 0)["loss_kd_fpn"] > 0


def test_a_loop_without_a_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped: list[list[Tensor]] = []
    clip = nn.utils.clip_grad_norm_

    def recorded(parameters: Any, norm: float) -> None:
        clipped.append(list(parameters))
        assert float(clip(clipped[-1], norm)) > norm
        total = torch.stack([p.grad.norm() for p in clipped[-1] if p.grad is not None]).norm()
        torch.testing.assert_close(float(total), norm, rtol=1e-3, atol=0)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", recorded)
    names = {
        "torch": torch,
        "Distiller": Distiller,
        "Teacher": Teacher,
        "terms": terms,
        "student": student(),
        "teacher": student(fpn=16),
        "loader": [batch(seed=i) for i in range(2)],
    }
    exec(block("set_progress"), names)
    model = names["model"]
    everything = {id(p) for p in model.parameters()}
    assert {id(p) for p in model.terms.parameters()} <= everything
    assert [{id(p) for p in found} for found in clipped] == [everything] * 2
    with pytest.raises(AssertionError):  # none is left behind either
        get_event_storage()
    found = predictions(loaded("student.pth"), INPUTS)
    assert all(len(x["instances.scores"]) for x in found)
    exactly(found, predictions(model, INPUTS))


@pytest.mark.parametrize("kind", ["value", "norm"])
def test_detectron2_clips_connectors_as_well(teacher: tuple[str, str], kind: str) -> None:
    cfg = distiller_cfg(teacher)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e-4
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY = 1.0, 0.0, 0.0
    model = build_model(cfg)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = build_optimizer(cfg, model)
    sum(step(model, 0).values()).backward()
    optimizer.step()
    moved = {k: (p.detach() - before[k]).abs().max() for k, p in model.named_parameters()}
    assert max(map(float, moved.values())) < 1.01e-4, sorted(moved.items(), key=lambda x: -x[1])[:3]
    assert float(moved["terms.fpn.connectors.p3.weight"]) > 0


class MyNet(nn.Module):
    """Registered nowhere."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.neck = nn.ModuleDict({"out": nn.Conv2d(3, channels, 3, stride=2, padding=1)})
        self.head = nn.Conv2d(channels, 1, 1)
        self.register_buffer("pixel_mean", torch.zeros(()))

    def forward(self, inputs: list[dict[str, Any]]) -> Any:
        images = torch.stack([x["image"] for x in inputs]).float() - self.pixel_mean
        scores = self.head(self.neck["out"](images))
        return {"loss_mine": scores.square().mean()} if self.training else [scores]


def test_a_detector_that_detectron2_does_not_know() -> None:
    names = {"MyNet": MyNet, "Distiller": Distiller, "Teacher": Teacher, "terms": terms}
    exec(block("neck.out"), {**names, "batched_inputs": INPUTS}, names)
    model, losses = names["model"], names["losses"]
    assert set(losses) == {"loss_mine", "loss_kd_neck"}
    losses["loss_kd_neck"].backward()
    assert set(gradients(model.student)) == {"neck.out.weight", "neck.out.bias"}
    assert list(model.state_dict()) == list(MyNet(8).state_dict())


def test_a_running_mean_of_the_weights() -> None:
    model = distilled()
    watched = [model.student.backbone.fpn_output3.weight, *model.terms.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    steps: list[list[Tensor]] = []
    optimizer.register_step_post_hook(
        lambda *_: steps.append([p.detach().clone() for p in watched])
    )
    names = {"model": model, "optimizer": optimizer, "torch": torch}
    exec(block("AveragedModel"), {**names, "loader": [batch(seed=i) for i in range(3)]}, names)
    ema = names["ema"]
    expected = steps[0]
    for now in steps[1:]:
        expected = [0.999 * mean + 0.001 * x for mean, x in zip(expected, now, strict=True)]
    mean = [ema.module.student.backbone.fpn_output3.weight, *ema.module.terms.parameters()]
    assert len(mean) == 11
    torch.testing.assert_close([p.detach() for p in mean], expected)
    assert not torch.equal(expected[0], steps[-1][0])
    # One teacher, which came after the copy was made.
    held = [m.sources["teacher"].hidden.held for m in (model, ema.module)]
    assert held[0] is held[1] is not None
    assert len(list(ema.module.parameters())) == len(list(model.parameters()))
    assert len(names["predictions"]) == 2
    exactly(predictions(ema, INPUTS), predictions(loaded("student_ema.pth"), INPUTS))


def test_ddp(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        names = {"model": distilled(), "DistributedDataParallel": DistributedDataParallel}
        exec(block("DistributedDataParallel"), names)
        model = names["model"]
        sum(step(model, 0).values()).backward()
        assert set(gradients(model)) == {name for name, _ in model.named_parameters()}
        assert [k.removeprefix("module.") for k in model.state_dict()] == list(
            student().state_dict()
        )
        with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel: .*'module\.\*'"):
            Distiller(student=model, sources={}, terms={})
    finally:
        distributed.destroy_process_group()
