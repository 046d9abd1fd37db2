"""A plan as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from .params import NamedParam
from .pieces import Piece
from .world import World

_HEAD = ("name", "whole", "local", "placements", "owned", "group", "decay")


def format_plan(
    world: World, entries: Sequence[NamedParam], pieces: Sequence[Piece], owned: Sequence[bool], numel: int
) -> str:
    """A row for each parameter that this rank holds, and a line that sums up."""
    rows = [_HEAD] + [_row(*columns) for columns in zip(entries, pieces, owned, strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    mine = sum(piece.numel for piece, own in zip(pieces, owned, strict=True) if own)
    lines.append(f"rank {world.rank} of {world.size} speaks for {mine:,} of {numel:,} elements")
    return "\n".join(lines)


def _row(entry: NamedParam, piece: Piece, owned: bool) -> tuple[str, ...]:
    whole, local = ("×".join(map(str, shape)) or "scalar" for shape in (piece.shape, piece.local_shape))
    return (
        entry.name,
        f"{piece.shape[0]} pieces" if piece.is_counted else whole,
        local,
        piece.placements,
        "yes" if owned else "no",
        str(entry.group),
        entry.decay or "-",
    )
