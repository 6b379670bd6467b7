"""Terms that compare one map of the student with one map of the target, level by level."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kd_det.channels import REDUCTIONS, Common, common_channels
from kd_det.connectors import Auto, Connector
from kd_det.context import Context
from kd_det.detectors import TapShape
from kd_det.pairing import Pair, on_one_grid, pair_levels
from kd_det.regions import Padding, Region
from kd_det.sources import Source
from kd_det.taps import ROWS, Maps
from kd_det.terms.term import Aligned, PlanRow, Term


class LevelwiseTerm(Term):
    """
    connector -> one grid -> region -> `compare`, for every pair of levels of one stride. A subclass
    implements `compare`, or `compare_levels` for a loss that takes all levels at once.

    Args:
        tap: preset or module path in the student.
        source_tap: preset or module path in the source; empty for the same as ``tap``.
        levels: names of the student's levels; empty for all that have a partner.
        level_weights: one factor per used level, in order; empty for 1 each, as published. (CWD
            pushes every level equally, and so a cell of P7 some 200 times as hard as one of P3;
            weights that fall by 4 per level make it equal per cell.)
        connector: recipe of the map from the student's to the target's channels. On taps whose
            channels have a meaning (logits, deltas), ``Auto`` trains nothing: classes are matched
            by name and anchors reduced, see `kd_det.channels.common_channels`; ``Identity`` takes
            the channels as they are.
        anchors: how the anchors of a cell become one where the two sides have other numbers of
            them, ``"max"`` or ``"logsumexp"``: see `kd_det.channels.REDUCTIONS`.
        region: where it counts.
        common: source, weight, schedule: see `Term`.

    Raises:
        ValueError: if a level weight is negative or not finite, or ``anchors`` is unknown.
    """

    def __init__(
        self,
        *,
        tap: str = "features",
        source_tap: str = "",
        levels: tuple[str, ...] = (),
        level_weights: tuple[float, ...] = (),
        connector: Connector = Auto(),
        anchors: str = "max",
        region: Region = Padding(),
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not all(math.isfinite(w) and w >= 0 for w in level_weights):
            raise ValueError(f"level_weights are finite and >= 0, but got {tuple(level_weights)}.")
        if anchors not in REDUCTIONS:
            raise ValueError(f"anchors is one of {', '.join(REDUCTIONS)}, but got '{anchors}'.")
        self.tap = tap
        self.source_tap = source_tap or tap
        self.levels = tuple(levels)
        self.level_weights = tuple(level_weights)
        self.connector = connector
        self.anchors = anchors
        self.region = region
        self.pairs: list[Pair] = []
        self.connectors = nn.ModuleDict()
        # What becomes of the target's channels; nothing to train. `Identity` but for mixed pairs.
        self.target_channels = nn.ModuleDict()

    def student_taps(self) -> tuple[str, ...]:  # noqa: D102  # as in the base
        return tuple(dict.fromkeys((self.tap, *self.region.student_taps())))

    def source_taps(self) -> tuple[str, ...]:  # noqa: D102  # as in the base
        return tuple(dict.fromkeys((self.source_tap, *self.region.source_taps())))

    def wire(  # noqa: D102  # as in the base
        self, student: Mapping[str, list[TapShape]], target: Mapping[str, list[TapShape]]
    ) -> list[PlanRow]:
        for tap, shapes in [
            (self.tap, student[self.tap]),
            (self.source_tap, target[self.source_tap]),
        ]:
            if any(shape.kind in ROWS for shape in shapes):
                raise ValueError(
                    f"tap '{tap}' gives a row per region of interest, and {type(self).__name__} "
                    "compares (N, C, H, W) maps: take another TAP, or TYPE: BoxHead for what a box "
                    "head predicts"
                )
        self.pairs = pair_levels(student[self.tap], target[self.source_tap], self.levels)
        if self.level_weights and len(self.level_weights) != len(self.pairs):
            raise ValueError(
                f"there are {len(self.level_weights)} LEVEL_WEIGHTS for {len(self.pairs)} levels "
                f"({', '.join(p.student.level for p in self.pairs)})"
            )
        rows = []
        for pair in self.pairs:
            common = self.connect(pair)
            # ModuleDict keys may not contain dots; level names are keys of dicts or numbers.
            self.connectors[pair.student.level] = common.student
            self.target_channels[pair.student.level] = common.target
            rows.append(
                PlanRow(
                    tap=self.tap,
                    level=pair.student.level,
                    target=f"{self.source_tap}.{pair.target.level}",
                    student_channels=pair.student.channels,
                    target_channels=pair.target.channels,
                    stride=pair.target.stride,
                    connector=common.name,
                    region=type(self.region).__name__,
                    loss=type(self).__name__,
                    parameters=sum(p.numel() for p in common.student.parameters()),
                    compared_channels=common.channels,
                    note=common.note,
                )
            )
        return rows

    def connect(self, pair: Pair) -> Common:
        """
        What brings the two maps of a pair to channels that mean the same.

        Raises:
            ValueError: if nothing does.
        """
        s, t = pair.student, pair.target
        try:
            if {s.kind, t.kind} != {"feature"} and isinstance(self.connector, Auto):
                return common_channels(s, t, self.anchors)
            module = self.connector(s.channels, t.channels)
        except ValueError as e:
            raise ValueError(f"level {s.level} of tap '{self.tap}': {e}") from None
        return Common(module, nn.Identity(), t.channels, t.anchors, _describe(module))

    def forward(  # noqa: D102  # as in the base
        self,
        student: Mapping[str, Maps],
        target: Mapping[str, Maps],
        context: Context,
        source: Source,
    ) -> dict[str, Tensor]:
        return self.compare_levels(list(self.aligned(student, target, context)))

    def aligned(  # noqa: D102  # as in the base
        self, student: Mapping[str, Maps], target: Mapping[str, Maps], context: Context
    ) -> Iterator[Aligned]:
        if self.region.source_taps():
            context = context.with_targets(target)
        for pair in self.pairs:
            level = pair.student.level
            s = self.connectors[level](student[self.tap][level])
            t = target[self.source_tap][pair.target.level]
            s, t = on_one_grid(s, self.target_channels[level](t), pair)
            yield level, s, t, self.region(context, s, t, pair.target.stride)

    def compare_levels(self, levels: Sequence[Aligned]) -> dict[str, Tensor]:
        """
        The value of every level, for a loss that takes all levels in one call; `compare` of each,
        unless a subclass knows better.

        Args:
            levels: ``(level, student's map, target's map, region)``, as `compare` describes them.
        """
        return {level: self.compare(s, t, region) for level, s, t, region in levels}

    def compare(self, student: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
        """
        The value of one level.

        Args:
            student: ``(N, C, H, W)``, after its connector.
            target: ``(N, C, H, W)``, a constant.
            region: ``(N, 1, H, W)`` weights >= 0, or ``None`` where every cell counts 1.
        """
        raise NotImplementedError

    def target_level(self, level: str) -> str:  # noqa: D102  # as in the base
        return next(p.target.level for p in self.pairs if p.student.level == level)

    def level_weight(self, level: str) -> float:  # noqa: D102  # as in the base
        if not self.level_weights:
            return 1.0
        index = [p.student.level for p in self.pairs].index(level)
        return self.level_weights[index]


def _describe(module: nn.Module) -> str:
    if isinstance(module, nn.Identity):
        return "-"
    conv, *behind = module if isinstance(module, nn.Sequential) else [module]
    kernel = getattr(conv, "kernel_size", ("?",))[0]
    names = ["BN" if isinstance(m, nn.BatchNorm2d) else type(m).__name__ for m in behind]
    return "+".join([f"conv{kernel}x{kernel}", *names])
