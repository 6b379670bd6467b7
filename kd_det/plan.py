"""The resolved plan of a Distiller as a table."""

from typing import Any

from tabulate import tabulate
from torch import nn

from kd_det.distiller import Distiller
from kd_det.sources import STUDENT

_MIB = 2**20


def plan_table(distiller: Distiller, canvas: tuple[int, int, int]) -> str:
    """
    One line per term and level: what is compared with what, how, and what it costs; below them
    what else is to be said of a term, the classes that were matched by name, say.

    ``MiB`` is what the line holds at the end of the forward: the target's map, the connector's
    output, and the gradient that the loss saves. Weights of frozen sources come in a line of
    their own, and so do the networks that train beside the student (their activations are in the
    peak that ``--dry-run`` measures).

    Args:
        distiller: a wired Distiller.
        canvas: (N, H, W) of the padded batch.
    """
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name, term in distiller.wiring.terms.items():
        for row in distiller.wiring.rows.get(name, []):
            rows.append(
                [
                    distiller.wiring.source_of[name],
                    name,
                    f"{_whose(distiller, name)}{row.tap}.{row.level}",
                    row.target,
                    f"1/{row.stride}" if row.stride else f"{row.rows} rows",
                    f"{row.student_channels} -> {row.target_channels}",
                    row.connector,
                    row.region,
                    row.loss,
                    term.weight * term.level_weight(row.value or row.level),
                    row.parameters,
                    row_bytes(
                        row.target_channels,
                        row.stride,
                        canvas,
                        row.connector != "-",
                        row.compared_channels,
                        row.rows,
                    )
                    / _MIB,
                ]
            )
            notes += [f"{name}: {row.note}"] * bool(row.note)
    header = "source term student target grid channels connector region loss weight parameters MiB"
    table = tabulate(rows, headers=header.split(), floatfmt=".4g")
    total = sum(r[-1] for r in rows)
    weights = sum(_hidden_bytes(s) for s in distiller.sources.values()) / _MIB
    below = "".join(f"\n{note}" for note in dict.fromkeys(notes))
    n, h, w = canvas
    return (
        f"{table}\n{below}\nfor a batch of {n} images padded to {h} x {w}: maps "
        f"{total:.4g} MiB, weights of frozen sources {weights:.4g} MiB{_beside(distiller)}"
    )


def _whose(distiller: Distiller, term: str) -> str:
    learner = distiller.wiring.learner_of[term]
    return "" if learner == STUDENT else f"{learner}: "


def _beside(distiller: Distiller) -> str:
    """A line per source that learns the task."""
    return "".join(
        f"\n{name} trains beside the student ({type(source).__name__}"
        f"{'' if source.network is None else f' of a {type(source.network).__name__}'}, "
        f"{sum(p.numel() for p in source.parameters() if p.requires_grad):,} parameters)"
        for name, source in distiller.wiring.sources.items()
        if source.is_learner
    )


def row_bytes(
    channels: int,
    stride: int,
    canvas: tuple[int, int, int],
    connected: bool,
    compared: int = 0,
    rows: int = 0,
) -> int:
    """
    Bytes of float32 that one level of a term holds, see `plan_table`.

    Args:
        channels: of the target's map.
        stride: pixels per cell; 0 for rows (`kd_det.taps.ROWS`).
        canvas: (N, H, W) of the padded batch.
        connected: whether the student's map is changed before it is compared.
        compared: channels that the loss sees; 0 for the target's.
        rows: per image, where there is no grid.
    """
    n, h, w = canvas
    one = 4 * n * (-(-h // stride) * -(-w // stride) if stride else rows)
    return one * (channels + (compared or channels) * (2 if connected else 1))


def _hidden_bytes(source: nn.Module) -> int:
    held = getattr(getattr(source, "hidden", None), "held", None)
    tensors = [] if held is None else [*held.parameters(), *held.buffers()]
    return sum(x.numel() * x.element_size() for x in tensors)
