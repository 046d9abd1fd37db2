"""The metrics' door to the network: everything a phase needs from other ranks, in one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CollectiveError, PlanError
from ..metrics.metric import Statistic
from .world import World

Totals = dict[tuple[int, Statistic], Tensor]


@dataclass(frozen=True, slots=True)
class Partial:
    """One rank's contribution: `values` [cells] of `moment`, for the `key`-th thing that is measured."""

    key: int
    statistic: Statistic
    values: Tensor


def num_collectives(statistics: Sequence[Statistic], world: World) -> int:
    """How many all-reduces `reduce_partials` makes: sums share one, extrema share one."""
    return 0 if world.size == 1 else len({statistic.is_sum for statistic in statistics})


def reduce_partials(partials: Sequence[Partial], world: World) -> Totals:
    """Combine over all ranks; on every rank the same bits come back, on the device of each input."""
    totals: Totals = {}
    for is_sum in (True, False):
        some = [partial for partial in partials if partial.statistic.is_sum is is_sum]
        if some:
            reduced = _add([p.values for p in some], world) if is_sum else _extremes(some, world)
            totals.update({(p.key, p.statistic): value for p, value in zip(some, reduced, strict=True)})
    return totals


def any_rank(flag: Tensor, world: World) -> Tensor:
    """Whether the boolean 0-d `flag` is true on any rank; one all-reduce."""
    return _all_reduce(flag.to(torch.int32).reshape(1), dist.ReduceOp.MAX, world)[0] > 0


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """`values` added up over all ranks, where they are; one all-reduce."""
    return _all_reduce(values, dist.ReduceOp.SUM, world).to(values.device)


def _add(values: list[Tensor], world: World) -> list[Tensor]:
    if world.size == 1:
        return values
    return _unpack(_all_reduce(_pack(values, world), dist.ReduceOp.SUM, world), values)


def _extremes(partials: list[Partial], world: World) -> list[Tensor]:
    if world.size == 1:
        return [partial.values for partial in partials]
    # All as maxima. Backends do not agree on what the maximum with a NaN is, so NaNs travel as a flag of their own.
    values = [-p.values if p.statistic.kind == "min" else p.values for p in partials]
    packed = _pack(values, world)
    flagged = torch.cat(
        [packed.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), packed.isnan().to(packed.dtype)]
    )
    reduced, is_nan = _all_reduce(flagged, dist.ReduceOp.MAX, world).chunk(2)
    unpacked = _unpack(torch.where(is_nan > 0, torch.nan, reduced), values)
    return [-v if p.statistic.kind == "min" else v for p, v in zip(partials, unpacked, strict=True)]


def _pack(values: list[Tensor], world: World) -> Tensor:
    device = world.sendable(values[0]).device
    return torch.cat([value.to(device) for value in values])


def _unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = packed.split([len(value) for value in like])
    return [part.to(value.device) for part, value in zip(parts, like, strict=True)]


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, world: World) -> Tensor:
    if world.size > 1:
        tensor = world.sendable(tensor)
        try:
            dist.all_reduce(tensor, op=op, group=world.group)
        except RuntimeError as error:  # a rank that died, raised or does something else, after the group's timeout
            if words := world.words():
                raise PlanError(words) from error
            raise CollectiveError(
                f"rank {world.rank}: another rank has died, or has not taken the step that this one takes: {error}"
            ) from error
    return tensor
