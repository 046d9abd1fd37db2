"""`global_metric`: one number about sharded tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor

from ..sharding.layout import Layout
from ..sharding.params import entries_of
from .metric import parse_metric
from .plan import Plan


def global_metric(
    tensors: Iterable[Tensor | tuple[str, Tensor]],
    metric: str | float = "mad",
    *,
    group: dist.ProcessGroup | None = None,
    layout: Layout | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """A number about all elements of `tensors`, each counted once however they are sharded:  mean|x|, ‖x‖_p, ...

    tensors: DTensors, plain tensors or a mix, on any meshes; or (name, tensor) pairs. Float dtypes, any shapes.
    metric: "mad" (mean |x|), "std", "var" (both with N-1), "sum", "rms", "l0" (non-zeros), "l1", "l2", "l3", "l4", "linf", or a number p.
        Over no elements it is 0; a NaN on any rank makes it NaN on all. std and var keep float32's precision up to |mean|/std of 10^4.
    group: the ranks that together hold the tensors; default all ranks. layout: as in `Plan.build`.
    names: one for each tensor, where they come without.
    Returns a 0-d float32 tensor (float64 if all are float64), the same bits on every rank; accumulated in float64.
    A collective call that builds a plan each time; for a number in every step use `Plan.build` once and `plan.metric`.
    Raises ValueError for an unknown metric, PlanError (see `Plan.build`) for tensors that are not what they seem.

    >>> import torch
    >>> from distwd import global_metric
    >>> global_metric([torch.tensor([3.0, -4.0])], "l2")
    tensor(5.)
    """
    parse_metric(metric)
    plan = Plan.build(tensors if names is None else _with_names(tensors, names), group=group, layout=layout)
    return plan.metric([entry.tensor for entry in plan.entries], metric)


def _with_names(items: Iterable[Tensor | tuple[str, Tensor]], names: Sequence[str]) -> list[tuple[str, Tensor]]:
    tensors = [entry.tensor for entry in entries_of(items)]
    if len(names) != len(tensors):
        raise ValueError(f"names has {len(names)} entries for {len(tensors)} tensors; give one for each")
    return list(zip(names, tensors, strict=True))
