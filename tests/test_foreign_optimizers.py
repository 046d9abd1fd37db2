"""Optimizers that do more in their step than read `p.grad` and write p."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from distwd import (
    LR,
    Adam,
    CautiousWeightDecay,
    Chain,
    DirectWeightDecay,
    RelativeWeightDecay,
    WeightDecay,
    Wrap,
    attach,
)

RATE, DECAY = 0.25, 0.5


class SignSGD(torch.optim.Optimizer):
    """p ← p − lr·sign(g); then something happens to the gradient."""

    def __init__(self, params, lr=1.0, after="keep"):
        super().__init__(params, {"lr": lr, "after": after})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                param.sub_(param.grad.sign(), alpha=group["lr"])
                if group["after"] == "clear":
                    param.grad = None
                elif group["after"] == "scale":
                    param.grad.mul_(100.0)
                elif group["after"] == "delete":
                    del param.grad


def start():
    return torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))


GRAD = torch.tensor([3.0, -4.0, -12.0])
RULES = {
    "absolute": (lambda: WeightDecay(DECAY), lambda p: DECAY),
    "cautious": (lambda: CautiousWeightDecay(DECAY), lambda p: DECAY * (p * GRAD > 0)),
    "of grad": (lambda: RelativeWeightDecay(DECAY, norm_input="grad", metric="l2"), lambda p: DECAY * 13.0),
    "of grad by tensor": (
        lambda: RelativeWeightDecay(DECAY, norm_input="grad", metric="linf", scope="tensor"),
        lambda p: DECAY * 12.0,
    ),
    "of update": (lambda: RelativeWeightDecay(DECAY), lambda p: DECAY * 1.0),
}


@pytest.mark.parametrize("of", RULES)
@pytest.mark.parametrize("after", ["keep", "clear", "scale", "delete"])
def test_what_a_rule_needs_of_gradients_is_taken_before_the_step(after, of):
    make, rate = RULES[of]
    param = start()
    optimizer = SignSGD([param], RATE, after)
    attach(optimizer, make())
    want = start().detach().double()
    for _ in range(2):
        want = want - RATE * rate(want) * want - RATE * GRAD.sign()
        param.grad = GRAD.clone()
        optimizer.step()
    assert torch.allclose(param.double(), want, rtol=1e-5)


@pytest.mark.parametrize("after", ["clear", "scale"])
def test_several_optimizers_may_change_their_gradients(after):
    params = [start(), start()]
    optimizers = [SignSGD([param], RATE, after) for param in params]
    attachment = attach(
        optimizers, RelativeWeightDecay(0.0), RelativeWeightDecay(DECAY, norm_input="grad", metric="linf")
    )
    for factor, param in enumerate(params, 1):
        param.grad = factor * GRAD
    for optimizer in reversed(optimizers):
        optimizer.step()
    assert attachment.stats()["RelativeWeightDecay_1"]["metric"] == 24.0
    want = start() * (1 - RATE * DECAY * 24.0) - RATE * GRAD.sign()
    assert all(torch.allclose(param, want) for param in params)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("how", ["chain", "attach", "chain of a stranger"])
def test_a_metric_of_the_gradient_is_of_what_backward_left(how, foreach):
    """torch's SGD adds its momentum to `p.grad` in place, with nesterov and foreach."""
    param = start()
    rules = [RelativeWeightDecay(0.0), RelativeWeightDecay(0.0, norm_input="grad", metric="linf")]
    settings = {"momentum": 0.5, "nesterov": True, "foreach": foreach}
    if how == "attach":
        optimizer = torch.optim.SGD([param], lr=RATE, **settings)
        stats = attach(optimizer, *rules).stats
    else:
        wrap = Wrap(torch.optim.SGD, **settings) if how == "chain" else Wrap(SignSGD, after="scale")
        optimizer = Chain([param], wrap, *rules, LR(RATE))
        stats = optimizer.stats
    for _ in range(2):
        param.grad = GRAD.clone()
        optimizer.step()
        assert stats()["RelativeWeightDecay_1"]["metric"] == 12.0


def test_a_closure_that_the_optimizer_does_not_call_hinders_no_decay():
    param = start()
    optimizer = SignSGD([param], RATE)
    attach(optimizer, WeightDecay(DECAY))
    param.grad = GRAD.clone()
    optimizer.step(lambda: None)
    assert torch.allclose(param, start() * (1 - RATE * DECAY) - RATE * GRAD.sign())


class Cooling(torch.optim.Optimizer):
    """SGD that lowers its own lr in its step."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=float(group["lr"]))
            group["lr"] *= 0.1  # in place, if it is a tensor


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_lr_of_a_decay_is_the_one_that_the_optimizer_steps_with(as_tensor):
    param, grad = start(), GRAD / 10
    optimizer = Cooling([param], torch.tensor(RATE) if as_tensor else RATE)
    attachment = attach(optimizer, RelativeWeightDecay(DECAY), WeightDecay(DECAY))
    rate, want = RATE, start().detach()
    for _ in range(2):
        want = want - rate * (grad + DECAY * want + DECAY * grad.abs().mean() * want)
        param.grad = grad.clone()
        optimizer.step()
        assert attachment.stats()["RelativeWeightDecay"]["metric"].item() == pytest.approx(
            grad.abs().mean().item(), rel=1e-4
        )
        rate *= 0.1
    assert torch.allclose(param, want)


@pytest.mark.parametrize("of", ["params", "grad"])
def test_the_lr_may_change_until_its_optimizer_steps(of):
    params = [start(), start()]
    optimizers = [torch.optim.SGD([param], lr=RATE) for param in params]
    attach(optimizers, RelativeWeightDecay(DECAY, norm_input=of, metric="linf"))
    for param in params:
        param.grad = torch.full((3,), 2.0)
    optimizers[1].step()
    optimizers[0].param_groups[0]["lr"] = RATE / 5
    optimizers[0].step()
    for param, rate in zip(params, (RATE / 5, RATE), strict=True):
        assert torch.allclose(param, start() * (1 - rate * DECAY * 2.0) - rate * 2.0)


@pytest.mark.parametrize("coupling", ["lr", "none"])
def test_rules_of_an_attachment_see_what_the_optimizer_did_and_no_more(coupling):
    param, grad = start(), torch.tensor([0.2, -0.1, -0.3])
    optimizer = torch.optim.SGD([param], lr=RATE)
    rules = [WeightDecay(DECAY), CautiousWeightDecay(0.25), RelativeWeightDecay(0.25), RelativeWeightDecay(1.0, 1)]
    attachment = attach(optimizer, *rules, coupling=coupling)
    param.grad = grad.clone()
    optimizer.step()
    factor = RATE if coupling == "lr" else 1.0
    metric = 0.2 if coupling == "lr" else RATE * 0.2
    p = start().detach()
    decay = DECAY * p + 0.25 * p * (p * grad > 0) + 0.25 * metric * p + metric * p.sign()
    assert torch.allclose(param, p - RATE * grad - factor * decay)
    for label in ("RelativeWeightDecay", "RelativeWeightDecay_1"):
        assert attachment.stats()[label]["metric"].item() == pytest.approx(metric)


RULES_BEFORE = [lambda: WeightDecay(0.5), lambda: RelativeWeightDecay(0.25, norm_input="params", metric="linf")]


@pytest.mark.parametrize("coupling", ["lr", "none"])
@pytest.mark.parametrize("make", RULES_BEFORE)
def test_a_rule_before_a_decay_at_once_acts(make, coupling):
    param = start()
    optimizer = torch.optim.AdamW([param], lr=RATE, weight_decay=0)
    attach(optimizer, make(), DirectWeightDecay(0.125), coupling=coupling)
    param.grad = torch.zeros(3)
    optimizer.step()
    assert torch.allclose(param, start() * (1 - 0.125 - 0.5 * (RATE if coupling == "lr" else 1.0)))


# --- a chain ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1.0, 0.5, torch.tensor(1.0)])
def test_a_decay_of_the_gradient_behind_the_lr_does_not_reach_the_update(lr):
    param = start()
    param.grad = GRAD.clone()
    Chain([param], LR(lr), WeightDecay(DECAY, target="grad")).step()
    assert torch.allclose(param, start() - float(lr) * GRAD)
    assert torch.allclose(param.grad, GRAD + DECAY * start())


class Plain(torch.optim.SGD):
    """A subclass that changes nothing; but who knows."""


@pytest.mark.parametrize("relative", [False, True])
def test_saving_a_chain_whose_optimizer_keeps_nothing_changes_nothing(relative):
    model = torch.nn.Linear(3, 2)
    rule = RelativeWeightDecay(DECAY, norm_input="params") if relative else WeightDecay(DECAY)
    chain = Chain(model.named_parameters(), Wrap(Plain), LR(RATE), rule)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        chain.step()
        chain.zero_grad()
        before, stats = [param.detach().clone() for param in model.parameters()], chain.stats()
        get_optimizer_state_dict(model, chain)
        assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
        assert str(chain.stats()) == str(stats)


class Summing(torch.optim.Optimizer):
    """p ← p − lr·Σ g; its state begins while there is none, under a key that ends in a number."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if len(state) == 0:
                    state["sum_1"], state["sum_0"] = torch.zeros_like(param), torch.zeros_like(param)
                assert set(state) == {"sum_1", "sum_0"}
                state["sum_1"].add_(param.grad)
                state["sum_0"].add_(1)
                param.sub_(state["sum_1"], alpha=group["lr"])


@pytest.mark.parametrize("others", [[], [Adam], [Adam, lambda: Wrap(torch.optim.SGD, momentum=0.5)]])
def test_every_wrapped_optimizer_sees_its_own_state_only(others):
    param = start()
    chain = Chain([param], Wrap(Summing), *(make() for make in others), LR(RATE))
    for _ in range(3):
        param.grad = GRAD.clone()
        chain.step()
    numbered = "_0" if others else ""
    assert torch.equal(chain.state[param]["sum_1" + numbered], 3 * GRAD)
    assert torch.equal(chain.state[param]["sum_0" + numbered], torch.full((3,), 3.0))
    twin = Chain([start()], Wrap(Summing), *(make() for make in others), LR(RATE))
    twin.load_state_dict(chain.state_dict())
    assert set(next(iter(twin.state.values()))) == set(chain.state[param])


def test_stats_name_the_parameters_that_were_measured():
    named = [(name, torch.nn.Parameter(torch.full((2,), value))) for name, value in zip("xyz", (1.0, 2.0, 3.0))]
    chain = Chain(named, RelativeWeightDecay(DECAY, norm_input="params", scope="tensor"), LR(RATE))
    for _, param in named:
        param.grad = torch.zeros(2)
    chain.step()

    def shown():
        return {name: value.item() for name, value in chain.stats()["RelativeWeightDecay"]["metric"].items()}

    assert shown() == {"x": 1.0, "y": 2.0, "z": 3.0}
    chain.add_param_group({"params": [("new", start())]})
    assert shown() == {"x": 1.0, "y": 2.0, "z": 3.0}
    del chain.param_groups[0]["params"][0], chain.param_groups[0]["param_names"][0]
    assert len(chain.plan.entries) == 3
    assert shown() == {"x": 1.0, "y": 2.0, "z": 3.0}


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda chain: pickle.loads(pickle.dumps(chain)), "copy": copy.copy}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_chain_follows_its_parameters(how):
    chain = COPIES[how](Chain([start()], Adam(), LR(RATE)))
    chain.param_groups[0]["params"][0] = start()
    assert len(chain.state_dict()["state"]) == 1
    chain.add_param_group({"params": [start()]})
    assert len(chain.state_dict()["state"]) == 2


@pytest.mark.parametrize("how", ["chain", "attach"])
@pytest.mark.parametrize("decay", [0.0, 0, torch.tensor(0.0)])
def test_no_decay_is_off_where_a_metric_is_infinite(decay, how):
    decayed, free = start(), start()
    key = "weight_decay" if how == "chain" else "distwd_weight_decay"
    groups = [{"params": [decayed]}, {"params": [free], key: decay}]
    rule = RelativeWeightDecay(DECAY, norm_input="grad")
    if how == "chain":
        optimizer = Chain(groups, Wrap(torch.optim.SGD), rule, LR(RATE))
    else:
        optimizer = torch.optim.SGD(groups, lr=RATE)
        attach(optimizer, rule)
    decayed.grad, free.grad = torch.full((3,), torch.inf), torch.ones(3)
    optimizer.step()
    assert torch.equal(free, start() - RATE)
    assert not decayed.isfinite().any()


def test_no_decay_is_off_where_its_direction_overflows():
    param = torch.nn.Parameter(torch.tensor([1e20, -1.0]))
    param.grad = torch.zeros(2)
    Chain([param], WeightDecay(0.0, ord=4), LR(RATE)).step()
    assert torch.equal(param, torch.tensor([1e20, -1.0]))


# --- what is passed on, and what is refused ---------------------------------------------------------------------------


class Polyak(torch.optim.Optimizer):
    """SGD whose `step` takes the loss first."""

    def __init__(self, params):
        super().__init__(params, {"lr": RATE})

    @torch.no_grad()
    def step(self, loss):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(float(loss) * param.grad, alpha=group["lr"])


@pytest.mark.parametrize("loss", [0.5, torch.tensor(0.5)])
@pytest.mark.parametrize("of", ["absolute", "of update"])
def test_what_is_no_closure_is_passed_on(of, loss):
    param = start()
    optimizer = Polyak([param])
    attach(optimizer, WeightDecay(DECAY) if of == "absolute" else RelativeWeightDecay(DECAY, metric="linf"))
    param.grad = torch.full((3,), 2.0)
    optimizer.step(loss)
    assert torch.allclose(param, start() * (1 - RATE * DECAY) - RATE * 1.0)


REFUSED = {
    "attach": lambda p: attach(torch.optim.SGD([p], lr=RATE, differentiable=True), WeightDecay(DECAY)),
    "chain": lambda p: Chain([p], Wrap(torch.optim.SGD, differentiable=True), WeightDecay(DECAY), LR(RATE)),
    "group of a chain": lambda p: Chain([{"params": [p], "differentiable": True}], Adam(), LR(RATE)),
    "adam": lambda p: Adam(differentiable=True),
}


@pytest.mark.parametrize("place", REFUSED)
def test_derivatives_of_a_step_are_refused(place):
    with pytest.raises(ValueError, match="differentiable"):
        REFUSED[place](start())


def test_derivatives_of_a_step_are_refused_when_they_are_asked_for_later():
    param = start()
    optimizer = torch.optim.SGD([param], lr=RATE)
    attach(optimizer, WeightDecay(DECAY))
    optimizer.param_groups[0]["differentiable"] = True
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="differentiable"):
        optimizer.step()
    assert torch.equal(param, start())
