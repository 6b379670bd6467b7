"""The resolved plan of a Distiller as a table."""

from typing import Any

from tabulate import tabulate
from torch import nn

from kd_det.distiller import Distiller

_MIB = 2**20


def plan_table(distiller: Distiller, canvas: tuple[int, int, int]) -> str:
    """
    One line per term and level: what is compared with what, how, and what it costs.

    ``MiB`` is what the line holds at the end of the forward: the target's map, the connector's
    output, and the gradient that the loss saves. Weights of frozen sources come in a line of
    their own.

    Args:
        distiller: a wired Distiller.
        canvas: (N, H, W) of the padded batch.
    """
    rows: list[list[Any]] = []
    for name, term in distiller.wiring.terms.items():
        for row in distiller.wiring.rows.get(name, []):
            rows.append(
                [
                    distiller.wiring.source_of[name],
                    name,
                    f"{row.tap}.{row.level}",
                    row.target,
                    f"1/{row.stride}",
                    f"{row.student_channels} -> {row.target_channels}",
                    row.connector,
                    row.region,
                    row.loss,
                    term.weight * term.level_weight(row.level),
                    row.parameters,
                    row_bytes(row.target_channels, row.stride, canvas, row.parameters > 0) / _MIB,
                ]
            )
    header = "source term student target grid channels connector region loss weight parameters MiB"
    table = tabulate(rows, headers=header.split(), floatfmt=".4g")
    total = sum(r[-1] for r in rows)
    weights = sum(_hidden_bytes(s) for s in distiller.sources.values()) / _MIB
    return (
        f"{table}\n\nfor a batch of {canvas[0]} images padded to {canvas[1]} x {canvas[2]}: maps "
        f"{total:.4g} MiB, weights of frozen sources {weights:.4g} MiB"
    )


def row_bytes(channels: int, stride: int, canvas: tuple[int, int, int], connected: bool) -> int:
    """Bytes of float32 that one level of a term holds, see `plan_table`."""
    n, h, w = canvas
    one = 4 * n * channels * -(-h // stride) * -(-w // stride)
    return one * (3 if connected else 2)


def _hidden_bytes(source: nn.Module) -> int:
    held = getattr(getattr(source, "hidden", None), "held", None)
    tensors = [] if held is None else [*held.parameters(), *held.buffers()]
    return sum(x.numel() * x.element_size() for x in tensors)
