"""attach, in one process: every coupling is the chain with the rules at that place, and `remove` leaves no trace."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

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
from tests.layouts import whole_model
from tests.one_process import GROUPS, grouped, parameters
from tests.runs import differing, grads_of

COUPLINGS = ("gradient", "lr", "none")
METRICS = ("mad", "std", "var", "sum", "rms", "l0", "l1", "l2", "l3", "l4", "linf", 2.5, math.inf, -math.inf)
OTHERS = [metric for metric in METRICS if metric not in ("mad", "l2", "rms", "linf")]
OPTIMIZERS = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adam": (torch.optim.Adam, {})}


def small(metric: object) -> float:
    """A λ that lets the metric move the parameters and not blow them up."""
    return {"sum": 1e-4, "l0": 1e-4, "l1": 1e-4, "var": 1.0, -math.inf: 1e3}.get(metric, 1e-2)


# name: (rules, whether they use the update when they stand behind the optimizer)
RULES = {
    **{f"ord {ord}": ([WeightDecay(0.05, ord)], False) for ord in (1, 1.5, 2, 3)},
    **{f"cautious ord {ord}": ([CautiousWeightDecay(0.05, ord)], True) for ord in (1, 2, 2.5)},
    **{f"{m} of params": ([RelativeWeightDecay(small(m), 2, "params", m)], False) for m in ("mad", "l2", *OTHERS)},
    **{f"{m} of grad": ([RelativeWeightDecay(small(m), 1.5, "grad", m)], False) for m in ("rms", "linf")},
    **{f"{m} of update": ([RelativeWeightDecay(small(m), 2, "update", m)], True) for m in METRICS},
    **{
        f"{of} by {scope}": ([RelativeWeightDecay(0.01, 2, of, "rms", scope=scope)], of == "update")
        for of in ("update", "grad", "params")
        for scope in ("group", "tensor")
    },
    "cautious relative": ([RelativeWeightDecay(0.05, 1, "params", "std", cautious=True)], True),
    "direct": ([DirectWeightDecay(0.02)], False),
    "direct before relative": ([DirectWeightDecay(0.02), RelativeWeightDecay(0.01)], True),
    "relative to params, direct": ([RelativeWeightDecay(0.01, 1, "params", "mad", "params_direct")], False),
    "into the gradient": ([WeightDecay(0.05, 2, "grad")], True),
    "into the gradient, then of it": ([WeightDecay(0.05, 1, "grad"), RelativeWeightDecay(0.01, 2, "grad")], True),
    "two absolute": ([WeightDecay(0.05), WeightDecay(0.01, 1)], False),
    "update twice": ([RelativeWeightDecay(0.05), RelativeWeightDecay(0.01, 1, "update", "l3")], True),
    "absolute, cautious": ([WeightDecay(0.05), CautiousWeightDecay(0.05)], True),
    "cautious, of the update": ([CautiousWeightDecay(0.05), RelativeWeightDecay(0.05)], True),
}


def settings(key: str) -> list[dict]:
    """Groups with an lr and a decay of their own."""
    return [{"lr": 0.05}, {key: 0.02}, {"lr": 0.002, key: 0.0}]


def chain_of(params: dict, coupling: str, rules: list, inner: str):
    cls, kwargs = OPTIMIZERS[inner]
    parts = {"gradient": [*rules, "inner", "lr"], "lr": ["inner", *rules, "lr"], "none": ["inner", "lr", *rules]}[
        coupling
    ]
    made = [Wrap(cls, **kwargs) if part == "inner" else LR(0.01) if part == "lr" else part for part in parts]
    return Chain(grouped(params, settings("weight_decay")), *made)


def optimizer_of(params: dict, name: str, key: str = "distwd_weight_decay") -> torch.optim.Optimizer:
    cls, kwargs = OPTIMIZERS[name]
    return cls(grouped(params, settings(key)), lr=0.01, **kwargs)


def train(optimizer, params: dict, dtype: torch.dtype, num_steps: int = 3) -> tuple[dict, dict]:
    """The parameters at the end, and their gradients after the last step."""
    for step in range(num_steps):
        for name, grad in grads_of(step, dtype).items():
            params[name].grad = None if (step, name) == (1, "up.bias") else grad
        optimizer.step()
    grads = {name: torch.zeros(()) if param.grad is None else param.grad.clone() for name, param in params.items()}
    return {name: param.detach().clone() for name, param in params.items()}, grads


# Rules that would see the decay of another in a chain. Attached behind the optimizer they see what that did, and no more:
# tests/test_foreign_optimizers.py.
SEE_OTHERS = ("update twice", "absolute, cautious", "cautious, of the update")
ADAM_TOO = ("ord 1.5", "cautious ord 2", "mad of update", "rms of grad", "update by tensor", "direct before relative")


@pytest.mark.parametrize(
    ("inner", "rule", "coupling"),
    [
        (inner, rule, coupling)
        for inner, rules in (("sgd", RULES), ("adam", ADAM_TOO))
        for rule in rules
        for coupling in COUPLINGS
        if coupling == "gradient" or rule not in SEE_OTHERS
    ],
)
def test_a_coupling_is_the_chain_with_the_rule_at_that_place(inner, rule, coupling):
    rules, sees_update = RULES[rule]
    # Where the update is computed from what the optimizer did, p − p_old has torch's own rounding: float64, and a bound of the
    # coefficient's, which is rounded to fp32. Everywhere else the bits agree.
    exact = coupling == "gradient" or not sees_update
    dtype = torch.float32 if exact else torch.float64
    ours = parameters(dtype)
    optimizer = optimizer_of(ours, inner)
    attach(optimizer, *rules, coupling=coupling)
    theirs, bare = parameters(dtype), parameters(dtype)
    values, grads = train(optimizer, ours, dtype)
    expected, expected_grads = train(chain_of(theirs, coupling, rules, inner), theirs, dtype)
    if exact:
        assert differing(values, expected) == []
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=lambda text: f"{name}: {text}")
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-6, atol=1e-7)
    if rule != "into the gradient" or coupling == "gradient":
        without, _ = train(optimizer_of(bare, inner), bare, dtype)
        assert max((values[n] - without[n]).abs().max() for n in values) > 1e-4


MODES = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
VARIANTS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "both": {"amsgrad": True, "maximize": True, "betas": (0.8, 0.95), "eps": 1e-6},
    "tensor lr": {"lr": torch.tensor(0.01)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attached_decay_is_adamw_bit_for_bit(variant, mode, dtype):
    if (variant, mode) == ("tensor lr", "foreach"):
        pytest.skip("torch refuses it without capturable, which needs a GPU: tests/test_gpu.py")

    def run(attached: bool) -> dict:
        params = parameters(dtype)
        settings = copy.deepcopy({"lr": 0.01} | MODES[mode] | VARIANTS[variant])
        lrs = [{"lr": settings["lr"] * 3}, {}, {}]
        optimizer = torch.optim.AdamW(grouped(params, lrs), weight_decay=0 if attached else 0.1, **settings)
        if attached:
            attach(optimizer, WeightDecay(0.1))
        scheduler = CosineAnnealingLR(optimizer, 7)
        for step in range(5):
            for name, grad in grads_of(step, dtype).items():
                params[name].grad = grad
            optimizer.step()
            scheduler.step()
        assert all(group["weight_decay"] == (0 if attached else 0.1) for group in optimizer.param_groups)
        return {name: param.detach() for name, param in params.items()}

    assert differing(run(True), run(False)) == []


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("rules", [[WeightDecay(0.1)], [RelativeWeightDecay(0.1)], [DirectWeightDecay(0.1, 1)]])
def test_gradients_are_afterwards_what_they_were(rules, coupling):
    """The same objects with the same numbers, whether one attachment or two."""
    params = parameters()
    optimizer = optimizer_of(params, "adam")
    for more in ([], [CautiousWeightDecay(0.1, 1.5)]):
        attach(optimizer, *(more or rules), coupling=coupling)
        for name, grad in grads_of(0, torch.float64).items():
            params[name].grad = grad
        given = {name: param.grad for name, param in params.items()}
        optimizer.step()
        assert all(param.grad is given[name] for name, param in params.items())
        assert differing(given, grads_of(0, torch.float64)) == []


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_maximize_never_makes_decay_grow(coupling):
    for target in ("update", "grad", "params_direct", "closure"):
        p = torch.nn.Parameter(torch.full((5,), 2.0))
        optimizer = torch.optim.SGD([p], lr=0.1, maximize=True)
        attach(optimizer, WeightDecay(0.1, 2, target), coupling=coupling)

        def closure(p=p):
            p.grad = torch.zeros(5)
            return 0.0

        closure()
        optimizer.step(closure)
        assert (p < 2).all() or (target == "grad" and coupling != "gradient"), target


# --- taking it off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [[WeightDecay(0.1)], [RelativeWeightDecay(0.1), WeightDecay(0.1, 1)]])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_removing_leaves_no_trace(rules, fused, coupling):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer, bare = (torch.optim.AdamW(p.values(), weight_decay=0, fused=fused) for p in (ours, theirs))
    attachment = attach(optimizer, *rules, coupling=coupling)
    train(optimizer, ours, torch.float32, 2)
    train(bare, theirs, torch.float32, 2)
    attachment.remove()
    attachment.remove()
    assert vars(optimizer).keys() == vars(bare).keys()
    hooks = [value for key, value in vars(optimizer).items() if key.endswith("_hooks")]
    assert hooks
    assert not any(hooks)
    without = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    assert without == [{k: v for k, v in group.items() if k != "params"} for group in bare.param_groups]
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, param in ours.items():
        theirs[name].data.copy_(param.data)
    assert differing(train(optimizer, ours, torch.float32)[0], train(bare, theirs, torch.float32)[0]) == []


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64, torch.bfloat16)], ids=len)
def test_two_attachments_on_one_optimizer_add_up_and_come_off_one_by_one(fused, dtypes):
    """Absolute decays of 0.1 and 0.2, which to first order are one of 0.3; and the optimizer's own weight_decay stays 0."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0, fused=fused)
    first, second = attach(optimizer, WeightDecay(1.0)), attach(optimizer, WeightDecay(2.0))
    for remove, strength in ((None, 0.03), (first, 0.02), (second, 0.0)):
        if remove is not None:
            remove.remove()
        for param in params:
            param.data.fill_(1.0)
            param.grad = torch.zeros_like(param)
        optimizer.step()
        for param in params:
            assert param.detach().float() == pytest.approx(torch.full((3,), 1 - strength), abs=4e-3)
        assert optimizer.param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_an_optimizer_is_copied_without_its_attachment_which_can_be_put_on_again(copied):
    params = parameters(torch.float32)
    optimizer = optimizer_of(params, "adam")
    attach(optimizer, RelativeWeightDecay(0.1))
    train(optimizer, params, torch.float32)
    pair = copied({"params": params, "optimizer": optimizer})
    attach(pair["optimizer"], RelativeWeightDecay(0.1))
    straight, _ = train(optimizer, params, torch.float32)
    again, _ = train(pair["optimizer"], pair["params"], torch.float32)
    assert differing(straight, again) == []


# --- an optimizer that is itself a chain ------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("rule", ["ord 2", "cautious ord 2", "mad of update", "rms of grad"])
def test_decay_can_be_attached_to_a_chain(rule, coupling):
    """A chain's own state exists from construction, and nothing of it is in the way."""
    rules, _ = RULES[rule]
    ours, theirs = parameters(), parameters()
    bare = Chain(grouped(ours, [{"lr": 0.05}, {}, {"lr": 0.002}]), Wrap(torch.optim.SGD, momentum=0.9), LR(0.01))
    for group, given in zip(bare.param_groups, settings("distwd_weight_decay"), strict=True):
        group.update(given)
    attach(bare, *rules, coupling=coupling)
    expected, _ = train(chain_of(theirs, coupling, rules, "sgd"), theirs, torch.float64)
    values, _ = train(bare, ours, torch.float64)
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


# --- a learning rate of zero --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("rule", ["ord 2", "cautious ord 2", "mad of update", "l3 of update", "-inf of update"])
def test_at_lr_zero_parameters_stay_and_numbers_are_finite(rule, lr):
    rules, _ = RULES[rule]
    params = parameters(torch.float32)
    moving = [{}, {}, {"lr": 0.01}]
    optimizer = torch.optim.AdamW(grouped(params, moving), lr=lr, weight_decay=0, foreach=False)
    attachment = attach(optimizer, *rules)
    before = parameters(torch.float32)
    after, _ = train(optimizer, params, torch.float32)
    still = [name for names in GROUPS[:2] for name in names]
    assert not set(differing(after, {n: p.detach() for n, p in before.items()})) & set(still)
    assert all(value.isfinite().all() for value in after.values())
    for numbers in attachment.stats().values():
        assert numbers["metric"].isfinite()
    assert differing(after, whole_model(7, scale=0.3)) == GROUPS[2]
