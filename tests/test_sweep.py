"""Worlds of 1 to 8 ranks × layouts × shapes, in one process: each tensor is counted once and steps like one process."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from tests import threads
from tests.mesh_cases import Case, Seen, TensorPlacement, check, look

SHAPES = [(), (1,), (0,), (5,), (8,), (16,), (23,), (3, 2), (7, 3), (8, 8), (0, 3), (1, 9), (2, 3, 4), (9, 5, 2)]
MESHES = [
    sizes
    for ranks in range(1, 9)
    for num_axes in (1, 2, 3)
    for sizes in itertools.product(range(1, 9), repeat=num_axes)
    if math.prod(sizes) == ranks and (num_axes == 1 or min(sizes) > 1)
]


def ways_on(sizes: tuple[int, ...]) -> Iterator[TensorPlacement]:
    """Every placement on every choice of axes; FSDP2 over TP; strided cuts; plain pieces; stages of a pipeline."""
    axes = range(len(sizes))
    for some in itertools.chain.from_iterable(itertools.combinations(axes, k) for k in range(len(sizes) + 1)):
        for placements in itertools.product((Replicate(), Shard(0), Shard(1)), repeat=len(some)):
            yield TensorPlacement(some, placements)
    for outer, inner in itertools.combinations(axes, 2):
        yield TensorPlacement((outer, inner), (_StridedShard(0, split_factor=sizes[inner]), Shard(0)))
        yield from (TensorPlacement((inner,), (Shard(dim),), fsdp=outer) for dim in (0, 1))
    for axis in axes:
        yield TensorPlacement((), (), fsdp=axis)
        yield from (TensorPlacement((axis,), shares=shares(sizes[axis], first)) for first in (1.0, 0.0))
        rest = tuple(other for other in axes if other != axis)
        for index in {0, sizes[axis] - 1}:
            yield TensorPlacement(rest, (Shard(0),) * len(rest), stage=(axis, index))


def shares(ranks: int, first: float) -> tuple[float, ...]:
    """Uneven pieces; without a first one, or with one alone."""
    return (first, *(float(rank % 3) for rank in range(1, ranks)))


def cases_on(sizes: tuple[int, ...]) -> list[Case]:
    """Each way with shapes that take turns, a hundred tensors of one plan at a time."""
    turns = itertools.cycle(SHAPES)
    tensors = []
    for way in ways_on(sizes):
        fitting = [shape for shape in itertools.islice(turns, 7 if len(sizes) < 3 else 4) if len(shape) >= way.num_dims]
        tensors += [(way, shape) for shape in fitting]
    ranks = tuple(range(math.prod(sizes)))
    return [Case(ranks, sizes, tuple(tensors[start::6]), seed=start) for start in range(6) if tensors[start::6]]


def test_the_sweep_meets_every_number_of_ranks_with_many_tensors():
    cases = [case for sizes in MESHES for case in cases_on(sizes)]
    assert {len(case.ranks) for case in cases} == set(range(1, 9))
    assert sum(len(case.tensors) for case in cases) > 1500


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_way_to_lie_on_a_mesh_is_counted_once_and_steps_like_one_process(sizes):
    for case in cases_on(sizes):
        check(case, threads.run(len(case.ranks), look, case))


def same(one: Seen, other: Seen) -> bool:
    bits = all(torch.equal(one.params[name], other.params[name]) for name in one.params)
    mine, its = (dataclasses.replace(seen, params={}) for seen in (one, other))
    return bits and one.params.keys() == other.params.keys() and mine == its


# FSDP2 over uneven pieces of tensor parallelism: its last rank has nothing where it has something by the placements as they are written.
UNEVEN = Case(
    tuple(range(6)),
    (3, 2),
    ((TensorPlacement((1,), (Shard(0),), fsdp=0), (7, 2)), (TensorPlacement((0,), (Shard(0),)), (5,))),
)


@pytest.mark.parametrize("case", [cases_on((2, 2))[0], UNEVEN], ids=["2x2", "uneven FSDP2 over TP"])
def test_real_ranks_see_what_threads_see(worlds, case):
    as_threads = threads.run(len(case.ranks), look, case)
    as_processes = worlds.run(len(case.ranks), look, case)
    check(case, as_processes)
    assert all(map(same, as_threads, as_processes))
