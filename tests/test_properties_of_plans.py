"""Random meshes, placements, shapes, dtypes, groups and pieces: a plan's pieces are those that torch cut, and every element counts once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

import distwd
from distwd.sharding.pieces import describe
from tests import mesh_cases, simulated_ranks, threads
from tests.mesh_cases import Case, TensorPlacement
from tests.releases import UNEVEN_OVER_TP, needs_torch

steady = {"derandomize": True, "deadline": None, "database": None}
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
MESHES = [
    (1,),
    (2,),
    (3,),
    (4,),
    (5,),
    (6,),
    (7,),
    (8,),
    (2, 2),
    (2, 3),
    (3, 2),
    (2, 4),
    (4, 2),
    (1, 5),
    (2, 2, 2),
    (2, 1, 3),
]


def shapes(num_dims: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Of at least so many dimensions; of few elements, so that some shards are uneven and some empty."""
    return st.lists(st.integers(0, 9), min_size=num_dims, max_size=3).map(tuple)


# --- ranks in turn: pieces and owners ---------------------------------------------------------------------------------


@st.composite
def cuts(draw: st.DrawFn, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], list]:
    """A shape, and placements for it; strided ones as FSDP2 over TP writes them, where both readings are the same, and others."""
    shape = draw(shapes(0))
    dims = st.integers(0, max(len(shape) - 1, 0))
    kinds = st.one_of(st.just(Replicate()), dims.map(Shard)) if shape else st.just(Replicate())
    placements: list = [draw(kinds) for _ in sizes]
    if len(sizes) > 1 and shape and draw(st.booleans()):
        dim = draw(dims)
        shape = (*shape[:dim], draw(st.integers(0, 3)) * math.prod(sizes), *shape[dim + 1 :])
        placements[-2:] = [_StridedShard(dim, split_factor=sizes[-1]), Shard(dim)]
        placements[:-2] = [Replicate()] * (len(sizes) - 2)
    elif shape and draw(st.booleans()):
        placements[-1] = _StridedShard(draw(dims), split_factor=draw(st.integers(1, 4)))
    return shape, placements


@st.composite
def models(draw: st.DrawFn) -> tuple[tuple[int, ...], list]:
    sizes = draw(st.sampled_from(MESHES))
    return sizes, draw(st.lists(cuts(sizes), min_size=1, max_size=6))


@simulated_ranks.has_local_tensors
@settings(max_examples=200, **steady)
@given(model=models())
def test_pieces_are_what_torch_cuts_and_have_one_owner_each(model):
    check_in_turn(*model)


def check_in_turn(sizes: tuple[int, ...], tensors: list) -> None:
    numbers = [torch.arange(math.prod(shape)).double().reshape(shape) for shape, _ in tensors]
    held = simulated_ranks.distribute(numbers, sizes, [placements for _, placements in tensors])
    owned: list[list[int]] = [[] for _ in tensors]
    for mine, found in zip(held, simulated_ranks.owners(held), strict=True):
        assert (found.mismatched, found.uncovered, found.drifted) == ([], [], [])
        for index, (tensor, is_owner) in enumerate(zip(mine, found.owned.tolist(), strict=True)):
            piece, local = describe("w", tensor), tensor._local_tensor
            assert mesh_cases.numbers_of(piece) == local.flatten().tolist()
            assert piece.local_shape == tuple(local.shape)
            check_offsets(tensor, piece)
            owned[index] += local.flatten().long().tolist() if is_owner else []
    for (shape, _), counted in zip(tensors, owned, strict=True):
        assert sorted(counted) == list(range(math.prod(shape)))


def check_offsets(tensor: Any, piece: Any) -> None:
    """torch's own account of where a shard lies, for those that lie in one block."""
    if any(isinstance(placement, _StridedShard) for placement in tensor.placements):
        return
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape) == piece.local_shape
    if piece.numel:
        assert tuple(offset) == tuple(cut[0][0] for cut in piece.cuts)


# --- ranks as threads: plans, metrics, steps --------------------------------------------------------------------------


@st.composite
def way(draw: st.DrawFn, sizes: tuple[int, ...]) -> TensorPlacement:
    axes = tuple(draw(st.sets(st.integers(0, len(sizes) - 1)).map(sorted)))
    stage = None
    outside = [axis for axis in range(len(sizes)) if axis not in axes]
    if outside and draw(st.integers(0, 3)) == 0:
        axis = draw(st.sampled_from(outside))
        stage = (axis, draw(st.integers(0, sizes[axis] - 1)))
    kind = draw(st.sampled_from(["dtensor", "dtensor", "pieces", "fsdp"]))
    if kind == "pieces" and axes:
        some = draw(st.lists(st.integers(0, 5), min_size=sizes[axes[0]], max_size=sizes[axes[0]]))
        return TensorPlacement(axes[:1], shares=tuple(map(float, some)), stage=stage)
    placements = tuple(draw(st.sampled_from([Replicate(), Shard(0), Shard(1)])) for _ in axes)
    if (
        kind == "fsdp" and axes and axes[0] > 0 and stage is None
    ):  # FSDP2 over what is there: tensor parallelism, or nothing
        return TensorPlacement(axes[-1:], placements[-1:], fsdp=axes[0] - 1)
    return TensorPlacement(axes, placements, stage=stage)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, Case]:
    """A number of ranks, and a case on some of them."""
    sizes = draw(st.sampled_from(MESHES))
    ranks = draw(st.integers(math.prod(sizes), 8))
    some = tuple(sorted(draw(st.permutations(range(ranks)))[: math.prod(sizes)]))
    kinds = draw(st.lists(way(sizes), min_size=1, max_size=7))
    tensors = tuple((kind, draw(shapes(kind.num_dims))) for kind in kinds)
    return ranks, Case(some, sizes, tensors, draw(dtypes), draw(st.integers(0, 2**31)))


@settings(max_examples=150, **steady)
@given(world=cases())
def test_any_mix_counts_once_measures_right_and_steps_like_one_process(world):
    ranks, case = world
    mesh_cases.check(case, threads.run(ranks, mesh_cases.look, case))


def look_without(case: Case, victim: int, name: str) -> tuple[list[int], list[int]] | str:
    """What this rank has and owns of `name` when the `victim` does not pass its piece of it, or why not."""
    mesh, params, layout = mesh_cases.set_up(case)
    held = params.get(name)
    if dist.get_rank() == victim:
        params.pop(name, None)
    try:
        plan = distwd.Plan.build(params.items(), layout=layout)
    except distwd.PlanError as error:
        return str(error)
    here = mesh_cases.placed(case, case.numbers(), mesh).get(name)
    numbers = [] if here is None else mesh_cases.local_of(here).flatten().long().tolist()
    owned = any(entry.name == name and own for entry, own in zip(plan.entries, plan.owned, strict=True))
    assert held is not None or not owned
    return (numbers if name in params else []), (numbers if owned else [])


@settings(max_examples=100, **steady)
@given(world=cases(), victim=st.integers(0, 7), index=st.integers(0, 6))
def test_a_piece_that_is_not_passed_is_missed_by_all_ranks_alike_or_owned_by_a_copy(world, victim, index):
    case = dataclasses.replace(world[1], ranks=tuple(range(len(world[1].ranks))))
    check_without(case, victim % len(case.ranks), list(case.named)[index % len(case.named)])


def check_without(case: Case, victim: int, name: str) -> None:
    outcomes = threads.run(len(case.ranks), look_without, case, victim, name)
    errors = {one for one in outcomes if isinstance(one, str)}
    if errors:
        assert len(errors) == 1
        assert set(outcomes) == errors
        (error,) = errors
        assert name in error or "matches no parameter" in error  # the pattern of a mark
        return
    held = {number for one, _ in outcomes for number in one}
    assert sorted(number for _, own in outcomes for number in own) == sorted(held)
    # Nobody may hold it at all: then it is no parameter of the model.
    assert len(held) in (0, math.prod(case.named[name][1]))


# --- these laws can fail ----------------------------------------------------------------------------------------------


def every_holder_owns(resolve: Callable) -> Callable:
    def wrong(rows: Any, rank: int) -> Any:
        found = resolve(rows, rank)
        return dataclasses.replace(found, owned=torch.ones_like(found.owned))

    return wrong


def no_check_of_coverage(resolve: Callable) -> Callable:
    return lambda *args: dataclasses.replace(resolve(*args), uncovered=[])


def even_chunks(chunk: Callable) -> Callable:
    """As numpy cuts: the first ones are longer by one."""

    def wrong(intervals: Any, num_chunks: int, index: int) -> Any:
        length = sum(high - low for low, high in intervals)
        edges = [length * k // num_chunks for k in range(num_chunks + 1)]
        return chunk.__globals__["_take"](intervals, edges[index], edges[index + 1])

    return lambda *args: tuple(wrong(*args))


def as_written(reorder: Callable) -> Callable:
    return lambda axes: axes


MUTANTS = {
    "every holder owns": ("distwd.sharding.build.resolve", every_holder_owns),
    "no check of coverage": ("distwd.sharding.build.resolve", no_check_of_coverage),
    "even chunks": ("distwd.sharding.pieces._chunk", even_chunks),
    "strided as written": ("distwd.sharding.pieces._as_fsdp_cuts", as_written),
}


@contextmanager
def mutant(name: str) -> Iterator[None]:
    target, change = MUTANTS[name]
    module, attribute = target.rsplit(".", 1)
    original = getattr(__import__(module, fromlist=[attribute]), attribute)
    with ExitStack() as stack:
        stack.enter_context(mock.patch(target, change(original)))
        yield


COPIES = Case((0, 1, 2, 3), (2, 2), ((TensorPlacement((1,), (Shard(0),)), (7, 3)), (TensorPlacement(), (4,))))
UNEVEN = Case((0, 1, 2), (3,), ((TensorPlacement((0,), (Shard(0),)), (7, 2)),))
NESTED = Case((0, 1, 2, 3, 4, 5), (3, 2), ((TensorPlacement((1,), (Shard(0),), fsdp=0), (7, 2)),))


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("every holder owns", COPIES),
        ("even chunks", UNEVEN),
        pytest.param("strided as written", NESTED, marks=needs_torch("2.9", UNEVEN_OVER_TP)),
    ],
)
def test_a_mutant_of_owners_or_cuts_is_seen(name, case):
    mesh_cases.check(case, threads.run(len(case.ranks), mesh_cases.look, case))
    with mutant(name), pytest.raises((AssertionError, distwd.PlanError)):
        mesh_cases.check(case, threads.run(len(case.ranks), mesh_cases.look, case))


def test_a_mutant_of_the_coverage_is_seen():
    name = next(iter(UNEVEN.named))
    check_without(UNEVEN, 1, name)
    with mutant("no check of coverage"), pytest.raises(AssertionError):
        check_without(UNEVEN, 1, name)


@simulated_ranks.has_local_tensors
def test_a_mutant_of_cuts_is_seen_in_turn():
    model = ((3,), [((7, 2), [Shard(0)])])
    check_in_turn(*model)
    with mutant("even chunks"), pytest.raises((AssertionError, ValueError)):
        check_in_turn(*model)
