"""Stochastic rounding on real ranks: the noise belongs to the element, wherever it lies, so every sharding ends at the same bits."""

from __future__ import annotations

import warnings
from itertools import repeat
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import layouts, runs, wire
from tests.layouts import LAYOUTS, SHAPES, submesh, whole_model
from tests.runs import PARAMS_SEED, differing

BF16, FP16 = torch.bfloat16, torch.float16
NUM_STEPS = 3


def chain_over(held, kind: str = "absolute", **kwargs):
    """What rounds alike wherever a tensor is cut: torch's own steps in bf16 do not, but for SGD without momentum."""
    import distwd

    sgd, lr = distwd.Wrap(torch.optim.SGD), distwd.LR(0.02)
    chains = {
        "absolute": [distwd.DirectWeightDecay(1e-3), sgd, distwd.WeightDecay(0.05, 1.5), lr, distwd.WeightDecay(2e-3)],
        "cautious": [sgd, distwd.CautiousWeightDecay(0.05), lr],
        "relative": [sgd, distwd.RelativeWeightDecay(0.1), lr],
        "alone": [distwd.WeightDecay(1e-3)],
    }
    return distwd.Chain(held, *chains[kind], **{"rounding": "stochastic", **kwargs})


def train(layout: str, dtype: torch.dtype = BF16, kind: str = "absolute", **kwargs) -> dict[str, Tensor]:
    held = layouts.place(layout, whole_model(PARAMS_SEED, dtype))
    return steps(chain_over(held.items(), kind, **kwargs), layout, held, range(NUM_STEPS))


def steps(optimizer, layout: str, held: dict, numbers) -> dict[str, Tensor]:
    for number in numbers:
        runs.feed(layout, held, number)
        optimizer.step()
    return layouts.view(layout, held)


_known: dict = {}


def alone(worlds, fn=train, *args) -> dict[str, Tensor]:
    if (fn, args) not in _known:
        _known[fn, args] = worlds.run(0, fn, "single", *args)[0]
    return _known[fn, args]


CASES = [
    *((layout, BF16, "absolute") for layout in LAYOUTS),
    *((layout, FP16, "absolute") for layout in ("fsdp3", "tp2", "fsdp_tp")),
    *((layout, BF16, kind) for layout in ("fsdp3", "hsdp", "fsdp_tp", "stages") for kind in ("cautious", "relative")),
]


@pytest.mark.parametrize(("layout", "dtype", "kind"), CASES, ids=str)
def test_sharded_equals_whole(worlds, layout, dtype, kind):
    for params in worlds.run(LAYOUTS[layout].ranks, train, layout, dtype, kind):
        assert differing(params, alone(worlds, train, dtype, kind)) == []


def mutant(layout: str, what: str) -> dict[str, Tensor]:
    """Noise by the place in the local tensor; or without a draw of its own at each write; or as on every step before."""
    from distwd.kernels.stochastic import GlobalIndices
    from distwd.step import rounding

    local = lambda piece, offset=0: GlobalIndices(((0, torch.Size(piece.local_shape).numel()),))  # noqa: E731
    patches = {
        "local": mock.patch.object(rounding, "global_indices_of", local),
        "writes": mock.patch.object(rounding, "count", return_value=repeat(0)),
        "steps": mock.patch.object(rounding.Rounding, "count"),
    }
    with patches[what]:
        return train(layout)


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp3", "tp2", "fsdp_tp"])
def test_noise_by_the_local_place_is_seen(worlds, layout):
    reference = alone(worlds)
    for params in worlds.run(LAYOUTS[layout].ranks, mutant, layout, "local"):
        assert differing(params, reference) != []


@pytest.mark.parametrize("what", ["writes", "steps"])
def test_every_write_of_every_step_has_noise_of_its_own(worlds, what):
    assert differing(worlds.run(0, mutant, "single", what)[0], alone(worlds)) != []


def with_seed(layout: str, seed: int, rounding: str) -> dict[str, Tensor]:
    return train(layout, seed=seed, rounding=rounding)


def test_the_seed_decides_and_nothing_else(worlds):
    reference = alone(worlds)
    assert differing(worlds.run(2, with_seed, "fsdp2", 0, "stochastic")[0], reference) == []
    other, nearest = (
        worlds.run(2, with_seed, "fsdp2", *settings)[0] for settings in ((1, "stochastic"), (0, "nearest"))
    )
    assert len(differing(other, reference)) > len(SHAPES) / 2
    assert len(differing(nearest, reference)) > len(SHAPES) / 2


def other_seed() -> str:
    import distwd

    held = layouts.place("fsdp2", whole_model(PARAMS_SEED, BF16))
    chain = chain_over(held.items(), "relative", seed=dist.get_rank())
    runs.feed("fsdp2", held, 0)
    try:
        chain.step()
    except distwd.PlanError as error:
        return str(error)
    return "not seen"


def test_ranks_with_other_seeds_are_refused_where_a_plan_is_built(worlds):
    for message in worlds.run(2, other_seed):
        assert "seed 0" in message
        assert "seed 1" in message


# --- attach ---------------------------------------------------------------------------------------------------------


def attached(layout: str, kind: str) -> dict[str, Tensor]:
    import distwd

    held = layouts.place(layout, whole_model(PARAMS_SEED, BF16))
    rules = {
        "before": [distwd.WeightDecay(0.05)],
        "after": [distwd.CautiousWeightDecay(0.05), distwd.WeightDecay(0.01, 1)],
        "relative": [distwd.RelativeWeightDecay(0.1)],
        "direct": [distwd.CautiousWeightDecay(0.05), distwd.DirectWeightDecay(1e-3)],
    }
    sgd = torch.optim.SGD(held.values(), lr=0.02, foreach=False)  # foreach refuses DTensors of two meshes
    distwd.attach(sgd, *rules[kind], named_parameters=held.items(), rounding="stochastic")
    with warnings.catch_warnings():
        # With a decay at once SGD steps the parameters themselves, and rounds away much of its update: that is told.
        warnings.filterwarnings("ignore", message=".*the rest of its update was rounded away")
        return steps(sgd, layout, held, range(NUM_STEPS))


@pytest.mark.parametrize("kind", ["before", "after", "relative", "direct"])
@pytest.mark.parametrize("layout", ["fsdp3", "fsdp_tp"])
def test_attached_decay_rounds_alike_on_any_sharding(worlds, layout, kind):
    for params in worlds.run(LAYOUTS[layout].ranks, attached, layout, kind):
        assert differing(params, alone(worlds, attached, kind)) == []


# --- layout= --------------------------------------------------------------------------------------------------------


def hand_cut(dim: int) -> dict[str, Tensor]:
    """A matrix whose rows (or columns) three ranks hold as plain tensors, of unequal lengths; beside it experts that no mesh shows."""
    import distwd

    whole = whole_model(PARAMS_SEED, BF16)
    cuts = {0: (0, 2, 2, 11), 1: (0, 3, 4, 6)}[dim]
    rank = dist.get_rank()
    piece = whole["embed.weight"].movedim(dim, 0)[cuts[rank] : cuts[rank + 1]].movedim(0, dim).clone()
    held = {"embed.weight": torch.nn.Parameter(piece)}
    held["head.bias"] = torch.nn.Parameter(whole["head.bias"])
    chain = chain_over(held.items(), "alone", layout={"embed*": distwd.Sharded()})
    for _ in range(NUM_STEPS):
        for param in held.values():
            param.grad = torch.zeros_like(param)
        chain.step()
    return {name: param.detach() for name, param in held.items()}


def decayed_alone() -> dict[str, Tensor]:
    held = layouts.place("single", whole_model(PARAMS_SEED, BF16))
    chain = chain_over(held.items(), "alone")
    for _ in range(NUM_STEPS):
        for param in held.values():
            param.grad = torch.zeros_like(param)
        chain.step()
    return {name: param.detach() for name, param in held.items()}


def test_pieces_of_a_layout_draw_the_noise_of_the_whole(worlds):
    reference = worlds.run(0, decayed_alone)[0]
    pieces = worlds.run(3, hand_cut, 0)
    assert torch.equal(torch.cat([piece["embed.weight"] for piece in pieces]), reference["embed.weight"])
    assert all(torch.equal(piece["head.bias"], reference["head.bias"]) for piece in pieces)


def test_columns_in_a_layout_draw_noise_of_their_own(worlds):
    """A layout states that pieces follow each other, not that they are columns; the docs explain it."""
    reference = worlds.run(0, decayed_alone)[0]
    whole = torch.cat([piece["embed.weight"] for piece in worlds.run(3, hand_cut, 1)], dim=1)
    assert not torch.equal(whole, reference["embed.weight"])
    assert ((whole - reference["embed.weight"]).abs() <= 2.0**-6 * reference["embed.weight"].abs()).all()


def fsdp1(use_orig_params: bool) -> Tensor:
    """The first rows of an FSDP1 model after three decays, as this rank holds them; its flat pieces end anywhere."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    import distwd

    torch.manual_seed(0)
    model = torch.nn.Linear(7, 13, bias=False, dtype=BF16)
    if dist.is_initialized():
        model = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    layout = distwd.Sharded.from_fsdp1(model) if dist.is_initialized() else None
    (param,) = model.parameters()
    name = "_flat_param" if not use_orig_params else "weight"
    chain = chain_over([(name, param)], "alone", layout=layout)
    for _ in range(NUM_STEPS):
        param.grad = torch.zeros_like(param)
        chain.step()
    return param.detach().flatten()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_draws_the_noise_of_the_whole(worlds, use_orig_params):
    (reference,) = worlds.run(0, fsdp1, use_orig_params)
    pieces = torch.cat(worlds.run(2, fsdp1, use_orig_params))
    assert torch.equal(pieces[: len(reference)], reference)  # a flat parameter is padded at its end


def hidden_experts() -> Tensor:
    """Experts over `inner`, cut once more as DTensors over `outer`: the stack of both is the whole."""
    from torch.distributed.tensor import Shard, distribute_tensor

    import distwd

    outer, inner = submesh("outer", 2, 2, names=("outer", "inner")), submesh("inner", 2, 2, names=("outer", "inner"))
    whole = whole_model(PARAMS_SEED, BF16)["experts.weight"]
    own = whole.chunk(2)[inner.get_local_rank()].clone()
    param = torch.nn.Parameter(distribute_tensor(own, outer, [Shard(0)]))
    chain = chain_over([("experts.weight", param)], "alone", layout={"exp*": distwd.Sharded(inner.get_group())})
    for _ in range(NUM_STEPS):
        param.grad = torch.zeros_like(param)
        chain.step()
    return param.detach().full_tensor()


def test_experts_on_no_mesh_draw_the_noise_of_the_stack(worlds):
    ranks = worlds.run(4, hidden_experts)
    reference = worlds.run(0, decayed_alone)[0]["experts.weight"]
    assert torch.equal(torch.cat(ranks[:2]), reference)
    assert torch.equal(torch.cat(ranks[2:]), reference)


# --- what a step may not do -----------------------------------------------------------------------------------------


def quiet_steps(layout: str, kind: str) -> list[list[str]]:
    """What goes over the wire in each step, which reads nothing on the host."""
    held = layouts.place(layout, whole_model(PARAMS_SEED, BF16))
    chain = chain_over(held.items(), kind)
    runs.feed(layout, held, 0)
    with wire.Wire() as first:
        chain.step()
    assert kind == "relative" or first.calls == []  # a plan is built where a number of the whole model is needed
    calls = []
    for step in (1, 2):
        runs.feed(layout, held, step)
        with wire.no_host_sync(), wire.Wire() as seen:
            chain.step()
        calls.append(seen.calls)
    return calls


@pytest.mark.parametrize(("kind", "num_calls"), [("absolute", 0), ("relative", 1)])
@pytest.mark.parametrize("layout", ["fsdp3", "fsdp_tp"])
def test_noise_costs_no_collective_and_reads_nothing(worlds, layout, kind, num_calls):
    for calls in worlds.run(LAYOUTS[layout].ranks, quiet_steps, layout, kind):
        assert [len(each) for each in calls] == [num_calls] * 2
