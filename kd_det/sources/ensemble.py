"""OKDCR's ensemble of networks that train together."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated

from torch import Tensor

from kd_det.classes import listed
from kd_det.context import Context
from kd_det.detectors import TapShape
from kd_det.losses import check_mode, ensemble_logits
from kd_det.registry import SOURCES
from kd_det.sources.source import Source, Targets
from kd_det.taps import Maps

TAP = "cls_logits"


@SOURCES.register()
class Ensemble(Source):
    """
    The adaptive ensemble of OKDCR (Zhang, Gong, Liu, 2021), in our *reconstruction* of its
    equations: at every anchor the networks' mean class logits, weighted by how well the two heads
    of each agree there; see `kd_det.losses.ensemble_logits`. Without second heads it is the plain
    mean of the networks' logits.

    It has no network. Its members are other sources, among them ``student``, the student itself;
    its one tap is ``cls_logits``, with the members' levels, and its maps are constants: a term that
    imitates it (published: KL at tau = 3, `PI` here, for every head) moves the head alone.

    Args:
        heads: names of the sources whose ``cls_logits`` are a network's first opinion.
        second_heads: names of those that are the second, one for each of ``heads`` in that order,
            or none at all; an empty name stands for a network without one.
        mode: how class scores come from logits where heads are compared, ``"sigmoid"`` or
            ``"softmax"`` over an anchor's classes (published).

    Raises:
        ValueError: if a name comes twice, ``second_heads`` are not as many as ``heads``, there are
            fewer than two members, or the mode is unknown; when wired, if the members' maps do not
            look the same.
    """

    def __init__(
        self,
        *,
        heads: Annotated[tuple[str, ...], "name"] = ("student",),
        second_heads: Annotated[tuple[str, ...], "name"] = (),
        mode: str = "sigmoid",
    ) -> None:
        super().__init__()
        check_mode(mode)
        if second_heads and len(second_heads) != len(heads):
            raise ValueError(
                "An Ensemble has a second head for each of its heads, in the same order (an empty "
                f"name where there is none), or no second heads; but HEADS are {_list(heads)} and "
                f"SECOND_HEADS {_list(second_heads)}."
            )
        self.heads = tuple(heads)
        self.second_heads = tuple(second_heads)
        self.mode = mode
        self.members = tuple(filter(None, chain(heads, second_heads)))
        if len(set(self.members)) < max(2, len(self.members)) or "" in self.heads:
            raise ValueError(
                "An Ensemble has two members or more, each named once, but HEADS are "
                f"{_list(heads)} and SECOND_HEADS {_list(second_heads)}."
            )
        self._shapes: list[TapShape] = []

    def reads(self, taps: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Their class logits, whatever is asked for: `shapes` refuses other taps."""
        return dict.fromkeys(self.members, (TAP,)) if taps else {}

    def wire_members(  # noqa: D102  # as in the base
        self, shapes: Mapping[str, Mapping[str, list[TapShape]]]
    ) -> None:
        looks = {name: shapes[name][TAP] for name in self.members}
        first, *others = looks
        for other in others:
            mine, theirs = _described(looks[first]), _described(looks[other])
            if mine != theirs:
                raise ValueError(
                    "An Ensemble takes the mean of class logits, so its members need the same "
                    f"levels, anchors and classes; but {TAP} of '{first}' are {mine}, and those of "
                    f"'{other}' {theirs}."
                )
        named = [name for name in looks if looks[name][0].names]  # where they are not known: alike
        for other in named[1:]:
            known, found = looks[named[0]][0].names, looks[other][0].names
            if known != found:
                raise ValueError(
                    "An Ensemble takes the mean of class logits, so its members need the same "
                    f"classes in the same order; but those of '{named[0]}' are {listed(known)}, "
                    f"and those of '{other}' {listed(found)}."
                )
        self._shapes = looks[(named or [first])[0]]

    def shapes(self, taps: tuple[str, ...]) -> dict[str, list[TapShape]]:  # noqa: D102  # as in the base
        if unknown := sorted(set(taps) - {TAP}):
            raise KeyError(
                f"An Ensemble has no tap {', '.join(unknown)}: only {TAP}, the mean of its "
                "members' class logits."
            )
        return dict.fromkeys(taps, self._shapes)

    def forward(self, context: Context, taps: tuple[str, ...]) -> Targets:
        """The ensemble of what the members say of this batch, a constant."""
        if not taps:
            return Targets({})
        logits = {name: context.targets[name][TAP] for name in self.members}
        return Targets({TAP: {s.level: self._mean(logits, s) for s in self._shapes}})

    def _mean(self, logits: Mapping[str, Maps], shape: TapShape) -> Tensor:
        maps = {name: of[shape.level] for name, of in logits.items()}
        # Members that pad differently reach differently far, see `kd_det.pairing.on_one_grid`.
        h, w = (min(x.shape[side] for x in maps.values()) for side in (-2, -1))
        cropped = {name: x[..., :h, :w] for name, x in maps.items()}
        seconds = self.second_heads or ("",) * len(self.heads)
        return ensemble_logits(
            [(cropped[a], cropped.get(b)) for a, b in zip(self.heads, seconds, strict=True)],
            mode=self.mode,
            classes=shape.per_anchor,
        )


def _described(levels: Sequence[TapShape]) -> str:
    return ", ".join(
        f"{s.level} (stride {s.stride}, "
        + (
            f"{s.anchors} anchor(s) x {s.per_anchor} classes)"
            if s.anchors
            else f"{s.channels} channels)"
        )
        for s in levels
    )


def _list(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
