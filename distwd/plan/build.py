"""Building a plan: describe, exchange, resolve, and raise together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PlanError
from ..local import local_tensor
from ..world import World
from .entries import Entry
from .exchange import gather_objects, gather_rows
from .explain import Clue, explain
from .manifest import NUM_COLUMNS, checksums_of, rows_of, stable_hash
from .owners import Ownership, resolve
from .pieces import Piece, describe

# The first row of every rank is about the rank itself: does it object, which rules, are its tensors named, how many groups.
_OBJECTS, _RULES, _NAMED, _GROUPS = range(4)
_UNNAMED, _ALL_NAMED, _EMPTY = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """What `build` found: this rank's pieces, which it owns, the cell of each, and sizes over all ranks."""

    pieces: tuple[Piece, ...]
    owned: tuple[bool, ...]
    name_ids: tuple[int, ...]
    num_groups: int
    numel: Tensor
    group_numel: Tensor


def build(entries: Sequence[Entry], world: World, check_replicas: bool, rules: str) -> Built:
    """Describe this rank's entries, exchange with the world, find owners; PlanError on every rank if anything is wrong."""
    pieces, objection = _describe_all(entries)
    named = _named(entries)
    checksums = _checksums(entries, world, check_replicas) if objection is None else []
    rows = (
        rows_of(pieces, [e.group for e in entries], checksums, named != _UNNAMED)
        if objection is None
        else torch.zeros(0, NUM_COLUMNS, dtype=torch.int64)
    )
    num_groups = 1 + max((entry.group for entry in entries), default=0)
    header = torch.tensor([[objection is not None, stable_hash(rules), named, num_groups, 0, 0, 0]], dtype=torch.int64)
    gathered = gather_rows(torch.cat([header, rows]), world)
    headers = torch.stack([part[0] for part in gathered])
    _agree_on_the_call(headers, objection, rules, world)
    num_groups = int(headers[:, _GROUPS].max())
    found = resolve([part[1:] for part in gathered], world.rank, num_groups)
    _agree_on_the_pieces(found, entries, pieces, world)
    return Built(
        pieces, tuple(found.owned.tolist()), tuple(found.name_ids.tolist()), num_groups, found.numel, found.group_numel
    )


def _describe_all(entries: Sequence[Entry]) -> tuple[tuple[Piece, ...], str | None]:
    """The pieces, or the first reason why this rank cannot take part. Not raised here: a rank that raises alone strands the others."""
    seen: dict[object, str] = {}
    try:
        for entry in entries:
            for key in (entry.name, id(entry.tensor)):
                if key in seen:
                    what = "is listed twice" if seen[key] == entry.name else f"is the same tensor as {seen[key]} (tied)"
                    raise ValueError(
                        f"{entry.name} {what}; pass every parameter once, as model.named_parameters() does"
                    )
                seen[key] = entry.name
        return tuple(describe(entry.name, entry.tensor) for entry in entries), None
    except ValueError as error:
        return (), str(error)


def _named(entries: Sequence[Entry]) -> int:
    if not entries:
        return _EMPTY
    return _ALL_NAMED if all(entry.named for entry in entries) else _UNNAMED


def _checksums(entries: Sequence[Entry], world: World, check_replicas: bool) -> list[int]:
    # With one process there are no copies to compare.
    if world.size == 1 or not check_replicas:
        return [0] * len(entries)
    return checksums_of([local_tensor(entry.tensor) for entry in entries])


def _agree_on_the_call(headers: Tensor, objection: str | None, rules: str, world: World) -> None:
    """Raise on every rank if any objects, or if they were called differently; all decide by the same headers."""
    if headers[:, _OBJECTS].any():
        objections = gather_objects(objection, world)
        raise PlanError(_on_ranks(objections, world))
    if len(headers[:, _RULES].unique()) > 1:
        raise PlanError("the ranks do not have the same rules: " + _on_ranks(gather_objects(rules, world), world))
    kinds = headers[headers[:, _NAMED] != _EMPTY, _NAMED].unique()
    if len(kinds) > 1:
        raise PlanError("some ranks gave names and others did not; pass model.named_parameters() on every rank")


def _on_ranks(texts: Sequence[str | None], world: World) -> str:
    if world.size == 1:
        return str(texts[0])
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text is not None:
            by_text.setdefault(text or "no relative rule", []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items())


def _agree_on_the_pieces(found: Ownership, entries: Sequence[Entry], pieces: Sequence[Piece], world: World) -> None:
    """Raise on every rank, with everyone's account of the names in question."""
    if not (found.mismatched or found.uncovered or found.drifted):
        return
    wrong = set(found.mismatched) | set(found.uncovered) | set(found.drifted)
    clues = [
        Clue(name_id, piece, entry.named)
        for name_id, piece, entry in zip(found.name_ids.tolist(), pieces, entries, strict=True)
        if name_id in wrong
    ]
    raise PlanError(explain(found, gather_objects(clues, world)))
