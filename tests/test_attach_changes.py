"""What changes while decay is attached, between steps: lr and λ become tensors and back, groups are added, and all is removed again."""

from __future__ import annotations

import copy

import pytest
import torch

from distwd import DirectWeightDecay, RelativeWeightDecay, WeightDecay, attach
from tests.one_process import fp32_parameters
from tests.oracle import metric_of

RULES = {
    "absolute": WeightDecay(0.5),
    "of params": RelativeWeightDecay(0.5, norm_input="params"),
    "of the update": RelativeWeightDecay(0.5, norm_input="update"),
    "at once": DirectWeightDecay(0.5),
}
OPTIMIZERS = {
    "single": (torch.optim.AdamW, {"weight_decay": 0, "foreach": False}),
    "fused": (torch.optim.AdamW, {"weight_decay": 0, "fused": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}


@pytest.mark.parametrize("inner", OPTIMIZERS)
@pytest.mark.parametrize("name", ["absolute", "of params"])
def test_numbers_and_tensors_take_turns_and_groups_come(name, inner):
    """With gradients of 0:  p ← p·(1 − lr·λ·M), with lr and λ of the group as they are at the step, M over all there is."""
    cls, kwargs = OPTIMIZERS[inner]
    params = [torch.nn.Parameter(torch.tensor([1.0, -3.0])), torch.nn.Parameter(torch.tensor([2.0]))]
    optimizer = cls([{"params": params[:1], "lr": torch.tensor(0.25)}, {"params": params[1:]}], lr=0.5, **kwargs)
    attach(optimizer, RULES[name])
    values = [param.detach().double().clone() for param in params]
    late = torch.nn.Parameter(torch.tensor([4.0]))
    changes = [
        {},
        {0: {"distwd_weight_decay": torch.tensor(0.75)}, 1: {"lr": torch.tensor(0.125)}},
        {0: {"distwd_weight_decay": 0.25, "lr": 0.5}, 1: {"distwd_weight_decay": torch.tensor(0.0)}},
        {2: {}},
        {1: {"distwd_weight_decay": 0.5}, 2: {"distwd_weight_decay": torch.tensor(1.0), "lr": torch.tensor(0.0625)}},
    ]
    for step in changes:
        if 2 in step and len(optimizer.param_groups) == 2:
            optimizer.add_param_group({"params": [late]})
            values.append(late.detach().double().clone())
        for index, settings in step.items():
            optimizer.param_groups[index].update(settings)
        for param in [*params, late]:
            param.grad = torch.zeros_like(param)
        metric = metric_of(values, "mad") if name == "of params" else 1.0
        rates = [float(group["lr"]) * float(group.get("distwd_weight_decay", 0.5)) for group in optimizer.param_groups]
        values = [value * (1 - rate * metric) for value, rate in zip(values, rates, strict=True)]
        optimizer.step()
    for value, param in zip(values, [*params, late], strict=True):
        torch.testing.assert_close(param.detach().double(), value, rtol=1e-5, atol=1e-6)


def everything(optimizer: torch.optim.Optimizer) -> dict:
    """All that an optimizer has, in order, down to its state and what hangs on its parameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    plain = {key: value for key, value in vars(optimizer).items() if key not in ("state", "param_groups")}
    return {
        "attributes": copy.deepcopy({key: value if not callable(value) else id(value) for key, value in plain.items()}),
        "order": list(vars(optimizer)),
        "groups": [
            [(key, value) for key, value in group.items() if key != "params"] for group in optimizer.param_groups
        ],
        "params": [
            (id(param), param._version, list(vars(param)), len(param._backward_hooks or ())) for param in params
        ],
        "state": [list(optimizer.state.get(param, {})) for param in params],
        "held": len(optimizer.state),
    }


@pytest.mark.parametrize("coupling", ["gradient", "lr", "none"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("inner", OPTIMIZERS)
def test_removing_leaves_everything_as_if_never_attached(inner, rule, coupling):
    cls, kwargs = OPTIMIZERS[inner]
    seen = []
    for stepped_with in (False, True):
        params = fp32_parameters()
        optimizer = cls([{"params": list(params.values())}, {"params": []}], lr=0.1, **kwargs)
        attachment = attach(optimizer, RULES[rule], coupling=coupling) if stepped_with else None
        for param in params.values():
            param.grad = torch.ones_like(param)
        grads = [param.grad for param in params.values()]
        optimizer.step()
        if attachment is not None:
            attachment.remove()
        assert all(param.grad is grad for param, grad in zip(params.values(), grads, strict=True))
        state = everything(optimizer)
        state["params"] = [of_param[2:] for of_param in state["params"]]
        seen.append(state)
    assert seen[0] == seen[1]
    params = fp32_parameters()
    optimizer = cls(list(params.values()), lr=0.1, **kwargs)
    before = everything(optimizer)
    attach(optimizer, RULES[rule], coupling=coupling).remove()
    assert everything(optimizer) == before


@pytest.mark.parametrize("name", ["absolute", "of the update"])
def test_a_parameter_that_no_rule_can_work_on_is_refused_when_it_comes_later(name):
    w, late = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = torch.optim.SGD([w], lr=0.1)
    attach(optimizer, RULES[name])
    w.grad, late.grad = torch.ones(2), torch.ones(2, dtype=torch.complex64)
    optimizer.step()
    before = w.detach().clone()
    optimizer.add_param_group({"params": [late]})
    with pytest.raises(ValueError, match=r"param 1 is complex; pass torch.view_as_real of it instead"):
        optimizer.step()
    assert torch.equal(w, before)
