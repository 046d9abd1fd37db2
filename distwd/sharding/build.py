"""Building a plan: describe, exchange, resolve, and raise together."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PlanError
from .collectives import gather_objects, gather_rows
from .error_store import ErrorStore
from .explain import SHOWN, Clue, explain
from .layout import Layout, find_mark
from .local import local_tensor
from .manifest import CHECKSUM, NUM_COLUMNS, checksums_of, offsets_of, rows_of, stable_hash
from .ownership import Ownership, resolve
from .params import NamedParam
from .pieces import Meshes, Piece, describe
from .world import World

# The first row of every rank is about the rank itself: does it object, which rules, are its tensors named, how many
# groups it has, its other arguments, which patterns of its layout have matched (bits), and a number for the plan.
_OBJECTS, _RULES, _NAMED, _GROUPS, _ARGUMENTS, _MATCHED, _NUMBER = range(NUM_COLUMNS)
_MAX_PATTERNS = 62  # as bits of one number
_NARROW = 1 << _MAX_PATTERNS  # the bit beside them: some tensors here are not float64
_UNNAMED, _ALL_NAMED, _EMPTY = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """What `build` found: this rank's pieces, which it owns, the cell of each, how many ranks hold each, where counted ones begin;
    over all ranks, whether there are copies, sizes, and whether everything is float64; and a board for these ranks."""

    pieces: tuple[Piece, ...]
    owned: tuple[bool, ...]
    name_ids: tuple[int, ...]
    num_holders: tuple[int, ...]
    offsets: tuple[int, ...]
    has_copies: bool
    num_groups: int
    numel: Tensor
    group_numel: Tensor
    is_wide: bool
    error_store: ErrorStore | None


@dataclass(frozen=True, slots=True)
class Call:
    """How a plan is asked for: the ranks, the marks of plain tensors, whether to compare bits, the rules it is for, and
    whether the places of counted pieces are wanted."""

    world: World
    layout: Layout
    check_replicas: bool = True
    rules: str = ""
    offsets: bool = False

    @property
    def arguments(self) -> str:
        """What must be the same on every rank besides the rules."""
        return f"check_replicas={self.check_replicas}, a layout of {len(self.layout)} patterns"


def build(entries: Sequence[NamedParam], call: Call) -> Built:
    """Describe this rank's entries, exchange with the world, find owners; PlanError on every rank if anything is wrong."""
    told = _tell(entries, call)
    gathered = gather_rows(told.rows, call.world)
    headers = torch.stack([part[0] for part in gathered])
    _agree_on_the_call(headers, told.objection, call)
    num_groups = int(headers[:, _GROUPS].max())
    found = resolve([part[1:] for part in gathered], call.world.rank, num_groups)
    _agree_on_the_pieces(found, entries, told, call.world)
    owned, name_ids = tuple(found.owned.tolist()), tuple(found.name_ids.tolist())
    offsets = offsets_of(told.pieces, [part[1:] for part in gathered]) if call.offsets else ()
    # Not by this rank's own tensors: a metric has the same bits on a rank that holds others, or none.
    is_wide = len(found.names) > 0 and not any(mask & _NARROW for mask in headers[:, _MATCHED].tolist())
    # A number that no other plan has, the same on every rank: the first one's.
    error_store = ErrorStore.of(call.world.group, int(headers[0, _NUMBER]))
    return Built(
        told.pieces,
        owned,
        name_ids,
        tuple(found.holders.tolist()),
        offsets,
        found.has_copies,
        num_groups,
        found.numel,
        found.group_numel,
        is_wide,
        error_store,
    )


@dataclass(frozen=True, slots=True)
class _Told:
    """What this rank has to say: its pieces, or why it cannot take part, and both as rows."""

    pieces: tuple[Piece, ...]
    objection: str | None
    rows: Tensor


def _tell(entries: Sequence[NamedParam], call: Call) -> _Told:
    matched: set[int] = set()
    pieces: tuple[Piece, ...] = ()
    objection, rows = None, torch.zeros(0, NUM_COLUMNS, dtype=torch.int64)
    # Not raised here: a rank that raises alone strands the others.
    try:
        pieces = tuple(_describe_all(entries, call.layout, matched))
        checksums = _checksums(entries, call)
        rows = rows_of(pieces, [entry.group for entry in entries], checksums, _named(entries) != _UNNAMED)
    except (ValueError, RuntimeError) as error:
        objection = str(error)
    num_groups = 1 + max((entry.group for entry in entries), default=0)
    mask = sum(1 << number for number in matched)
    mask |= _NARROW if any(piece.dtype != torch.float64 for piece in pieces) else 0
    number, arguments = uuid.uuid4().int >> 65, stable_hash(call.arguments)
    header = [objection is not None, stable_hash(call.rules), _named(entries), num_groups, arguments, mask, number]
    return _Told(pieces, objection, torch.cat([torch.tensor([header], dtype=torch.int64), rows]))


def _describe_all(entries: Sequence[NamedParam], layout: Layout, matched: set[int]) -> Iterator[Piece]:
    """The pieces in order; notes which patterns of the layout have matched."""
    if len(layout) > _MAX_PATTERNS:
        raise ValueError(
            f"layout has {len(layout)} patterns; at most {_MAX_PATTERNS}: join some by a wildcard or a predicate"
        )
    seen: dict[object, str] = {}
    meshes: Meshes = {}
    for entry in entries:
        for key in (entry.name, id(entry.tensor)):
            if key in seen:
                what = "is listed twice" if seen[key] == entry.name else f"is the same tensor as {seen[key]} (tied)"
                raise ValueError(f"{entry.name} {what}; pass every parameter once, as model.named_parameters() does")
            seen[key] = entry.name
        found = find_mark(entry.name, entry.tensor, layout)
        matched.update(() if found is None else (found[0],))
        yield describe(entry.name, entry.tensor, None if found is None else found[1], meshes)


def _named(entries: Sequence[NamedParam]) -> int:
    if not entries:
        return _EMPTY
    return _ALL_NAMED if all(entry.named for entry in entries) else _UNNAMED


def _checksums(entries: Sequence[NamedParam], call: Call) -> list[int]:
    # With one process there are no copies to compare.
    if call.world.size == 1 or not call.check_replicas:
        return [0] * len(entries)
    return checksums_of([local_tensor(entry.tensor) for entry in entries])


def _agree_on_the_call(headers: Tensor, objection: str | None, call: Call) -> None:
    """Raise on every rank if any objects, or if they were called differently; all decide by the same headers."""
    if headers[:, _OBJECTS].any():
        raise PlanError(_on_ranks(gather_objects(objection, call.world), call.world))
    if len(headers[:, _RULES].unique()) > 1:
        texts = gather_objects(call.rules, call.world)
        raise PlanError("the ranks do not have the same rules: " + _on_ranks(texts, call.world))
    kinds = headers[headers[:, _NAMED] != _EMPTY, _NAMED].unique()
    if len(kinds) > 1:
        raise PlanError("some ranks gave names and others did not; pass model.named_parameters() on every rank")
    if len(headers[:, _ARGUMENTS].unique()) > 1:
        texts = gather_objects(call.arguments, call.world)
        raise PlanError("the ranks do not have the same arguments: " + _on_ranks(texts, call.world))
    matched = headers[:, _MATCHED].tolist()
    idle = [
        repr(pattern) for number, pattern in enumerate(call.layout) if not any(mask >> number & 1 for mask in matched)
    ]
    if idle:
        raise PlanError(
            f"layout: {', '.join(idle)} matches no parameter on any rank; print the names with model.named_parameters()"
        )


def _on_ranks(texts: Sequence[str | None], world: World) -> str:
    if world.size == 1:
        return str(texts[0])
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text is not None:
            by_text.setdefault(text or "no relative rule", []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items())


def _agree_on_the_pieces(found: Ownership, entries: Sequence[NamedParam], told: _Told, world: World) -> None:
    """Raise on every rank, with everyone's account of the names in question."""
    if not (found.mismatched or found.uncovered or found.drifted):
        return
    wrong = {name_id for names in (found.mismatched, found.uncovered, found.drifted) for name_id in names[:SHOWN]}
    bits = [checksum % (1 << 64) for checksum in told.rows[1:, CHECKSUM].tolist()]
    clues = [
        Clue(name_id, piece, entry.named, entry.group, f"bits {checksum:016x}")
        for name_id, piece, entry, checksum in zip(found.name_ids.tolist(), told.pieces, entries, bits, strict=True)
        if name_id in wrong
    ]
    raise PlanError(explain(found, gather_objects(clues, world)))
