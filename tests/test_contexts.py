"""A step under whatever the caller has switched on: no_grad, inference_mode, autocast, torch.compile; the same bits as without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import distwd
from tests.one_process import fp32_parameters
from tests.runs import differing, grads_of

CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "enable_grad": torch.enable_grad,
}
RULES = {
    "absolute": lambda: distwd.WeightDecay(0.1),
    "of the update": lambda: distwd.RelativeWeightDecay(0.1),
    "cautious": lambda: distwd.CautiousWeightDecay(0.1, ord=1.5),
}


def trained(way: str, rule: str, within: Callable[[int], contextlib.AbstractContextManager], compiled: bool = False):
    params = fp32_parameters()
    if way == "chain":
        optimizer = distwd.Chain(params.items(), distwd.Adam(foreach=True), RULES[rule](), distwd.LR(0.01))
    else:
        optimizer = torch.optim.AdamW(params.values(), lr=0.01, weight_decay=0)
        distwd.attach(optimizer, RULES[rule]())
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for index in range(3):
        for name, param in params.items():
            param.grad = grads_of(index)[name]
        with within(index):
            step()
    return {name: param.detach() for name, param in params.items()}


@pytest.mark.parametrize("way", ["chain", "attach"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_step_is_the_same_whatever_is_switched_on(context, rule, way):
    """In one step alone: what it leaves behind must not trouble the next, outside. (An optimizer's own state begins in its first.)"""
    when = 0 if way == "chain" else 1
    plain = trained(way, rule, lambda index: contextlib.nullcontext())
    inside = trained(way, rule, lambda index: CONTEXTS[context]() if index == when else contextlib.nullcontext())
    assert differing(plain, inside) == []


@pytest.mark.parametrize("rule", RULES)
def test_a_compiled_chain_steps_as_ever(rule):
    """The compiler breaks its graph at the step, which runs as it is."""
    plain = trained("chain", rule, lambda index: contextlib.nullcontext())
    assert differing(plain, trained("chain", rule, lambda index: contextlib.nullcontext(), compiled=True)) == []


ALL_RULES = {**RULES, "of the parameters": lambda: distwd.RelativeWeightDecay(0.1, norm_input="params")}


@pytest.mark.parametrize("way", ["chain", "attach"])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_another_default_device_changes_nothing(rule, way, monkeypatch):
    """ "meta" stands for a device that a CPU has not: what is made there by mistake has no numbers."""
    monkeypatch.setitem(RULES, rule, ALL_RULES[rule])
    plain = trained(way, rule, lambda index: contextlib.nullcontext())
    assert differing(plain, trained(way, rule, lambda index: torch.device("meta"))) == []


@pytest.mark.parametrize("way", ["chain", "attach"])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_step_of_fake_tensors_runs(rule, way):
    """Memory of a step is estimated so: tensors have shapes there and no values."""
    with FakeTensorMode():
        model = torch.nn.Linear(16, 32)
        if way == "chain":
            optimizer = distwd.Chain(model.named_parameters(), distwd.Adam(), ALL_RULES[rule](), distwd.LR(0.1))
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0)
            distwd.attach(optimizer, ALL_RULES[rule]())
        for _ in range(2):
            model(torch.ones(2, 16)).sum().backward()
            optimizer.step()
