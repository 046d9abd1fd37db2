"""The plan: built by one exchange, owned once, printed as a table, kept until the layout changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, distribute_tensor

import distwd
from tests import layouts, runs, wraps
from tests.chains import CHAINS, transforms_of
from tests.layouts import EVERY, FLAT, NUM_ELEMENTS, SHAPES, whole_model
from tests.oracle import metric_of
from tests.runs import PARAMS_SEED, differing
from tests.wire import Wire


def plan_on(layout: str) -> dict:
    held = layouts.place(layout, whole_model(0))
    with Wire() as built:
        plan = distwd.Plan.build(held.items(), layout=held.marks)
    with Wire() as measured:
        value = plan.metric([param.detach() for param in held.values()], "std")
    with Wire() as printed:
        text = str(plan)
    owned = sum(elements_of(p) for p, mine in zip(held.values(), plan.owned, strict=True) if mine)
    return {
        "built": len(built.calls),
        "measured": measured.calls,
        "printed": printed.calls,
        "value": value.item(),
        "text": text,
        "owned": owned,
        "names": list(held),
    }


def elements_of(param: torch.Tensor) -> int:
    """Of the whole: FSDP1 fills its last pieces up."""
    return layouts.local_of(param).numel() - getattr(param, "_shard_numel_padded", 0)


def scalars_elsewhere() -> tuple[int, float, list[bool]]:
    """A scalar and a matrix that live on ranks 1 and 2 only, and a vector everywhere."""
    mesh = wraps.mesh_without_rank0()
    tensors = [torch.tensor(3.0), torch.ones(2, 3), torch.ones(4)]
    there = [distribute_tensor(tensor, mesh, [Replicate()]) for tensor in tensors[:2]]
    named = list(zip(("scale", "w", "everywhere"), [*there, tensors[2]], strict=True))
    plan = distwd.Plan.build(named)
    return plan.numel, plan.metric([tensor for _, tensor in named], "sum").item(), list(plan.owned)


def test_a_rank_outside_the_mesh_holds_nothing_of_a_scalar_either(worlds):
    first, *others = worlds.run(3, scalars_elsewhere)
    assert first == (11, 13.0, [False, False, True])
    assert others == [(11, 13.0, [True, True, False]), (11, 13.0, [False, False, False])]


@pytest.mark.parametrize("layout", EVERY)
def test_a_plan_owns_every_element_once_and_measures_with_one_collective(worlds, layout):
    alone = EVERY[layout].ranks < 2
    ranks = worlds.run(EVERY[layout].ranks, plan_on, layout)
    assert sum(seen["owned"] for seen in ranks) == NUM_ELEMENTS
    for seen in ranks:
        assert seen["built"] <= (0 if alone else 3)
        assert len(seen["measured"]) == (0 if alone else 1)
        assert seen["printed"] == []
        assert seen["value"] == pytest.approx(metric_of(list(whole_model(0).values()), "std"), rel=1e-6)
        for name in seen["names"]:
            assert name in seen["text"]


def test_a_plan_is_frozen():
    plan = distwd.Plan.build([("w", torch.ones(2, 3))])
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.owned = ()


def test_a_table_has_a_line_for_each_parameter_with_its_sizes():
    plan = distwd.Plan.build([("weight", torch.ones(12, 34)), ("bias", torch.ones(56))])
    lines = str(plan).splitlines()
    weight, bias = (next(line for line in lines if name in line) for name in ("weight", "bias"))
    assert "12" in weight
    assert "34" in weight
    assert "56" in bias


def test_a_plan_refuses_tensors_that_are_not_its_parameters():
    plan = distwd.Plan.build([("w", torch.ones(2, 3)), ("v", torch.ones(4))])
    with pytest.raises(ValueError, match="2 parameters"):
        plan.metric([torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"\bv\b"):
        plan.metric([torch.ones(2, 3), torch.ones(5)])


def test_none_counts_as_zeros():
    plan = distwd.Plan.build([("w", torch.ones(3)), ("v", torch.ones(3))])
    assert plan.metric([torch.full((3,), 2.0), None], "mad").item() == 1
    assert plan.metric([torch.full((3,), 2.0), None], float("-inf")).item() == 0
    assert plan.metric([None, None], "l2").item() == 0


def wires_after(change: str) -> list[int]:
    """Collectives of four steps, with something done between the second and the third."""
    held = layouts.place("fsdp2", whole_model(PARAMS_SEED))
    names = list(held)
    chain = distwd.Chain([(name, held[name]) for name in names[:-2]], *transforms_of(CHAINS["mad_of_update"].parts))
    counts = []
    for step in range(4):
        if step == 2:
            CHANGES[change](chain, held, names)
        runs.feed("fsdp2", held, step)
        with Wire() as wire:
            chain.step()
        counts.append(len(wire.calls))
    return counts


def add_group(chain, held: dict, names: list[str]) -> None:
    chain.add_param_group({"params": [(name, held[name]) for name in names[-2:]]})


def new_storage(chain, held: dict, names: list[str]) -> None:
    """On one rank only: another rank must not be waited for."""
    if dist.get_rank() == 0:
        for name in names:
            local = layouts.local_of(held[name])
            held[name].data = type(held[name].data).from_local(
                local.clone(), held[name].device_mesh, held[name].placements, shape=held[name].shape, stride=held[name].stride()
            ) if isinstance(held[name].data, torch.distributed.tensor.DTensor) else local.clone()  # fmt: skip


def other_rates(chain, held: dict, names: list[str]) -> None:
    chain.param_groups[0]["lr"] = 0.5
    chain.param_groups[0]["weight_decay"] = 0.5


def loaded(chain, held: dict, names: list[str]) -> None:
    chain.load_state_dict(chain.state_dict())


CHANGES = {"add_group": add_group, "new_storage": new_storage, "other_rates": other_rates, "loaded": loaded}


def test_a_plan_is_built_once(worlds):
    for first, *later in worlds.run(2, wires_after, "other_rates"):
        assert first > 1
        assert later == [1, 1, 1]


def test_a_plan_is_built_again_after_a_group_was_added(worlds):
    for first, second, third, fourth in worlds.run(2, wires_after, "add_group"):
        assert (second, fourth) == (1, 1)
        assert third == first


@pytest.mark.parametrize("change", ["new_storage", "loaded"])
def test_new_storage_of_the_same_layout_is_found_without_a_collective(worlds, change):
    for _, *later in worlds.run(2, wires_after, change):
        assert later == [1, 1, 1]


def absolute_wires() -> list[int]:
    """Absolute rules on tensors that no plan would accept."""
    params = [("w", torch.nn.Parameter(torch.ones(3) + dist.get_rank()))]
    chain = distwd.Chain(params, distwd.Adam(), distwd.CautiousWeightDecay(0.1), distwd.LR(0.1))
    counts = []
    for _ in range(2):
        params[0][1].grad = torch.ones(3)
        with Wire() as wire:
            chain.step()
        counts.append(len(wire.calls))
    return counts


def test_absolute_rules_need_no_plan(worlds):
    assert worlds.run(2, absolute_wires) == [[0, 0]] * 2


def metric_of_gradients(layout: str) -> tuple[float, float]:
    held = layouts.place(layout, whole_model(PARAMS_SEED))
    plan = distwd.Plan.build(held.items(), layout=held.marks)
    runs.feed(layout, held, 0)
    everything = plan.metric([param.grad for param in held.values()], "l2")
    runs.feed(layout, held, 0, without=["up.weight", "head.bias"])
    return everything.item(), plan.metric([param.grad for param in held.values()], "l2").item()


@pytest.mark.parametrize("layout", [name for name in EVERY if name not in FLAT])
def test_a_metric_of_gradients_is_that_of_the_whole(worlds, layout):
    grads = runs.grads_of(0)
    some = [grads[name] for name in SHAPES if name not in ("up.weight", "head.bias")]
    for everything, partly in worlds.run(EVERY[layout].ranks, metric_of_gradients, layout):
        assert everything == pytest.approx(metric_of(list(grads.values()), "l2"), rel=2e-7)
        assert partly == pytest.approx(metric_of(some, "l2"), rel=2e-7)


def test_the_same_run_twice_has_the_same_bits(worlds):
    first, second = (worlds.run(2, runs.train, "fsdp2", "update_twice")[0].params for _ in range(2))
    assert differing(first, second) == []


def test_a_plan_is_built_again_for_another_dtype():
    """A metric has the dtype of the model as it is now."""
    param = torch.nn.Parameter(torch.ones(3))
    chain = distwd.Chain([("w", param)], distwd.RelativeWeightDecay(0.1, norm_input="params"), distwd.LR(0.1))
    for dtype in (torch.float32, torch.float64):
        param.data = param.data.to(dtype)
        param.grad = torch.ones_like(param)
        chain.step()
        assert chain.stats()["RelativeWeightDecay"]["metric"].dtype == dtype
