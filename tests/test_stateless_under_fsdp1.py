"""A chain that keeps nothing, over a model of FSDP1: saved and loaded by all of torch's ways, as torch's own SGD is."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

from distwd import LR, Chain, RelativeWeightDecay, Sharded, WeightDecay

OPTIONS = {
    "sharded": ({}, {}),
    "full": ({"full_state_dict": True}, {"full_state_dict": True}),
    "from rank 0": (
        {"full_state_dict": True, "cpu_offload": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ),
    "flat": ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
}
RULES = {
    "absolute": lambda: (WeightDecay(0.1), LR(0.1)),
    "of parameters": lambda: (RelativeWeightDecay(0.1, norm_input="params"), LR(0.1)),
    "not scaled by lr": lambda: (LR(0.1), WeightDecay(0.1)),
}


def through_a_checkpoint(rule: str, use_orig_params: bool, way: str) -> tuple[list, list, list]:
    """The pieces before and after the save, and after one more step, here and where it was loaded."""

    def made() -> tuple[FullyShardedDataParallel, Chain]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
        model = FullyShardedDataParallel(net, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        return model, Chain(model.named_parameters(), *RULES[rule](), layout=Sharded.from_fsdp1(model))

    def step(model, chain) -> list:
        chain.zero_grad()
        model(torch.ones(2, 5)).sum().backward()
        chain.step()
        return pieces(model)

    def pieces(model) -> list:
        return [param.detach().clone() for param in model.parameters()]

    model, chain = made()
    before = step(model, chain)
    if way == "FSDP":
        saved = FullyShardedDataParallel.optim_state_dict(model, chain)
    else:
        saved = get_optimizer_state_dict(model, chain, options=StateDictOptions(**OPTIONS[way][0]))
    after = pieces(model)
    other, loaded = made()
    with torch.no_grad():
        for param, value in zip(other.parameters(), after, strict=True):
            param.copy_(value)
    if way == "FSDP":
        loaded.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(other, loaded, saved))
    else:
        set_optimizer_state_dict(other, loaded, saved, options=StateDictOptions(**OPTIONS[way][1]))
    return [before, after], [pieces(other), after], [step(model, chain), step(other, loaded)]


@pytest.mark.parametrize("way", [*OPTIONS, "FSDP"])
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_changes_nothing_and_goes_on_with_the_same_bits(worlds, rule, use_orig_params, way):
    for pairs in worlds.run(2, through_a_checkpoint, rule, use_orig_params, way):
        for one, other in pairs:
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
