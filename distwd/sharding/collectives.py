"""The one door to the network: every collective that distwd starts is started here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import ORDINARY, is_dtensor, local_tensor, plain_tensors
from ..errors import CollectiveError, PlanError
from .world import World

# --- in a step --------------------------------------------------------------------------------------------------------


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Σ over ranks of `values`, the same bits on every rank. One all-reduce; none in a world of one.

    values: [n], any dtype and device. Its memory may be used for the result.
    Returns [n] on the device of `values`.
    Raises PlanError or CollectiveError if another rank does not take part.
    """
    return _all_reduce(values, dist.ReduceOp.SUM, world)


def max_over_ranks(values: Tensor, world: World) -> Tensor:
    """Maximum over ranks of `values`, the same bits on every rank; NaN where any rank has a NaN. One all-reduce.

    values: [n], a float dtype, any device.
    Returns [n] on the device of `values`.
    Raises PlanError or CollectiveError if another rank does not take part.
    """
    if world.size == 1:
        return values
    # Backends do not agree on the maximum of a number and a NaN, so NaNs travel as a second vector of flags.
    numbers = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    both = torch.cat([numbers, values.isnan().to(values.dtype)])
    reduced, is_nan = _all_reduce(both, dist.ReduceOp.MAX, world).chunk(2)
    return torch.where(is_nan > 0, torch.nan, reduced)


def is_true_on_any_rank(flag: bool, world: World) -> bool:
    """Whether `flag` is true on any rank. One all-reduce, and the result is read: not for every step."""
    # A real number, whatever kind of tensors is made by default.
    with plain_tensors():
        return bool(_all_reduce(torch.tensor([flag], dtype=torch.int32), dist.ReduceOp.MAX, world)[0] > 0)


def _all_reduce(values: Tensor, op: dist.ReduceOp.RedOpType, world: World) -> Tensor:
    if world.size == 1:
        return values
    # NCCL alone cannot send what CPU offload keeps in host memory.
    sent = world.sendable(values)
    with _errors_explained(world, in_step=True):
        dist.all_reduce(sent, op=op, group=world.group)
    return sent.to(values.device)


def local_like(tensor: Tensor, param: Tensor) -> Tensor:
    """This rank's part of `tensor`, cut as `param` is cut.

    tensor: a gradient, say; a DTensor or a plain tensor.
    param: the parameter that it belongs to.
    Returns a plain tensor of the local shape of `param`.

    A gradient with other placements than its parameter (`Replicate`, `Partial`) is redistributed first, as torch's own
    optimizers do implicitly. That is a collective, on every rank of the mesh. Its ranks agree, since placements are the
    same on all ranks of a mesh. With equal placements nothing is sent.
    """
    if type(tensor) in ORDINARY:
        return tensor
    if is_dtensor(tensor) and is_dtensor(param) and tensor.placements != param.placements:
        tensor = tensor.redistribute(placements=param.placements)
    return local_tensor(tensor)


# --- while a plan is built --------------------------------------------------------------------------------------------


def gather_rows(rows: Tensor, world: World) -> list[Tensor]:
    """The integers of every rank. Two all-gathers: how many rows each rank has, then the rows.

    rows: [number of rows of this rank, columns] int64 on the CPU; columns the same on every rank.
    Returns one such matrix for each rank, in order of rank.
    Raises PlanError if another rank does not take part.
    """
    if world.size == 1:
        return [rows]
    # Stages of a pipeline hold different numbers of parameters.
    counts = torch.cat(_gather(torch.tensor([rows.shape[0]]), world)).tolist()
    # An all-gather takes equal shapes only: gloo has no other.
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: rows.shape[0]] = rows
    return [part[:count].cpu() for part, count in zip(_gather(padded, world), counts, strict=True)]


def gather_objects(value: Any, world: World) -> list[Any]:
    """One small picklable value from every rank, in order of rank. Not for every step: for texts of an error, say."""
    if world.size == 1:
        return [value]
    if world.is_fake:
        return [value] * world.size
    # Pickled by torch, through a tensor on the group's device.
    values: list[Any] = [None] * world.size
    with _errors_explained(world, in_step=False):
        dist.all_gather_object(values, value, group=world.group)
    return values


def _gather(tensor: Tensor, world: World) -> list[Tensor]:
    # A fake backend sends nothing and leaves the other parts as they were made: with any numbers.
    if world.is_fake:
        return [tensor] * world.size
    sent = world.sendable(tensor)
    parts = [torch.empty_like(sent) for _ in range(world.size)]
    with _errors_explained(world, in_step=False):
        dist.all_gather(parts, sent, group=world.group)
    return parts


@contextmanager
def _errors_explained(world: World, in_step: bool) -> Iterator[None]:
    """Turn a backend's error into one that says what to do: another rank died, raised, or does something else."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"the process group of {world.size} ranks that the model was planned for is gone ({error}); make the optimizer (or "
            "the attachment) anew with the new group, or without group=: then it follows the default group"
        ) from error
    except RuntimeError as error:
        # While a plan is built no rank can have published anything: its store comes with the plan.
        if not in_step:
            raise PlanError(
                f"rank {world.rank} of {world.size}: a rank has died while a plan or param_groups were made ({error}); find its own "
                "error, and restart the ranks together"
            ) from error
        # A rank that raised has published why. A rank that was killed could not.
        if reasons := world.published_errors():
            raise PlanError(reasons) from error
        raise CollectiveError(
            f"rank {world.rank}: another rank has died, or has not taken the step that this one takes: {error}; step on "
            "every rank or on none, or find the rank that died, and go on from a checkpoint"
        ) from error
