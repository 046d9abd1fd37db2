"""Measure: local moments of what is asked for, one reduction for all of it, and the formulas that finish the numbers."""

from __future__ import annotations

from collections import defaultdict
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
    cells: list[int] = []
    found: dict[Moment, list[Tensor]] = {moment: [] for moment in moments}
    for parts, values in _measured(request.parts, moments, scratch):
        cells += [part.cell for part in parts]
        for moment, value in values.items():
            found[moment].append(_scaled(value, moment, parts[0].scale).to(device))
    with_zeros = [part.cell for part in request.parts if part.zeros]
    for moment, values_of in found.items():
        if with_zeros and moment.of_zeros is not None:
            values_of.append(request.numel.new_full((len(with_zeros),), moment.of_zeros))
    return {
        moment: _by_cell(cells if moment.of_zeros is None else cells + with_zeros, values_of, moment, request.numel)
        for moment, values_of in found.items()
    }


def _measured(
    parts: Sequence[Part], moments: Sequence[Moment], scratch: Scratch
) -> Iterator[tuple[Sequence[Part], Mapping[Moment, Tensor]]]:
    """All parts, some at a time, with their moments, [parts] each. Parts of one tensor are measured together with others of its length."""
    alike: dict[Any, list[Part]] = {}
    for part in parts:
        if len(part.tensors) != 1 or not (numel := part.tensors[0].numel()):
            values = local_moments(part.tensors, moments, scratch, part.minus)
            yield [part], {moment: value.view(1) for moment, value in values.items()}
            continue
        scale = id(part.scale) if isinstance(part.scale, Tensor) else part.scale
        kind = (part.tensors[0].device, part.tensors[0].dtype)
        alike.setdefault((kind, numel, bool(part.minus), scale), []).append(part)
    for some in alike.values():
        tensors, minus = [part.tensors[0] for part in some], [one for part in some for one in part.minus]
        yield some, moments_of_each(tensors, minus, moments, scratch)


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


def _by_cell(cells: list[int], values: list[Tensor], moment: Moment, numel: Tensor) -> Tensor:
    """Values, in all one for each of `cells`, combined where several are of the same cell."""
    if not cells:
        return torch.full_like(numel, moment.identity)
    joined = torch.cat(values)
    if cells == list(range(len(numel))):
        return joined
    nothing, by_cell = [identity(moment, numel.device)], defaultdict[int, list[Tensor]](list)
    for cell, value in zip(cells, joined.unbind(), strict=True):
        by_cell[cell].append(value)
    return torch.stack([combine(by_cell.get(cell, nothing), moment) for cell in range(len(numel))])
