"""Building a plan: describe what is here, exchange it, find the owners, and raise together if anything is wrong.

Two all-gathers of integers. A third exchange, of text, is made only to explain an error.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._torch import is_fake, local_tensor, plain_tensors
from ..errors import PlanError
from .collectives import gather_objects, gather_rows
from .explain import SHOWN, PieceReport, explain
from .layout import Layout, Mark, find_mark
from .ownership import CHECKSUM, NUM_COLUMNS, OwnerTable, checksums_of, offsets_of, resolve, rows_of, stable_hash
from .params import NamedParam
from .pieces import Meshes, Piece, check_matrices, check_params, describe, is_measurable
from .world import MAX_ACCELERATORS, ErrorStore, World

# The first row of every rank is about the rank itself: whether it objects, a hash of its rules, whether its tensors are
# named, how many groups it has, a hash of its other arguments, which patterns of its layout have matched (bits), a
# number for the plan. The bits of the patterns have others above them.
_OBJECTS, _RULES, _NAMED, _GROUPS, _ARGUMENTS, _MATCHED, _NUMBER = range(NUM_COLUMNS)
# Patterns are the lower bits of one int64. Above them, and below the sign: on which accelerators tensors lie, and whether
# some tensors are not float64.
_MAX_PATTERNS = 62 - MAX_ACCELERATORS
_NARROW = 1 << 62
_MARKS = 1 << 20
# Values of _NAMED. A rank without parameters is of neither kind, and fits to both.
_UNNAMED, _ALL_NAMED, _EMPTY = 0, 1, 2


@dataclass(frozen=True, slots=True)
class BuildArgs:
    """How a plan is asked for.

    world: the ranks that hold the model.
    layout: the marks of plain tensors, see layout.py.
    check_replicas: whether to compare the bits of copies.
    rules: what will be measured, as text; must be the same on every rank.
    offsets: whether to find where counted pieces begin in their wholes.
    frozen: positions of parameters that are not trained now.
    by_matrix: whether numbers of single matrices will be asked for, so that each tensor must tell its own.
    objection: why this rank cannot take part, if something else than its parameters is wrong.
    """

    world: World
    layout: Layout
    check_replicas: bool = True
    rules: str = ""
    offsets: bool = False
    frozen: frozenset[int] = frozenset()
    by_matrix: bool = False
    objection: str | None = None

    @property
    def arguments(self) -> str:
        """What must be the same on every rank besides the rules, as text."""
        return f"check_replicas={self.check_replicas}, a layout of {len(self.layout)} patterns"


@dataclass(frozen=True, slots=True, eq=False)
class Ownership:
    """What `build` finds. First by parameter of this rank, then over all ranks, where every rank has the same.

    pieces: what this rank holds of each parameter.
    owned: whether this rank owns the piece.
    name_ids: the place of each name among all names.
    num_holders: how many ranks hold each piece.
    first_cells: the place of each parameter's first matrix among all matrices of the model, in the order of the names.
    offsets: elements of the whole before each counted piece; () if that was not asked for.
    has_copies: whether any piece is held by several ranks.
    num_names: how many names there are.
    num_cells: how many matrices there are.
    num_groups: the largest number of param groups of any rank.
    numel: elements of all whole tensors.
    alike: tuples of names that have the same bits, see `OwnerTable.alike`.
    is_wide: whether every tensor is float64.
    world: these ranks, with the store where they publish errors, and the device that they all send from in a step.
    mark: a number that no other plan of these ranks has, by all odds.
    """

    pieces: tuple[Piece, ...]
    owned: tuple[bool, ...]
    name_ids: tuple[int, ...]
    num_holders: tuple[int, ...]
    first_cells: tuple[int, ...]
    offsets: tuple[int, ...]
    has_copies: bool
    num_names: int
    num_cells: int
    num_groups: int
    numel: int
    alike: list[tuple[int, ...]]
    is_wide: bool
    world: World
    mark: int


def build(entries: Sequence[NamedParam], args: BuildArgs) -> Ownership:
    """Find out, together with the other ranks, who owns what.

    entries: the parameters of this rank.
    Raises PlanError on every rank alike, and with the same text, if anything is wrong on any of them.
    """
    # What is described and exchanged are numbers. They must be real ones on the CPU, also where a user makes tensors
    # without values (FakeTensorMode) or on another device by default.
    with plain_tensors():
        return _build(entries, args)


def _build(entries: Sequence[NamedParam], args: BuildArgs) -> Ownership:
    local = _report(entries, args)
    args.world.meet("build a plan")
    gathered = gather_rows(local.rows, args.world)
    headers = torch.stack([part[0] for part in gathered])
    _check_headers(headers, local.objection, args)
    # A pipeline stage may have fewer groups than another. Per-group numbers are vectors over the longest list.
    num_groups = int(headers[:, _GROUPS].max())
    rows = [part[1:] for part in gathered]
    found = resolve(rows, args.world.rank)
    # The other ranks of a fake backend, which simulates many in one process, have told nothing.
    if not args.world.is_fake:
        _check_pieces(found, entries, local, args.world)
    first_cells = found.num_cells.cumsum(0) - found.num_cells
    # Bits of all ranks: what one of them holds, numbers in a step, and who sends them from where, must not differ by.
    bits = 0
    for own in headers[:, _MATCHED].tolist():
        bits |= own
    # Every rank drew a random number; the first rank's is the plan's, so no two plans share keys of the store.
    number = int(headers[0, _NUMBER])
    world = args.world.at(_trained_on(entries, args), bits >> _MAX_PATTERNS & (1 << MAX_ACCELERATORS) - 1)
    return Ownership(
        pieces=local.pieces,
        owned=tuple(found.owned.tolist()),
        name_ids=tuple(found.name_ids.tolist()),
        num_holders=tuple(found.holders.tolist()),
        first_cells=tuple(first_cells[found.name_ids].tolist()),
        offsets=offsets_of(local.pieces, rows) if args.offsets else (),
        has_copies=found.has_copies and not args.world.is_fake,
        num_names=len(found.names),
        num_cells=int(found.num_cells.sum()),
        alike=[] if args.world.is_fake else found.alike,
        num_groups=num_groups,
        numel=found.numel,
        # By the dtypes of all ranks: a metric must have the same bits on a rank that holds other tensors, or none.
        is_wide=len(found.names) > 0 and not bits & _NARROW,
        world=replace(world, error_store=ErrorStore.of(args.world.group, number)),
        # Small enough for float32 to hold it exactly.
        mark=number % _MARKS + 1,
    )


# --- what this rank sends ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LocalReport:
    """What this rank sends to the others.

    pieces: of its parameters; incomplete if it objects.
    objection: why it cannot take part; None if it can.
    rows: [1 + pieces, 7] int64: a row about the rank itself, then its pieces.
    """

    pieces: tuple[Piece, ...]
    objection: str | None
    rows: Tensor


def _report(entries: Sequence[NamedParam], args: BuildArgs) -> LocalReport:
    named = _EMPTY
    if entries:
        named = _ALL_NAMED if all(entry.named for entry in entries) else _UNNAMED
    matched: set[int] = set()
    # What is sent if this rank objects: no rows, so that the exchange goes its usual way.
    pieces: tuple[Piece, ...] = ()
    objection, rows = None, torch.zeros(0, NUM_COLUMNS, dtype=torch.int64)
    # An error is sent, not raised: a rank that raises alone leaves the others waiting in the exchange. ValueErrors come
    # from our checks, RuntimeErrors from torch, of tensors whose bits cannot be read.
    try:
        if args.objection is not None:
            raise ValueError(args.objection)
        check_params(entries, args.frozen)
        pieces = tuple(_describe_all(entries, args, matched))
        checksums = [(0, 0)] * len(entries)
        # With one process there are no copies to compare.
        if args.world.size > 1 and args.check_replicas:
            # Reading what is frozen would cost as much as reading the model, and its bits may be packed.
            compared = [position for position, entry in enumerate(entries) if _has_bits(position, entry, args.frozen)]
            found = checksums_of([local_tensor(entries[position].tensor) for position in compared])
            for position, checksum in zip(compared, found, strict=True):
                checksums[position] = checksum
        rows = rows_of(pieces, [entry.group for entry in entries], checksums, named != _UNNAMED)
    except (ValueError, RuntimeError) as error:
        objection = str(error)
    header = [0] * NUM_COLUMNS
    header[_OBJECTS] = int(objection is not None)
    header[_RULES] = stable_hash(args.rules)
    header[_NAMED] = named
    header[_GROUPS] = 1 + max((entry.group for entry in entries), default=0)
    header[_ARGUMENTS] = stable_hash(args.arguments)
    header[_MATCHED] = sum(1 << number for number in matched)
    header[_MATCHED] |= args.world.types_of(_trained_on(entries, args)) << _MAX_PATTERNS
    if any(piece.dtype != torch.float64 for piece in pieces):
        header[_MATCHED] |= _NARROW
    # 63 bits, so a positive int64. Not from torch's generator: building a plan must not change what a user draws next.
    header[_NUMBER] = uuid.uuid4().int >> 65
    return LocalReport(pieces, objection, torch.cat([torch.tensor([header], dtype=torch.int64), rows]))


def _trained_on(entries: Sequence[NamedParam], args: BuildArgs) -> list[torch.device]:
    """Where the tensors lie that are trained. Others, such as the model under LoRA, are in no number."""
    return [local_tensor(entry.tensor).device for n, entry in enumerate(entries) if n not in args.frozen]


def _has_bits(position: int, entry: NamedParam, frozen: frozenset[int]) -> bool:
    """Whether the bits of a parameter are compared: it is trained, and has values."""
    return position not in frozen and not is_fake(local_tensor(entry.tensor))


def _describe_all(entries: Sequence[NamedParam], args: BuildArgs, matched: set[int]) -> Iterator[Piece]:
    """The pieces in order. Adds to `matched` the numbers of the layout's patterns that match something."""
    layout = args.layout
    if len(layout) > _MAX_PATTERNS:
        raise ValueError(
            f"layout has {len(layout)} patterns; at most {_MAX_PATTERNS}: join some by a wildcard or a predicate"
        )
    seen: set[str] = set()
    meshes: Meshes = {}
    for position, entry in enumerate(entries):
        # Ranks match their pieces by name.
        if entry.name in seen:
            raise ValueError(
                f"{entry.name} is listed twice; pass every parameter once, as model.named_parameters() does"
            )
        seen.add(entry.name)
        mark: Mark | None = None
        if (found := find_mark(entry.name, entry.tensor, layout)) is not None:
            number, mark = found
            matched.add(number)
        if position in args.frozen and not is_measurable(entry.tensor):
            # It will never be trained (4-bit weights in integers, say), so its shape and where it lies do not matter.
            yield Piece(entry.name, (0,), entry.tensor.dtype, ((),), (0,), "frozen", ())
        else:
            if args.by_matrix:
                check_matrices(entry.name, entry.tensor, mark)
            yield describe(entry.name, entry.tensor, mark, meshes)


# --- what all ranks decide alike --------------------------------------------------------------------------------------


def _check_headers(headers: Tensor, objection: str | None, args: BuildArgs) -> None:
    """Raise PlanError on every rank if any objects, or if they were called differently.

    headers: [ranks, 7] int64, the same on every rank, so all take the same branch and the exchange of texts in it is
        safe.
    """
    # Objections first: a rank that could not describe its tensors differs from the others in everything that follows.
    if headers[:, _OBJECTS].any():
        raise PlanError(_by_rank(gather_objects(objection, args.world), args.world))
    # Ranks with other rules would start other collectives in a step.
    if len(headers[:, _RULES].unique()) > 1:
        texts = gather_objects(args.rules, args.world)
        raise PlanError("the ranks do not have the same rules: " + _by_rank(texts, args.world))
    # Names cannot be matched with positions.
    if len(headers[headers[:, _NAMED] != _EMPTY, _NAMED].unique()) > 1:
        raise PlanError("some ranks gave names and others did not; pass model.named_parameters() on every rank")
    if len(headers[:, _ARGUMENTS].unique()) > 1:
        texts = gather_objects(args.arguments, args.world)
        raise PlanError("the ranks do not have the same arguments: " + _by_rank(texts, args.world))
    # A pattern may well match nothing on this rank: of another pipeline stage. On no rank at all it is a typing error.
    masks = headers[:, _MATCHED].tolist()
    idle = [
        repr(pattern) for number, pattern in enumerate(args.layout) if not any(mask >> number & 1 for mask in masks)
    ]
    if idle:
        raise PlanError(
            f"layout: {', '.join(idle)} matches no parameter on any rank; print the names with model.named_parameters()"
        )


def _by_rank(texts: Sequence[str | None], world: World) -> str:
    """`rank 0, 2: this; rank 1: that`, ranks with the same text together, those without any left out."""
    if world.size == 1:
        return str(texts[0])
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text is not None:
            by_text.setdefault(text or "no relative rule", []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items())


def _check_pieces(found: OwnerTable, entries: Sequence[NamedParam], local: LocalReport, world: World) -> None:
    """Raise PlanError on every rank if pieces do not fit together, with what each rank holds of those names."""
    # The table is the same on every rank, so all return here, or all take part in the exchange below.
    if not (found.mismatched or found.uncovered or found.drifted):
        return
    wrong = {name_id for names in (found.mismatched, found.uncovered, found.drifted) for name_id in names[:SHOWN]}
    # As unsigned, which people compare more easily.
    bits = [checksum % (1 << 64) for checksum in local.rows[1:, CHECKSUM].tolist()]
    reports = [
        PieceReport(name_id, piece, entry.named, entry.group, f"bits {checksum:016x}" if checksum else "frozen")
        for name_id, piece, entry, checksum in zip(found.name_ids.tolist(), local.pieces, entries, bits, strict=True)
        if name_id in wrong
    ]
    raise PlanError(explain(found, gather_objects(reports, world)))
