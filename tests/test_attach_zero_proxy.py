"""Rules that need the update of an elementwise optimizer: it steps zeros in place of the parameters; nothing else may change."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from distwd import LR, CautiousWeightDecay, Chain, RelativeWeightDecay, WeightDecay, Wrap, attach
from tests.one_process import fp32_parameters
from tests.runs import differing, grads_of

OPTIMIZERS = {
    "Adam": {},
    "Adam, amsgrad": {"amsgrad": True},
    "AdamW": {"weight_decay": 0},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"centered": True},
    "NAdam": {},
    "RAdam": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
}
RULES = {
    "relative": lambda: RelativeWeightDecay(0.1),
    "cautious": lambda: CautiousWeightDecay(0.1),
    "by tensor": lambda: RelativeWeightDecay(0.05, 1, "update", "l3", scope="tensor", cautious=True),
    "an extremum": lambda: RelativeWeightDecay(0.01, 3, "update", "linf"),
}


def feed(params: dict, step: int) -> None:
    for name, grad in grads_of(step).items():
        params[name].grad = None if (step, name) == (1, "up.bias") else grad


def train(optimizer, params: dict, steps=range(4)) -> dict:
    for step in steps:
        feed(params, step)
        optimizer.step()
    return {name: param.detach().clone() for name, param in params.items()}


def adamw(params: dict, rule: str = "relative", **kwargs) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(params.items(), lr=0.01, weight_decay=0, **kwargs)
    attach(optimizer, RULES[rule]())
    return optimizer


@pytest.mark.parametrize("coupling", ["lr", "none"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("inner", OPTIMIZERS)
def test_an_optimizer_on_zeros_is_the_chain_bit_for_bit(inner, rule, coupling):
    cls, ours, theirs = getattr(torch.optim, inner.split(",")[0]), fp32_parameters(), fp32_parameters()
    modes = [{"foreach": False}, {"foreach": True}] + [{"fused": True}] * hasattr(cls, "_step_supports_amp_scaling")
    for mode in modes:
        try:
            optimizer = cls(ours.items(), lr=0.01, **OPTIMIZERS[inner], **mode)
        except (RuntimeError, TypeError):
            assert "fused" in mode
            continue
        attachment = attach(optimizer, RULES[rule](), coupling=coupling)
        rest = {"lr": [RULES[rule](), LR(0.01)], "none": [LR(0.01), RULES[rule]()]}[coupling]
        chain = Chain(theirs.items(), Wrap(cls, **OPTIMIZERS[inner], **mode), *rest)
        assert differing(train(optimizer, ours), train(chain, theirs)) == []
        attachment.remove()


def seen_by_optimizer(monkeypatch) -> list[list[torch.Tensor]]:
    """What the groups of torch's AdamW show it, step by step."""
    # On the class itself: once dynamo has been imported, each optimizer class has an `_init_group` of its own.
    seen, init_group = [], torch.optim.AdamW._init_group

    def watched(self, group, *lists):
        seen.append([param.detach().clone() for param in group["params"]])
        return init_group(self, group, *lists)

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", watched)
    return seen


def test_the_optimizer_sees_zeros_and_afterwards_its_own_parameters(monkeypatch):
    params = fp32_parameters()
    optimizer, seen = adamw(params), seen_by_optimizer(monkeypatch)
    given = optimizer.param_groups[0]["params"]
    feed(params, 1)
    grads = {name: param.grad for name, param in params.items()}
    before = {name: param.detach().clone() for name, param in params.items()}
    optimizer.step()
    # One has no gradient, so it needs no zeros.
    assert [shown.shape for shown in seen[0]] == [param.shape for name, param in params.items() if name != "up.bias"]
    assert not any(shown.any() for shown in seen[0])
    assert all(param.grad is grads[name] for name, param in params.items())
    assert differing({name: param.detach() for name, param in params.items()}, before) != []
    assert optimizer.param_groups[0]["params"] is given
    assert list(optimizer.state) == [param for name, param in params.items() if name != "up.bias"]


@pytest.mark.parametrize("of", ["this optimizer", "all optimizers"])
def test_hooks_see_the_real_parameters(of, monkeypatch):
    ours, theirs = fp32_parameters(), fp32_parameters()
    optimizer, found = adamw(ours), []

    def look(stepped, args, kwargs):
        found.append(all(a is b for a, b in zip(stepped.param_groups[0]["params"], ours.values(), strict=True)))

    hook = (
        optimizer.register_step_pre_hook(look)
        if of == "this optimizer"
        else torch_optimizer.register_optimizer_step_pre_hook(look)
    )
    values = train(optimizer, ours)
    hook.remove()
    assert found == [True] * 4
    assert differing(values, train(adamw(theirs), theirs)) == []


def broken(optimizer, monkeypatch) -> None:
    """A step that ends in the optimizer's own error."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "_init_group", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()


@pytest.mark.parametrize("then", ["step", "save", "load", "remove"])
def test_a_step_that_raises_leaves_everything_as_it_was_and_the_next_is_right(then, monkeypatch):
    ours, theirs = fp32_parameters(), fp32_parameters()
    optimizer, other = adamw(ours), adamw(theirs)
    train(optimizer, ours, [0])
    expected = train(other, theirs, [0])
    feed(ours, 1)
    grads = {name: param.grad for name, param in ours.items()}
    broken(optimizer, monkeypatch)
    assert differing({name: param.detach() for name, param in ours.items()}, expected) == []
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], ours.values(), strict=True))
    assert all(param.grad is grads[name] for name, param in ours.items())
    saved = copy.deepcopy(other.state_dict())
    if then == "save":
        state = optimizer.state_dict()["state"]
        assert all(torch.equal(state[index]["exp_avg"], saved["state"][index]["exp_avg"]) for index in saved["state"])
    elif then == "load":
        optimizer.load_state_dict(saved)
    elif then == "remove":
        next(iter(optimizer._optimizer_step_pre_hooks.values())).__self__.remove()
        attach(optimizer, RULES["relative"]())
    assert differing(train(optimizer, ours, [1, 2]), train(other, theirs, [1, 2])) == []


def test_after_a_broken_step_a_scaler_unscales_the_gradients_of_the_next(monkeypatch):
    ours, theirs = fp32_parameters(), fp32_parameters()
    optimizer, other = adamw(ours), adamw(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    feed(ours, 0)
    scaler.scale(torch.tensor(1.0))  # begins lazily
    broken(optimizer, monkeypatch)
    optimizer.zero_grad()
    assert all(param.grad is None for param in ours.values())
    for step in range(3):
        feed(ours, step)
        for param in ours.values():
            if param.grad is not None:
                param.grad.mul_(64.0)
        scaler.step(optimizer)
        scaler.update()
    assert differing({name: param.detach() for name, param in ours.items()}, train(other, theirs, range(3))) == []


def test_gradients_that_a_later_hook_makes_are_the_ones_that_count():
    ours, theirs = fp32_parameters(), fp32_parameters()
    optimizer = adamw(ours)

    def halve(stepped, args, kwargs):
        for param in ours.values():
            param.grad = None if param.grad is None else param.grad / 2

    optimizer.register_step_pre_hook(halve)
    other = torch.optim.AdamW(theirs.items(), lr=0.01, weight_decay=0)
    other.register_step_pre_hook(lambda *_: [p.grad.div_(2) for p in theirs.values() if p.grad is not None] and None)
    attach(other, RULES["relative"]())
    assert differing(train(optimizer, ours), train(other, theirs)) == []


def test_the_zeros_are_freed_when_the_decay_is_removed():
    params = fp32_parameters()
    optimizer = torch.optim.AdamW(params.items(), lr=0.01, weight_decay=0)
    attachment = attach(optimizer, RULES["relative"]())
    train(optimizer, params, [0])
    zeros = weakref.ref(attachment._strategy._zero_proxies._zeros)
    attachment.remove()
    gc.collect()
    assert zeros() is None


@pytest.mark.parametrize("rule", ["relative", "cautious", "by tensor"])
def test_in_one_group_some_may_be_replaced_by_zeros_and_others_copied(rule):
    class Special(torch.nn.Parameter):
        pass

    def params() -> dict:
        values = {name: param.detach() for name, param in fp32_parameters().items()}
        return {name: (Special if "bias" in name else torch.nn.Parameter)(value) for name, value in values.items()}

    ours, theirs = params(), params()
    wrapped = Wrap(torch.optim.AdamW, foreach=False)
    values = train(adamw(ours, rule, foreach=False), ours)
    for name, value in train(Chain(theirs.items(), wrapped, RULES[rule](), LR(0.01)), theirs).items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changed", ["the optimizer", "the closure"])
def test_a_later_hook_that_changes_what_is_stepped_is_an_error(changed):
    params = fp32_parameters()
    optimizer = adamw(params)
    optimizer.register_step_pre_hook(
        lambda stepped, args, kwargs: ((stepped, *args[1:]) if changed == "the optimizer" else args[:1], kwargs)
    )
    feed(params, 0)
    with pytest.raises(ValueError, match=r"a hook before the step of AdamW has changed .*; register such hooks before"):
        optimizer.step()


def test_hooks_that_look_at_the_arguments_find_the_groups():
    params = fp32_parameters()
    optimizer, found = adamw(params), []
    hook = torch_optimizer.register_optimizer_step_post_hook(
        lambda stepped, args, kwargs: found.append(args[0].param_groups is optimizer.param_groups)
    )
    train(optimizer, params, [0, 1])
    hook.remove()
    assert found == [True, True]


def test_nothing_of_the_state_is_kept_alive_between_steps():
    params = fp32_parameters()
    optimizer = adamw(params)
    train(optimizer, params, [0])
    old = [weakref.ref(state["exp_avg"]) for state in optimizer.state.values()]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)


def decay_of(*rules: str) -> torch.Tensor:
    """What attachments of one rule each take off, in all."""
    makers, ends = {**RULES, "absolute": lambda: WeightDecay(0.1), "again": lambda: RelativeWeightDecay(0.11)}, []
    for some in ((), rules):
        params = fp32_parameters()
        optimizer = torch.optim.AdamW(params.items(), lr=0.01, weight_decay=0)
        for rule in some:
            attach(optimizer, makers[rule]())
        ends.append(torch.cat([value.flatten() for value in train(optimizer, params).values()]))
    return ends[0] - ends[1]


@pytest.mark.parametrize("rules", [("relative", "again"), ("absolute", "relative"), ("relative", "absolute")])
def test_two_attachments_do_not_hide_the_update_from_each_other(rules):
    both, one, other = decay_of(*rules), decay_of(rules[0]), decay_of(rules[1])
    # Not equal: from the second step on both decay parameters that the other has decayed.
    assert (both - one - other).norm() < 0.25 * min(one.norm(), other.norm())
