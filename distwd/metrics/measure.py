"""Measure: local moments of what is asked for, one reduction for all of it, and the formulas that finish the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.scratch import Scratch
from ..world import World
from .metric import COUNT, SUM, Metric, Moment
from .moments import combine, identity, local_moments, moments_of_each
from .reduce import Partial, reduce_partials


@dataclass(frozen=True, slots=True)
class Share:
    """Some of the tensors that a metric is taken of, local and of one device: scale · (tensor − minus).

    positions: of their parameters. minus: subtracted a block at a time; empty: nothing.
    """

    positions: Sequence[int]
    tensors: Sequence[Tensor]
    minus: Sequence[Tensor] = ()
    scale: float | Tensor = 1.0


def shares_of(tensors: Sequence[Tensor | None]) -> list[Share]:
    """Local tensors, by parameter (None: there is none), as shares."""
    found: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for position, tensor in enumerate(tensors):
        if tensor is not None:
            device = tensor.device
            if (lists := found.get(device)) is None:
                lists = found[device] = ([], [])
            lists[0].append(position)
            lists[1].append(tensor)
    return [Share(*lists) for lists in found.values()]


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


def measure(requests: Sequence[Request], world: World, scratch: Scratch) -> list[Tensor]:
    """The requested numbers, [cells] float64 each, with the same bits on every rank. One reduction, however much is asked."""
    partials = [
        Partial(key, moment, values)
        for key, request in enumerate(requests)
        for moment, values in _local(request, scratch).items()
    ]
    totals = reduce_partials(partials, world)
    return [
        request.metric({moment: totals[key, moment] for moment in request.metric.moments}, request.numel)
        for key, request in enumerate(requests)
    ]


def _local(request: Request, scratch: Scratch) -> dict[Moment, Tensor]:
    """This rank's moments by cell, [cells] on the device of `request.numel`."""
    moments, device = request.metric.moments, request.numel.device
    found: dict[Moment, dict[int, list[Tensor]]] = {moment: {} for moment in moments}
    for part, values in zip(request.parts, _of_parts(request.parts, moments, scratch), strict=True):
        for moment, value in values.items():
            found[moment].setdefault(part.cell, []).append(_scaled(value, moment, part.scale).to(device))
            if part.zeros and moment.of_zeros is not None:
                found[moment][part.cell].append(value.new_full((), moment.of_zeros).to(device))
    return {moment: _by_cell(cells, moment, request.numel) for moment, cells in found.items()}


def _of_parts(parts: Sequence[Part], moments: Sequence[Moment], scratch: Scratch) -> Iterator[Mapping[Moment, Tensor]]:
    """The moments of each part. Parts of one tensor are measured together with others of its length."""
    alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for part in parts:
        if (key := _kind(part)) is not None:
            tensors, minus = alike.setdefault(key, ([], []))
            tensors += part.tensors
            minus += part.minus
    of_each = {key: iter(moments_of_each(*lists, moments, scratch)) for key, lists in alike.items()}
    for part in parts:
        key = _kind(part)
        yield local_moments(part.tensors, moments, scratch, part.minus) if key is None else next(of_each[key])


def _kind(part: Part) -> Any:
    """What parts of one tensor have to have in common to be measured together; None for others."""
    if len(part.tensors) != 1 or not part.tensors[0].numel():
        return None
    return part.tensors[0].device, part.tensors[0].numel(), bool(part.minus)


def _scaled(value: Tensor, moment: Moment, scale: float | Tensor) -> Tensor:
    """The moment of scale · x, of that of x."""
    if not isinstance(scale, Tensor) and (scale == 1 or (scale == -1 and moment != SUM)):
        return value
    factor = scale.to(value.device, value.dtype) if isinstance(scale, Tensor) else value.new_full((), scale)
    if moment == COUNT:
        return torch.where(factor == 0, 0.0, value)
    if moment == SUM:
        return value * factor
    return value * factor.abs() ** (moment.p if moment.kind == "power" else 1)


def _by_cell(cells: dict[int, list[Tensor]], moment: Moment, numel: Tensor) -> Tensor:
    nothing = [identity(moment, numel.device)]
    return torch.stack([combine(cells.get(cell, nothing), moment) for cell in range(len(numel))])
