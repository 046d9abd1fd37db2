"""Measure: local moments of what is asked for, one reduction for all of it, and the formulas that finish the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.scratch import Scratch
from ..world import World
from .metric import Metric, Moment
from .moments import combine, identity, local_moments, moments_of_each
from .reduce import Partial, reduce_partials


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of one device that count towards one cell.

    negated: measure -x, not x. zeros: elements beside them count as zero (parameters without a gradient).
    """

    cell: int
    tensors: list[Tensor]
    negated: bool = False
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
            value = -value if part.negated and moment.kind == "sum" else value
            found[moment].setdefault(part.cell, []).append(value.to(device))
            if part.zeros and moment.of_zeros is not None:
                found[moment][part.cell].append(value.new_full((), moment.of_zeros).to(device))
    return {moment: _by_cell(cells, moment, request.numel) for moment, cells in found.items()}


def _of_parts(parts: Sequence[Part], moments: Sequence[Moment], scratch: Scratch) -> Iterator[Mapping[Moment, Tensor]]:
    """The moments of each part. Parts of one tensor are measured together with others of its length."""
    alike: dict[tuple[torch.device, int], list[Tensor]] = {}
    for tensor in (part.tensors[0] for part in parts if len(part.tensors) == 1 and part.tensors[0].numel()):
        alike.setdefault((tensor.device, tensor.numel()), []).append(tensor)
    of_each = {key: iter(moments_of_each(tensors, moments, scratch)) for key, tensors in alike.items()}
    for part in parts:
        key = (part.tensors[0].device, part.tensors[0].numel()) if len(part.tensors) == 1 else None
        yield next(of_each[key]) if key in of_each else local_moments(part.tensors, moments, scratch)


def _by_cell(cells: dict[int, list[Tensor]], moment: Moment, numel: Tensor) -> Tensor:
    nothing = [identity(moment, numel.device)]
    return torch.stack([combine(cells.get(cell, nothing), moment) for cell in range(len(numel))])
