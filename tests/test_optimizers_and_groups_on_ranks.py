"""Other optimizers than Adam, settings per group, and odd parameters, sharded: the same bits as in one process."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests import layouts, runs
from tests.chains import ADAM, LR, Decay, transforms_of
from tests.layouts import LAYOUTS, SHAPES, mesh_of, whole_model
from tests.oracle import Oracle
from tests.releases import needs_torch
from tests.runs import PARAMS_SEED, differing, grads_of
from tests.wire import Wire

OPTIMIZERS = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "NAdam": {},
    "RAdam": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
}


def with_optimizer(name: str, layout: str, foreach: bool) -> dict:
    import distwd

    held = layouts.place(layout, whole_model(PARAMS_SEED))
    optimizer = distwd.Wrap(getattr(torch.optim, name), foreach=foreach, **OPTIMIZERS[name])
    rules = (
        distwd.WeightDecay(0.01),
        optimizer,
        distwd.RelativeWeightDecay(0.1),
        distwd.LR(0.01),
        distwd.CautiousWeightDecay(0.01),
    )
    return runs.train_chain(distwd.Chain(held.items(), *rules), layout, held, 3).params


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("layout", ["fsdp3", "fsdp_tp", "mixed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_elementwise_optimizer_has_the_bits_of_one_process(worlds, name, layout, foreach):
    (reference,) = worlds.run(0, with_optimizer, name, "single", foreach)
    for params in worlds.run(LAYOUTS[layout].ranks, with_optimizer, name, layout, foreach):
        assert differing(params, reference) == []


def with_muon(layout: str, ours: bool) -> dict:
    """An optimizer of whole matrices, which calls collectives by itself."""
    import distwd

    held = layouts.place(layout, whole_model(PARAMS_SEED))
    matrices = {name: param for name, param in held.items() if param.ndim == 2}
    if ours:
        optimizer = distwd.Chain(matrices.items(), distwd.Wrap(torch.optim.Muon), distwd.LR(1.0))
    else:
        optimizer = torch.optim.Muon(matrices.values(), lr=1.0, weight_decay=0.0)
    for step in range(3):
        runs.feed(layout, held, step)
        optimizer.step()
    return {name: layouts.whole_of(param) for name, param in matrices.items()}


@needs_torch("2.9", "torch.optim.Muon")
@pytest.mark.parametrize("layout", ["single", "fsdp2"])
def test_an_optimizer_of_whole_matrices_sees_them(worlds, layout):
    """Its own bfloat16 products depend on the sharding, so it is compared with itself on the same one."""
    bare = worlds.run(LAYOUTS[layout].ranks, with_muon, layout, False)
    for ours, theirs in zip(worlds.run(LAYOUTS[layout].ranks, with_muon, layout, True), bare, strict=True):
        assert differing(ours, theirs) == []


# --- groups -----------------------------------------------------------------------------------------------------------

NAMES = list(SHAPES)
CUT = NAMES.index("down.weight")
GROUPS = [NAMES[:2], NAMES[2:CUT], [], NAMES[CUT:]]
SETTINGS = [
    {"weight_decay": 0.2, "ord": 1, "metric": "std", "norm_input": "params"},
    {"metric": "l2", "norm_input": "grad"},
    {"metric": "sum"},
    {"weight_decay": 0.05, "ord": 2.5, "metric": "mad", "lr": 0.1},
]


def with_groups(layout: str, scope: str, settings: list[dict]) -> tuple[dict, list[int], int]:
    import distwd

    held = layouts.place(layout, whole_model(PARAMS_SEED))
    groups = [
        {"params": [(name, held[name]) for name in names if name in held]} | given
        for names, given in zip(GROUPS, settings, strict=True)
    ]
    rule = Decay(0.1, metric="rms", scope=scope)
    chain = distwd.Chain(groups, *transforms_of([ADAM, rule, LR]))
    counts = []
    for step in range(3):
        runs.feed(layout, held, step)
        with Wire() as wire:
            chain.step()
        counts.append(len(wire.calls))
    return layouts.view(layout, held), counts[1:], chain.phases


@pytest.mark.parametrize("settings", [SETTINGS, [{}] * 4], ids=["own", "shared"])
@pytest.mark.parametrize("scope", ["all", "group", "tensor"])
@pytest.mark.parametrize("layout", ["fsdp3", "hsdp", "fsdp_tp", "mixed", "stages"])
def test_groups_have_their_own_numbers_in_one_collective(worlds, layout, scope, settings):
    ((reference, *_),) = worlds.run(0, with_groups, "single", scope, settings)
    for params, counts, phases in worlds.run(LAYOUTS[layout].ranks, with_groups, layout, scope, settings):
        assert differing(params, reference) == []
        assert (counts, phases) == ([1, 1], 1)


@pytest.mark.parametrize("scope", ["all", "group", "tensor"])
def test_groups_in_one_process_are_those_of_the_oracle(worlds, scope):
    by_name = {name: given for names, given in zip(GROUPS, SETTINGS, strict=True) for name in names}
    rates = {name: given.get("lr", 0.01) for name, given in by_name.items()}
    parts = [ADAM, Decay(0.1, metric="rms", scope=scope, by_name=by_name), type(LR)(0.01, rates)]
    oracle = Oracle(whole_model(PARAMS_SEED), parts, [group for group in GROUPS if group])
    for step in range(3):
        oracle.step(grads_of(step))
    ((params, *_),) = worlds.run(0, with_groups, "single", scope, SETTINGS)
    for name in params:
        torch.testing.assert_close(params[name].double(), oracle.params[name], rtol=1e-4, atol=1e-5)


# --- odd parameters ---------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A scalar (which nobody can shard), a frozen matrix, a transposed one, an empty one, two dtypes."""

    def __init__(self, shard=lambda value, dim: value) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        random = functools.partial(torch.randn, generator=generator)
        self.scalar = nn.Parameter(random(()))
        self.frozen = nn.Parameter(shard(random(5, 3), 0), requires_grad=False)
        self.turned = nn.Parameter(shard(random(4, 7), 1).t())
        self.empty = nn.Parameter(shard(torch.zeros(0, 3), 0))
        self.low = nn.Parameter(shard(random(9).bfloat16(), 0))
        self.plain = nn.Parameter(shard(random(7, 2), 0))


def over_three(value: torch.Tensor, dim: int) -> DTensor:
    return distribute_tensor(value, mesh_of(3, names=("dp",)), [Shard(dim)])


def odd_parameters(sharded: bool, norm_input: str) -> dict:
    import distwd

    module = Odd(over_three) if sharded else Odd()
    held = dict(module.named_parameters())
    rules = distwd.RelativeWeightDecay(0.1, norm_input=norm_input), distwd.LR(0.5), distwd.WeightDecay(0.25)
    chain = distwd.Chain(held.items(), distwd.Wrap(torch.optim.SGD, momentum=0.9), *rules)
    for _ in range(2):
        for param in held.values():
            # A gradient that depends on the element, made without knowing the layout.
            param.grad = (param.detach() * 0.5) if param.requires_grad else None
        chain.step()
    return {name: layouts.whole_of(param) for name, param in held.items()}


@pytest.mark.parametrize("norm_input", ["update", "grad", "params"])
def test_odd_parameters_have_the_bits_of_one_process(worlds, norm_input):
    (reference,) = worlds.run(0, odd_parameters, False, norm_input)
    for params in worlds.run(3, odd_parameters, True, norm_input):
        assert differing(params, reference) == []
    assert torch.equal(reference["frozen"], Odd().frozen)
    assert not torch.equal(reference["turned"], Odd().turned)


def stepped_in_another_order(metric: str) -> list[list[float]]:
    """Two models of the same shapes; in the second step rank 1 steps the other one first. Their metrics after each step."""
    import distwd

    params = [torch.nn.Parameter(torch.full((3,), value)) for value in (1.0, 5.0)]
    chains = [
        distwd.Chain([p], distwd.RelativeWeightDecay(0.0, norm_input="params", metric=metric), distwd.LR(0.5))
        for p in params
    ]
    found = []
    for order in ((0, 1), (0, 1) if dist.get_rank() == 0 else (1, 0), (0, 1)):
        for index in order:
            params[index].grad = torch.ones(3)
            chains[index].step()
        found.append([chain.stats()["RelativeWeightDecay"]["metric"].item() for chain in chains])
        for param, value in zip(params, (1.0, 5.0), strict=True):
            param.data.fill_(value)
    return found


@pytest.mark.parametrize("metric", ["mad", "linf", "std"])
def test_numbers_of_two_optimizers_are_never_taken_for_one_another(worlds, metric):
    for first, mixed, last in worlds.run(2, stepped_in_another_order, metric):
        assert first == last == ([0.0, 0.0] if metric == "std" else [1.0, 5.0])
        assert all(math.isnan(value) for value in mixed)
