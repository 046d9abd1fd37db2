"""Parameters that others replace by new tensors, as accelerate's `prepare` does between construction and the first step."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from distwd import LR, Adam, Chain, RelativeWeightDecay, WeightDecay, Wrap, attach
from tests.layouts import whole_model
from tests.one_process import fp32_parameters
from tests.runs import PARAMS_SEED, differing, grads_of

RULE = RelativeWeightDecay(0.1)


def swap(optimizer: torch.optim.Optimizer, new: dict[str, torch.nn.Parameter]) -> None:
    """As accelerate does it: the state dict is loaded back (which replaces the groups), then come placeholder tensors, then the shards."""
    optimizer.load_state_dict(optimizer.state_dict())
    (group,) = optimizer.param_groups
    for place in range(len(group["params"])):
        group["params"][place] = torch.empty(1)
    group["params"] = list(new.values())


def train(optimizer: torch.optim.Optimizer, params: dict, steps=range(2)) -> dict[str, torch.Tensor]:
    for step in steps:
        for name, grad in grads_of(step).items():
            params[name].grad = grad
        optimizer.step()
    return {name: param.detach().clone() for name, param in params.items()}


def chain_of(params: dict, *transforms) -> Chain:
    return Chain(params.items(), *(transforms or (Adam(), RULE, LR(0.01))))


@pytest.mark.parametrize("stepped", [False, True])
def test_a_chain_steps_new_tensors_and_forgets_the_old(stepped):
    old, new, straight = fp32_parameters(), fp32_parameters(), fp32_parameters()
    chain = chain_of(old)
    if stepped:
        train(chain, old)
    swap(chain, new)
    values = train(chain, new)
    assert differing(values, train(chain_of(straight), straight)) == []
    assert set(chain.state) == set(new.values())
    assert set(chain.state_dict()["state"]) == set(range(len(new)))


class Model(torch.nn.Module):
    def __init__(self, params: dict[str, torch.nn.Parameter]) -> None:
        super().__init__()
        for name, param in params.items():
            self.register_parameter(name.replace(".", "_"), param)


@pytest.mark.parametrize("asked", ["state_dict", "get_optimizer_state_dict"])
def test_a_chain_can_be_saved_before_its_first_step_with_new_tensors(asked):
    old, new, straight = fp32_parameters(), fp32_parameters(), fp32_parameters()
    chain = chain_of(old)
    swap(chain, new)
    if asked == "state_dict":
        saved = chain.state_dict()
        assert [state["exp_avg"].shape for state in saved["state"].values()] == [p.shape for p in new.values()]
    else:
        saved = get_optimizer_state_dict(Model(new), chain)
        assert set(saved["state"]) == {name.replace(".", "_") for name in new}
    assert differing(train(chain, new), train(chain_of(straight), straight)) == []


def test_a_group_may_be_added_between_a_swap_and_the_first_step():
    new, late = fp32_parameters(), torch.nn.Parameter(torch.ones(2))
    chain = chain_of(fp32_parameters())
    swap(chain, new)
    chain.add_param_group({"params": [("late", late)]})
    assert set(chain.state) == {*new.values(), late}


def test_a_group_that_is_hidden_for_a_step_keeps_its_state():
    """DeepSpeed steps one group at a time, with `param_groups` that group alone."""
    params = fp32_parameters()
    named = list(params.items())
    groups = [{"params": named[:4]}, {"params": named[4:]}]
    chain = Chain(groups, Adam(), RelativeWeightDecay(0.1, scope="group"), LR(0.01))
    for step in range(2):
        for name, grad in grads_of(step).items():
            params[name].grad = grad
        whole = chain.param_groups
        for group in whole:
            chain.param_groups = [group]
            chain.step()
        chain.param_groups = whole
    assert all(chain.state[param]["step"] == 2 for param in params.values())


class Unborn(torch.optim.SGD):
    """An optimizer of another package: its state begins at its first step."""


Unborn.__module__ = "elsewhere"


def test_a_state_dict_that_brings_nothing_is_not_a_step():
    """accelerate loads what it has just saved; the hidden step of a checkpoint must still be recognised."""
    params = fp32_parameters()
    chain = chain_of(params, Wrap(Unborn, momentum=0.9), LR(0.1), WeightDecay(0.1))
    chain.load_state_dict(chain.state_dict())
    get_optimizer_state_dict(Model(params), chain)
    assert differing({n: p.detach() for n, p in params.items()}, whole_model(PARAMS_SEED)) == []


@pytest.mark.parametrize("built_with", ["names", "named_parameters"])
def test_attached_decay_keeps_the_names_of_the_places(built_with):
    old, new, straight = fp32_parameters(), fp32_parameters(), fp32_parameters()
    optimizers, attachments = [], []
    for params in (old, straight):
        given = params.items() if built_with == "names" else params.values()
        optimizers.append(torch.optim.AdamW(given, lr=0.01, weight_decay=0))
        attachments.append(attach(optimizers[-1], RULE, named_parameters=params.items()))
    swap(optimizers[0], new)
    del old
    assert differing(train(optimizers[0], new), train(optimizers[1], straight)) == []
    assert "embed.weight" in str(attachments[0].plan)
    assert str(attachments[0].plan) == str(attachments[1].plan)


def test_the_name_of_a_parameter_that_is_gone_is_not_used_again():
    """Objects come to lie where others were; an `id` alone would give a new parameter an old one's name."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0)
    gone = [(f"gone.{number}", torch.nn.Parameter(torch.ones(3))) for number in range(100)]
    attachment = attach(optimizer, RULE, named_parameters=[*((f"p{n}", p) for n, p in enumerate(params)), *gone])
    del gone
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3)) for _ in range(100)]})
    assert "gone" not in str(attachment.plan)
