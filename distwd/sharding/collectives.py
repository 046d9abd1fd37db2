"""The plan's door to the network: descriptions of pieces go out once, when a plan is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import PlanError
from .world import World


def gather_rows(rows: Tensor, world: World) -> list[Tensor]:
    """Every rank's int64 matrix of rows [its number of rows, columns], by rank: two all-gathers."""
    if world.size == 1:
        return [rows]
    counts = torch.cat(_gather(torch.tensor([rows.shape[0]]), world)).tolist()
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: rows.shape[0]] = rows
    return [part[:count].cpu() for part, count in zip(_gather(padded, world), counts, strict=True)]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's (small, picklable) value, by rank; for what is said once, before training: explanations, patterns that matched."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    with _together(world):
        dist.all_gather_object(values, value, group=world.group)
    return values


def _gather(tensor: Tensor, world: World) -> list[Tensor]:
    tensor = world.sendable(tensor)
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    with _together(world):
        dist.all_gather(parts, tensor, group=world.group)
    return parts


@contextmanager
def _together(world: World) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PlanError(
            f"rank {world.rank} of {world.size} has come to build a plan, and another rank of the group has not. "
            "Every rank needs the same rules (one with absolute decay only never builds a plan) and the same group=, and "
            "must ask for the plan when the others do; or a rank has died."
        ) from error
