"""The plan: who holds what, who speaks for it, and numbers about the whole model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._torch import layout_spec
from ..kernels.sums import wide_dtype
from ..kernels.workspace import Workspace
from ..sharding.build import Built, Call, build
from ..sharding.explain import explain_change
from ..sharding.layout import Layout, check_layout
from ..sharding.local import local_like
from ..sharding.params import NamedParam, entries_of
from ..sharding.pieces import Piece
from ..sharding.tables import format_plan
from ..sharding.world import World
from .measure import Part, Request, Source, measure, sources_of
from .metric import Metric, parse_metric

Made = TypeVar("Made")

_MAX_KEPT = 64


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Who holds which piece of every parameter, and which rank speaks for it.

    Built once, by one exchange of descriptions (56 bytes per parameter and rank); frozen; `print(plan)` shows it as a table.
    For each piece that several ranks hold, the lowest rank owns it, so that every element of the model counts exactly once.

    >>> import torch
    >>> from distwd import Plan
    >>> plan = Plan.build([("w", torch.ones(2, 3))])
    >>> plan.metric([torch.full((2, 3), -2.0)], "mad")
    tensor(2.)
    """

    world: World
    entries: tuple[NamedParam, ...]
    pieces: tuple[Piece, ...]
    owned: tuple[bool, ...]
    cells: tuple[int, ...]
    num_groups: int
    _built: Built = field(repr=False)
    _stamps: list[Any] = field(repr=False)
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)
    _index: dict[tuple[tuple[int, ...], Any], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        params: Iterable[Any],
        *,
        group: dist.ProcessGroup | None = None,
        layout: Layout | None = None,
        check_replicas: bool = True,
    ) -> Plan:
        """Find out, together with the other ranks, who holds what.

        params: tensors, (name, tensor) pairs, or group dicts, as torch.optim takes them; any shapes, float dtypes.
            Names make errors readable and are needed where ranks hold different parameters.
        group: the ranks that together hold the model; default all ranks if torch.distributed is initialised.
        layout: {glob of names or predicate(name, tensor): Sharded(group) | Replicated(group)}, for tensors whose
            ownership no DTensor tells; the first pattern that matches counts.
        check_replicas: compare the bits of all copies of a piece (one read of the parameters).

        A collective call: every rank of `group` must make it. Two all-gathers.
        Raises PlanError, on every rank alike, if a tensor cannot be used, if ranks mean different shapes or dtypes by
        one name, if the pieces of a name do not cover it exactly once, or if copies differ.
        """
        return build_plan(entries_of(params), group, layout, check_replicas)

    def metric(self, tensors: Sequence[Tensor | None], metric: str | float = "mad") -> Tensor:
        """A metric over `tensors`, which correspond to the plan's parameters one by one (their gradients, say).

        tensors: DTensors or local tensors, of the parameters' local shapes; None counts as zeros. metric: as in `global_metric`.
        Returns a 0-d float32 tensor (float64 if every parameter is float64), with the same bits on every rank. One all-reduce.
        Raises ValueError if their number or local shapes are not the plan's, or the metric is not known.
        """
        kind = parse_metric(metric)
        if len(tensors) != len(self.entries):
            raise ValueError(
                f"plan.metric got {len(tensors)} tensors for a plan of {len(self.entries)} parameters; pass one (or None) for each"
            )
        with torch.no_grad():
            locals_ = [
                None if t is None else local_like(t, e.tensor) for t, e in zip(tensors, self.entries, strict=True)
            ]
            for local, piece in zip(locals_, self.pieces, strict=True):
                if local is not None and tuple(local.shape) != piece.local_shape:
                    raise ValueError(
                        f"{piece.name}: got a local tensor of shape {tuple(local.shape)}, the plan has {piece.local_shape}"
                    )
            (value,) = measure([self.request(kind, sources_of(locals_))], self.world, Workspace())
        return value[0].to(self.result_dtype)

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of metrics, the same on every rank: float32, or float64 for a model in float64."""
        return torch.float64 if self._built.is_wide else torch.float32

    def request(self, metric: Metric, sources: Sequence[Source], scope: str = "all") -> Request:
        """What to measure of local tensors; pieces that another rank speaks for are left out, missing ones count as zeros."""
        parts: list[Part] = []
        missing = self._num_owned(scope).copy()
        for share in sources:
            for cell, some in self._owned_among(share.positions, scope).items():
                tensors = self._counted(share.positions, share.tensors, some)
                minus = self._counted(share.positions, share.minus, some) if share.minus else []
                parts.append(Part(cell, tensors, minus, share.scale))
                missing[cell] -= len(some)
        place_of = {part.cell: place for place, part in enumerate(parts)}
        for cell in sorted(cell for cell, number in missing.items() if number):
            if cell in place_of:
                parts[place_of[cell]] = replace(parts[place_of[cell]], zeros=True)
            else:
                parts.append(Part(cell, [], [], zeros=True))
        device = sources[0].tensors[0].device if sources else self.world.device
        return Request(metric, parts, self._numel_of(scope, device))

    def _counted(self, positions: Sequence[int], locals_: Sequence[Tensor], some: Sequence[int]) -> list[Tensor]:
        """Some of the local tensors, without what only pads them."""
        if not self._has_padding:
            return [locals_[place] for place in some]
        pieces = [self.pieces[positions[place]] for place in some]
        return [
            locals_[place].flatten()[: piece.numel] if piece.padding else locals_[place]
            for place, piece in zip(some, pieces, strict=True)
        ]

    @property
    def _has_padding(self) -> bool:
        return self._kept("padding", lambda: any(piece.padding for piece in self.pieces))

    def _num_owned(self, scope: str) -> Counter[int]:
        """By cell, how many pieces this rank speaks for."""
        return self._kept(scope, lambda: Counter(compress(self._cells(scope), self.owned)))

    def _owned_among(self, positions: Sequence[int], scope: str) -> dict[int, list[int]]:
        """By cell, which of these positions are of pieces that this rank speaks for."""

        def find() -> dict[int, list[int]]:
            cells, found = self._cells(scope), defaultdict(list)
            for place, position in enumerate(positions):
                if self.owned[position]:
                    found[cells[position]].append(place)
            return found

        return self._kept_of(positions, scope, find)

    def _kept(self, key: Any, make: Callable[[], Made]) -> Made:
        """What is made once, and not in every step."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def _kept_of(self, positions: Sequence[int], key: Any, make: Callable[[], Made]) -> Made:
        """What is made once for some of the parameters."""
        full = (tuple(positions), key)
        if full not in self._index:
            if len(self._index) >= _MAX_KEPT:  # gradients that come and go make ever new combinations
                self._index.clear()
            self._index[full] = make()
        made: Made = self._index[full]
        return made

    def _cells(self, scope: str) -> Sequence[int]:
        if scope == "all":
            return (0,) * len(self.entries)
        return [entry.group for entry in self.entries] if scope == "group" else self.cells

    def _numel_of(self, scope: str, device: torch.device) -> Tensor:
        """[cells] elements over all ranks, kept on `device`."""

        def make() -> Tensor:
            by_scope = {"all": self._built.numel.sum().reshape(1), "group": self._built.group_numel}
            return by_scope.get(scope, self._built.numel).to(device, wide_dtype(device))

        return self._kept(("numel", scope, device), make)

    @property
    def num_names(self) -> int:
        """Parameters of the whole model."""
        return len(self._built.numel)

    @property
    def num_holders(self) -> tuple[int, ...]:
        """For each piece of this rank, how many ranks hold it."""
        return self._built.num_holders

    @property
    def has_copies(self) -> bool:
        """Whether any piece of the model is held by several ranks; the same on every rank."""
        return self._built.has_copies

    @property
    def numel(self) -> int:
        """Elements of the whole model, each counted once."""
        return int(self._built.numel.sum())

    def cells_of(self, positions: Sequence[int], device: torch.device) -> Tensor:
        """Where the numbers of these parameters stand among per-tensor numbers; kept on `device`, so that a step copies nothing."""
        return self._kept_of(
            positions, device, lambda: torch.tensor([self.cells[position] for position in positions], device=device)
        )

    def offset_of(self, position: int) -> int:
        """Elements of the whole before a piece that is known by its number, if the plan was built to tell."""
        return self._built.offsets[position]

    def fits(self, entries: Sequence[NamedParam]) -> bool:
        """Whether `entries` still have the names, groups, shapes and placements that this plan was built for, in whatever storage."""
        if entries is not self.entries and list(map(_identity, entries)) != list(map(_identity, self.entries)):
            return False
        # Lists compare their elements by identity first, and few stamps are ever compared otherwise.
        return [_stamp(entry.tensor) for entry in entries] == self._stamps

    def meet(self, entries: Sequence[NamedParam], rules: str) -> None:
        """Wait until every rank is about to build another plan. Raises PlanError if some are not: they go on with this one."""
        if self.world.error_store is not None:
            self.world.error_store.meet(explain_change(self.entries, entries, rules))

    def __str__(self) -> str:
        return format_plan(self.world, self.entries, self.pieces, self.owned, self.numel)


def build_plan(
    entries: tuple[NamedParam, ...],
    group: dist.ProcessGroup | None = None,
    layout: Layout | None = None,
    check_replicas: bool = True,
    rules: str = "",
    offsets: bool = False,
) -> Plan:
    """`Plan.build` for entries; rules: a text that must be the same on every rank; offsets: whether `offset_of` will be asked."""
    check_layout(layout or {})
    call = Call(World.of(group), layout or {}, check_replicas, rules, offsets)
    built = build(entries, call)
    stamps = [_stamp(entry.tensor) for entry in entries]
    world = replace(call.world, error_store=built.error_store)
    return Plan(world, entries, built.pieces, built.owned, built.name_ids, built.num_groups, built, stamps)


def _stamp(tensor: Tensor) -> Any:
    """What must not change as long as a plan is to hold."""
    return layout_spec(tensor) if isinstance(tensor, DTensor) else (tensor.shape, tensor.dtype)


def _identity(entry: NamedParam) -> tuple[str, int]:
    return entry.name, entry.group
