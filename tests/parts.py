"""Parts of a user's own: each is the least that needs its seam, none a method of a paper."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from detectron2.structures import pairwise_iou
from torch import Tensor, nn

from kd_det.context import Context
from kd_det.detectors import TapShape
from kd_det.regions import Region
from kd_det.sources import Source
from kd_det.sources.source import Targets
from kd_det.taps import Maps
from kd_det.terms import LevelwiseTerm, Term
from kd_det.terms.term import PlanRow

Shapes = Mapping[str, list[TapShape]]


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


class SelfTeacher(Source):
    """
    Grown on the student's pyramid: refines it, has a task loss of its own, and is imitated.

    Its tap is ``refined``; its maps are detached, or the student would be pulled towards itself.
    """

    def __init__(self, *, channels: int = 6, name: str = "loss_self") -> None:
        super().__init__()
        self.channels = channels
        self.name = name

    def student_taps(self, taps: tuple[str, ...]) -> tuple[str, ...]:
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
