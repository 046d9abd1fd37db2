"""attach refuses early and by name, keeps its numbers in the groups, and survives steps that raise."""

from __future__ import annotations

import copy

import pytest
import torch

from distwd import DirectWeightDecay, RelativeWeightDecay, WeightDecay, Wrap, attach
from tests.one_process import fp32_parameters as parameters
from tests.runs import differing, grads_of

COUPLINGS = ("gradient", "lr", "none")
RULES = {"absolute": lambda: [WeightDecay(0.1)], "relative": lambda: [RelativeWeightDecay(0.1)]}


def some(count: int = 2) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]


class Wrapper(torch.optim.Optimizer):
    """As accelerate's AcceleratedOptimizer and schedulefree's ScheduleFreeWrapper are made."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults

    def step(self, closure=None):
        return self.optimizer.step(closure)


class NoHooks(torch.optim.Optimizer):
    def __init__(self, params):
        self.param_groups, self.state, self.defaults = [{"params": list(params), "lr": 0.1}], {}, {}

    def step(self, closure=None):
        pass


class NoRate(torch.optim.Optimizer):
    def __init__(self, params, **settings):
        super().__init__(params, settings)

    def step(self, closure=None):
        pass


def sgd(**kwargs) -> torch.optim.SGD:
    return torch.optim.SGD(some(), lr=0.1, **kwargs)


def sharing() -> list[torch.optim.Optimizer]:
    params = some(2)
    return [torch.optim.SGD(params, lr=0.1), torch.optim.SGD(params[1:], lr=0.1)]


DECAY = WeightDecay(0.1)
REFUSED = {
    "decays already": (
        lambda: torch.optim.AdamW(some()),
        [DECAY],
        "lr",
        r"param_groups\[0\].*weight_decay=0.01.*twice",
    ),
    "decays by a tensor": (
        lambda: torch.optim.SGD(some(), lr=0.1, weight_decay=torch.tensor(0.5)),
        [DECAY],
        "none",
        "weight_decay=0.5.*twice",
    ),
    "second group decays": (
        lambda: torch.optim.SGD([{"params": some()}, {"params": some(), "weight_decay": 0.1}], lr=0.1),
        [DECAY],
        "gradient",
        r"param_groups\[1\].*weight_decay=0.1",
    ),
    "wrapper": (lambda: Wrapper(sgd()), [DECAY], "lr", "Wrapper.*attach to the SGD"),
    "no hooks": (lambda: NoHooks(some()), [DECAY], "lr", "NoHooks has no step hooks"),
    "not an optimizer": (lambda: torch.nn.Linear(2, 2), [DECAY], "lr", "Linear"),
    "none": (lambda: None, [DECAY], "lr", "NoneType"),
    "nothing": (list, [DECAY], "lr", "no optimizer"),
    "a number": (sgd, [0.1], "lr", "0.1 is not a decay rule"),
    "a class": (sgd, [WeightDecay], "lr", r"WeightDecay is a class; write WeightDecay\("),
    "another transform": (sgd, [Wrap(torch.optim.SGD)], "lr", "not a decay rule"),
    "no rule": (sgd, [], "lr", "at least one rule"),
    "bad coupling": (sgd, [DECAY], "decoupled", "coupling='decoupled' is not known; use one of"),
    "no lr": (lambda: NoRate(some()), [DECAY], "lr", r"param_groups\[0\] has no 'lr'.*coupling='none'"),
    "lr None": (lambda: NoRate(some(), lr=None), [DECAY], "lr", r"param_groups\[0\] has no 'lr'"),
    "search": (lambda: torch.optim.LBFGS(some()), [DECAY], "gradient", "LBFGS.*target='closure'"),
    "twice": (lambda: [sgd()] * 2, [DECAY], "lr", "listed twice"),
    "shared parameter": (sharing, [DECAY], "lr", "listed twice"),
    "negative": (
        lambda: torch.optim.SGD([{"params": some(), "distwd_weight_decay": -1.0}], lr=0.1),
        [DECAY],
        "lr",
        "-1.0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_by_name_and_changes_nothing(name):
    make, rules, coupling, message = REFUSED[name]
    made = make()
    optimizers = [
        optimizer
        for optimizer in (made if isinstance(made, list) else [made])
        if isinstance(optimizer, torch.optim.Optimizer)
    ]
    before = [[dict(group) for group in optimizer.param_groups] for optimizer in optimizers]
    with pytest.raises(ValueError, match=message):
        attach(made, *rules, coupling=coupling)
    assert [[group.keys() for group in optimizer.param_groups] for optimizer in optimizers] == [
        [group.keys() for group in groups] for groups in before
    ]
    assert not any(
        value for optimizer in optimizers for key, value in vars(optimizer).items() if key.endswith("_hooks")
    )


def test_without_lr_the_other_couplings_work():
    for coupling in ("gradient", "none"):
        params = some()
        optimizer = NoRate(params)
        attach(optimizer, DECAY, coupling=coupling)
        for param in params:
            param.grad = torch.zeros(3)
        optimizer.step()


def test_a_step_without_a_closure_is_refused_where_a_rule_needs_it_and_the_next_is_right():
    params = some(1)
    optimizer = torch.optim.SGD(params, lr=0.1)
    attach(optimizer, WeightDecay(0.5, target="closure"))
    with pytest.raises(ValueError, match=r"call step\(closure\)"):
        optimizer.step()

    def closure():
        params[0].grad = torch.zeros(3)

    optimizer.step(closure)
    assert torch.allclose(params[0].detach(), torch.full((3,), 0.95))


# --- numbers in the groups ----------------------------------------------------------------------------------------------


def decayed(optimizer: torch.optim.Optimizer) -> list[float]:
    """How much of a parameter of ones the next step leaves, by group."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.data.fill_(1.0)
            param.grad = torch.zeros_like(param)
    optimizer.step()
    return [pytest.approx(group["params"][0].detach().mean().item()) for group in optimizer.param_groups]


def test_every_group_has_its_own_decay_read_at_every_step():
    groups = [{"params": some()}, {"params": some(), "distwd_weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    attach(optimizer, WeightDecay(0.1))
    assert decayed(optimizer) == [0.9, 1.0]
    optimizer.param_groups[0]["distwd_weight_decay"] = torch.tensor(0.2)
    optimizer.param_groups[1]["distwd_weight_decay"] = 0.5
    optimizer.param_groups[1]["lr"] = 0.5
    assert decayed(optimizer) == [0.8, 0.75]
    optimizer.add_param_group({"params": some()})
    assert decayed(optimizer) == [0.8, 0.75, 0.9]


def test_an_old_checkpoint_loads_and_each_groups_own_decay_stays():
    old = torch.optim.SGD([{"params": some()}, {"params": some()}], lr=1.0).state_dict()
    optimizer = torch.optim.SGD([{"params": some()}, {"params": some(), "distwd_weight_decay": 0.0}], lr=1.0)
    attach(optimizer, WeightDecay(0.1))
    optimizer.load_state_dict(old)
    assert decayed(optimizer) == [0.9, 1.0]


def test_a_checkpoint_that_brings_the_optimizers_own_decay_back_is_refused():
    """Else the run that had AdamW(weight_decay=0.1) would go on with twice the decay."""
    old = torch.optim.AdamW(some(), weight_decay=0.1).state_dict()
    params = some()
    optimizer = torch.optim.AdamW(params, weight_decay=0)
    attach(optimizer, DirectWeightDecay(0.1))
    optimizer.load_state_dict(old)
    params[0].grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"param_groups\[0\].*weight_decay=0.1"):
        optimizer.step()
    assert (params[0] == 1).all()


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), "much", None])
def test_a_bad_number_in_a_group_is_refused_before_anything_changes(bad):
    optimizer = sgd()
    attach(optimizer, WeightDecay(0.1))
    optimizer.param_groups[0]["distwd_weight_decay"] = bad
    with pytest.raises(ValueError, match="distwd_weight_decay"):
        decayed(optimizer)
    assert all((param == 1).all() for param in optimizer.param_groups[0]["params"])


# --- steps that raise ---------------------------------------------------------------------------------------------------


class Fragile(torch.optim.AdamW):
    """Raises once, when `fails` is set."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            self.fails = False
            raise RuntimeError("out of memory")
        return super().step(closure)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_optimizers", [1, 2])
def test_a_step_that_raises_leaves_the_next_one_right(rule, coupling, fused, set_to_none, num_optimizers):
    params = parameters()
    names = list(params)
    parts = [names] if num_optimizers == 1 else [names[:5], names[5:]]
    optimizers = [Fragile([params[n] for n in part], lr=0.01, weight_decay=0, fused=fused) for part in parts]
    attach(optimizers, *RULES[rule](), coupling=coupling)
    for name, param in params.items():
        param.grad = grads_of(0)[name]
    optimizers[0].fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizers[0].step()
    twins = copy.deepcopy({"params": params, "optimizers": optimizers})
    for param in twins["params"].values():
        param.grad = None
    for optimizer in twins["optimizers"]:
        for group in optimizer.param_groups:
            group.update(weight_decay=0)
    attach(twins["optimizers"], *RULES[rule](), coupling=coupling)
    for each in ({"params": params, "optimizers": optimizers}, twins):
        for optimizer in each["optimizers"]:
            optimizer.zero_grad(set_to_none=set_to_none)
        for n, param in each["params"].items():
            param.grad = grads_of(1)[n] if param.grad is None else param.grad.add_(grads_of(1)[n])
        for optimizer in each["optimizers"]:
            optimizer.step()
    assert (
        differing({n: p.detach() for n, p in params.items()}, {n: p.detach() for n, p in twins["params"].items()}) == []
    )


class Twice(torch.optim.SGD):
    """torch calls the step hooks for this class, and again for the base."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("target", ["update", "grad", "params_direct", "closure"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_subclass_that_calls_its_base_decays_once(coupling, target, with_closure):
    ends = []
    for cls in (torch.optim.SGD, Twice):
        parts = [some(), some()]
        optimizers = [cls(part, lr=0.1, momentum=0.9) for part in parts]
        attach(optimizers, RelativeWeightDecay(0.5, 2, "params", "mad", target), coupling=coupling)

        def closure(parts=parts):
            for part in parts:
                for param in part:
                    param.grad = torch.full((3,), 0.25)

        for _ in range(2):
            closure()
            for optimizer in optimizers:
                optimizer.step(closure if with_closure or target == "closure" else None)
        ends.append(torch.stack([param.detach() for part in parts for param in part]))
    torch.testing.assert_close(*ends)
