"""Laws 3 and 6: one collective per phase, counted underneath everything, on a schedule that only the layout sets."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests import layouts, runs
from tests.chains import ADAM, CHAINS, LR, transforms_of
from tests.layouts import EVERY, FLAT, LAYOUTS, SHAPES, whole_model
from tests.oracle import Decay, Oracle
from tests.runs import PARAMS_SEED, differing, grads_of, spread
from tests.wire import Wire

SPREAD = [name for name, layout in EVERY.items() if layout.ranks > 1 and name not in FLAT]


# Every chain on two layouts, and one of each kind on every layout.
KINDS = ["decoupled", "cautious", "mad_of_update", "by_tensor", "params_and_grad_share", "update_twice"]
COUNTED = [(layout, name) for layout in SPREAD for name in (CHAINS if layout in ("fsdp3", "fsdp_tp") else KINDS)]


@pytest.mark.parametrize(("layout", "chain_name"), COUNTED)
def test_a_step_costs_one_collective_per_phase(worlds, layout, chain_name):
    phases = CHAINS[chain_name].phases
    for run in spread(worlds, layout, chain_name):
        assert run.phases == phases
        # The first step may exchange descriptions as well, if anything is to be measured.
        assert [len(calls) for calls in run.wires[1:]] == [phases] * 2
        assert phases or run.wires[0] == []


@pytest.mark.parametrize("layout", ["single", "fsdp1rank"])
@pytest.mark.parametrize("chain_name", CHAINS)
def test_one_rank_makes_no_collective(worlds, layout, chain_name):
    (run,) = spread(worlds, layout, chain_name)
    assert run.phases == 0
    assert run.wires == [[], [], []]


def step_counts(parts: tuple) -> tuple[int, list[int]]:
    import distwd

    held = layouts.place("fsdp_tp", whole_model(PARAMS_SEED))
    chain = distwd.Chain(held.items(), *transforms_of(parts))
    run = runs.train_chain(chain, "fsdp_tp", held, 3)
    return chain.phases, [len(calls) for calls in run.wires[1:]]


MEETINGS = {
    "sums and extrema": [("mad", "params"), ("linf", "params"), ("sum", "grad")],
    "both extrema": [(float("inf"), "params"), (float("-inf"), "params")],
    "every metric": [(m, "grad") for m in ("mad", "std", "var", "sum", "rms", "l0", "l1", "l2", "l3", "l4", 2.5)],
    "extrema of an update": [("linf", "update"), ("mad", "params")],
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_phases_is_what_goes_over_the_wire(worlds, meeting):
    """Whether sums and extrema are packed or counted apart, the number the user reads is the number sent."""
    decays = [Decay(1e-5, metric=metric, norm_input=of) for metric, of in MEETINGS[meeting]]
    for phases, counts in worlds.run(4, step_counts, (ADAM, LR, *decays)):
        assert counts == [phases, phases]
        assert 1 <= phases <= 3


@pytest.mark.parametrize("scope", ["all", "group", "tensor"])
def test_every_scope_costs_one_collective(worlds, scope):
    parts = (ADAM, Decay(0.1, metric="std", scope=scope), LR)
    for phases, counts in worlds.run(4, step_counts, parts):
        assert (phases, counts) == (1, [1, 1])


def elements_sent() -> list[int]:
    import distwd

    held = layouts.place("fsdp2", whole_model(PARAMS_SEED))
    chain = distwd.Chain(held.items(), *transforms_of(CHAINS["mad_of_update"].parts))
    sent = []
    for step in range(3):
        runs.feed("fsdp2", held, step)
        with Wire() as wire:
            chain.step()
        sent.append(wire.num_elements)
    return sent[1:]


def test_a_collective_carries_a_few_numbers_not_a_parameter(worlds):
    for sent in worlds.run(2, elements_sent):
        assert max(sent) <= 16


def without_gradients(layout: str, missing: dict[int, list[str]]) -> tuple[dict, list[int], dict]:
    """Three steps; in the second the ranks in `missing` lack the gradients named there."""
    import distwd

    held = layouts.place(layout, whole_model(PARAMS_SEED))
    chain = distwd.Chain(held.items(), *transforms_of(CHAINS["params_and_grad_share"].parts), layout=held.marks)
    counts = []
    for step in range(3):
        rank = dist.get_rank() if dist.is_initialized() else 0
        before = {name: layouts.local_of(param).clone() for name, param in held.items()}
        runs.feed(layout, held, step, missing.get(rank, missing.get(-1, [])) if step == 1 else [])
        with Wire() as wire:
            chain.step()
        counts.append(len(wire.calls))
        if step == 1:
            still = {name for name, p in held.items() if torch.equal(before[name], layouts.local_of(p))}
    seen = {"held": set(held), "still": still, "finite": all_finite(held)}
    return layouts.view(layout, held), counts[1:], seen


def all_finite(held: dict) -> bool:
    return all(bool(layouts.local_of(param).isfinite().all()) for param in held.values())


SOME = ["up.weight", "norm.bias", "experts.weight", "gate.weight"]


@pytest.mark.parametrize("layout", SPREAD)
@pytest.mark.parametrize("names", [SOME, list(SHAPES)], ids=["some", "all"])
def test_a_missing_gradient_is_zeros_in_metrics_and_leaves_its_parameter(worlds, layout, names):
    oracle = Oracle(whole_model(PARAMS_SEED), CHAINS["params_and_grad_share"].parts)
    for step in range(3):
        oracle.step({n: g for n, g in grads_of(step).items() if step != 1 or n not in names})
    reference = worlds.run(0, without_gradients, "single", {-1: names})[0][0]
    for name in SHAPES:
        torch.testing.assert_close(reference[name].double(), oracle.params[name], rtol=1e-4, atol=1e-5)
    for params, counts, seen in worlds.run(EVERY[layout].ranks, without_gradients, layout, {-1: names}):
        assert differing(params, reference) == []
        assert counts == [1, 1]
        assert seen["still"] >= seen["held"] & set(names)


@pytest.mark.parametrize("layout", SPREAD)
@pytest.mark.parametrize("rank", [0, 1])
def test_gradients_missing_on_one_rank_keep_the_schedule(worlds, layout, rank):
    """The rank contributes zeros for what it lacks: the others neither wait for it nor pair its numbers with other things."""
    for _, counts, seen in worlds.run(EVERY[layout].ranks, without_gradients, layout, {rank: SOME}):
        assert counts == [1, 1]
        assert seen["finite"]


def with_an_empty_group(layout: str) -> tuple[dict, dict]:
    import distwd

    def run(extra: list) -> dict:
        held = layouts.place(layout, whole_model(PARAMS_SEED))
        groups = [{"params": list(held.items())}, *extra]
        chain = distwd.Chain(groups, *transforms_of(CHAINS["mad_of_update"].parts))
        return runs.train_chain(chain, layout, held, 2).params

    return run([]), run([{"params": []}])


@pytest.mark.parametrize("layout", ["single", "fsdp3", "stages"])
def test_an_empty_group_changes_nothing(worlds, layout):
    for plain, with_empty in worlds.run(LAYOUTS[layout].ranks, with_an_empty_group, layout):
        assert differing(plain, with_empty) == []


def sum_of_another_value(layout: str) -> tuple[float, float]:
    """NaN on one element of one rank, then infinity."""
    import distwd

    def measure(value: float) -> float:
        held = layouts.place(layout, whole_model(0))
        if dist.get_rank() == 0:
            layouts.local_of(held["up.weight"])[0, 0] = value
        return distwd.global_metric(list(held.values()), "mad", names=list(held)).item()

    return measure(float("nan")), measure(float("inf"))


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp3", "fsdp4", "tp2"])
def test_what_is_not_finite_is_seen_by_all(worlds, layout):
    for nan, inf in worlds.run(LAYOUTS[layout].ranks, sum_of_another_value, layout):
        assert nan != nan
        assert inf == float("inf")


def collectives_of_the_first_step(way: str, lr: float) -> tuple[int, int]:
    """With the plan built before: how many collectives the first step makes, and `phases`."""
    import distwd

    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    rule = distwd.RelativeWeightDecay(0.1, norm_input="params")
    if way == "chain":
        optimizer = decay = distwd.Chain([("w", param)], distwd.Adam(), rule, distwd.LR(lr))
    else:
        optimizer = torch.optim.AdamW([("w", param)], lr=lr, weight_decay=0)
        decay = distwd.attach(optimizer, rule)
    _ = decay.plan
    with Wire() as wire:
        optimizer.step()
    return len(wire.calls), decay.phases


@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize("way", ["chain", "attach"])
def test_the_first_step_costs_no_more_than_any_other(worlds, way, lr):
    """Whether it is a real step, all ranks find out together; that is no collective, and at lr > 0 nobody waits for it."""
    assert worlds.run(2, collectives_of_the_first_step, way, lr) == [(1, 1)] * 2
