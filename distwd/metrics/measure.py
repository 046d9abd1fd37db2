"""Measure: local moments of what is asked for, one reduction for all of it, and the formulas that finish the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.scratch import Scratch
from ..world import World
from .metric import Metric, Moment
from .moments import combine, identity, local_moments
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
    moments = request.metric.moments
    found: dict[Moment, dict[int, list[Tensor]]] = {moment: {} for moment in moments}
    for part in request.parts:
        for moment, value in local_moments(part.tensors, moments, scratch).items():
            value = -value if part.negated and moment.kind == "sum" else value
            found[moment].setdefault(part.cell, []).append(value.to(request.numel.device))
            if part.zeros and moment.of_zeros is not None:
                found[moment][part.cell].append(value.new_full((), moment.of_zeros).to(request.numel.device))
    return {moment: _by_cell(cells, moment, request.numel) for moment, cells in found.items()}


def _by_cell(cells: dict[int, list[Tensor]], moment: Moment, numel: Tensor) -> Tensor:
    nothing = [identity(moment, numel.device)]
    return torch.stack([combine(cells.get(cell, nothing), moment) for cell in range(len(numel))])
