"""Simulates the ranks of a mesh in one process: LocalTensorMode shards for all of them; each describes its pieces.

LocalTensorMode runs one program for all ranks and keeps what differs between them (coordinates, lengths) symbolic. Ours branches on
such numbers, so plans do not run under it: it only makes the shards. Both it and the fake process group are private to torch, and
this file is the only one that knows them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from distwd._torch import local_tensor
from distwd.sharding.ownership import OwnerTable, checksums_of, resolve, rows_of
from distwd.sharding.pieces import describe

has_local_tensors = pytest.mark.skipif(
    importlib.util.find_spec("torch.distributed._local_tensor") is None,
    reason="this torch cannot simulate ranks: LocalTensorMode is missing in 2.9 and before",
)


def distribute(wholes: Sequence[Tensor], sizes: tuple[int, ...], placements: Sequence[Sequence[Placement]]) -> list:
    """The DTensors of every rank of a mesh of these sizes: [rank][tensor], as each rank would see its own."""
    ranks = math.prod(sizes)
    shards = _shards(wholes, sizes, placements)
    held = []
    for rank in range(ranks):
        mesh = DeviceMesh("cpu", torch.arange(ranks).reshape(sizes), _init_backend=False, _rank=rank)
        held.append([_dtensor(local[rank], w, mesh, p) for local, w, p in zip(shards, wholes, placements, strict=True)])
    return held


def _shards(wholes: Sequence[Tensor], sizes: tuple[int, ...], placements: Sequence[Sequence[Placement]]) -> list:
    """[tensor][rank] plain tensors."""
    from torch.distributed._local_tensor import LocalTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = math.prod(sizes)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = DeviceMesh("cpu", torch.arange(ranks).reshape(sizes))
        with LocalTensorMode(ranks):
            made = [distribute_tensor(w, mesh, p, src_data_rank=None) for w, p in zip(wholes, placements, strict=True)]
        return [_by_rank(tensor._local_tensor, ranks) for tensor in made]
    finally:
        dist.destroy_process_group()


def _by_rank(local: Tensor, ranks: int) -> list[Tensor]:
    by_rank = getattr(local, "_local_tensors", None)
    # A tensor that is whole everywhere stays a plain one.
    return [local if by_rank is None else by_rank[rank] for rank in range(ranks)]


def _dtensor(local: Tensor, whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def owners(held: Sequence[Sequence[Tensor]]) -> list[OwnerTable]:
    """The ownership that each rank computes from the rows of all; tensors are matched by position."""
    rows = []
    for tensors in held:
        pieces = [describe(f"t{number}", tensor) for number, tensor in enumerate(tensors)]
        rows.append(rows_of(pieces, [0] * len(pieces), checksums_of([local_tensor(t) for t in tensors]), named=True))
    return [resolve(rows, rank) for rank in range(len(held))]
