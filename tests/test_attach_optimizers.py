"""attach to real optimizers: closures, scaled gradients, and several optimizers of one model."""

from __future__ import annotations

import pytest
import torch

from distwd import (
    LR,
    CautiousWeightDecay,
    Chain,
    DirectWeightDecay,
    RelativeWeightDecay,
    WeightDecay,
    Wrap,
    attach,
)
from distwd.attach.zero_proxy import ZeroProxyCapture
from tests import wire
from tests.layouts import NUM_ELEMENTS
from tests.one_process import fp32_parameters
from tests.runs import differing, grads_of

COUPLINGS = ("gradient", "lr", "none")
MATRICES = ("embed.weight", "up.weight", "down.weight", "head.weight")
TORCH = {
    "AdamW": {"weight_decay": 0},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"centered": True},
    "NAdam": {},
    "RAdam": {},
    "Adagrad": {},
    "Adafactor": {},
    "Muon": {"weight_decay": 0},
}
RULES = {
    "absolute": [WeightDecay(0.1)],
    "relative": [RelativeWeightDecay(0.1)],
    "cautious": [CautiousWeightDecay(0.1, 1)],
    "of params": [RelativeWeightDecay(0.01, norm_input="params", scope="tensor")],
    "of grad": [RelativeWeightDecay(0.01, norm_input="grad", metric="l2")],
    "direct": [DirectWeightDecay(0.1)],
    "grad, folded": [RelativeWeightDecay(0.01, norm_input="grad"), CautiousWeightDecay(0.1)],
    "into the gradient": [WeightDecay(0.1, target="grad"), RelativeWeightDecay(0.01, 1, "grad")],
}


def parameters(name: str = "") -> dict[str, torch.nn.Parameter]:
    params = fp32_parameters()
    return {key: params[key] for key in MATRICES} if name == "Muon" else params


def feed(params: dict, step: int, scale: float = 1.0) -> None:
    for name, param in params.items():
        param.grad = grads_of(step)[name] * scale


def train(optimizer, params: dict, steps=range(3)) -> dict:
    for step in steps:
        feed(params, step)
        optimizer.step()
    return {name: param.detach().clone() for name, param in params.items()}


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", TORCH)
def test_an_optimizer_decays_as_in_the_chain(name, coupling):
    """Adafactor and Muon look at whole parameters; a chain runs them at lr 1, so a chain of them is compared at lr 1."""
    lr = 1.0 if name in ("Adafactor", "Muon") else 0.01
    for rules in ([WeightDecay(0.01)], [RelativeWeightDecay(0.01, 1, "params")], [RelativeWeightDecay(0.01)]):
        cls, ours, theirs = getattr(torch.optim, name), parameters(name), parameters(name)
        optimizer = cls(ours.values(), lr=lr, **TORCH[name])
        attach(optimizer, *rules, coupling=coupling)
        parts = {"gradient": [*rules, cls, LR], "lr": [cls, *rules, LR], "none": [cls, LR, *rules]}[coupling]
        made = [Wrap(cls, **TORCH[name]) if part is cls else LR(lr) if part is LR else part for part in parts]
        values, expected = train(optimizer, ours), train(Chain(theirs.items(), *made), theirs)
        for key, value in values.items():
            # p − (p_new − p): fp32, of parameters up to about 10.
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5, msg=lambda text: f"{key}: {text}")


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["absolute", "relative", "cautious", "of params", "of grad", "direct", "grad, folded"])
def test_nothing_is_read_on_the_host_after_the_first_step(name, lr, coupling):
    params = parameters()
    optimizer = torch.optim.AdamW(params.values(), lr=lr, weight_decay=0, foreach=False)
    attach(optimizer, *RULES[name], coupling=coupling)
    train(optimizer, params, [0])
    for step in (1, 2):
        feed(params, step)
        with wire.no_host_sync():
            optimizer.step()


# --- closures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["positional", "keyword", "none", "none by keyword"])
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", ["absolute", "cautious", "of grad"])
def test_gradients_are_looked_at_when_they_are_there(name, coupling, form):
    """A closure as Lightning's zeroes the gradients and computes them: what a hook finds before it is stale."""
    ours, theirs = parameters(), parameters()
    optimizer, other = (torch.optim.AdamW(p.values(), lr=0.01, weight_decay=0) for p in (ours, theirs))
    for each in (optimizer, other):
        attach(each, *RULES[name], coupling=coupling)
    for step in range(3):

        def closure(step=step):
            assert torch.is_grad_enabled()
            calls.append(step)
            optimizer.zero_grad()
            feed(ours, step)
            return torch.tensor(3.5)

        calls: list[int] = []
        if form.startswith("none"):
            closure()
            loss = optimizer.step(None) if form == "none" else optimizer.step(closure=None)
        else:
            feed(ours, 9)
            loss = optimizer.step(closure) if form == "positional" else optimizer.step(closure=closure)
        assert calls == [step]
        assert loss is None if form.startswith("none") else loss.item() == 3.5
    assert differing({n: p.detach() for n, p in ours.items()}, train(other, theirs)) == []


def search(optimizer, params: dict) -> dict:
    def closure():
        optimizer.zero_grad()
        loss = sum(((param - 1) ** 2).sum() * (i + 1) for i, param in enumerate(params.values()))
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return {name: param.detach() for name, param in params.items()}


@pytest.mark.parametrize("place", ["closure", "lr", "none"])
def test_lbfgs_decays_as_in_the_chain(place):
    ours, theirs = parameters(), parameters()
    optimizer = torch.optim.LBFGS(ours.values(), lr=1.0, max_iter=3)
    rule = WeightDecay(0.1, target="closure" if place == "closure" else "update")
    attach(optimizer, rule, coupling="none" if place == "none" else "lr")
    inner = Wrap(torch.optim.LBFGS, max_iter=3)
    parts = {"closure": [rule, inner, LR(1.0)], "lr": [inner, rule, LR(1.0)], "none": [inner, LR(1.0), rule]}[place]
    values, expected = search(optimizer, ours), search(Chain(theirs.items(), *parts), theirs)
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


# --- GradScaler ---------------------------------------------------------------------------------------------------------


def scaled_step(scaler, optimizers: list, params: dict, step: int, infinite: str = "") -> None:
    feed(params, step, scaler.scale(torch.tensor(1.0)).item())
    if infinite:
        params[infinite].grad[0] = torch.inf
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()


FUSED = {"adamw": (torch.optim.AdamW, {"weight_decay": 0}), "sgd": (torch.optim.SGD, {"momentum": 0.9})}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("inner", FUSED)
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", RULES)
def test_scaled_gradients_decay_alike_and_a_skipped_step_decays_nothing(name, coupling, inner, fused):
    """The scale is a power of two, so even the bits agree."""
    results = []
    for scale in (1.0, 2.0**10):
        params = parameters()
        cls, kwargs = FUSED[inner]
        optimizer = cls(params.values(), lr=0.01, fused=fused, **kwargs)
        attach(optimizer, *RULES[name], coupling=coupling)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        scaled_step(scaler, [optimizer], params, 0)
        before = {n: p.detach().clone() for n, p in params.items()}
        scaled_step(scaler, [optimizer], params, 1, infinite="up.bias")
        after = {n: p.detach().clone() for n, p in params.items()}
        assert differing(before, after) == []
        scaled_step(scaler, [optimizer], params, 2)
        results.append({n: p.detach() for n, p in params.items()})
    assert differing(*results) == []
    assert differing(results[0], after) != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_under_a_scaler_too_attached_decay_is_fused_adamw_bit_for_bit(dtype):
    def run(attached: bool) -> dict:
        params = {n: torch.nn.Parameter(p.detach().to(dtype)) for n, p in parameters().items()}
        optimizer = torch.optim.AdamW(params.values(), lr=0.01, weight_decay=0 if attached else 0.3, fused=True)
        if attached:
            attach(optimizer, WeightDecay(0.3))
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(2.0)
        for step in range(3):
            for name, param in params.items():
                param.grad = grads_of(step, dtype)[name]
            optimizer.step()
        return {name: param.detach() for name, param in params.items()}

    assert differing(run(True), run(False)) == []


# --- several optimizers -----------------------------------------------------------------------------------------------


def pair_of(params: dict, **kwargs) -> list[torch.optim.Optimizer]:
    named = list(params.items())
    return [torch.optim.AdamW(part, lr=0.01, weight_decay=0, **kwargs) for part in (named[:5], named[5:])]


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", [name for name in RULES if name != "of params"])
@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])
def test_several_optimizers_share_their_numbers_as_if_they_were_one(name, coupling, order, monkeypatch):
    # The update of several optimizers is found from copies of the parameters; here that of a single one too.
    monkeypatch.setattr(ZeroProxyCapture, "works_for", lambda self, optimizer: False)
    ours, theirs = parameters(), parameters()
    optimizers = pair_of(ours)
    one = torch.optim.AdamW(theirs.items(), lr=0.01, weight_decay=0)
    attachment = attach(optimizers, *RULES[name], coupling=coupling)
    attach(one, *RULES[name], coupling=coupling)
    for step in range(3):
        feed(ours, step)
        for optimizer in optimizers[::order]:
            optimizer.step()
    values = {n: p.detach() for n, p in ours.items()}
    assert differing(values, train(one, theirs)) == []
    assert attachment.plan.numel == NUM_ELEMENTS
    attachment.remove()
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in optimizers)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_scaler_may_skip_one_optimizer_and_not_the_other(coupling, fused):
    """Absolute rules have nothing to share, so this is what an attachment each would do."""
    ours, theirs = parameters(), parameters()
    together, apart = pair_of(ours, fused=fused), pair_of(theirs, fused=fused)
    attach(together, WeightDecay(0.1), coupling=coupling)
    for each in apart:
        attach(each, WeightDecay(0.1), coupling=coupling)
    for optimizers, params in ((together, ours), (apart, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for step, infinite in enumerate(["", "up.weight", "head.bias", "", "up.weight", "up.weight", ""]):
            scaled_step(scaler, optimizers, params, step, infinite)
    assert differing({n: p.detach() for n, p in ours.items()}, {n: p.detach() for n, p in theirs.items()}) == []
