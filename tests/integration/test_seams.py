"""
The places where published methods will be added, each with one small real user.

Nothing here is a method of a paper; each class is the least that needs its seam: several terms and
sources, a region, a network with its own optimizer, ground truth and anchors, several levels at
once, a trainable module on the teacher's side, a self-teacher.
"""

import copy
from collections.abc import Iterator, Mapping

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from kd_det.context import Context
from kd_det.detectors import TapShape
from kd_det.kd_state import KDState
from kd_det.regions import Region
from kd_det.registry import REGIONS, SOURCES, TERMS
from kd_det.sources import Source
from kd_det.sources.source import Targets
from kd_det.taps import Maps
from kd_det.terms import LevelwiseTerm, Term
from kd_det.terms.term import PlanRow
from tests.toys import batch, distiller_cfg, save_teacher

Shapes = Mapping[str, list[TapShape]]
FPN = {"TYPE": "CWD", "TAP": "features"}
INPUTS = batch(((128, 128), (96, 128)))


@pytest.fixture(autouse=True)
def own_parts() -> Iterator[None]:
    """Registered for one test: what a user's module does by being imported."""
    own = [(REGIONS, BoxInterior), (SOURCES, SelfTeacher)]
    own += [(TERMS, t) for t in (L2, Critic, Positives, Relation, Translator)]
    for registry, cls in own:
        registry.register(cls)
    yield
    for registry, cls in own:
        del registry._obj_map[cls.__name__]


def step(model: nn.Module, iteration: int = 0) -> dict[str, Tensor]:
    with EventStorage(iteration):
        return model(INPUTS)


def row(term: Term, tap: str, shape: TapShape, target: TapShape, parameters: int = 0) -> PlanRow:
    return PlanRow(
        tap=tap,
        level=shape.level,
        target=target.level,
        student_channels=shape.channels,
        target_channels=target.channels,
        stride=shape.stride,
        connector="-",
        region="-",
        loss=type(term).__name__,
        parameters=parameters,
    )


class L2(LevelwiseTerm):
    """Mean squared difference inside a region: connector, grid and levels come from the base."""

    def compare(self, student: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
        weight = torch.ones_like(target[:, :1]) if region is None else region
        total = weight.sum() * target.shape[1]
        return (weight * (student - target) ** 2).sum() / total.clamp(min=1)


# Several terms of one type, several sources -----------------------------------------------------


def test_two_terms_of_one_type_and_two_sources(tmp_path, teacher: tuple[str, str]) -> None:
    second = save_teacher(tmp_path, seed=2)
    cfg = distiller_cfg(teacher, {})
    other = {"TYPE": "Teacher", "CONFIG_FILE": second[0], "WEIGHTS": second[1]}
    terms = {
        "NEAR": {**FPN, "SOURCE": "TEACHER", "LEVELS": ["p3"], "TAU": 2.0},
        "FAR": {**FPN, "SOURCE": "SECOND", "LEVELS": ["p4", "p5"]},
        "AGAIN": {**FPN, "SOURCE": "SECOND", "LEVELS": ["p4", "p5"], "WEIGHT": 3.0},
    }
    cfg.merge_from_other_cfg(CfgNode({"KD": {"SOURCES": {"SECOND": other}, "TERMS": terms}}))
    model = build_model(cfg)
    assert model.wiring.source_of == {"near": "teacher", "far": "second", "again": "second"}
    losses = step(model)
    torch.testing.assert_close(losses["loss_kd_again"], 3 * losses["loss_kd_far"])
    assert float(losses["loss_kd_near"]) > 0
    # A connector where the channels differ (8 and 16), none where they agree.
    assert [len(list(model.terms[n].parameters())) for n in ("near", "far")] == [2, 0]
    calls: list[str] = []
    for name, source in model.sources.items():
        source.hidden.held.backbone.register_forward_hook(lambda *_, n=name: calls.append(n))
    step(model)
    assert sorted(calls) == ["second", "teacher"]  # one forward serves two terms


def test_a_source_that_no_term_names_is_not_kept(tmp_path, teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, {"A": {**FPN, "SOURCE": "TEACHER"}})
    missing = {"TYPE": "Teacher", "CONFIG_FILE": "none.yaml", "WEIGHTS": "none.pth"}
    cfg.merge_from_other_cfg(CfgNode({"KD": {"SOURCES": {"UNUSED": missing}}}))
    model = build_model(cfg)
    assert list(model.sources) == ["teacher"]
    step(model)


# A region ---------------------------------------------------------------------------------------


class BoxInterior(Region):
    """Cells whose centre lies in a box of the ground truth."""

    def __init__(self, *, margin: float = 0.0) -> None:
        self.margin = margin

    def __call__(
        self, context: Context, student: Tensor, target: Tensor, stride: int
    ) -> Tensor | None:
        h, w = target.shape[-2:]
        y = (torch.arange(h) + 0.5) * stride
        x = (torch.arange(w) + 0.5) * stride
        masks = []
        for instances in context.instances:
            x0, y0, x1, y1 = instances.gt_boxes.tensor.T[..., None]
            rows = (y0 - self.margin <= y) & (y <= y1 + self.margin)  # (boxes, H)
            columns = (x0 - self.margin <= x) & (x <= x1 + self.margin)
            masks.append((rows[:, :, None] & columns[:, None, :]).any(0))
        return torch.stack(masks)[:, None].float().to(target.device)


def test_a_region_with_a_field_of_its_own(teacher: tuple[str, str]) -> None:
    region = {"TYPE": "BoxInterior", "MARGIN": 4}
    terms = {
        "IN": {"TYPE": "L2", "TAP": "features", "LEVELS": ["p3"], "REGION": region},
        "ALL": {"TYPE": "L2", "TAP": "features", "LEVELS": ["p3"], "REGION": "Ones"},
    }
    cfg = distiller_cfg(teacher, terms)
    model = build_model(cfg)
    assert model.terms["in"].region.margin == 4.0
    assert model.wiring.rows["in"][0].region == "BoxInterior"
    model.terms["all"].load_state_dict(model.terms["in"].state_dict())
    values = step(model)
    assert 0 < float(values["loss_kd_in"]) != float(values["loss_kd_all"])
    # Without boxes the region is empty: exactly 0, and attached.
    with EventStorage(0):
        losses = model(batch(((128, 128),), boxes=0))
    assert float(losses["loss_kd_in"]) == 0
    losses["loss_kd_in"].backward()
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.terms["in"].parameters())


# An auxiliary network ---------------------------------------------------------------------------


class Critic(Term):
    """
    A discriminator between the student's and the teacher's P3, trained by an optimizer of its own.

    The network is outside of the module tree (so in no parameters(), main optimizer or DDP); what
    is to be restored, network and optimizer, is the term's extra state.
    """

    def __init__(self, *, lr: float = 0.01, **common: object) -> None:
        super().__init__(**common)
        self.lr = lr

    def student_taps(self) -> tuple[str, ...]:
        return ("features",)

    source_taps = student_taps

    def wire(self, student: Shapes, target: Shapes) -> list[PlanRow]:
        s, t = student["features"][0], target["features"][0]
        net = nn.Conv2d(t.channels, 1, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=self.lr, momentum=0.9)
        self.__dict__.update(net=net, optimizer=optimizer)
        self.connector = nn.Conv2d(s.channels, t.channels, 1)
        return [row(self, "features", s, t)]

    def forward(
        self,
        student: Mapping[str, Maps],
        target: Mapping[str, Maps],
        context: Context,
        source: Source,
    ) -> dict[str, Tensor]:
        fake, real = self.connector(student["features"]["p3"]), target["features"]["p3"]
        own = F.softplus(self.net(fake.detach())).mean() + F.softplus(-self.net(real)).mean()
        self.optimizer.zero_grad()
        own.backward()
        self.optimizer.step()
        weight, bias = (p.detach() for p in self.net.parameters())
        return {"p3": F.softplus(-F.conv2d(fake, weight, bias)).mean()}

    def get_extra_state(self) -> dict:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


def test_an_auxiliary_network_with_its_own_optimizer(tmp_path, teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, {"GAN": {"TYPE": "Critic", "LR": 0.1}})
    model = build_model(cfg)
    critic = model.terms["gan"]
    before = copy.deepcopy(critic.net.state_dict())
    optimizer = build_optimizer(cfg, model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in critic.net.parameters()}
    assert {id(p) for p in critic.connector.parameters()} <= trained
    for _ in range(2):
        loss = sum(step(model).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not torch.equal(before["weight"], critic.net.weight)
    assert all(torch.count_nonzero(p.grad) for p in critic.connector.parameters())

    assert list(model.state_dict()) == list(model.student.state_dict())
    for level_b in (False, True):
        other = build_model(cfg)
        if level_b:
            torch.save(KDState(model).state_dict(), tmp_path / "kd.pth")
            KDState(other).load_state_dict(torch.load(tmp_path / "kd.pth"))
        else:
            torch.save(model.state_dict(), tmp_path / "model.pth")
            other.load_state_dict(torch.load(tmp_path / "model.pth"))
        restored = other.terms["gan"]
        torch.testing.assert_close(dict(restored.net.state_dict()), dict(critic.net.state_dict()))
        momentum = restored.optimizer.state_dict()["state"]
        assert momentum
        torch.testing.assert_close(momentum, critic.optimizer.state_dict()["state"])
        assert other.check_resume(3) is True
    lost = build_model(cfg)
    lost.load_state_dict(model.student.state_dict())
    with pytest.raises(RuntimeError, match="cannot be restored"):
        step(lost, 3)


# Ground truth and anchors -----------------------------------------------------------------------


class Positives(Term):
    """Squared difference of the class logits at anchors that overlap a box; 0 without any."""

    def __init__(self, *, iou: float = 0.3, **common: object) -> None:
        super().__init__(**common)
        self.iou = iou

    def student_taps(self) -> tuple[str, ...]:
        return ("cls_logits", "features")

    def source_taps(self) -> tuple[str, ...]:
        return ("cls_logits",)

    def wire(self, student: Shapes, target: Shapes) -> list[PlanRow]:
        pairs = zip(student["cls_logits"], target["cls_logits"], strict=True)
        return [row(self, "cls_logits", s, t) for s, t in pairs]

    def forward(
        self,
        student: Mapping[str, Maps],
        target: Mapping[str, Maps],
        context: Context,
        source: Source,
    ) -> dict[str, Tensor]:
        anchors = context.anchors(list(student["features"].values()))
        values = {}
        for boxes, (level, s) in zip(anchors, student["cls_logits"].items(), strict=True):
            t = target["cls_logits"][level]
            n, channels, h, w = s.shape
            positive = torch.stack(
                [
                    (pairwise_iou(x.gt_boxes, boxes) > self.iou).any(0)
                    if len(x)
                    else torch.zeros(len(boxes), dtype=torch.bool)
                    for x in context.instances
                ]
            )  # (N, HWA)
            per_anchor = ((s - t) ** 2).view(n, -1, channels, h, w).permute(0, 3, 4, 1, 2)
            per_anchor = per_anchor.reshape(n, h * w, -1).sum(-1)  # one anchor per cell
            values[level] = (per_anchor * positive.view(n, h * w)).sum()
        return values


def test_a_term_that_sees_ground_truth_and_anchors(teacher: tuple[str, str]) -> None:
    terms = {"POS": {"TYPE": "Positives", "IOU": 0.1}, "NONE": {"TYPE": "Positives", "IOU": 1.0}}
    model = build_model(distiller_cfg(teacher, terms))
    losses = step(model)
    assert float(losses["loss_kd_pos"]) > 0
    assert float(losses["loss_kd_none"]) == 0
    assert losses["loss_kd_none"].requires_grad
    with EventStorage(0):
        losses = model(batch(((128, 128),), boxes=0))
    assert float(losses["loss_kd_pos"]) == 0
    losses["loss_kd_pos"].backward()


# Several levels at once -------------------------------------------------------------------------


class Relation(Term):
    """Compares the matrix of similarities between all levels: one value for all of them."""

    def student_taps(self) -> tuple[str, ...]:
        return ("features",)

    source_taps = student_taps

    def wire(self, student: Shapes, target: Shapes) -> list[PlanRow]:
        return [row(self, "features", student["features"][0], target["features"][0])]

    def forward(
        self,
        student: Mapping[str, Maps],
        target: Mapping[str, Maps],
        context: Context,
        source: Source,
    ) -> dict[str, Tensor]:
        def similarities(maps: Maps) -> Tensor:
            pooled = torch.stack([x.mean((2, 3)) for x in maps.values()], dim=1)  # (N, L, C)
            pooled = F.normalize(pooled.float(), dim=-1)
            return pooled @ pooled.transpose(1, 2)  # (N, L, L)

        s, t = similarities(student["features"]), similarities(target["features"])
        return {"all": (s - t).abs().mean()}


def test_a_term_over_all_levels_at_once(teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, {"REL": {"TYPE": "Relation", "WEIGHT": 2}})
    cfg.KD.LOG_PERIOD = 1
    model = build_model(cfg)
    with EventStorage(0) as storage:
        losses = model(INPUTS)
        logged = {k for k in storage.latest() if k.startswith("kd/")}
    assert logged == {"kd/rel/all", "kd/rel/all/weighted"}
    losses["loss_kd_rel"].backward()
    assert torch.count_nonzero(model.student.backbone.fpn_output3.weight.grad)


# A trainable module on the teacher's side ---------------------------------------------------------


class Translator(LevelwiseTerm):
    """Connectors on both sides: the teacher's map is translated by a convolution that trains."""

    def wire(self, student: Shapes, target: Shapes) -> list[PlanRow]:
        rows = super().wire(student, target)
        self.translators = nn.ModuleDict(
            {p.student.level: nn.Conv2d(p.target.channels, 4, 1) for p in self.pairs}
        )
        self.heads = nn.ModuleDict(
            {p.student.level: nn.Conv2d(p.target.channels, 4, 1) for p in self.pairs}
        )
        return rows

    def forward(
        self,
        student: Mapping[str, Maps],
        target: Mapping[str, Maps],
        context: Context,
        source: Source,
    ) -> dict[str, Tensor]:
        values = {}
        for pair in self.pairs:
            level = pair.student.level
            s = self.heads[level](self.connectors[level](student[self.tap][level]))
            t = self.translators[level](target[self.source_tap][pair.target.level])
            values[level] = F.l1_loss(s, t)
        return values


def test_a_trainable_module_on_the_teachers_side(teacher: tuple[str, str]) -> None:
    model = build_model(
        distiller_cfg(teacher, {"T": {"TYPE": "Translator", "LEVELS": ["p3", "p4"]}})
    )
    losses = step(model)
    losses["loss_kd_t"].backward()
    translators = list(model.terms["t"].translators.parameters())
    assert len(translators) == 4
    assert all(torch.count_nonzero(p.grad) for p in translators)
    held = model.sources["teacher"].hidden.held
    assert all(p.grad is None for p in held.parameters())
    assert list(model.state_dict()) == list(model.student.state_dict())
    assert any("translators" in k for k in model.kd_state_dict()["tensors"])


# A self-teacher -----------------------------------------------------------------------------------


class SelfTeacher(Source):
    """
    Grown on the student's pyramid: refines it, has a task loss of its own, and is imitated.

    Its tap is ``refined``; its maps are detached, or the student would be pulled towards itself.
    """

    def __init__(self, *, channels: int = 6, name: str = "loss_self") -> None:
        super().__init__()
        self.channels = channels
        self.name = name

    def student_taps(self) -> tuple[str, ...]:
        return ("features",)

    def wire(self, student: Shapes) -> None:
        self.levels = list(student["features"])
        self.refine = nn.ModuleDict(
            {s.level: nn.Conv2d(s.channels, self.channels, 1) for s in self.levels}
        )
        self.objectness = nn.Conv2d(self.channels, 1, 1)

    def shapes(self, taps: tuple[str, ...]) -> dict[str, list[TapShape]]:
        if unknown := set(taps) - {"refined"}:
            raise KeyError(f"SelfTeacher has no tap {', '.join(sorted(unknown))}: only 'refined'.")
        refined = [TapShape(s.level, self.channels, s.stride, s.origin) for s in self.levels]
        return {"refined": refined} if taps else {}

    def forward(self, context: Context, taps: tuple[str, ...]) -> Targets:
        features = context.student_maps["features"]
        refined = {k: conv(features[k]) for k, conv in self.refine.items()}
        scores = [self.objectness(x).mean((1, 2, 3)) for x in refined.values()]
        present = torch.tensor([float(len(x) > 0) for x in context.instances])
        loss = F.binary_cross_entropy_with_logits(sum(scores), present)
        return Targets({"refined": {k: x.detach() for k, x in refined.items()}}, {self.name: loss})


def self_cfg(teacher: tuple[str, str], **source: object) -> CfgNode:
    term = {"TYPE": "CWD", "TAP": "features", "SOURCE": "SELF", "SOURCE_TAP": "refined"}
    cfg = distiller_cfg(teacher, {})
    kd = {"SOURCES": {"SELF": {"TYPE": "SelfTeacher", **source}}, "TERMS": {"FPN": term}}
    cfg.merge_from_other_cfg(CfgNode({"KD": kd}))
    return cfg


def test_a_self_teacher_trains_and_is_imitated(tmp_path, teacher: tuple[str, str]) -> None:
    model = build_model(self_cfg(teacher))
    assert list(model.sources) == ["self"]
    losses = step(model)
    assert {"loss_self", "loss_kd_fpn"} <= set(losses)
    own = list(model.sources["self"].parameters())
    losses["loss_kd_fpn"].backward(retain_graph=True)
    assert all(p.grad is None for p in own)  # imitating it does not move it
    losses["loss_self"].backward()
    assert all(p.grad is not None for p in own)
    assert torch.count_nonzero(model.student.backbone.fpn_output3.weight.grad)
    assert list(model.state_dict()) == list(model.student.state_dict())
    other = build_model(self_cfg(teacher))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other.load_state_dict(torch.load(tmp_path / "model.pth"))
    torch.testing.assert_close(
        dict(other.sources["self"].state_dict()), dict(model.sources["self"].state_dict())
    )


def test_a_self_teacher_without_an_active_term_is_touched(teacher: tuple[str, str]) -> None:
    """DDP waits for the gradient of every parameter, of those of an idle source too."""
    cfg = self_cfg(teacher)
    cfg.merge_from_list(["KD.TERMS.FPN.SCHEDULE.START_ITER", "5"])
    model = build_model(cfg)
    losses = step(model)
    assert "loss_self" not in losses
    assert float(losses["loss_kd_fpn"]) == 0
    sum(losses.values()).backward()
    for p in model.parameters():
        assert p.grad is not None
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.sources["self"].parameters())


def test_a_source_may_not_replace_the_students_losses(teacher: tuple[str, str]) -> None:
    model = build_model(self_cfg(teacher, NAME="loss_cls"))
    with pytest.raises(ValueError, match="Source 'self' has losses of its own called loss_cls"):
        step(model)


def test_a_wrong_tap_of_a_source_of_ones_own(teacher: tuple[str, str]) -> None:
    cfg = self_cfg(teacher)
    cfg.merge_from_list(["KD.TERMS.FPN.SOURCE_TAP", "refind"])
    with pytest.raises(KeyError, match="Source 'self': SelfTeacher has no tap refind"):
        build_model(cfg)
