"""Optimizers that do more in their step than read `p.grad` and write p."""

from __future__ import annotations

import pytest
import torch

from distwd import LR, CautiousWeightDecay, Chain, RelativeWeightDecay, WeightDecay, Wrap, attach

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
