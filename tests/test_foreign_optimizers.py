"""Optimizers that do more in their step than read `p.grad` and write p."""

from __future__ import annotations

import copy
import pickle
import warnings

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
    values = {"x": 1.0, "y": 2.0, "z": 3.0}
    named = [(name, torch.nn.Parameter(torch.full((2,), value))) for name, value in values.items()]
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


# --- copies of the parameters that the optimizer steps from -----------------------------------------------------------


class Masters(torch.optim.Optimizer):
    """SGD on fp32 copies: in its state, or in an attribute."""

    def __init__(self, params, lr, place):
        super().__init__(params, {"lr": lr, "place": place})
        self.masters = [param.detach().float().clone() for param in self.param_groups[0]["params"]]
        if place != "attribute":
            del self.masters

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for number, param in enumerate(group["params"]):
                if group["place"] == "attribute":
                    master = self.masters[number]
                else:
                    master = self.state[param].setdefault("master", param.detach().float().clone())
                master.sub_(param.grad, alpha=group["lr"])
                param.copy_(master)


class ScheduleFree(torch.optim.Optimizer):
    """SGD of Defazio et al., arXiv 2405.15682: gradients at y, steps from z."""

    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            weight = 1 / group["k"]
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.clone())
                y.lerp_(z, weight)
                y.add_(y.grad, alpha=group["lr"] * (group["beta"] * (1 - weight) - 1))
                z.sub_(y.grad, alpha=group["lr"])


@pytest.mark.parametrize("coupling", ["lr", "none"])
@pytest.mark.parametrize("size", [0.0, 1e-3])
@pytest.mark.parametrize("how", ["state", "attribute", "schedule-free"])
def test_a_decay_lasts_where_the_optimizer_steps_from_copies(how, size, coupling):
    rate, decay, num_steps = 0.1, 0.2, 60
    dtype = torch.float32 if how == "schedule-free" else torch.bfloat16
    param = torch.nn.Parameter(torch.tensor([1.5, -2.0, 4.0]).to(dtype))
    optimizer = ScheduleFree([param], rate) if how == "schedule-free" else Masters([param], rate, how)
    factor = decay if coupling == "lr" else rate * decay
    attach(optimizer, WeightDecay(factor), coupling=coupling, rounding="stochastic")
    for _ in range(num_steps):
        param.grad = torch.full_like(param, size)
        optimizer.step()
    want = torch.tensor([1.5, -2.0, 4.0]) * (1 - rate * decay) ** num_steps
    assert torch.allclose(param.float(), want, atol=0.03)


@pytest.mark.parametrize("rule", [CautiousWeightDecay(2.0), RelativeWeightDecay(2.0, 1.5, "params", scope="tensor")])
def test_copies_are_decayed_by_every_rule(rule):
    """fp32 parameters with fp32 copies: as without the copies, but for roundings."""
    found = []
    for cls in (Masters, SignSGD):
        params = [start(), torch.nn.Parameter(torch.tensor([[0.5], [-0.25]]))]
        optimizer = torch.optim.SGD(params, lr=0.1) if cls is SignSGD else Masters(params, 0.1, "state")
        attach(optimizer, rule)
        for _ in range(4):
            for param in params:
                param.grad = torch.full_like(param, 0.125)
            optimizer.step()
        found.append(params)
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("kept", ["the start", "an average", "momentum"])
def test_what_only_looks_like_a_copy_is_left_alone(kept):
    class Keeping(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    state = self.state[param]
                    state.setdefault("the start", param.clone())
                    average = state.setdefault("an average", param.clone())
                    state.setdefault("momentum", param.grad.clone())
                    param.sub_(param.grad, alpha=group["lr"])
                    average.lerp_(param, 0.5)

    param = start()
    optimizer = Keeping([param], {"lr": 0.0})
    attach(optimizer, WeightDecay(0.5))
    for lr in (0.0, 0.1, 0.1):
        param.grad = param.detach().clone()  # so the momentum begins as the parameter
        optimizer.param_groups[0]["lr"] = lr
        old = optimizer.state[param].get(kept)
        old = None if old is None else old.clone()
        before = param.detach().clone()
        optimizer.step()
        if old is not None:
            want = old.lerp(before * (1 - lr), 0.5) if kept == "an average" else old
            assert torch.allclose(optimizer.state[param][kept], want)


# --- gradients elsewhere, steps of another size, low precision --------------------------------------------------------


class Elsewhere(torch.optim.Optimizer):
    """SGD that reads its gradients from another attribute."""

    def __init__(self, params, place):
        super().__init__(params, {"lr": RATE})
        self.place = place

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.data.sub_(getattr(param, self.place), alpha=group["lr"])


@pytest.mark.parametrize("coupling", ["lr", "none", "gradient"])
@pytest.mark.parametrize("place", ["main_grad", "decoupled_grad"])
def test_gradients_in_known_other_places_are_refused(place, coupling):
    param = start()
    setattr(param, place, GRAD.clone())
    optimizer = Elsewhere([param], place)
    attach(optimizer, WeightDecay(DECAY), coupling=coupling)
    with pytest.raises(ValueError, match=rf"param 0 lies in \.{place}"):
        optimizer.step()
    assert torch.equal(param, start())


def test_a_parameter_that_moves_without_a_gradient_is_named():
    param = start()
    param.hidden = GRAD.clone()
    optimizer = Elsewhere([param], "hidden")
    attach(optimizer, WeightDecay(DECAY))
    with pytest.warns(UserWarning, match=r"moved param 0, which had no \.grad"):
        optimizer.step()


class FindingItsRate(torch.optim.Optimizer):
    """p ← p − d·lr·sign(g), with a d that grows in the step, as in Prodigy."""

    def __init__(self, params, lr=1.0, d=1e-3):
        super().__init__(params, {"lr": lr, "d": d})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            rate = group["d"] * group["lr"]
            group["d"] *= 2
            for param in group["params"]:
                param.sub_(param.grad.sign(), alpha=rate)


def test_the_rate_that_an_optimizer_finds_is_the_rate_of_the_decay():
    param = start()
    optimizer = FindingItsRate([param])
    attachment = attach(optimizer, WeightDecay(DECAY), RelativeWeightDecay(DECAY))
    want, d = start().detach(), 1e-3
    for _ in range(3):
        param.grad = GRAD.clone()
        optimizer.step()
        want, d = want - d * (GRAD.sign() + 2 * DECAY * want), 2 * d
        assert attachment.stats()["RelativeWeightDecay"]["metric"].item() == pytest.approx(1.0, rel=1e-3)
    assert torch.allclose(param, want)


class Prodigy(torch.optim.Optimizer):
    """Finds its step size, and keeps it to itself."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})
        self.hidden = 1e-3

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param.sub_(param.grad.sign(), alpha=self.hidden)


@pytest.mark.parametrize("coupling", ["lr", "none"])
def test_a_rate_that_an_optimizer_hides_is_told_once(coupling):
    param = start()
    optimizer = Prodigy([param])
    attach(optimizer, WeightDecay(1e-3), coupling=coupling)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            param.grad = GRAD.clone()
            optimizer.step()
    found = [str(one.message) for one in caught]
    assert ["Prodigy finds its step size itself, and shows no 'd'" in text for text in found] == [True] * (
        coupling == "lr"
    )


@pytest.mark.parametrize("moves", [True, False], ids=["moved", "rounded away"])
def test_zero_gradients_do_not_look_like_updates_that_were_rounded_away(moves):
    """Of an embedding most rows have none in a step, and stay for that."""
    param = torch.nn.Parameter(torch.ones(100, 8, dtype=torch.bfloat16))
    optimizer = torch.optim.ASGD([param], lr=1.0 if moves else 1e-4, lambd=0)
    attach(optimizer, RelativeWeightDecay(0.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            param.grad = torch.zeros_like(param)
            param.grad[10 * step : 10 * step + 10] = 0.5
            optimizer.step()
    told = ["has moved 0 of 80 elements" in str(one.message) for one in caught]
    assert told == ([] if moves else [True])


@pytest.mark.parametrize("coupling", ["lr", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cls", "settings"), [(torch.optim.AdamW, {"eps": 1e-3}), (torch.optim.SGD, {})])
def test_the_update_of_low_precision_is_that_of_the_chain(cls, settings, dtype, coupling):
    values = {}
    for how in ("chain", "attach"):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(64, 8).to(dtype))
        rule = RelativeWeightDecay(DECAY)
        if how == "chain":
            parts = [rule, LR(1e-3)] if coupling == "lr" else [LR(1e-3), rule]
            optimizer = Chain([param], Wrap(cls, **settings), *parts)
            stats = optimizer.stats
        else:
            optimizer = cls([param], lr=1e-3, weight_decay=0, **settings)
            stats = attach(optimizer, rule, coupling=coupling).stats
        for _ in range(3):
            param.grad = torch.randn(64, 8).to(dtype)
            optimizer.step()
        values[how] = param.detach(), stats()["RelativeWeightDecay"]["metric"].item()
    assert torch.equal(values["chain"][0], values["attach"][0])
    assert values["chain"][1] == values["attach"][1] > 0


def test_an_update_that_is_rounded_away_is_warned_of():
    param = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = SignSGD([param], 1e-3)
    attach(optimizer, RelativeWeightDecay(DECAY))
    param.grad = torch.linspace(-1, 1, 64).bfloat16()
    param.data[:8] = 1e-3
    with pytest.warns(UserWarning, match="has moved 8 of 64 elements"):
        optimizer.step()


# --- who decays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["chain", "attach", "attach twice"])
def test_a_group_that_is_excluded_is_excluded_from_every_rule(how):
    decayed, free = start(), start()
    key = "weight_decay" if how == "chain" else "distwd_weight_decay"
    groups = [{"params": [decayed]}, {"params": [free], key: 0.0}]
    rules = [WeightDecay(DECAY), RelativeWeightDecay(DECAY, norm_input="params"), WeightDecay(DECAY, ord=1)]
    if how == "chain":
        optimizer = Chain(groups, *rules, LR(RATE))
    else:
        optimizer = torch.optim.SGD(groups, lr=RATE)
        for some in [rules] if how == "attach" else [rules[:1], rules[1:]]:
            attach(optimizer, *some)
    decayed.grad, free.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    assert torch.equal(free, start())
    assert not torch.equal(decayed, start())


def test_one_rule_may_be_off_and_another_on():
    param = start()
    optimizer = torch.optim.SGD([{"params": [param], "distwd_weight_decay": 0.0, "distwd_weight_decay_1": 0.5}], lr=1.0)
    attach(optimizer, WeightDecay(DECAY), WeightDecay(DECAY, ord=1))
    param.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(param, start() - 0.5 * start().sign())


def test_decay_is_taken_over_and_given_back():
    decayed, free, other = start(), start(), start()
    groups = [{"params": [decayed]}, {"params": [free], "weight_decay": 0.0}, {"params": [other], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY)
    with pytest.raises(ValueError, match="take_over=True"):
        attach(optimizer, WeightDecay(0.3))
    saved = optimizer.state_dict()
    attachment = attach(optimizer, WeightDecay(0.3), WeightDecay(0.2, ord=1), take_over=True)
    for _ in range(2):
        assert [group["distwd_weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0, 0.1]
        assert [group["distwd_weight_decay_1"] for group in optimizer.param_groups] == [0.2, 0.0, 0.2]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0, 0.0]
        for param in (decayed, free, other):
            param.grad = torch.zeros(3)
        optimizer.load_state_dict(saved)  # of the run that decayed by itself
        optimizer.step()
    assert torch.equal(free, start())
    attachment.remove()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0, 0.1]
    assert not any(key.startswith("distwd") for group in optimizer.param_groups for key in group)


def test_an_equal_rule_is_attached_once():
    optimizer = torch.optim.SGD([start()], lr=RATE)
    first = attach(optimizer, WeightDecay(DECAY))
    with pytest.raises(ValueError, match="attached to SGD already"):
        attach(optimizer, WeightDecay(DECAY))
    attach(optimizer, WeightDecay(DECAY, ord=1))
    attach(optimizer, CautiousWeightDecay(DECAY))
    first.remove()
    attach(optimizer, WeightDecay(DECAY))
