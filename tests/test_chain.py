"""A Chain is a torch optimizer and behaves like one."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

import distwd
from tests.layouts import whole_model
from tests.one_process import equal, make, step
from tests.one_process import fp32_parameters as parameters
from tests.runs import grads_of


def test_it_is_a_torch_optimizer():
    chain = make(parameters().values())
    assert isinstance(chain, torch.optim.Optimizer)
    assert len(chain.param_groups) == 1


def test_every_hyperparameter_is_a_group_key():
    group = make(parameters().values()).param_groups[0]
    given = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "ord": 2, "metric": "mad"}
    given |= {"norm_input": "update", "weight_decay_1": 1e-4, "ord_1": 2}
    for key, value in given.items():
        assert group[key] == value, key


@pytest.mark.parametrize("form", ["tensors", "pairs", "groups", "named groups", "generator"])
def test_it_takes_what_torch_takes(form):
    params = parameters()
    forms = {
        "tensors": list(params.values()),
        "pairs": list(params.items()),
        "groups": [{"params": list(params.values())[:3]}, {"params": list(params.values())[3:]}],
        "named groups": [{"params": list(params.items())[:3]}, {"params": list(params.items())[3:], "lr": 0.01}],
        "generator": (param for param in params.values()),
    }
    reference = parameters()
    step(make(reference.items()), reference)
    step(make(forms[form]), params)
    assert equal(params, reference)


def test_a_group_added_later_is_the_same_as_one_from_the_start():
    late, early = parameters(), parameters()
    names = list(late)
    chain = make([(name, late[name]) for name in names[:5]])
    chain.add_param_group({"params": [(name, late[name]) for name in names[5:]], "lr": 0.5})
    both = [{"params": [(n, early[n]) for n in names[:5]]}, {"params": [(n, early[n]) for n in names[5:]], "lr": 0.5}]
    other = make(both)
    for index in range(2):
        step(chain, late, index)
        step(other, early, index)
    assert equal(late, early)


def test_a_group_added_after_a_step_counts_in_the_metric():
    params = parameters()
    names = list(params)
    chain = make([(name, params[name]) for name in names[:5]])
    step(chain, params)
    few = next(iter(chain.stats().values()))["metric"].item()
    chain.add_param_group({"params": [(name, params[name]) for name in names[5:]]})
    step(chain, params, 1)
    assert next(iter(chain.stats().values()))["metric"].item() != few
    assert all(not torch.equal(params[name], whole_model(7)[name]) for name in names)


def test_a_closure_is_called_once_and_its_loss_returned():
    params, calls = parameters(), []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        for name, param in params.items():
            param.grad = grads_of(0)[name]
        return torch.tensor(3.5)

    reference = parameters()
    step(make(reference.items()), reference)
    assert make(params.items()).step(closure).item() == 3.5
    assert calls == [1]
    assert equal(params, reference)


def test_a_step_without_a_closure_returns_none():
    params = parameters()
    for name, param in params.items():
        param.grad = grads_of(0)[name]
    assert make(params.items()).step() is None


SCHEDULES = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 5),
    "onecycle": lambda optimizer: OneCycleLR(optimizer, 0.1, 10),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_schedules_of_torch_drive_it(schedule):
    ours, theirs = parameters(), parameters()
    chain = distwd.Chain(ours.items(), distwd.Adam(), distwd.WeightDecay(0.1), distwd.LR(0.01))
    optimizer = torch.optim.AdamW(theirs.values(), 0.01, weight_decay=0.1)
    drivers = [SCHEDULES[schedule](chain), SCHEDULES[schedule](optimizer)]
    for index in range(4):
        step(chain, ours, index)
        step(optimizer, theirs, index)
        for driver in drivers:
            driver.step()
    assert chain.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.01
    assert equal(ours, theirs)


def test_a_plateau_schedule_drives_it():
    chain = make(parameters().items())
    plateau = ReduceLROnPlateau(chain, patience=0)
    for loss in (1.0, 2.0, 3.0):
        plateau.step(loss)
    assert chain.param_groups[0]["lr"] < 0.01


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    params = parameters()
    chain = make(params.items())
    step(chain, params)
    chain.zero_grad(set_to_none=to_none)
    for param in params.values():
        assert param.grad is None if to_none else not param.grad.any()


def test_a_repr_reads_as_the_chain():
    text = repr(make(parameters().items()))
    places = [text.index(part) for part in ("Adam", "RelativeWeightDecay", "LR", "WeightDecay(")]
    assert text.count("WeightDecay") >= 2
    assert places[:3] == sorted(places[:3])


def test_step_hooks_of_torch_are_called():
    params, seen = parameters(), []
    chain = make(params.items())
    first = chain.register_step_pre_hook(lambda *args: seen.append(("pre", args[0] is chain)))
    last = chain.register_step_post_hook(lambda *args: seen.append(("post", args[0] is chain)))
    step(chain, params)
    assert seen == [("pre", True), ("post", True)]
    first.remove()
    last.remove()
    step(chain, params)
    assert len(seen) == 2


def test_state_dict_hooks_of_torch_are_called():
    chain, seen = make(parameters().items()), []
    chain.register_state_dict_pre_hook(lambda optimizer: seen.append("pre"))
    chain.register_state_dict_post_hook(lambda optimizer, state: seen.append("post"))
    chain.register_load_state_dict_post_hook(lambda optimizer: seen.append("load"))
    chain.load_state_dict(chain.state_dict())
    assert seen == ["pre", "post", "load"]


def test_the_same_chain_works_under_no_grad():
    ours, theirs = parameters(), parameters()
    step(make(ours.items()), ours)
    with torch.no_grad():
        step(make(theirs.items()), theirs)
    assert equal(ours, theirs)


def test_a_chain_of_decay_alone_is_gradient_descent():
    param = torch.nn.Parameter(torch.full((3,), 2.0))
    param.grad = torch.ones(3)
    distwd.Chain([param], distwd.WeightDecay(0.5), distwd.LR(0.25)).step()
    assert torch.equal(param, torch.full((3,), 1.5))


def test_transforms_are_not_shared_between_chains():
    adam, rate = distwd.Adam(), distwd.LR(0.01)
    first, second = parameters(), parameters(8)
    chains = [distwd.Chain(params.items(), adam, rate) for params in (first, second)]
    alone = parameters(8)
    step(chains[0], first)
    step(chains[1], second, 1)
    step(distwd.Chain(alone.items(), distwd.Adam(), distwd.LR(0.01)), alone, 1)
    assert equal(second, alone)


def test_a_load_state_dict_of_the_model_with_assign_is_found_again():
    model, reference = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    reference.load_state_dict(values)
    for net in (model, reference):
        chain = make(net.named_parameters())
        for index in range(2):
            for param in net.parameters():
                param.grad = torch.full_like(param, 0.1 + index)
            chain.step()
            if net is model and index == 0:
                for param in net.parameters():
                    param.data = param.data.clone()
    assert equal(dict(model.named_parameters()), dict(reference.named_parameters()))


def test_live_objects_stay_flat_over_steps():
    params = parameters()
    chain = make(params.items())
    for index in range(3):
        step(chain, params, index)

    def alive() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(type(each) in (torch.Tensor, torch.nn.Parameter) for each in objects)

    grads = grads_of(0)
    for name, param in params.items():
        param.grad = grads[name]
    chain.step()
    objects, tensors = alive()
    for _ in range(20):
        chain.step()
    more_objects, more_tensors = alive()
    assert more_tensors == tensors
    assert more_objects - objects < 20
