"""Wiring: terms are tied to taps of the student and of their sources, and sized."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd_det.classes import class_names
from kd_det.detectors import describe, probe
from kd_det.inherit import Inherit
from kd_det.registry import did_you_mean
from kd_det.rng import preserved_rng
from kd_det.sources import Source, SourceUnavailable
from kd_det.taps import Tap
from kd_det.terms import Term
from kd_det.terms.term import PlanRow

logger = logging.getLogger(__name__)


@dataclass
class Wiring:
    """
    The resolved plan of a Distiller.

    Attributes:
        sources: the sources that something needs.
        terms: the terms of non-zero weight.
        source_of: name of each term's source.
        taps: the student's taps by name.
        expected_calls: how often each tapped module of the student fires per forward.
        all_source_taps: for every source all taps that any term reads.
        rows: one row per term and level.
        unavailable: why training cannot start (a source's file is missing), or ``None``.
    """

    sources: dict[str, Source]
    terms: dict[str, Term]
    source_of: dict[str, str] = field(default_factory=dict)
    taps: dict[str, Tap] = field(default_factory=dict)
    expected_calls: dict[str, int] = field(default_factory=dict)
    all_source_taps: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: dict[str, list[PlanRow]] = field(default_factory=dict)
    unavailable: SourceUnavailable | None = None

    def student_taps(self, active: Iterable[str], over: Collection[str] = ()) -> dict[str, Tap]:
        """The student's taps that these terms, and the sources of `source_taps`, read."""
        active = list(active)
        names = [tap for term in active for tap in self.terms[term].student_taps()]
        for source, asked in self.source_taps(active, over).items():
            names += self.sources[source].student_taps(asked)
        return {name: self.taps[name] for name in dict.fromkeys(names)}

    def source_taps(
        self, active: Iterable[str], over: Collection[str] = ()
    ) -> dict[str, tuple[str, ...]]:
        """
        For every source that runs, the names of the taps that these terms read.

        Args:
            active: names of terms.
            over: names of sources that no term needs any more: the others run where they learn
                (`Source.learns`), whether a term reads them or not.
        """
        asked: dict[str, list[str]] = {
            name: [] for name, source in self.sources.items() if source.learns and name not in over
        }
        for term in active:
            asked.setdefault(self.source_of[term], []).extend(self.terms[term].source_taps())
        return {source: tuple(dict.fromkeys(taps)) for source, taps in asked.items()}


def wire(
    student: nn.Module,
    sources: Mapping[str, Source],
    terms: Mapping[str, Term],
    inherit: Inherit | None = None,
    classes: str | Sequence[str] = (),
) -> Wiring:
    """
    Tie terms to taps and let them build their connectors. No global random state is changed.

    Args:
        student: the detector that learns.
        sources: by name.
        terms: by name.
        inherit: names its source.
        classes: what the student's classes are called: see `kd_det.classes.class_names`.

    Raises:
        ValueError: if names or shapes do not fit; the message begins with the term.
        KeyError: if a tap or a source does not exist, with the nearest names.
    """
    _check_unwrapped(student)
    for name in (*sources, *terms):
        if not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"'{name}' cannot name a source or a term: take a Python identifier that is no "
                "method of a dict, for it becomes part of loss and parameter names."
            )
    kept = {name: term for name, term in terms.items() if term.weight > 0}
    if not kept and inherit is None:
        logger.warning("No term has a weight: this run trains the plain student.")
    source_of = {name: _source_of(name, term, sources) for name, term in kept.items()}
    needed = set(source_of.values())
    if inherit is not None:
        if inherit.source not in sources:
            raise KeyError(f"The student inherits from {_unknown_source(inherit.source, sources)}")
        needed.add(inherit.source)
        inherit.check(student)
    wiring = Wiring(
        sources={name: source for name, source in sources.items() if name in needed},
        terms=kept,
        source_of=source_of,
    )
    wiring.all_source_taps = {
        **dict.fromkeys(wiring.sources, ()),
        **wiring.source_taps(kept),
    }
    for name, source in wiring.sources.items():
        users = [term for of, term in kept.items() if source_of[of] == name]
        source.targets_saved = any(term.saves_target for term in users)
    detector = describe(student)
    with preserved_rng():
        for name, source in wiring.sources.items():
            with _named(f"Source '{name}'"):
                source.attach(student)
        for name, term in kept.items():
            with _named(f"Term '{name}'"):
                wiring.taps.update({tap: detector.tap(tap) for tap in term.student_taps()})
        for name, source in wiring.sources.items():
            with _named(f"Source '{name}'"):
                names = source.student_taps(wiring.all_source_taps[name])
                wiring.taps.update({tap: detector.tap(tap) for tap in names})
        with _named("The student"):
            seen = probe(student, wiring.taps.values(), class_names(classes)) if wiring.taps else {}
        wiring.expected_calls = {
            path: seen[name][0].calls for name, tap in wiring.taps.items() for path in tap.paths
        }
        try:
            shapes = {}
            for name, source in wiring.sources.items():
                with _named(f"Source '{name}'"):
                    source.wire(seen)
                    shapes[name] = source.shapes(wiring.all_source_taps[name])
        except SourceUnavailable as e:
            wiring.unavailable = e
            return wiring
        for name, term in kept.items():
            with _named(f"Term '{name}'"):
                wiring.rows[name] = term.wire(seen, shapes[source_of[name]])
            for note in dict.fromkeys(row.note for row in wiring.rows[name] if row.note):
                logger.info("Term '%s': %s.", name, note)
    return wiring


def _check_unwrapped(student: nn.Module) -> None:
    if isinstance(student, DistributedDataParallel) or hasattr(student, "_orig_mod"):
        inside = next(name for name, _ in student.named_children())
        raise ValueError(
            f"The student is wrapped in {type(student).__name__}: its checkpoint would have the "
            f"names '{inside}.*', and nobody knows its taps. Give the Distiller the detector "
            "itself; wrap the Distiller in DistributedDataParallel, and compile in place: "
            "student.backbone.compile()."
        )


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors of a part begin with its name: a config has many of them."""
    try:
        yield
    except (ValueError, KeyError) as e:
        raise type(e)(f"{what}: {e.args[0]}") from None


def _source_of(name: str, term: Term, sources: Mapping[str, Source]) -> str:
    if not term.source:
        if len(sources) == 1:
            return next(iter(sources))
        raise ValueError(
            f"Term '{name}' names no SOURCE, and there are {len(sources)} of them "
            f"({', '.join(sources) or 'none'}): say which one it imitates."
        )
    if term.source not in sources:
        raise KeyError(f"Term '{name}' imitates {_unknown_source(term.source, sources)}")
    return term.source


def _unknown_source(name: str, sources: Mapping[str, Source]) -> str:
    return (
        f"the source '{name}', which does not exist.{did_you_mean(name, sources)} "
        f"Sources: {', '.join(sources) or 'none'}."
    )
