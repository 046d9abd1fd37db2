"""Text tables for people: the plan, and the audit of what decays by how much."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .params import NamedParam
from .pieces import Piece
from .world import World

_PLAN_HEAD = ("name", "whole", "local", "placements", "owned", "group", "decay")
_AUDIT_HEAD = ("group", "weight_decay", "parameters", "whole", "tensors", "elements", "also", "rule")
# A part of a dotted name that is a number: of a layer, or of an expert.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of text with aligned columns, two spaces apart; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def plan_table(
    world: World,
    entries: Sequence[NamedParam],
    pieces: Sequence[Piece],
    owned: Sequence[bool],
    numel: int,
    owners: Sequence[int | None] | None = None,
    folds: bool = False,
) -> str:
    """A row for each parameter that this rank holds, and a line that sums up.

    pieces, owned: of each parameter, the piece that is here and whether this rank owns it.
    numel: elements of the whole model.
    owners: the rank that owns each piece, None where nobody does; None where this rank knows of itself alone.
    folds: whether parameters of equal layers share a row, as `layers.0–79.norm.weight`.
    """
    rows: list[Sequence[str]] = [_PLAN_HEAD]
    for number, (entry, piece, own) in enumerate(zip(entries, pieces, owned, strict=True)):
        # The true shape of a whole that is known as a number of pieces is known to nobody.
        whole = f"{piece.shape[0]} pieces" if piece.is_counted else _shape(piece.shape)
        own_word = "yes" if own else "no"
        # A copy, or a shard without elements.
        if owners is not None and not own:
            own_word = "nobody" if owners[number] is None else f"rank {owners[number]}"
        rows.append(
            (
                entry.name,
                whole,
                _shape(piece.local_shape),
                piece.placements,
                own_word,
                str(entry.group),
                entry.decay or "-",
            )
        )
    if folds:
        alike: dict[tuple[object, ...], list[str]] = {}
        for row in rows[1:]:
            alike.setdefault((_NUMBER.sub("*", row[0]), *row[1:]), []).append(row[0])
        rows = [_PLAN_HEAD, *((_folded(same), *map(str, key[1:])) for key, same in alike.items())]
    # The sum over all ranks of this number is the last number: what a user can check.
    num_owned = sum(piece.numel for piece, own in zip(pieces, owned, strict=True) if own)
    last = f"rank {world.rank} of {world.size} owns {num_owned:,} of {numel:,} elements"
    return "\n".join([*text_table(rows), last])


def _folded(names: Sequence[str]) -> str:
    """Names that differ in numbers alone as one, with ranges: `layers.0–31.experts.0–7.weight`."""
    found = [[int(number) for number in _NUMBER.findall(name)] for name in names]
    ranges, count = [], 1
    for numbers in zip(*found, strict=True):
        different = sorted(set(numbers))
        count *= len(different)
        parts: list[list[int]] = []
        for number in different:
            if parts and parts[-1][-1] == number - 1:
                parts[-1].append(number)
            else:
                parts.append([number])
        ranges.append(",".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts))
    # Ranges of several numbers mean all their combinations. Where some are missing they would say too much.
    words = iter(ranges if count == len(names) else ["*"] * len(ranges))
    return _NUMBER.sub(lambda match: next(words), names[0]) + ("" if count == len(names) else f" ({len(names)})")


@dataclass(frozen=True, slots=True)
class AuditRow:
    """How one parameter decays.

    name: of the parameter.
    shape: of its whole tensor.
    group: the index of its param group.
    decays: λ of each rule.
    also: other hyperparameters as text.
    rule: what put it into its group, or what decays it, as text.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    decays: tuple[float, ...]
    also: str
    rule: str

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def audit_table(rows: Sequence[AuditRow]) -> str:
    """A line for each kind of parameter, and one that sums up.

    rows: one for each parameter. Those of equal layers are put together as `layers.*.norm.weight`: of a large model
        nobody would read them all.
    """
    # Sorted by group; within a group the order of the model is kept, for sorting is stable.
    kinds: dict[tuple[object, ...], list[AuditRow]] = {}
    for row in sorted(rows, key=lambda row: row.group):
        kinds.setdefault((row.group, row.rule, _NUMBER.sub("*", row.name), row.shape), []).append(row)
    lines: list[Sequence[str]] = [_AUDIT_HEAD]
    for alike in kinds.values():
        first = alike[0]
        # A lone `layers.7.weight` is not a pattern: the other layers are in another group, or of another shape.
        name = first.name if len(alike) == 1 else _NUMBER.sub("*", first.name)
        # A rule of one's own may have no λ; its coefficient comes from something else.
        decays = "; ".join("?" if math.isnan(decay) else f"{decay:g}" for decay in first.decays) or "-"
        elements = f"{sum(row.numel for row in alike):,}"
        lines.append(
            (
                str(first.group),
                decays,
                name,
                _shape(first.shape),
                str(len(alike)),
                elements,
                first.also or "-",
                first.rule,
            )
        )
    sums = []
    for wanted in (True, False):
        some = [row for row in rows if any(row.decays) is wanted]
        sums.append(f"{len(some)} tensors, {sum(row.numel for row in some):,} elements")
    return "\n".join([*text_table(lines), f"decayed: {sums[0]}; not decayed: {sums[1]}"])


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"
