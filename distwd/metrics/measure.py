"""Measure: sums over local elements, one reduction over all ranks for everything that is asked, and the formulas.

    sources → local statistics by slot, float64 → one packed vector, one all-reduce → metric(statistics, num elements)

A slot is a place in a vector of numbers: one for all parameters (scope "all"), one per param group, per parameter, or per
matrix. Where parameters have slots of their own, sums are kept by parameter until they are put into the vector, so that
nothing is done for each of thousands of stacked matrices.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.blocks import Workspace, number_on
from ..kernels.sums import COUNT, MAX, SUM, Statistic, Vectors, local_statistics, statistics_of_each, wide_dtype
from ..sharding.collectives import max_over_ranks, sum_over_ranks
from ..sharding.world import World
from .metric import Metric

if TYPE_CHECKING:
    from .plan import Plan

# Gradients that come and go make ever new combinations of parameters; a cache of them must not grow without end.
_MAX_KEPT = 64


@dataclass(frozen=True, slots=True)
class Source:
    """Some of the tensors that a metric is taken of:  scale · (tensor − minus).

    positions: of their parameters in the plan.
    tensors: local tensors of the parameters' local shapes, all on one device.
    minus: as many again, subtracted a block at a time so that no difference lies in memory; () for none.
    scale: one factor for all, a number or a 0-d tensor, or one for each tensor, 1-d; of `vectors` that of the update.
    vectors: where products are asked for: `tensors` are the parameters, and vectors are read from them and `others`.
    others: further lists of such tensors.
    """

    positions: Sequence[int]
    tensors: Sequence[Tensor]
    minus: Sequence[Tensor] = ()
    scale: float | Tensor = 1.0
    vectors: Vectors | None = None
    others: Sequence[Sequence[Tensor]] = ()

    @property
    def lists(self) -> list[Sequence[Tensor]]:
        """All lists of tensors that are read."""
        return [self.tensors, *([self.minus] if self.minus else []), *self.others]


def sources_of(tensors: Sequence[Tensor | None]) -> list[Source]:
    """Local tensors in the order of the plan's parameters, as one source per device; None where there is no tensor."""
    found: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for position, tensor in enumerate(tensors):
        if tensor is not None:
            # Not setdefault, which would make two lists for each parameter in every step.
            if (lists := found.get(tensor.device)) is None:
                lists = found[tensor.device] = ([], [])
            lists[0].append(position)
            lists[1].append(tensor)
    return [Source(*lists) for lists in found.values()]


@dataclass(frozen=True, slots=True)
class Request:
    """One metric, in one or several slots.

    metric: what to measure.
    sources: local tensors; parameters that are in none of them count as zeros, unless they are frozen.
    scope: "all", "group", "tensor" or "matrix".
    taken: what `take` has found; then `sources` are not looked at.
    """

    metric: Metric
    sources: Sequence[Source]
    scope: str = "all"
    taken: Taken | None = None

    @property
    def device(self) -> torch.device | None:
        """Of the first tensor; None if there is none."""
        if self.taken is not None:
            return self.taken.device
        return self.sources[0].tensors[0].device if self.sources else None


@dataclass(slots=True)
class Taken:
    """Statistics of tensors that may change before the ranks meet: taken when the tensors are right, reduced later.

    parts: (keys, by statistic the values of each key in order, factor of the tensors). A key is what `Slots.keys` says.
    num_seen: by key, how many pieces are in them.
    device: of the first tensor; None: there is none.
    """

    parts: list[tuple[list[int], dict[Statistic, Tensor], float | Tensor]] = field(default_factory=list)
    num_seen: Counter[int] = field(default_factory=Counter)
    device: torch.device | None = None


# Scopes of which the numbers of different parameters are different ones.
OWN = ("tensor", "matrix")


class Slots:
    """In which slots each parameter of a plan counts, and which of them this rank has to count.

    None of it changes from step to step, so whoever measures in every step keeps this object beside the plan. A
    step must not walk over all parameters again, nor copy anything to a device.

    plan: who holds what.
    frozen: positions of parameters that are not trained now, on any rank. They count nowhere.
    """

    def __init__(self, plan: Plan, frozen: Sequence[int] = ()) -> None:
        self.plan = plan
        excluded = set(frozen)
        self._counts = [
            owned and piece.numel > 0 and position not in excluded
            for position, (owned, piece) in enumerate(zip(plan.owned, plan.pieces, strict=True))
        ]
        # Matrices of each piece that lie here, in the order of its elements, however many elements they have.
        self.num_cells = [math.prod(piece.local_stack) for piece in plan.pieces]
        self._keys: dict[str, tuple[Sequence[int], Counter[int]]] = {}
        self._numel: dict[tuple[str, torch.device], Tensor] = {}
        self._owned_among: dict[tuple[tuple[int, ...], str], dict[int, list[int]]] = {}
        self._index: dict[tuple[tuple[int, ...], str, torch.device], Tensor] = {}
        self._names_of_cells: dict[torch.device, Tensor] = {}
        self._has_padding = any(piece.padding for piece in plan.pieces)

    def keys(self, scope: str) -> tuple[Sequence[int], Counter[int]]:
        """By what sums are kept apart, for each parameter: its slot, or its position where it has slots of its own.

        And by key how many pieces this rank counts.
        """
        if scope not in self._keys:
            entries = self.plan.entries
            keys: Sequence[int] = range(len(entries)) if scope in OWN else [0] * len(entries)
            if scope == "group":
                keys = [entry.group for entry in entries]
            self._keys[scope] = keys, Counter(compress(keys, self._counts))
        return self._keys[scope]

    def num_slots(self, scope: str) -> int:
        """How many numbers there are of a scope; the same on every rank."""
        plan = self.plan
        return {"all": 1, "group": plan.num_groups, "tensor": plan.num_names, "matrix": plan.num_cells}[scope]

    def numel(self, scope: str, device: torch.device) -> Tensor:
        """[slots] float64: elements that this rank counts, on `device`."""
        key = scope, device
        if key not in self._numel:
            plan, dtype = self.plan, wide_dtype(device)
            numel = [0] * (num_slots := self.num_slots(scope))
            keys = self.keys(scope)[0]
            for position, piece in compress(enumerate(plan.pieces), self._counts):
                slots = plan.slots_of(position, scope) if scope in OWN else [keys[position]]
                for slot in slots:
                    numel[slot] += piece.numel // len(slots)
            # Filled there: a copy from the CPU would make it wait, and `Plan.metric` keeps no slots.
            one = torch.full((1,), numel[0], dtype=dtype, device=device) if num_slots == 1 else None
            self._numel[key] = _on(device, numel, dtype) if one is None else one
        return self._numel[key]

    def owned_among(self, positions: Sequence[int], scope: str) -> dict[int, list[int]]:
        """By key, the places in `positions` of pieces that this rank counts."""
        key = tuple(positions), scope
        if key not in self._owned_among:
            keys, _ = self.keys(scope)
            found = defaultdict[int, list[int]](list)
            for place, position in enumerate(positions):
                # A piece that several ranks hold would count several times, so only its owner counts it.
                if self._counts[position]:
                    found[keys[position]].append(place)
            if len(self._owned_among) >= _MAX_KEPT:
                self._owned_among.clear()
            self._owned_among[key] = found
        return self._owned_among[key]

    def index(self, positions: Sequence[int], scope: str, device: torch.device) -> Tensor:
        """[numbers] int64 on `device`: the slots of these parameters, in order, where each has slots of its own.

        For scope "tensor" one slot each, for "matrix" one for each matrix of a parameter that lies here.
        """
        key = tuple(positions), scope, device
        if key not in self._index:
            if len(self._index) >= _MAX_KEPT:
                self._index.clear()
            ids = [slot for position in positions for slot in self.plan.slots_of(position, scope)]
            # Spelled out, since of no positions (a rank may hold none of a group) torch would make float32.
            self._index[key] = _on(device, ids, torch.int64)
        return self._index[key]

    def by_matrix(self, values: Tensor) -> Tensor:
        """Numbers of scope "tensor" as those of "matrix": [slots] to [slots]. Matrices that are not here get NaN."""
        device = values.device
        if device not in self._names_of_cells:
            names = [self.plan.num_names] * self.plan.num_cells
            for position, name_id in enumerate(self.plan.name_ids):
                for slot in self.plan.slots_of(position, "matrix"):
                    names[slot] = name_id
            self._names_of_cells[device] = _on(device, names, torch.int64)
        # One more, for the names of other ranks: of these nobody here asks.
        return torch.cat([values, values.new_full((1,), torch.nan)])[self._names_of_cells[device]]

    def counted(self, source: Source, places: Sequence[int]) -> list[list[Tensor]]:
        """Some tensors of each list of a source, without elements that are only padding."""
        found = []
        for tensors in source.lists:
            some = [tensors[place] for place in places]
            # FSDP1 fills up the last shards. What lies there is nobody's, and would often be the smallest |x|.
            if self._has_padding:
                pieces = [self.plan.pieces[source.positions[place]] for place in places]
                some = [
                    local.flatten()[: piece.numel] if piece.padding else local
                    for local, piece in zip(some, pieces, strict=True)
                ]
            found.append(some)
        return found


def _on(device: torch.device, numbers: list[int], dtype: torch.dtype) -> Tensor:
    """Numbers of the host as a vector on `device`. Which gradients are missing may change in every step, so it must not wait."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def measure(
    plan: Plan, requests: Sequence[Request], *, slots: Slots | None = None, workspace: Workspace | None = None
) -> list[Tensor]:
    """Numbers about the whole model, each element counted once however it is sharded, with the same bits on every rank.

    plan: who holds what; every rank of its group must call this, with the same metrics and scopes in the same order.
    requests: what to measure of which tensors. No grad mode is set here.
    slots: of this plan, kept from step to step; made anew if None.
    workspace: temporaries, kept from step to step.
    Returns [slots] float64 for each request, on the device of its first tensor.
    Raises PlanError or CollectiveError if another rank does not take part.

    One collective, however much is asked (see `num_collectives`). A piece that another rank owns too is left out here.
    """
    slots, workspace = slots or Slots(plan), workspace or Workspace()
    # A rank without sources takes part all the same: which collectives are made depends on the plan alone, never on
    # gradients.
    devices: list[torch.device] = []
    partials: list[dict[Statistic, Tensor]] = []
    # How many elements there are travels with the sums, since parameters may be frozen and unfrozen between steps. Once
    # for each scope, whatever the devices: all ranks pack the same, those that hold nothing too.
    counts: dict[tuple[str, Statistic], Tensor] = {}
    for request in requests:
        devices.append(request.device or plan.world.device)
        numel = slots.numel(request.scope, devices[-1])
        if (taken := request.taken) is None:
            take(request, slots, workspace, taken := Taken())
        partials.append(_local_statistics(request, taken, numel, slots))
        counts.setdefault((request.scope, _count_kind(request.metric)), numel)
    totals = reduce_statistics(
        [*partials, *({kind: numel} for (_, kind), numel in counts.items())], plan.world, plan.mark
    )
    numels = {key: total[key[1]] for key, total in zip(counts, totals[len(requests) :], strict=True)}
    return [
        request.metric(total, numels[request.scope, _count_kind(request.metric)].to(device))
        for request, total, device in zip(requests, totals[: len(requests)], devices, strict=True)
    ]


def _count_kind(metric: Metric) -> Statistic:
    """How ranks combine the number of elements that a metric is of, so that it travels in the metric's own collective.

    Formulas of extrema only ask whether there is any element: there the largest number of a rank will do.
    """
    return SUM if all(statistic.is_sum for statistic in metric.statistics) else MAX


# --- over ranks -------------------------------------------------------------------------------------------------------


def num_collectives(statistics: Sequence[Statistic], world: World) -> int:
    """How many all-reduces it takes to combine these: sums share one, extrema share one; none in a world of one."""
    return 0 if world.size == 1 else len({statistic.is_sum for statistic in statistics})


def reduce_statistics(
    partials: Sequence[dict[Statistic, Tensor]], world: World, mark: int = 0
) -> list[dict[Statistic, Tensor]]:
    """Combine statistics over all ranks.

    partials: for each request, [slots] float64 by statistic, of this rank's own elements; other requests may be on
        other devices.
    mark: a number that no other plan of these ranks has; 0 for none.
    Returns the same, over all ranks, on the devices they came from. NaN where ranks have reduced other plans' numbers.
    """
    if world.size == 1:
        return list(partials)
    totals: list[dict[Statistic, Tensor]] = [{} for _ in partials]
    # A backend has no reduction that adds some elements of a vector and takes the maximum of others.
    for is_sum in (True, False):
        some = [(n, s, values) for n, by in enumerate(partials) for s, values in by.items() if s.is_sum is is_sum]
        if not some:
            continue
        # A minimum travels as the maximum of the negated values, so that all extrema share one collective.
        signed = [-values if statistic.kind == "min" else values for _, statistic, values in some]
        # Tensors may be on several devices; a collective takes one vector, on the device that all ranks have agreed on. Its
        # dtype goes by that, too: where one accelerator has no float64, a rank without tensors there would send other bytes.
        device = world.device
        wide = wide_dtype(device)
        # Two optimizers that ranks step in another order each would exchange one model's numbers for the other's, if the
        # vectors are of one length. So the mark travels with them, and is compared on the device, without a read.
        marks = [mark] if is_sum else [mark, -mark]
        own_marks = torch.cat([torch.full((1,), one, dtype=wide, device=device) for one in marks])
        packed = torch.cat([*(values.to(device, wide) for values in signed), own_marks])
        reduced = sum_over_ranks(packed, world) if is_sum else max_over_ranks(packed, world)
        reduced, met = reduced[: -len(marks)], reduced[-len(marks) :]
        if mark and not world.is_fake:
            is_same = (met == own_marks * (world.size if is_sum else 1)).all()
            reduced = torch.where(is_same, reduced, torch.nan)
        for (number, statistic, values), part in zip(some, reduced.split(list(map(len, signed))), strict=True):
            part = part.to(values.dtype).to(values.device)
            totals[number][statistic] = -part if statistic.kind == "min" else part
    return totals


# --- on this rank -----------------------------------------------------------------------------------------------------


def take(request: Request, slots: Slots, workspace: Workspace, into: Taken) -> None:
    """Add the statistics of a request's tensors, over the elements that this rank owns, to `into`. No communication."""
    scope = request.scope
    alike: dict[Any, tuple[list[int], list[list[Tensor]], list[Any]]] = {}
    numbers: dict[Any, int] = {}  # of what is wanted: to hash that for every tensor would cost more than the rest
    into.device = into.device or request.device
    for source in request.sources:
        wanted, scale = source.vectors or request.metric.statistics, source.scale
        # A tensor is not read to find out whether it equals another.
        scale_key = id(scale) if isinstance(scale, Tensor) else scale
        factors = scale.unbind() if isinstance(scale, Tensor) and scale.dim() else None
        number = numbers.setdefault(wanted, len(numbers))
        # Once for all: with slots of their own, parameters come one by one.
        counted = slots.counted(source, range(len(source.positions)))
        for key, places in slots.owned_among(source.positions, scope).items():
            into.num_seen[key] += len(places)
            num_rows = slots.num_cells[key] if scope == "matrix" else 1
            if factors is None and (len(places) > 1 or not counted[0][places[0]].numel()):
                lists = [[some[place] for place in places] for some in counted]
                values = local_statistics(lists[0], wanted, workspace, *lists[1:])
                into.parts.append(([key], {statistic: value.view(1) for statistic, value in values.items()}, scale))
                continue
            # Small tensors with a slot or a factor of their own: those of one length are measured together, as rows of a
            # matrix. One by one, scope="tensor" would start several kernels for every bias.
            for place in places:
                some = [one[place] for one in counted]
                if size := some[0].numel():
                    dtypes = tuple(one.dtype for one in some)
                    kind = (some[0].device, dtypes, size, scale_key, number, factors is not None, num_rows)
                    own_keys, own_lists, own_scales = alike.setdefault(kind, ([], [[] for _ in some], []))
                    own_keys.append(key)
                    for own, one in zip(own_lists, some, strict=True):
                        own.append(one)
                    own_scales.append(scale if factors is None else factors[place])
    by_number = list(numbers)
    for (*_, number, has_factors, num_rows), (own_keys, own_lists, own_scales) in alike.items():
        wanted = by_number[number]
        each = statistics_of_each(own_lists[0], wanted, workspace, *own_lists[1:], num_rows=num_rows)
        # torch has no stack of numbers.
        scale = torch.stack(own_scales).repeat_interleave(num_rows) if has_factors else own_scales[0]
        into.parts.append((own_keys, each, scale))


def _local_statistics(request: Request, taken: Taken, numel: Tensor, slots: Slots) -> dict[Statistic, Tensor]:
    """Statistics over the elements that this rank owns: [slots] float64 each, on the device of `numel`."""
    scope = request.scope
    # Parameters without a tensor count as zeros. To most statistics they add nothing, but they are the smallest |x|, and a
    # power of zero with a negative exponent is infinite.
    num_owned = slots.keys(scope)[1]
    with_zeros = [key for key, number in num_owned.items() if number != taken.num_seen[key]]
    totals = {}
    for statistic in request.metric.statistics:
        of_zero = math.inf if statistic.kind == "power" and statistic.p < 0 else 0.0
        # Of a vector that is zero a part says nothing.
        parts = [(own, values[statistic], scale) for own, values, scale in taken.parts if statistic in values]
        found = [_scaled(values, statistic, scale).to(numel.device) for _, values, scale in parts]
        keys = [key for own, _, _ in parts for key in own]
        if with_zeros and (of_zero or statistic.kind == "min"):
            num_zeros = sum(slots.num_cells[key] for key in with_zeros) if scope == "matrix" else len(with_zeros)
            found.append(numel.new_full((num_zeros,), of_zero))
            keys = keys + with_zeros
        if keys and scope in OWN:
            # Each number comes from one tensor, and has a slot of its own.
            index = slots.index(keys, scope, numel.device)
            totals[statistic] = torch.full_like(numel, statistic.identity).index_copy(0, index, torch.cat(found))
        else:
            totals[statistic] = _by_slot(keys, found, statistic, numel)
    return totals


def _scaled(value: Tensor, statistic: Statistic, scale: float | Tensor) -> Tensor:
    """The statistic of scale · x, from that of x:  Σx → s·Σx,  Σ|x|^p → |s|^p·Σ|x|^p,  max|x| → |s|·max|x|."""
    # The usual factors: of gradients and of updates that an optimizer leaves negated.
    is_even = statistic != SUM and (statistic.kind != "product" or statistic.pair.count(1) != 1)
    if not isinstance(scale, Tensor) and (scale == 1 or (scale == -1 and is_even)):
        return value
    exponent = statistic.p if statistic.kind == "power" else 1
    if not isinstance(scale, Tensor) and statistic.kind not in ("count", "product") and exponent in (1, 2):
        # Computed here, in the same float64: on a GPU an operation on one number costs as much as one on thousands.
        number = scale if statistic == SUM else abs(scale)
        return value * (number * number if exponent == 2 else number)
    # Other powers are torch's: Python's raise an error where these are infinite.
    factor = number_on(value.device, scale, value.dtype) if isinstance(scale, Tensor) else value.new_full((), scale)
    # The number of non-zeros has no factor, but at a learning rate of 0 there are none.
    if statistic == COUNT:
        return torch.where(factor == 0, 0.0, value)
    if statistic.kind == "product":
        # The factor is that of vector 1, the update.
        num_updates = statistic.pair.count(1)
        return value * factor**num_updates if num_updates else value
    return value * (factor if statistic == SUM else factor.abs() ** exponent)


def _by_slot(slots: list[int], values: list[Tensor], statistic: Statistic, numel: Tensor) -> Tensor:
    """[slots of `numel`]: values combined where several have the same slot, the identity where there is none.

    slots: of all elements of `values` (vectors) in order.
    """
    if not slots:
        return torch.full_like(numel, statistic.identity)
    joined = torch.cat(values)
    # One value for each, in order: scope "all", or "tensor" where this rank owns everything.
    if slots == list(range(len(numel))):
        return joined
    # A slot may have several values: of tensors on several devices, or of several dtypes.
    by_slot = defaultdict[int, list[Tensor]](list)
    for slot, value in zip(slots, joined.unbind(), strict=True):
        by_slot[slot].append(value)
    combined = []
    for slot in range(len(numel)):
        some = by_slot.get(slot) or [numel.new_full((), statistic.identity)]
        combined.append(some[0] if len(some) == 1 else statistic.combine(torch.stack(some)))
    return torch.stack(combined)
