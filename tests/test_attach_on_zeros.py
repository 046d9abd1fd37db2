"""Decay that looks at the update of one elementwise host: it steps zeros in the parameters' stead, and nobody else may notice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import optimizer as torch_optimizer

from distwd import LR, CautiousWeightDecay, Chain, RelativeWeightDecay, Wrap, attach
from tests.model import mesh_of
from tests.one_process import fp32_parameters
from tests.runs import differing, grads_of

HOSTS = {
    "Adam": {},
    "Adam, amsgrad": {"amsgrad": True},
    "AdamW": {"weight_decay": 0},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"centered": True},
    "NAdam": {},
    "RAdam": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
}
RULES = {
    "relative": lambda: RelativeWeightDecay(0.1),
    "cautious": lambda: CautiousWeightDecay(0.1),
    "by tensor": lambda: RelativeWeightDecay(0.05, 1, "update", "l3", scope="tensor", cautious=True),
    "an extremum": lambda: RelativeWeightDecay(0.01, 3, "update", "linf"),
}


def feed(params: dict, step: int) -> None:
    for name, grad in grads_of(step).items():
        params[name].grad = None if (step, name) == (1, "up.bias") else grad


def train(optimizer, params: dict, steps=range(4)) -> dict:
    for step in steps:
        feed(params, step)
        optimizer.step()
    return {name: param.detach().clone() for name, param in params.items()}


def adamw(params: dict, rule: str = "relative", **kwargs) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(params.items(), lr=0.01, weight_decay=0, **kwargs)
    attach(optimizer, RULES[rule]())
    return optimizer


@pytest.mark.parametrize("coupling", ["lr", "none"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("host", HOSTS)
def test_a_host_on_zeros_is_the_chain_bit_for_bit(host, rule, coupling):
    cls, ours, theirs = getattr(torch.optim, host.split(",")[0]), fp32_parameters(), fp32_parameters()
    modes = [{"foreach": False}, {"foreach": True}] + [{"fused": True}] * hasattr(cls, "_step_supports_amp_scaling")
    for mode in modes:
        try:
            optimizer = cls(ours.items(), lr=0.01, **HOSTS[host], **mode)
        except (RuntimeError, TypeError):
            assert "fused" in mode
            continue
        attachment = attach(optimizer, RULES[rule](), coupling=coupling)
        words = {"lr": [RULES[rule](), LR(0.01)], "none": [LR(0.01), RULES[rule]()]}[coupling]
        chain = Chain(theirs.items(), Wrap(cls, **HOSTS[host], **mode), *words)
        assert differing(train(optimizer, ours), train(chain, theirs)) == []
        attachment.remove()


def seen_by_host(monkeypatch) -> list[list[torch.Tensor]]:
    """What the groups of torch's AdamW show it, step by step."""
    # On the class itself: once dynamo has been imported, each optimizer class has an `_init_group` of its own.
    seen, init_group = [], torch.optim.AdamW._init_group

    def watched(self, group, *lists):
        seen.append([param.detach().clone() for param in group["params"]])
        return init_group(self, group, *lists)

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", watched)
    return seen


def test_the_host_sees_zeros_and_afterwards_its_own(monkeypatch):
    params = fp32_parameters()
    optimizer, seen = adamw(params), seen_by_host(monkeypatch)
    given = optimizer.param_groups[0]["params"]
    feed(params, 1)
    grads = {name: param.grad for name, param in params.items()}
    before = {name: param.detach().clone() for name, param in params.items()}
    optimizer.step()
    for (name, param), shown in zip(params.items(), seen[0], strict=True):
        # One has no gradient: there is nothing to stand in for.
        assert torch.equal(shown, before[name]) if name == "up.bias" else not shown.any()
        assert param.grad is grads[name]
    assert optimizer.param_groups[0]["params"] is given
    assert list(optimizer.state) == [param for name, param in params.items() if name != "up.bias"]


@pytest.mark.parametrize("of", ["this optimizer", "all optimizers"])
def test_who_looks_at_the_parameters_in_a_hook_finds_them(of, monkeypatch):
    ours, theirs = fp32_parameters(), fp32_parameters()
    optimizer, found = adamw(ours), []

    def look(host, args, kwargs):
        found.append(all(a is b for a, b in zip(host.param_groups[0]["params"], ours.values(), strict=True)))

    hook = (
        optimizer.register_step_pre_hook(look)
        if of == "this optimizer"
        else torch_optimizer.register_optimizer_step_pre_hook(look)
    )
    values = train(optimizer, ours)
    hook.remove()
    assert found == [True] * 4
    for name, value in train(adamw(theirs), theirs).items():
        # Copies and a difference: p − lr·u has been rounded before the update is known.
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-6)


def broken(optimizer, monkeypatch) -> None:
    """A step that ends in the host's own error."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "_init_group", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()


@pytest.mark.parametrize("then", ["step", "save", "load", "remove"])
def test_a_step_that_is_broken_off_leaves_the_parameters_and_goes_on(then, monkeypatch):
    ours, theirs = fp32_parameters(), fp32_parameters()
    optimizer, other = adamw(ours), adamw(theirs)
    train(optimizer, ours, [0])
    expected = train(other, theirs, [0])
    feed(ours, 1)
    broken(optimizer, monkeypatch)
    assert differing({name: param.detach() for name, param in ours.items()}, expected) == []
    saved = copy.deepcopy(other.state_dict())
    if then == "save":
        state = optimizer.state_dict()["state"]
        assert all(torch.equal(state[index]["exp_avg"], saved["state"][index]["exp_avg"]) for index in saved["state"])
    elif then == "load":
        optimizer.load_state_dict(saved)
    elif then == "remove":
        next(iter(optimizer._optimizer_step_pre_hooks.values())).__self__.remove()
        attach(optimizer, RULES["relative"]())
    assert differing(train(optimizer, ours, [1, 2]), train(other, theirs, [1, 2])) == []


def test_gradients_that_the_host_cleared_after_an_error_stay_cleared(monkeypatch):
    params = fp32_parameters()
    optimizer = adamw(params)
    train(optimizer, params, [0])
    before = {name: param.detach().clone() for name, param in params.items()}
    broken(optimizer, monkeypatch)
    optimizer.zero_grad()
    optimizer.step()
    assert all(param.grad is None for param in params.values())
    assert differing({name: param.detach() for name, param in params.items()}, before) == []


def test_gradients_added_to_those_of_a_broken_step_are_refused_once(monkeypatch):
    params = fp32_parameters()
    optimizer = adamw(params)
    feed(params, 0)
    broken(optimizer, monkeypatch)
    optimizer.zero_grad()
    sum(param.square().sum() for param in params.values()).backward()
    before = {name: param.detach().clone() for name, param in params.items()}
    with pytest.raises(ValueError, match=r"the last step was broken off .* call backward\(\) again"):
        optimizer.step()
    assert differing({name: param.detach() for name, param in params.items()}, before) == []
    other_params = fp32_parameters()
    assert differing(train(optimizer, params), train(adamw(other_params), other_params)) == []


def kinds(value) -> object:
    """What a state is made of, without its numbers."""
    if isinstance(value, dict):
        return {key: kinds(one) for key, one in value.items()}
    of_shard = (value.placements, tuple(value.to_local().shape)) if isinstance(value, DTensor) else None
    return type(value), tuple(value.shape), value.dtype, of_shard


def states_on_a_rank(host: str, wholes: dict) -> list:
    """By position, what is kept of DTensors by a bare optimizer, and by one that steps zeros in their stead."""
    cls, mesh, found = getattr(torch.optim, host.split(",")[0]), mesh_of(3, names=("dp",)), []
    for attached in (False, True):
        params = {
            name: torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0) if whole.dim() else Replicate()]))
            for name, whole in wholes.items()
        }
        optimizer = cls(params.items(), lr=0.01, foreach=False, **HOSTS[host])
        if attached:
            attach(optimizer, RULES["relative"]())
        for _ in range(2):
            for param in params.values():
                param.grad = torch.ones_like(param)
            optimizer.step()
        found.append(kinds(optimizer.state_dict()["state"]))
    return found


@pytest.mark.parametrize("scalar", [False, True], ids=["matrix and vector", "and a scalar"])
@pytest.mark.parametrize("host", HOSTS)
def test_the_state_is_of_the_kind_that_the_host_alone_keeps(worlds, host, scalar):
    wholes = {"matrix": torch.ones(4, 3), "vector": torch.ones(5)}
    if scalar:  # as a plain tensor, what is kept of it would not go together with the parameter
        wholes["scalar"] = torch.tensor(2.0)
    for alone, attached in worlds.run(3, states_on_a_rank, host, wholes):
        assert alone == attached
        assert len(alone) == len(wholes)
