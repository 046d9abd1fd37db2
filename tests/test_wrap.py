"""Any torch optimizer as a transform: `Chain(Wrap(X), LR(lr))` is X, and decay around it means what its place promises."""

from __future__ import annotations

import pytest
import torch

import distwd
from tests.layouts import whole_model
from tests.runs import grads_of

NUM_STEPS = 4
LR = 0.01

OPTIMIZERS: dict[str, tuple[type, dict]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "RMSprop momentum": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "Rprop": (torch.optim.Rprop, {}),
    "ASGD": (torch.optim.ASGD, {}),
}
# Where the update is the product of the rate and something that does not depend on it.
LINEAR = [name for name in OPTIMIZERS if name not in ("Rprop", "ASGD", "Adagrad", "NAdam", "SGD momentum")]


def matrices() -> dict[str, torch.nn.Parameter]:
    """Muon takes matrices only."""
    return {n: torch.nn.Parameter(v) for n, v in whole_model(7, torch.float64).items() if v.ndim == 2}


def parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(value) for name, value in whole_model(7, torch.float64).items()}


def train(optimizer, params: dict, num_steps: int = NUM_STEPS) -> dict[str, torch.Tensor]:
    for step in range(num_steps):
        grads = grads_of(step, torch.float64)
        for name, param in params.items():
            param.grad = grads[name]
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}


def assert_close(ours: dict, theirs: dict, rtol: float = 1e-9) -> None:
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=rtol, msg=lambda text: f"{name}: {text}")


def bare(kind: type, params: dict, lr: float, settings: dict) -> torch.optim.Optimizer:
    """The optimizer alone, its own decay off."""
    optimizer = kind(params.values(), lr=lr, **settings)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return optimizer


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_wrapped_optimizer_is_itself_at_rate_one(name, foreach):
    kind, settings = OPTIMIZERS[name]
    params, reference = parameters(), parameters()
    chain = distwd.Chain(params.items(), distwd.Wrap(kind, foreach=foreach, **settings), distwd.LR(1.0))
    optimizer = bare(kind, reference, 1.0, settings | {"foreach": foreach})
    assert_close(train(chain, params), train(optimizer, reference))
    # What the optimizer itself writes to a gradient (foreach Nesterov does) is its own business; nothing else may.
    assert_close({n: p.grad for n, p in params.items()}, {n: p.grad for n, p in reference.items()})


@pytest.mark.parametrize("rule", [distwd.WeightDecay, distwd.RelativeWeightDecay, distwd.CautiousWeightDecay])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_left_as_they_were(name, rule):
    kind, settings = OPTIMIZERS[name]
    params = parameters()
    chain = distwd.Chain(params.items(), rule(0.1), distwd.Wrap(kind, **settings), rule(0.1), distwd.LR(1.0), rule(0.1))
    train(chain, params, 1)
    for key, param in params.items():
        assert torch.equal(param.grad, grads_of(0, torch.float64)[key]), key


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW", "RAdam", "Adadelta", "Adamax"])
def test_the_rate_multiplies_what_was_wrapped(name):
    kind, settings = OPTIMIZERS[name]
    params, reference = parameters(), parameters()
    chain = distwd.Chain(params.items(), distwd.Wrap(kind, **settings), distwd.LR(LR))
    optimizer = bare(kind, reference, LR, settings)
    assert_close(train(chain, params), train(optimizer, reference))


class Counting(torch.optim.Optimizer):
    """Keeps what it knows where many optimizers of other packages do: in its groups and beside its parameters."""

    def __init__(self, params, lr=1.0, weight_decay=0.0, scale=0.5):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scale": scale})
        self.state["total"] = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.state["total"] += 1
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["scale"] *= 0.9
            group["lr"] *= 0.8
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"] * group["scale"] * group["step"] / self.state["total"] ** 2)


@pytest.mark.parametrize("second", [False, True], ids=["alone", "second"])
def test_what_an_optimizer_notes_beside_its_state_is_kept(second):
    """And saved: a run that goes on from a state dict ends where the whole run ends."""
    params, resumed, reference = parameters(), parameters(), parameters()
    # Momentum 0 changes nothing, but its optimizer is the first of two.
    first = [distwd.Wrap(torch.optim.SGD)] if second else []

    def make(some):
        return distwd.Chain(some.items(), *first, distwd.Wrap(Counting), distwd.WeightDecay(0.0), distwd.LR(LR))

    chain = make(params)
    optimizer = Counting(reference.values(), lr=1.0)
    other = make(resumed)
    for number in range(NUM_STEPS):
        gradients = grads_of(number, torch.float64)
        for name, param in reference.items():
            param.grad = gradients[name] * LR
        optimizer.step()
        for name in params:
            params[name].grad = gradients[name].clone()
        if number == 2:
            other.load_state_dict(chain.state_dict())
            for name in params:
                resumed[name].detach().copy_(params[name])
        chain.step()
        if number >= 2:
            for name in params:
                resumed[name].grad = gradients[name].clone()
            other.step()
    assert_close(dict(params), dict(reference), rtol=1e-12)
    assert_close(dict(resumed), dict(reference), rtol=1e-12)


def test_optimizers_of_another_package_are_themselves_at_rate_one():
    """Most of them count their steps in their groups."""
    package = pytest.importorskip("pytorch_optimizer", reason="its optimizers are compared")
    for name in ("AdaBelief", "Adan", "Lamb", "MADGRAD", "ScheduleFreeAdamW", "Prodigy", "SOAP", "ASGD"):
        kind = getattr(package, name)
        found = {}
        for wraps in (True, False):
            torch.manual_seed(0)
            param = torch.nn.Parameter(torch.randn(8, 4))
            wrapped = distwd.Chain([param], distwd.Wrap(kind), distwd.LR(1.0))
            optimizer = wrapped if wraps else kind([param], lr=1.0, weight_decay=0.0)
            for _ in range(NUM_STEPS):
                param.grad = torch.randn_like(param)
                optimizer.step()
            found[wraps] = {name: param.detach()}
        assert_close(found[True], found[False], rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rates", [(LR,), (0.5, 2 * LR)], ids=["one rate", "two rates"])
def test_the_rate_multiplies_an_optimizer_that_sees_the_parameters(rates, decay):
    """Muon steps at rate one while the rates behind it are known already: it has waited for what comes after it."""
    params, reference = matrices(), matrices()
    rules = [distwd.WeightDecay(decay)] if decay else []
    chain = distwd.Chain(params.items(), distwd.Wrap(torch.optim.Muon), *rules, *map(distwd.LR, rates))
    optimizer = torch.optim.Muon(reference.values(), lr=LR, weight_decay=decay)
    assert_close(train(chain, params), train(optimizer, reference), rtol=1e-7)


@pytest.mark.parametrize("name", ["SGD", "SGD momentum", "RMSprop", "Adam", "NAdam", "RAdam", "Adagrad", "Adamax"])
def test_decay_before_a_wrapped_optimizer_is_its_own_l2(name):
    kind, settings = OPTIMIZERS[name]
    params, reference = parameters(), parameters()
    chain = distwd.Chain(params.items(), distwd.WeightDecay(0.1), distwd.Wrap(kind, **settings), distwd.LR(1.0))
    optimizer = kind(reference.values(), lr=1.0, weight_decay=0.1, **settings)
    assert_close(train(chain, params), train(optimizer, reference))


def decayed_by_hand(kind: type, settings: dict, params: dict, rate: float, relative: bool) -> dict:
    """The optimizer steps at rate one; then decay proportional to the parameter before the step, times the metric."""
    optimizer = bare(kind, params, 1.0, settings)
    for step in range(NUM_STEPS):
        before = {name: param.detach().clone() for name, param in params.items()}
        grads = grads_of(step, torch.float64)
        for name, param in params.items():
            param.grad = grads[name]
        optimizer.step()
        moved = torch.cat([(before[n] - p.detach()).abs().reshape(-1) for n, p in params.items()])
        coefficient = rate * (moved.mean() if relative else 1.0)
        with torch.no_grad():
            for name, param in params.items():
                param.sub_(coefficient * before[name])
    return {name: param.detach() for name, param in params.items()}


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_after_a_wrapped_optimizer_is_decoupled(name, relative):
    kind, settings = OPTIMIZERS[name]
    params = parameters()
    rule = distwd.RelativeWeightDecay(0.1) if relative else distwd.WeightDecay(0.1)
    chain = distwd.Chain(params.items(), distwd.Wrap(kind, **settings), rule, distwd.LR(1.0))
    assert_close(train(chain, params), decayed_by_hand(kind, settings, parameters(), 0.1, relative), rtol=1e-6)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("kind", [getattr(torch.optim, "Muon", "Muon"), torch.optim.Adafactor])
def test_decay_after_matrix_optimizers_is_decoupled(kind, relative):
    params = matrices()
    rule = distwd.RelativeWeightDecay(0.1) if relative else distwd.WeightDecay(0.1)
    chain = distwd.Chain(params.items(), distwd.Wrap(kind), rule, distwd.LR(1.0))
    theirs = decayed_by_hand(kind, {}, matrices(), 0.1, relative)
    assert_close(train(chain, params), theirs, rtol=1e-6)


def rosenbrock(xy: torch.Tensor) -> torch.Tensor:
    return (1 - xy[0]) ** 2 + 100 * (xy[1] - xy[0] ** 2) ** 2


def minimise(optimizer, xy: torch.Tensor, penalty: float) -> torch.Tensor:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = rosenbrock(xy) + 0.5 * penalty * xy.square().sum()
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    return xy.detach()


def test_lbfgs_decays_inside_its_closure():
    """Every evaluation of the closure has the decay in its gradient; the loss has it only in the reference."""
    ours = torch.nn.Parameter(torch.tensor([-1.5, 2.0], dtype=torch.float64))
    theirs = torch.nn.Parameter(torch.tensor([-1.5, 2.0], dtype=torch.float64))
    chain = distwd.Chain(
        [ours], distwd.WeightDecay(0.5, target="closure"), distwd.Wrap(torch.optim.LBFGS, max_iter=5), distwd.LR(1.0)
    )
    minimise(chain, ours, 0.0)
    minimise(torch.optim.LBFGS([theirs], lr=1.0, max_iter=5), theirs, 0.5)
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-8)
    assert rosenbrock(ours).item() > 1e-4  # without decay it ends at zero


def test_a_line_search_sees_consistent_gradients():
    ours = torch.nn.Parameter(torch.tensor([-1.5, 2.0], dtype=torch.float64))
    lbfgs = distwd.Wrap(torch.optim.LBFGS, max_iter=20, line_search_fn="strong_wolfe")
    chain = distwd.Chain([ours], lbfgs, distwd.LR(1.0))
    assert rosenbrock(minimise(chain, ours, 0.0)).item() < 1e-8


def test_what_is_wrapped_decays_nothing_by_itself():
    param = torch.nn.Parameter(torch.full((3,), 2.0))
    param.grad = torch.zeros(3)
    distwd.Chain([param], distwd.Wrap(torch.optim.AdamW), distwd.LR(0.1)).step()
    assert torch.equal(param, torch.full((3,), 2.0))


def test_hyperparameters_of_what_is_wrapped_are_per_group():
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [first], "momentum": 0.0}, {"params": [second]}]
    chain = distwd.Chain(groups, distwd.Wrap(torch.optim.SGD, momentum=0.5), distwd.LR(0.1))
    for _ in range(2):
        for param in (first, second):
            param.grad = torch.ones(3)
        chain.step()
    torch.testing.assert_close(first.detach(), torch.full((3,), 0.8))
    torch.testing.assert_close(second.detach(), torch.full((3,), 0.75))


@pytest.mark.parametrize("wrong", [torch.nn.Linear, "Adam", None, torch.optim.Adam([torch.ones(1)])], ids=str)
def test_what_is_no_optimizer_class_is_refused(wrong):
    with pytest.raises((ValueError, TypeError), match=r"Wrap|optimizer"):
        distwd.Wrap(wrong)


@pytest.mark.parametrize(
    "mode", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=["single", "foreach", "fused"]
)
def test_decay_before_a_maximizer_is_its_own_l2(mode):
    """The update here will be ascended, so the term towards zero has the other sign."""
    params, reference = parameters(), parameters()
    chain = distwd.Chain(params.items(), distwd.WeightDecay(0.1), distwd.Adam(maximize=True, **mode), distwd.LR(LR))
    optimizer = torch.optim.Adam(reference.values(), lr=LR, weight_decay=0.1, maximize=True, **mode)
    assert_close(train(chain, params), train(optimizer, reference))
