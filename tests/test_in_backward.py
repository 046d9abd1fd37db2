"""Optimizers that step inside backward(): a number over parameters does not exist there; an absolute decay does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distwd import LR, Adam, Chain, RelativeWeightDecay, WeightDecay, attach
from tests.layouts import Net, whole_model
from tests.runs import differing

RELATIVE = {
    "of the update": RelativeWeightDecay(0.1),
    "of params": RelativeWeightDecay(0.1, norm_input="params"),
    "of the gradient": RelativeWeightDecay(0.1, norm_input="grad"),
}


def model() -> Net:
    return Net(whole_model(7))


def loss_of(net: nn.Module) -> torch.Tensor:
    return sum((param**2).sum() * (index + 1) for index, param in enumerate(net.parameters()))


def in_backward(net: nn.Module, make) -> None:
    """One optimizer per parameter, stepped as soon as its gradient is there, as memory-saving recipes do."""

    def step(optimizer):
        def hook(param):
            optimizer.step()
            param.grad = None

        return hook

    for name, param in net.named_parameters():
        param.register_post_accumulate_grad_hook(step(make(name, param)))


def attached(rule, coupling: str = "lr"):
    def make(name: str, param: nn.Parameter) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW([(name, param)], lr=0.01, weight_decay=0)
        attach(optimizer, rule, coupling=coupling)
        return optimizer

    return make


def chained(rule):
    return lambda name, param: Chain([(name, param)], Adam(), rule, LR(0.01))


@pytest.mark.parametrize("kind", [attached, chained])
@pytest.mark.parametrize("name", RELATIVE)
def test_a_relative_rule_is_refused_inside_of_backward(kind, name):
    """One attachment per parameter would silently take each parameter for the whole model."""
    net = model()
    in_backward(net, kind(RELATIVE[name]))
    with pytest.raises(ValueError, match=r"RelativeWeightDecay needs a metric .* inside backward\(\)"):
        loss_of(net).backward()
    assert differing({n: p.detach() for n, p in net.named_parameters()}, whole_model(7)) == []


@pytest.mark.parametrize("kind", [attached, chained])
def test_a_number_per_tensor_is_there_in_one_process(kind):
    ours, theirs = model(), model()
    rule = RelativeWeightDecay(0.01, norm_input="params", scope="tensor")
    in_backward(ours, kind(rule))
    optimizer = torch.optim.AdamW(theirs.named_parameters(), lr=0.01, weight_decay=0)
    attach(optimizer, rule)
    for _ in range(2):
        loss_of(ours).backward()
        optimizer.zero_grad()
        loss_of(theirs).backward()
        optimizer.step()
    assert differing(*({n: p.detach() for n, p in net.named_parameters()} for net in (ours, theirs))) == []


@pytest.mark.parametrize("kind", [attached, chained])
def test_an_absolute_decay_inside_of_backward_is_adamw_bit_for_bit(kind):
    ours, theirs = model(), model()
    in_backward(ours, kind(WeightDecay(0.1)))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        loss_of(ours).backward()
        optimizer.zero_grad()
        loss_of(theirs).backward()
        optimizer.step()
    assert differing(*({n: p.detach() for n, p in net.named_parameters()} for net in (ours, theirs))) == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchs_own_optimizers_in_backward_are_refused_when_attached_to():
    from torch.distributed.optim import _apply_optimizer_in_backward, _get_in_backward_optimizers

    ours, theirs = model(), model()
    _apply_optimizer_in_backward(torch.optim.AdamW, ours.parameters(), {"lr": 0.01, "weight_decay": 0})
    optimizers = _get_in_backward_optimizers(ours)
    for given in (optimizers, optimizers[0]):
        with pytest.raises(ValueError, match=r"inside backward\(\).*use an absolute rule"):
            attach(given, RelativeWeightDecay(0.1, scope="group"))
    attach(optimizers, WeightDecay(0.1))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        loss_of(ours).backward()
        optimizer.zero_grad()
        loss_of(theirs).backward()
        optimizer.step()
    assert differing(*({n: p.detach() for n, p in net.named_parameters()} for net in (ours, theirs))) == []


def refused_on_ranks(scope: str) -> str:
    net = model()
    in_backward(net, attached(RelativeWeightDecay(0.1, norm_input="params", scope=scope)))
    try:
        loss_of(net).backward()
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("scope", ["all", "tensor"])
def test_several_ranks_are_refused_alike(worlds, scope):
    """There even a number per tensor is a collective, and ranks may come to it in different orders."""
    texts = worlds.run(2, refused_on_ranks, scope)
    assert "inside backward()" in texts[0]
    assert texts[0] == texts[1]


def test_a_closure_that_calls_backward_is_no_step_inside_of_it():
    net = model()
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.01, weight_decay=0)
    attachment = attach(optimizer, RelativeWeightDecay(0.1))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert attachment.stats()["RelativeWeightDecay"]["metric"] > 0
