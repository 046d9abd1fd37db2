"""The plan: who holds which piece of every parameter, and which rank owns it; how it is kept, and metrics by it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import is_dtensor, layout_spec
from ..errors import CollectiveError, PlanError
from ..kernels.blocks import Workspace
from ..sharding.build import BuildArgs, build
from ..sharding.collectives import local_like
from ..sharding.explain import explain_change
from ..sharding.layout import Layout, check_layout
from ..sharding.params import NamedParam, entries_of, frozen_in
from ..sharding.pieces import Piece
from ..sharding.tables import plan_table
from ..sharding.world import World, check_group
from .measure import Request, measure, sources_of
from .metric import MetricName, parse_metric


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Who holds which piece of every parameter, and which rank owns it.

    Built once, by one exchange of descriptions (56 bytes per parameter and rank); frozen; `print(plan)` shows it as a
    table. For each piece that several ranks hold, the lowest rank owns it, so that every element of the model counts
    exactly once.

    world: the ranks that hold the model.
    entries: the parameters of this rank; the next five are in the same order.
    pieces: what this rank holds of each.
    owned: whether this rank owns the piece.
    name_ids: the place of each name among all names of the model, the order of numbers by parameter.
    num_holders: how many ranks hold the piece.
    first_cells: the place of its first matrix among all matrices of the model, the order of numbers by matrix.
    num_names: parameters of the whole model.
    num_cells: matrices of the whole model: stacked ones count one by one, and 1-d and 0-d parameters as one each.
    num_groups: param groups of the model.
    numel: elements of the whole model, each counted once.
    has_copies: whether any piece of the model is held by several ranks. This and the next are the same on every rank.
    alike: tuples of names (as in `name_ids`) that have the same bits, and may be one weight.
    result_dtype: of metrics: float32, or float64 for a model in float64.
    mark: travels with its numbers, to tell them from those of another plan.
    workspace: temporaries of metrics by this plan, kept between calls.

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
    name_ids: tuple[int, ...]
    num_holders: tuple[int, ...]
    first_cells: tuple[int, ...] = field(repr=False)
    num_names: int
    num_cells: int
    num_groups: int
    numel: int
    has_copies: bool
    alike: list[tuple[int, ...]] = field(repr=False)
    result_dtype: torch.dtype
    mark: int = field(repr=False)
    # Of no use to users: see `offset_of` and `fits`.
    _offsets: tuple[int, ...] = field(repr=False)
    _stamps: list[Any] = field(repr=False)
    workspace: Workspace = field(default_factory=Workspace, repr=False)

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
        Raises PlanError, on every rank alike, if a tensor cannot be used, if one name has different shapes or dtypes on
        different ranks, if the pieces of a name do not cover it exactly once, or if copies differ.
        """
        return build_plan(entries_of(params), group, layout, check_replicas)

    def metric(self, tensors: Sequence[Tensor | None], metric: MetricName | float = "mad") -> Tensor:
        """One metric over all elements of `tensors`, one tensor for each of the plan's parameters (their gradients, say).

        tensors: DTensors or local tensors, of the parameters' local shapes; None counts as zeros.
        metric: as in `global_metric`.
        Returns a 0-d float32 tensor (float64 if every parameter is float64), with the same bits on every rank. One
        all-reduce.
        Raises ValueError if their number or local shapes are not the plan's, or the metric is not known.
        """
        parsed = parse_metric(metric)
        if len(tensors) != len(self.entries):
            raise ValueError(
                f"plan.metric got {len(tensors)} tensors for a plan of {len(self.entries)} parameters; pass one (or None) for each"
            )
        # Users measure parameters that require gradients; nothing of it shall be recorded.
        with torch.no_grad():
            # All of them before the first check: `local_like` may talk to other ranks, which do not see what is wrong
            # here.
            locals_ = [
                None if t is None else local_like(t, entry.tensor)
                for t, entry in zip(tensors, self.entries, strict=True)
            ]
            for local, piece in zip(locals_, self.pieces, strict=True):
                if local is not None and tuple(local.shape) != piece.local_shape:
                    raise ValueError(
                        f"{piece.name}: got a local tensor of shape {tuple(local.shape)}, the plan has {piece.local_shape}"
                    )
            (value,) = measure(self, [Request(parsed, sources_of(locals_))], workspace=self.workspace)
        return value[0].to(self.result_dtype)

    def offset_of(self, position: int) -> int:
        """Elements of the whole before a counted piece; 0 for other pieces. The plan must be built with `offsets`."""
        return self._offsets[position]

    def slots_of(self, position: int, scope: str) -> list[int]:
        """The places of a parameter's own numbers among those of all parameters, scope "tensor", or all matrices, "matrix".

        Of matrices: those that this rank holds (a part of), in the order of its elements.
        """
        if scope == "tensor":
            return [self.name_ids[position]]
        return [self.first_cells[position] + cell for cell in self.pieces[position].cells()]

    def fits(self, entries: Sequence[NamedParam]) -> bool:
        """Whether the plan still holds: same names, groups, shapes, dtypes and placements, in whatever storage. Local.

        entries: the parameters as they are now.
        """
        # The same tuple as before is the usual case, and then names need not be compared. Tensors may have changed in
        # place.
        if entries is not self.entries and (
            [(entry.name, entry.group) for entry in entries] != [(entry.name, entry.group) for entry in self.entries]
        ):
            return False
        # Lists compare their elements by identity first, and few stamps are ever compared otherwise.
        return [_stamp(entry.tensor) for entry in entries] == self._stamps

    def meet_to_rebuild(self, entries: Sequence[NamedParam], rules: str) -> None:
        """Wait until every rank of this plan is about to build another one.

        entries, rules: the parameters and the numbers asked for as they are now, to say why this rank needs another
            plan.
        Raises PlanError if some ranks do not come: they go on with this plan.
        """
        # Without a store (one rank, or a fake backend) there is nobody to wait for.
        if self.world.error_store is not None:
            self.world.error_store.rendezvous(explain_change(self.entries, entries, rules))

    def __str__(self) -> str:
        return plan_table(self.world, self.entries, self.pieces, self.owned, self.numel)


def build_plan(
    entries: tuple[NamedParam, ...],
    group: dist.ProcessGroup | None = None,
    layout: Layout | None = None,
    check_replicas: bool = True,
    rules: str = "",
    offsets: bool = False,
    frozen: Collection[int] = (),
    by_matrix: bool = False,
    objection: str | None = None,
) -> Plan:
    """`Plan.build` for parameters that have been read already.

    rules: what will be measured, as text; must be the same on every rank.
    offsets: whether `Plan.offset_of` will be asked.
    frozen: positions of parameters that are not trained now; these may be anything, and their copies are not compared.
    by_matrix: whether numbers of single matrices will be asked for.
    objection: why this rank cannot take part, if something else than its parameters is wrong.
    """
    # On this rank alone, since it is an error of the call, the same on every rank that runs the same program.
    check_layout(layout or {})
    args = BuildArgs(
        World.of(group), layout or {}, check_replicas, rules, offsets, frozenset(frozen), by_matrix, objection
    )
    found = build(entries, args)
    return Plan(
        world=found.world,
        entries=entries,
        pieces=found.pieces,
        owned=found.owned,
        name_ids=found.name_ids,
        num_holders=found.num_holders,
        first_cells=found.first_cells,
        num_names=found.num_names,
        num_cells=found.num_cells,
        num_groups=found.num_groups,
        numel=found.numel,
        has_copies=found.has_copies,
        alike=found.alike,
        result_dtype=torch.float64 if found.is_wide else torch.float32,
        mark=found.mark,
        _offsets=found.offsets,
        _stamps=[_stamp(entry.tensor) for entry in entries],
    )


def _stamp(tensor: Tensor) -> Any:
    """What must not change as long as a plan is to hold."""
    # A DTensor keeps its spec object as long as nothing changes, so a comparison is one of identity.
    return layout_spec(tensor) if is_dtensor(tensor) else (tensor.shape, tensor.dtype)


# --- a plan over time ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Which ranks hold the model, and how: the arguments `group`, `layout` and `check_replicas`, checked."""

    group: dist.ProcessGroup | None = None
    layout: Layout = field(default_factory=dict)
    check_replicas: bool = True

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, layout: Layout | None, check_replicas: bool) -> PlanOptions:
        """Raises ValueError for what is not a group or a layout."""
        if group is not None:
            check_group(group)
        check_layout(layout or {})
        return cls(group, layout or {}, check_replicas)


class PlanCache:
    """Keeps one plan. All ranks build it together, and build it anew together.

    options: which ranks hold the model, and how.
    with_offsets: whether the plan must know where pieces that are only counted begin in their whole.
    """

    def __init__(self, options: PlanOptions, with_offsets: bool = False) -> None:
        self.options = options
        self.plan: Plan | None = None
        self._with_offsets = with_offsets
        self._key: Hashable = None
        self.has_published = False
        self.on_new_world: list[Callable[[], None]] = []  # what to call when the ranks have become others

    @property
    def world(self) -> World:
        """The ranks as they are now."""
        return World.of(self.options.group)

    @property
    def is_current(self) -> bool:
        """Whether the plan is there, and of the ranks that `group=` means now."""
        group = self.options.group
        # As `current_group`, without a call: this is asked in every step.
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        return self.plan is not None and self.plan.world.group is group

    def fits(self, entries: tuple[NamedParam, ...], key: Hashable = None) -> bool:
        """Whether the plan is there, and is of these parameters; key: what else it must have been built for."""
        plan = self.plan if self.is_current else None
        return plan is not None and plan.fits(entries) and (key is None or self._key == key)

    def build(
        self,
        entries: tuple[NamedParam, ...],
        rules: str,
        key: Hashable,
        by_matrix: bool = False,
        objection: str | None = None,
    ) -> Plan:
        """Build the plan together with the other ranks.

        rules: a text that must be the same on every rank.
        key: what makes the plan fit, besides the parameters.
        by_matrix: whether numbers of single matrices will be asked for.
        objection: why this rank cannot take part; all ranks raise then.
        """
        if self.plan is not None and not self.is_current:
            # The default process group has been made after the plan, or anew with other ranks. The old one may be dead,
            # and all ranks of the new one find that out in the same step.
            self.plan, self.has_published = None, False
            for forget in self.on_new_world:
                forget()
        if self.plan is not None:
            # The others go on with the old plan unless they come here too: an exchange that they do not expect would
            # pair up with whatever collective they are in.
            self.plan.meet_to_rebuild(entries, rules)
            self.plan = None
        options = self.options
        self.plan = build_plan(
            entries,
            options.group,
            options.layout,
            options.check_replicas,
            rules,
            self._with_offsets,
            frozen_in(entries),
            by_matrix,
            objection,
        )
        self._key = key
        return self.plan

    def publish(self, error: Exception) -> None:
        """Leave the reason for ranks that will wait for this one in vain."""
        # All ranks know of a PlanError already, and a CollectiveError comes of waiting for another rank.
        store = None if self.plan is None else self.plan.world.error_store
        if store is not None and not isinstance(error, (PlanError, CollectiveError)):
            store.publish(f"{type(error).__name__}: {error}")
            self.has_published = True

    def clear_published(self) -> None:
        """A step is tried again: what was published about the last one is past."""
        store = None if self.plan is None else self.plan.world.error_store
        if self.has_published and store is not None:
            store.clear()
        self.has_published = False


# --- without a plan of one's own -----------------------------------------------------------------------------------


def global_metric(
    tensors: Iterable[Tensor | tuple[str, Tensor]],
    metric: MetricName | float = "mad",
    *,
    group: dist.ProcessGroup | None = None,
    layout: Layout | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """One metric over all elements of `tensors`, each counted once however they are sharded:  mean|x|, ‖x‖_p, ...

    tensors: DTensors, plain tensors or a mix, on any meshes; or (name, tensor) pairs. Float dtypes, any shapes.
    metric: "mad" (mean |x|), "std", "var" (both with N-1), "sum", "rms", "l0" (non-zeros), "l1", "l2", "l3", "l4",
        "linf", or a number p. Over no elements it is 0; a NaN on any rank makes it NaN on all. std and var keep
        float32's precision up to |mean|/std of 10^4.
    group: the ranks that together hold the tensors; default all ranks.
    layout: as in `Plan.build`.
    names: one for each tensor, where they come without.
    Returns a 0-d float32 tensor (float64 if all are float64), the same bits on every rank; accumulated in float64.
    A collective call that builds a plan each time; for a number in every step use `Plan.build` once and `plan.metric`.
    Raises ValueError for an unknown metric, PlanError (see `Plan.build`) for tensors that are not what they seem.

    >>> import torch
    >>> from distwd import global_metric
    >>> global_metric([torch.tensor([3.0, -4.0])], "l2")
    tensor(5.)
    """
    parse_metric(metric)  # before the exchange: a wrong word is an error on this rank at once
    # Names given beside the tensors: a list of gradients, say, with the names of their parameters.
    if names is not None:
        found = [entry.tensor for entry in entries_of(tensors)]
        if len(names) != len(found):
            raise ValueError(f"names has {len(names)} entries for {len(found)} tensors; give one for each")
        tensors = list(zip(names, found, strict=True))
    plan = Plan.build(tensors, group=group, layout=layout)
    return plan.metric([entry.tensor for entry in plan.entries], metric)
