"""Several attachments on one optimizer: each sees parameters, gradients and update as the optimizer alone makes them."""

from __future__ import annotations

import itertools

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
from tests.model import whole_model
from tests.runs import PARAMS_SEED, grads_of

RULES = {
    "absolute": lambda: WeightDecay(0.3),
    "ord 1.5": lambda: WeightDecay(0.2, ord=1.5),
    "of params": lambda: RelativeWeightDecay(4.0, norm_input="params"),
    "of the gradient": lambda: RelativeWeightDecay(3.0, norm_input="grad", metric="rms"),
    "of the update": lambda: RelativeWeightDecay(2.0),
    "cautious": lambda: CautiousWeightDecay(0.4),
    "at once": lambda: DirectWeightDecay(0.1),
}
OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0, "foreach": False}),
    "fused AdamW": (torch.optim.AdamW, {"weight_decay": 0, "fused": True}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "ASGD": (torch.optim.ASGD, {}),  # not elementwise
}
PAIRS = [*itertools.permutations(RULES, 2), *itertools.combinations(RULES, 3)]


def stepped(optimizer_name, rules, coupling="none", num_steps=1, together=False, dtype=torch.float64) -> tuple:
    """Parameters after some steps, the numbers that each attachment shows, and the optimizer's gradients then."""
    params = {name: torch.nn.Parameter(p) for name, p in whole_model(PARAMS_SEED, dtype).items()}
    cls, settings = OPTIMIZERS[optimizer_name]
    optimizer = cls(params.items(), lr=0.1, **settings)
    couplings = [coupling] * len(rules) if isinstance(coupling, str) else coupling
    sets = [rules] if together else [[rule] for rule in rules]
    found = [
        attach(optimizer, *(RULES[rule]() for rule in some), coupling=one)
        for some, one in zip(sets, couplings, strict=False)
        if some
    ]
    for step in range(num_steps):
        grads = grads_of(step, dtype)
        for name, param in params.items():
            param.grad = grads[name].clone()
        optimizer.step()
        assert all(torch.equal(param.grad, grads[name]) for name, param in params.items())
    stats = {label: numbers for each in found for label, numbers in each.stats().items()}
    return {name: param.detach() for name, param in params.items()}, stats


@pytest.mark.parametrize("coupling", ["lr", "none"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decays_of_several_attachments_add_up(name, coupling):
    """What two take off is what one takes off and what the other takes off, whatever their order; so are their numbers."""
    bare, _ = stepped(name, [])
    alone = {rule: stepped(name, [rule], coupling) for rule in RULES}
    for rules in PAIRS:
        both, stats = stepped(name, rules, coupling)
        for key, value in both.items():
            expected = bare[key] + sum(alone[rule][0][key] - bare[key] for rule in rules)
            torch.testing.assert_close(
                value, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{rules}, {key}: {text}"
            )
        for label, numbers in ((label, each) for rule in rules for label, each in alone[rule][1].items()):
            if sum(rule.startswith("of") for rule in rules) == 1:
                torch.testing.assert_close(stats[label], numbers, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rules", [("absolute", "of the update"), ("of params", "absolute"), ("cautious", "ord 1.5")])
def test_two_attachments_train_as_one_with_both_rules(name, rules):
    ends = [stepped(name, rules, "lr", num_steps=4, together=together)[0] for together in (True, False)]
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [("gradient", "lr"), ("lr", "gradient")])
@pytest.mark.parametrize(
    "rules", [("absolute", "of the update"), ("of the gradient", "of the gradient"), ("of params", "absolute")]
)
def test_decay_before_and_behind_an_optimizer_is_the_chain_of_both(rules, order):
    before, behind = rules if order[0] == "gradient" else rules[::-1]
    values, stats = stepped("SGD", rules, order, num_steps=2)
    params = {name: torch.nn.Parameter(p) for name, p in whole_model(PARAMS_SEED, torch.float64).items()}
    chain = Chain(params.items(), RULES[before](), Wrap(torch.optim.SGD, momentum=0.9), RULES[behind](), LR(0.1))
    for step in range(2):
        for name, param in params.items():
            param.grad = grads_of(step, torch.float64)[name]
        chain.step()
    for name, value in values.items():
        torch.testing.assert_close(value, params[name].detach(), rtol=1e-9, atol=1e-9)
    for label in stats:
        torch.testing.assert_close(stats[label]["metric"], chain.stats()[label]["metric"], rtol=1e-6, atol=0)


def test_gradients_that_two_attachments_add_to_are_not_a_metric_of_a_third():
    params = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([params], lr=0.1)
    attach(optimizer, WeightDecay(1.0), coupling="gradient")
    attach(optimizer, WeightDecay(2.0), coupling="gradient")
    third = attach(optimizer, RelativeWeightDecay(0.0, norm_input="grad"), coupling="none")
    params.grad = torch.full((4,), 0.5)
    optimizer.step()
    assert third.stats()["RelativeWeightDecay"]["metric"] == 0.5
    torch.testing.assert_close(params.detach(), torch.full((4,), 1 - 0.1 * 3.5))
    assert params.grad.tolist() == [0.5] * 4


@pytest.mark.parametrize("fused", [False, True])
def test_before_and_after_there_are_two_the_first_has_the_bits_of_adamw(fused):
    """While there are two, both wait for the optimizer. One that comes and goes leaves nothing behind."""
    whole = whole_model(PARAMS_SEED)
    ours, theirs = ({name: torch.nn.Parameter(p.clone()) for name, p in whole.items()} for _ in range(2))
    optimizer = torch.optim.AdamW(ours.items(), lr=0.1, weight_decay=0, fused=fused)
    alone = torch.optim.AdamW(theirs.items(), lr=0.1, weight_decay=0.1, fused=fused)
    attach(optimizer, WeightDecay(0.1))
    for step in range(3):
        for params in (ours, theirs):
            for name, param in params.items():
                param.grad = grads_of(step)[name]
        second = attach(optimizer, RelativeWeightDecay(0.0)) if step == 1 else None
        optimizer.step()
        alone.step()
        for name, param in ours.items():
            if second is None:
                assert torch.equal(param, theirs[name]), (step, name)
            torch.testing.assert_close(param, theirs[name], rtol=1e-6, atol=1e-6)
            param.data.copy_(theirs[name])
        if second is not None:
            second.remove()


def test_a_copy_that_an_optimizer_steps_from_is_decayed_by_both():
    """Where bf16 parameters have fp32 masters, a decay that is written to the parameter alone would not last."""

    class Masters(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})
            for param in (param for group in self.param_groups for param in group["params"]):
                self.state[param]["master"] = param.detach().float()

        @torch.no_grad()
        def step(self, closure=None):
            for param in (param for group in self.param_groups for param in group["params"]):
                master = self.state[param]["master"]
                master.sub_(param.grad.float(), alpha=self.param_groups[0]["lr"])
                param.copy_(master)

    ends = []
    for together in (True, False):
        param = torch.nn.Parameter(torch.linspace(1, 2, 16, dtype=torch.bfloat16))
        optimizer = Masters([param], lr=0.5)
        rules = [WeightDecay(0.01), WeightDecay(0.03)]
        for some in [rules] if together else [[rule] for rule in rules]:
            attach(optimizer, *some)
        for _ in range(3):
            param.grad = torch.full_like(param, 0.01)
            optimizer.step()
        ends.append(optimizer.state[param]["master"])
    bare = torch.linspace(1, 2, 16, dtype=torch.bfloat16).float() - 0.015
    assert (ends[0] < bare - 0.04).all()
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=0)


def test_two_attachments_of_several_optimizers_see_each_update_once():
    """One of both, one of the second alone: it writes first, while the other still waits."""
    whole = whole_model(PARAMS_SEED, torch.float64)
    halves = list(whole.items())[:5], list(whole.items())[5:]
    metrics = []
    for others in (False, True):
        two = [torch.optim.SGD([(n, torch.nn.Parameter(p.clone())) for n, p in half], lr=0.1) for half in halves]
        shared = attach(two, RelativeWeightDecay(0.5), coupling="none")
        if others:
            attach(two[0], WeightDecay(0.3), coupling="none")
        for each, half in zip(two, halves, strict=True):
            for (name, _), param in zip(half, each.param_groups[0]["params"], strict=True):
                param.grad = grads_of(0, torch.float64)[name]
        for each in two:
            each.step()
        metrics.append(shared.stats()["RelativeWeightDecay"]["metric"])
        found = [param.detach() for each in two for param in each.param_groups[0]["params"]]
        for number, ((name, before), after) in enumerate(zip(whole.items(), found, strict=True)):
            rate = 0.5 * metrics[0].double() + (0.3 if others and number < 5 else 0)
            torch.testing.assert_close(after, (1 - rate) * before - 0.1 * grads_of(0, torch.float64)[name])
    assert metrics[0] == metrics[1]
