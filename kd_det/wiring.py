"""Wiring: terms are tied to taps of the student and of their sources, and sized."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd_det.classes import ClassNames, class_names
from kd_det.detectors import TapShape, describe, probe
from kd_det.inherit import Inherit
from kd_det.registry import did_you_mean
from kd_det.rng import preserved_rng
from kd_det.sources import STUDENT, Source, SourceUnavailable, Student
from kd_det.taps import ROWS, Tap
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
        learner_of: name of each term's learner, `STUDENT` or a source.
        networks: the whole detectors that learn, the student first.
        taps: the student's taps by name.
        expected_calls: how often each tapped module of the student fires per forward.
        all_source_taps: for every source all taps that any term reads.
        rows: one row per term and level.
        unavailable: why training cannot start (a source's file is missing), or ``None``.
    """

    sources: dict[str, Source]
    terms: dict[str, Term]
    source_of: dict[str, str] = field(default_factory=dict)
    learner_of: dict[str, str] = field(default_factory=dict)
    networks: dict[str, nn.Module] = field(default_factory=dict)
    taps: dict[str, Tap] = field(default_factory=dict)
    expected_calls: dict[str, int] = field(default_factory=dict)
    all_source_taps: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: dict[str, list[PlanRow]] = field(default_factory=dict)
    unavailable: SourceUnavailable | None = None

    def student_taps(self, active: Iterable[str], over: Collection[str] = ()) -> dict[str, Tap]:
        """The student's taps that these terms, and the sources of `source_taps`, read."""
        active = list(active)
        names = [
            tap
            for term in active
            if self.learner_of[term] == STUDENT
            for tap in self.terms[term].student_taps()
        ]
        for source, asked in self.source_taps(active, over).items():
            names += self.sources[source].student_taps(asked)
        return {name: self.taps[name] for name in dict.fromkeys(names)}

    def source_taps(
        self, active: Iterable[str], over: Collection[str] = ()
    ) -> dict[str, tuple[str, ...]]:
        """
        For every source that runs, the names of the taps that these terms and other sources read;
        a source comes behind those that it reads.

        Args:
            active: names of terms.
            over: names of sources that no term needs any more: the others run where they learn
                (`Source.learns`), whether a term reads them or not.
        """
        asked: dict[str, list[str]] = {
            name: []
            for name, source in self.sources.items()
            if source.is_learner or (source.learns and name not in over)
        }
        for term in active:
            asked.setdefault(self.source_of[term], []).extend(self.terms[term].source_taps())
            if self.learner_of[term] != STUDENT:
                asked[self.learner_of[term]].extend(self.terms[term].student_taps())
        for name in reversed(self.sources):  # who reads comes behind whom it reads
            if name in asked:
                for read, taps in self.sources[name].reads(tuple(asked[name])).items():
                    asked.setdefault(read, []).extend(taps)
        return {name: tuple(dict.fromkeys(asked[name])) for name in self.sources if name in asked}

    def network_name(self, name: str) -> str:
        """
        The network of that name, `STUDENT` for none.

        Raises:
            KeyError: if there is no such network.
            SourceUnavailable: if a file is missing that says what it is.
        """
        if name and name not in self.networks:
            raise self.unavailable or KeyError(
                f"There is no network '{name}' to be exported.{did_you_mean(name, self.networks)} "
                f"Networks: {', '.join(self.networks)}."
            )
        return name or STUDENT

    def over(self, unfinished: Iterable[str]) -> list[str]:
        """
        Names of the sources that nobody needs until the end of the run.

        Args:
            unfinished: names of the terms that are not over.
        """
        needed = self.source_taps(unfinished, over=self.sources)
        return [name for name in self.sources if name not in needed]


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
    if inherit is not None:
        if inherit.source not in sources:
            raise KeyError(f"The student inherits from {_unknown_source(inherit.source, sources)}")
        inherit.check(student)
    known = _with_student(sources)
    wiring = Wiring(sources={}, terms=kept, networks={STUDENT: student})
    for name, term in kept.items():
        wiring.source_of[name] = _source_of(name, term, sources, known)
        wiring.learner_of[name] = _learner_of(name, term, known)
    wiring.sources = _needed(wiring, known, inherit)
    if not (kept or wiring.sources):
        logger.warning("No term has a weight: this run trains the plain student.")
    wiring.all_source_taps = {
        **dict.fromkeys(wiring.sources, ()),
        **wiring.source_taps(kept),
    }
    for name, source in wiring.sources.items():
        users = [term for of, term in kept.items() if wiring.source_of[of] == name]
        source.targets_saved = any(term.saves_target for term in users)
        source.run_name = name
        source.run_classes = class_names(classes)
    with preserved_rng():
        try:
            for name, source in wiring.sources.items():
                with _named(f"Source '{name}'"):
                    _attach(source, wiring.networks)
            shapes = _shapes(wiring, class_names(classes))
        except SourceUnavailable as e:
            wiring.unavailable = e
            return wiring
        for name, term in kept.items():
            learner, of = wiring.learner_of[name], wiring.source_of[name]
            with _named(f"Term '{name}'"):
                wiring.rows[name] = term.wire(shapes[learner], shapes[of])
            for note in dict.fromkeys(row.note for row in wiring.rows[name] if row.note):
                logger.info("Term '%s': %s.", name, note)
    return wiring


def _shapes(wiring: Wiring, classes: ClassNames) -> dict[str, dict[str, list[TapShape]]]:
    """What all taps look like, by learner or source; the student's taps go into the wiring."""
    student = wiring.networks[STUDENT]
    detector = describe(student)
    for name, term in wiring.terms.items():
        if wiring.learner_of[name] == STUDENT:
            with _named(f"Term '{name}'"):
                wiring.taps.update({tap: detector.tap(tap) for tap in term.student_taps()})
    for name, source in wiring.sources.items():
        with _named(f"Source '{name}'"):
            names = source.student_taps(wiring.all_source_taps[name])
            wiring.taps.update({tap: detector.tap(tap) for tap in names})
    with _named("The student"):
        seen = probe(student, wiring.taps.values(), classes) if wiring.taps else {}
    wiring.expected_calls = {
        path: seen[name][0].calls for name, tap in wiring.taps.items() for path in tap.paths
    }
    shapes: dict[str, dict[str, list[TapShape]]] = {STUDENT: seen}
    for name, source in wiring.sources.items():
        with _named(f"Source '{name}'"):
            source.wire(seen)
            source.wire_members({member: shapes[member] for member in source.members})
            found = source.shapes(wiring.all_source_taps[name])
        shapes[name] = {**shapes.get(name, {}), **found}
    return shapes


def _needed(
    wiring: Wiring, known: Mapping[str, Source], inherit: Inherit | None
) -> dict[str, Source]:
    """The sources that something needs, each behind those that it is made of or reads."""
    wanted = [*wiring.source_of.values()]
    wanted += [name for name, source in known.items() if source.is_learner]
    wanted += [inherit.source] if inherit is not None else []
    placed: dict[str, Source] = {}

    def place(name: str, readers: tuple[str, ...]) -> None:
        if name in readers:
            raise ValueError(f"Sources read each other in a circle: {', '.join((*readers, name))}.")
        source = known[name]
        for below in (*source.members, *filter(None, [source.of])):
            if below not in known:
                raise KeyError(f"Source '{name}' is made of {_unknown_source(below, known)}")
            place(below, (*readers, name))
        placed[name] = source

    for name in dict.fromkeys(n for n in known if n in wanted):
        place(name, ())
    return placed


def _attach(source: Source, networks: dict[str, nn.Module]) -> None:
    of = source.of or STUDENT
    if of not in networks:
        raise ValueError(
            f"it is made of '{of}', which is no network: OF names a peer, or is empty for the "
            f"student. Networks: {', '.join(networks)}."
        )
    source.attach(networks[of])
    if source.network is not None:
        for name, network in networks.items():
            if network is source.network:
                raise ValueError(
                    f"its network is that of '{name}' itself, of which there is nothing to learn: "
                    "give it one of its own."
                )
        networks[source.run_name] = source.network


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


def _with_student(sources: Mapping[str, Source]) -> dict[str, Source]:
    """The sources, and the student as one of them."""
    if STUDENT in sources:
        raise ValueError(f"A source cannot be called '{STUDENT}': that is the student itself.")
    return {STUDENT: Student(), **sources}


def _source_of(
    name: str, term: Term, sources: Mapping[str, Source], known: Mapping[str, Source]
) -> str:
    if not term.source:
        if len(sources) == 1:
            return next(iter(sources))
        raise ValueError(
            f"Term '{name}' names no SOURCE, and there are {len(sources)} of them "
            f"({', '.join(sources) or 'none'}): say which one it imitates."
        )
    if term.source not in known:
        raise KeyError(f"Term '{name}' imitates {_unknown_source(term.source, known)}")
    return term.source


def _learner_of(name: str, term: Term, known: Mapping[str, Source]) -> str:
    learner = term.learner or STUDENT
    if learner not in known:
        raise KeyError(f"Term '{name}' teaches {_unknown_source(learner, known)}")
    if learner == STUDENT:
        return learner
    if not known[learner].is_learner:
        raise ValueError(
            f"Term '{name}' teaches '{learner}', a {type(known[learner]).__name__}, which no term "
            "can move: LEARNER names a network that learns the task (a Peer, a SecondHead), or is "
            "empty for the student."
        )
    if set(term.student_taps()) & set(ROWS):
        raise ValueError(
            f"Term '{name}' compares regions of interest, and sources look at those of the student "
            f"alone: LEARNER '{learner}' has others. Leave LEARNER empty."
        )
    return learner


def _unknown_source(name: str, sources: Mapping[str, Source]) -> str:
    return (
        f"the source '{name}', which does not exist.{did_you_mean(name, sources)} "
        f"Sources: {', '.join(sources) or 'none'}."
    )
