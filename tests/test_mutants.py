"""The laws can fail: each is broken on purpose inside the ranks, and the break shows by far more than a tolerance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from tests import layouts, runs, wire
from tests.chains import CHAINS, transforms_of
from tests.layouts import EVERY, LARGE, LAYOUTS, NUM_ELEMENTS, SHAPES, mesh_of, whole_model
from tests.oracle import metric_of
from tests.runs import PARAMS_SEED, alone, differing
from tests.test_law_sharded_equals_whole import METRICS, metrics_on, sums_on, ulp


def _patched(target: str, change: Callable) -> mock._patch:
    """Replace what `target` names by `change(original)`."""
    module, name = target.rsplit(".", 1)
    owner = __import__(module, fromlist=[name])
    return mock.patch.object(owner, name, change(getattr(owner, name)))


@contextmanager
def everyone_owns_everything() -> Iterator[None]:
    """Every replica counts."""

    def change(build):
        def wrong(*args, **kwargs):
            built = build(*args, **kwargs)
            return dataclasses.replace(built, owned=(True,) * len(built.owned))

        return wrong

    with _patched("distwd.metrics.plan.build", change):
        yield


@contextmanager
def owners_by_visible_replication() -> Iterator[None]:
    """Who owns is guessed from the tensor's own mesh, as libraries do that never ask other ranks."""

    def change(build):
        def wrong(entries, *args, **kwargs):
            built = build(entries, *args, **kwargs)
            return dataclasses.replace(built, owned=tuple(_first_in_its_mesh(entry.tensor) for entry in entries))

        return wrong

    with _patched("distwd.metrics.plan.build", change):
        yield


def _first_in_its_mesh(tensor: torch.Tensor) -> bool:
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == 0
    pairs = zip(tensor.placements, tensor.device_mesh.get_coordinate() or (), strict=True)
    return all(index == 0 for placement, index in pairs if isinstance(placement, Replicate))


@contextmanager
def no_reduction() -> Iterator[None]:
    """Each rank takes its own part for the whole."""
    with mock.patch.object(dist, "all_reduce", return_value=None):
        yield


@contextmanager
def wrong_group() -> Iterator[None]:
    """The sum stops at one axis of the mesh."""
    pairs = mesh_of(2, 2, names=("replicate", "shard")).get_group("shard")

    def change(reduce):
        return lambda tensor, op=dist.ReduceOp.SUM, group=None, **kwargs: reduce(tensor, op, group=pairs, **kwargs)

    with _patched("torch.distributed.all_reduce", change):
        yield


MUTANTS = {
    "everyone owns everything": (
        everyone_owns_everything,
        [
            "hsdp",
            "hsdp3x1",
            "ddp2",
            "replicated3",
            "mixed",
            "stages_tp",
            "experts_plain",
            "fsdp1_hybrid",
            "fsdp1_whole",
            "hsdp_tp",
        ],
    ),
    "owners by visible replication": (
        owners_by_visible_replication,
        ["fsdp_tp", "experts", "stages", "stages_tp", "experts_plain", "experts_named", "cut_by_hand", "fsdp1_full"],
    ),
    "no reduction": (
        no_reduction,
        ["fsdp2", "fsdp3", "fsdp4", "stages", "tp2", "stages_interleaved", "columns4", "some_ranks", "fsdp1_full_flat"],
    ),
    "wrong group": (
        wrong_group,
        ["fsdp4", "fsdp_tp", "experts_fsdp", "experts_hidden", "stages_fsdp", "stages_tp", "columns4"],
    ),
}
# Here every rank holds, or every piece has, equally many copies. If all of them count, a mean is right by luck: the number of
# elements, which travels with the sums, is as wrong as they are.
MEANS = ("mad", "rms", "std", "var")
EQUALLY_COPIED = ["hsdp", "hsdp3x1", "ddp2", "replicated3", "fsdp1_hybrid", "fsdp1_whole"]
BROKEN = [(mutant, layout) for mutant, (_, broken) in MUTANTS.items() for layout in broken]


def mutated(mutant: str, fn: Callable, *args: object) -> object:
    # In a first step most wrong owners are found out by the gradients of copies. Here the numbers have to show it.
    with MUTANTS[mutant][0](), _patched("distwd.optimizers.init_step.check_gradients", lambda check: lambda plan: None):
        return fn(*args)


@pytest.mark.parametrize(("mutant", "layout"), BROKEN)
def test_a_mutant_miscounts_the_elements(worlds, mutant, layout):
    for ones, *_ in worlds.run((EVERY | LARGE)[layout].ranks, mutated, mutant, sums_on, layout):
        assert ones != NUM_ELEMENTS


@pytest.mark.parametrize(("mutant", "layout"), BROKEN)
def test_a_mutant_is_far_from_the_oracle(worlds, mutant, layout):
    """On some rank every metric that adds something up is wrong by more than ten times what the law allows."""
    whole = list(whole_model(0).values())
    ranks = worlds.run((EVERY | LARGE)[layout].ranks, mutated, mutant, metrics_on, layout, 0, 1.0)
    hides_means = mutant == "everyone owns everything" and layout in EQUALLY_COPIED
    unseen = {"linf", float("-inf"), *(MEANS if hides_means else ())}
    for metric in [metric for metric in METRICS if metric not in unseen]:
        expected = metric_of(whole, metric)
        # NaN is far: a number that is not of this plan alone is made NaN.
        assert not all(abs(measured[metric] - expected) <= 10 * ulp(expected) for measured in ranks), metric


@pytest.mark.parametrize(("mutant", "layout"), BROKEN)
def test_a_mutant_trains_to_other_parameters(worlds, mutant, layout):
    hides_means = mutant == "everyone owns everything" and layout in EQUALLY_COPIED
    chain = "l2_of_grad" if hides_means else "mad_of_update"
    reference = alone(worlds, chain)
    for run in worlds.run((EVERY | LARGE)[layout].ranks, mutated, mutant, runs.train, layout, chain):
        assert differing(run.params, reference.params) != []


def padding_counts(layout: str) -> dict:
    """What fills up the last pieces of FSDP1 is zeros: it shows in a mean, not in a sum."""
    with _patched("distwd.sharding.pieces.padding_of_shard", lambda padding_of_shard: lambda tensor: 0):
        return metrics_on(layout, 0, 1.0)


def test_padding_that_counts_is_seen(worlds):
    expected = metric_of(list(whole_model(0).values()), "mad")
    for measured in worlds.run(3, padding_counts, "fsdp1_full_flat"):
        assert abs(measured["mad"] - expected) > 10 * ulp(expected)


@pytest.mark.parametrize("layout", ["fsdp3", "stages"])
def test_ranks_without_a_reduction_disagree(worlds, layout):
    ranks = worlds.run(LAYOUTS[layout].ranks, mutated, "no reduction", metrics_on, layout, 0, 1.0)
    assert len({measured["mad"] for measured in ranks}) > 1


# --- laws 3, 5 and 6 ------------------------------------------------------------------------------------------------


@contextmanager
def before_measuring(act: Callable[[], object]) -> Iterator[None]:
    """Do something else each time a chain measures."""

    def change(measure):
        def wrong(*args, **kwargs):
            act()
            return measure(*args, **kwargs)

        return wrong

    with _patched("distwd.step.coefficients.measure", change):
        yield


def a_collective_more() -> list[int]:
    with before_measuring(lambda: dist.all_reduce(torch.ones(1))):
        run = runs.train("fsdp2", "mad_of_update")
    return [len(calls) for calls in run.wires[1:]]


def test_a_collective_more_is_counted(worlds):
    assert worlds.run(2, a_collective_more) == [[2, 2]] * 2


def a_read() -> str:
    held = layouts.place("fsdp2", whole_model(PARAMS_SEED))
    import distwd

    chain = distwd.Chain(held.items(), *transforms_of(CHAINS["mad_of_update"].parts))
    runs.feed("fsdp2", held, 0)
    chain.step()
    try:
        with before_measuring(lambda: torch.ones(()).item()), wire.no_host_sync():
            chain.step()
    except wire.HostSync as sync:
        return str(sync)
    return "not seen"


def test_a_read_is_seen(worlds):
    for seen in worlds.run(2, a_read):
        assert "distwd" in seen


def drifting() -> dict:
    """A mutant of law 4: the coefficient of one replica is off in its fourth digit."""

    def change(measure):
        def wrong(*args, **kwargs):
            off = 1 + 1e-3 * dist.get_rank()
            return [numbers * off for numbers in measure(*args, **kwargs)]

        return wrong

    with _patched("distwd.step.coefficients.measure", change):
        return runs.train("ddp2", "mad_of_update", 8).params


def test_replicas_that_drift_are_seen(worlds):
    first, second = worlds.run(2, drifting)
    assert differing(first, second) != []


def test_every_parameter_is_there_to_be_miscounted():
    assert len(SHAPES) == len(whole_model(0))
