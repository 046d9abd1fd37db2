"""Law 10 on many ranks: the same PlanError on every rank, naming the parameter; nothing changed and nobody waits."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from tests import layouts, runs
from tests.layouts import LAYOUTS, mesh_of, whole_model
from tests.runs import PARAMS_SEED

Refusal = tuple[str, str, bool]


def step_of(params: list, **settings) -> None:
    import distwd

    for _, param in params:
        param.grad = torch.zeros_like(param)
    chain = distwd.Chain(
        params, distwd.DirectWeightDecay(0.5), distwd.RelativeWeightDecay(), distwd.LR(0.1), **settings
    )
    chain.step()


def refusal(make: Callable[[], list], **settings) -> Refusal:
    """The outcome on this rank, and whether a parameter changed all the same."""
    params = make()
    before = bits_of(params)
    try:
        step_of(params, **settings)
        kind, message = "nothing", ""
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    same = [torch.equal(old, new) for old, new in zip(before, bits_of(params), strict=True)]
    return kind, message, not all(same)


def bits_of(params: list) -> list[torch.Tensor]:
    locals_ = [layouts.local_of(param) for _, param in params]
    return [local.to_dense().clone() for local in locals_ if not local.is_meta]


def parameter(*shape: int, value: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full(shape, value, dtype=dtype))


def rank() -> int:
    return dist.get_rank()


def drifted() -> list:
    return [("ok", parameter(4)), ("w", parameter(3, value=1.0 + 1e-6 * (rank() == 1)))]


def plain_shards() -> list:
    """Equal shapes on every rank, as FSDP1's pieces have: only the values differ."""
    return [("ok", parameter(4)), ("w", torch.nn.Parameter(torch.arange(3.0) + 3 * rank()))]


def uneven_plain_shards() -> list:
    return [("ok", parameter(4)), ("w", parameter(3 + rank()))]


def other_dtype() -> list:
    return [("ok", parameter(4)), ("w", parameter(3, dtype=torch.float64 if rank() else torch.float32))]


def other_shape() -> list:
    return [("ok", parameter(4)), ("w", parameter(*((2, 3) if rank() else (3, 2))))]


def partial() -> list:
    mesh = mesh_of(dist.get_world_size(), names=("dp",))
    value = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    return [("ok", parameter(4)), ("w", torch.nn.Parameter(value))]


def sparse_on_one() -> list:
    value = torch.eye(3)
    return [("ok", parameter(4)), ("w", (value.to_sparse() if rank() == 1 else value).requires_grad_())]


def complex_on_all() -> list:
    return [("ok", parameter(4)), ("w", torch.ones(3, dtype=torch.complex64, requires_grad=True))]


def meta_on_one() -> list:
    where = "meta" if rank() == 1 else "cpu"
    return [("ok", parameter(4)), ("w", torch.nn.Parameter(torch.ones(3, device=where)))]


def sharded_here_plain_there() -> list:
    mesh = mesh_of(dist.get_world_size(), names=("dp",))
    value = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
    return [("ok", parameter(4)), ("w", torch.nn.Parameter(value) if rank() == 0 else parameter(2))]


def drifted_replicas_of_a_shard() -> list:
    """Replicas over one axis of a mesh whose other axis shards."""
    mesh = mesh_of(2, 2, names=("replicate", "shard"))
    local = torch.ones(2) + (rank() == 3)
    return [("w", torch.nn.Parameter(DTensor.from_local(local, mesh, [Replicate(), Shard(0)], run_check=False)))]


FAULTS = {
    "drifted": (drifted, 2),
    "plain shards": (plain_shards, 2),
    "uneven plain shards": (uneven_plain_shards, 2),
    "other dtype": (other_dtype, 2),
    "other shape": (other_shape, 3),
    "partial": (partial, 2),
    "sparse on one": (sparse_on_one, 2),
    "complex": (complex_on_all, 2),
    "meta on one": (meta_on_one, 3),
    "sharded here, plain there": (sharded_here_plain_there, 2),
    "drifted replicas of a shard": (drifted_replicas_of_a_shard, 4),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_the_same_plan_error_on_every_rank(worlds, fault):
    make, ranks = FAULTS[fault]
    outcomes = worlds.run(ranks, refusal, make)
    for kind, message, changed in outcomes:
        assert kind == "PlanError", message
        assert re.search(r"\bw\b", message), message
        assert not changed
    assert len({message for _, message, _ in outcomes}) == 1


@pytest.mark.parametrize("fault", ["drifted", "plain shards", "drifted replicas of a shard"])
def test_the_error_names_the_ranks(worlds, fault):
    make, ranks = FAULTS[fault]
    guilty = {"drifted replicas of a shard": "3"}.get(fault, "1")
    for _, message, _ in worlds.run(ranks, refusal, make):
        assert "rank" in message
        assert guilty in message


def one_of_three() -> list:
    return [("ok", parameter(4)), ("w", parameter(3, value=1.0 + 1e-6 * (rank() == 1)))]


def test_the_copy_that_differs_is_named_apart_from_those_that_agree(worlds):
    (message,) = {message for _, message, _ in worlds.run(3, refusal, one_of_three)}
    assert re.search(r"w: rank 0, 2: \[0:3\] of \[3\] \(plain\), bits (\w+) \| rank 1: .*, bits (?!\1)\w+\n", message)


def unchecked(make) -> Refusal:
    return refusal(make, check_replicas=False)


@pytest.mark.parametrize("fault", ["drifted", "plain shards"])
def test_the_comparison_of_bits_can_be_turned_off(worlds, fault):
    make, ranks = FAULTS[fault]
    assert {kind for kind, *_ in worlds.run(ranks, unchecked, make)} == {"nothing"}


@pytest.mark.parametrize("fault", ["uneven plain shards", "other dtype"])
def test_coverage_is_checked_all_the_same(worlds, fault):
    make, ranks = FAULTS[fault]
    assert {kind for kind, *_ in worlds.run(ranks, unchecked, make)} == {"PlanError"}


# --- names ----------------------------------------------------------------------------------------------------------


def without_names(layout: str) -> Refusal:
    import distwd

    held = layouts.place(layout, whole_model(PARAMS_SEED))
    before = {name: layouts.local_of(param).clone() for name, param in held.items()}
    runs.feed(layout, held, 0)
    try:
        # The stage that holds nothing has an empty group: legal, and the others must know of it.
        groups = [{"params": list(held.values())}]
        distwd.Chain(groups, distwd.DirectWeightDecay(0.5), distwd.RelativeWeightDecay(), distwd.LR(0.1)).step()
        kind, message = "nothing", ""
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    changed = any(not torch.equal(before[name], layouts.local_of(param)) for name, param in held.items())
    return kind, message, changed


@pytest.mark.parametrize("layout", ["stages", "stages_interleaved", "stages_fsdp", "stages_tp", "fsdp_tp", "experts"])
def test_where_ranks_hold_other_meshes_names_are_asked_for(worlds, layout):
    outcomes = worlds.run(LAYOUTS[layout].ranks, without_names, layout)
    for kind, message, changed in outcomes:
        assert kind == "PlanError"
        assert "name" in message
        assert not changed


@pytest.mark.parametrize("layout", ["fsdp3", "hsdp", "mixed", "ddp2", "tp2", "columns4", "some_ranks"])
def test_names_are_not_needed_where_ranks_hold_the_same_tensors(worlds, layout):
    assert {kind for kind, *_ in worlds.run(LAYOUTS[layout].ranks, without_names, layout)} == {"nothing"}


def other_order() -> list:
    held = list(layouts.place("ddp2", whole_model(PARAMS_SEED)).items())
    return held[::-1] if rank() == 1 else held


def test_named_parameters_may_come_in_any_order(worlds):
    assert {kind for kind, *_ in worlds.run(2, refusal, other_order)} == {"nothing"}


def unnamed_other_order() -> Refusal:
    import distwd

    params = [parameter(3, value=2.0), parameter(2, value=3.0)]
    params = params[::-1] if rank() == 1 else params
    for param in params:
        param.grad = torch.zeros_like(param)
    try:
        distwd.Chain(params, distwd.RelativeWeightDecay(), distwd.LR(0.1)).step()
    except Exception as error:
        return type(error).__name__, str(error), False
    return "nothing", "", False


def test_unnamed_parameters_in_another_order_are_refused(worlds):
    assert {kind for kind, *_ in worlds.run(2, unnamed_other_order)} == {"PlanError"}


# --- rules ------------------------------------------------------------------------------------------------------------


def another_rule_on_one_rank(difference: str) -> Refusal:
    import distwd

    params = [("w", parameter(3)), ("v", parameter(2))]
    mine = rank() == 1
    for _, param in params:
        param.grad = torch.ones_like(param)
    rules = {
        "metric": lambda: distwd.RelativeWeightDecay(metric="l2" if mine else "mad"),
        "input": lambda: distwd.RelativeWeightDecay(norm_input="grad" if mine else "update"),
        "scope": lambda: distwd.RelativeWeightDecay(scope="tensor" if mine else "all"),
        "extremum": lambda: distwd.RelativeWeightDecay(metric="linf" if mine else "mad"),
    }
    try:
        distwd.Chain(params, distwd.Adam(), rules[difference](), distwd.LR(0.1)).step()
        kind, message = "nothing", ""
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    return kind, message, not all(bool((param == 1).all()) for _, param in params)


@pytest.mark.parametrize("difference", ["metric", "input", "scope", "extremum"])
def test_another_rule_on_one_rank_is_refused_on_every_rank(worlds, difference):
    for kind, message, changed in worlds.run(2, another_rule_on_one_rank, difference):
        assert kind == "PlanError", message
        assert not changed


def absolute_on_plain_shards() -> list[float]:
    import distwd

    params = plain_shards()
    for _, param in params:
        param.grad = torch.zeros_like(param)
    distwd.Chain(params, distwd.Adam(), distwd.WeightDecay(0.5), distwd.LR(1.0)).step()
    return params[1][1].tolist()


def test_absolute_rules_make_no_collective(worlds):
    """Any plain shard decays as it is; there is nothing to check."""
    assert worlds.run(2, absolute_on_plain_shards) == [[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]]
