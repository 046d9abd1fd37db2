"""Measure: local moments of what is asked for, one reduction for all of it, and the formulas that finish the numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.sums import combine, identity, local_statistics, statistics_of_each
from ..kernels.workspace import Workspace
from ..sharding.reduce import Partial, reduce_partials
from ..sharding.world import World
from .metric import COUNT, SUM, Metric, Statistic


@dataclass(frozen=True, slots=True)
class Source:
    """Some of the tensors that a metric is taken of, local and of one device: scale · (tensor − minus).

    positions: of their parameters. minus: subtracted a block at a time; empty: nothing.
    """

    positions: Sequence[int]
    tensors: Sequence[Tensor]
    minus: Sequence[Tensor] = ()
    scale: float | Tensor = 1.0


def sources_of(tensors: Sequence[Tensor | None]) -> list[Source]:
    """Local tensors, by parameter (None: there is none), as shares."""
    found: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for position, tensor in enumerate(tensors):
        if tensor is not None:
            device = tensor.device
            if (lists := found.get(device)) is None:
                lists = found[device] = ([], [])
            lists[0].append(position)
            lists[1].append(tensor)
    return [Source(*lists) for lists in found.values()]


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of one device that count towards one cell: scale · (tensor − minus).

    zeros: elements beside them count as zero (parameters without a gradient).
    """

    cell: int
    tensors: list[Tensor]
    minus: list[Tensor]
    scale: float | Tensor = 1.0
    zeros: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One metric, for one or several cells (all parameters; each param group; each parameter).

    parts: this rank's own elements. numel: [cells] float64, elements in each cell over all ranks.
    """

    metric: Metric
    parts: Sequence[Part]
    numel: Tensor


def measure(requests: Sequence[Request], world: World, workspace: Workspace) -> list[Tensor]:
    """The requested numbers, [cells] float64 each, with the same bits on every rank. One reduction, however much is asked."""
    partials = [
        Partial(key, statistic, values)
        for key, request in enumerate(requests)
        for statistic, values in _local(request, workspace).items()
    ]
    totals = reduce_partials(partials, world)
    return [
        request.metric({statistic: totals[key, statistic] for statistic in request.metric.statistics}, request.numel)
        for key, request in enumerate(requests)
    ]


def _local(request: Request, workspace: Workspace) -> dict[Statistic, Tensor]:
    """This rank's moments by cell, [cells] on the device of `request.numel`."""
    statistics, device = request.metric.statistics, request.numel.device
    cells: list[int] = []
    found: dict[Statistic, list[Tensor]] = {statistic: [] for statistic in statistics}
    for parts, values in _measured(request.parts, statistics, workspace):
        cells += [part.cell for part in parts]
        for statistic, value in values.items():
            found[statistic].append(_scaled(value, statistic, parts[0].scale).to(device))
    with_zeros = [part.cell for part in request.parts if part.zeros]
    for statistic, values_of in found.items():
        if with_zeros and statistic.of_zeros is not None:
            values_of.append(request.numel.new_full((len(with_zeros),), statistic.of_zeros))
    return {
        statistic: _by_cell(
            cells if statistic.of_zeros is None else cells + with_zeros, values_of, statistic, request.numel
        )
        for statistic, values_of in found.items()
    }


def _measured(
    parts: Sequence[Part], statistics: Sequence[Statistic], workspace: Workspace
) -> Iterator[tuple[Sequence[Part], Mapping[Statistic, Tensor]]]:
    """All parts, some at a time, with their moments, [parts] each. Parts of one tensor are measured together with others of its length."""
    alike: dict[Any, list[Part]] = {}
    for part in parts:
        if len(part.tensors) != 1 or not (numel := part.tensors[0].numel()):
            values = local_statistics(part.tensors, statistics, workspace, part.minus)
            yield [part], {statistic: value.view(1) for statistic, value in values.items()}
            continue
        scale = id(part.scale) if isinstance(part.scale, Tensor) else part.scale
        kind = (part.tensors[0].device, part.tensors[0].dtype)
        alike.setdefault((kind, numel, bool(part.minus), scale), []).append(part)
    for some in alike.values():
        tensors, minus = [part.tensors[0] for part in some], [one for part in some for one in part.minus]
        yield some, statistics_of_each(tensors, minus, statistics, workspace)


def _scaled(value: Tensor, statistic: Statistic, scale: float | Tensor) -> Tensor:
    """The moment of scale · x, of that of x."""
    if not isinstance(scale, Tensor) and (scale == 1 or (scale == -1 and statistic != SUM)):
        return value
    factor = scale.to(value.device, value.dtype) if isinstance(scale, Tensor) else value.new_full((), scale)
    if statistic == COUNT:
        return torch.where(factor == 0, 0.0, value)
    if statistic == SUM:
        return value * factor
    return value * factor.abs() ** (statistic.p if statistic.kind == "power" else 1)


def _by_cell(cells: list[int], values: list[Tensor], statistic: Statistic, numel: Tensor) -> Tensor:
    """Values, in all one for each of `cells`, combined where several are of the same cell."""
    if not cells:
        return torch.full_like(numel, statistic.identity)
    joined = torch.cat(values)
    if cells == list(range(len(numel))):
        return joined
    nothing, by_cell = [identity(statistic, numel.device)], defaultdict[int, list[Tensor]](list)
    for cell, value in zip(cells, joined.unbind(), strict=True):
        by_cell[cell].append(value)
    return torch.stack([combine(by_cell.get(cell, nothing), statistic) for cell in range(len(numel))])
