"""Every setting of every rule is a key of the param groups, and each group is decayed by its own."""

from __future__ import annotations

import pytest
import torch

import distwd
from tests.chains import transforms_of
from tests.one_process import GROUPS, assert_close, expected, grouped, parameters, train
from tests.oracle import AdamPart, Decay, LrPart, Oracle
from tests.runs import grads_of
from tests.test_rules import RULES

ADAM, LR = AdamPart(), LrPart(0.01)
SETTINGS = {
    "weight_decay": [0.1, 0.0, 0.5],
    "ord": [1, 2.5, 4],
    "metric": ["mad", "linf", "std"],
    "norm_input": ["update", "grad", "params"],
}
WHOLE_CHAIN = {"cautious": [True, False, True], "scope": ["all", "group", "tensor"]}


def by_name(settings: list[dict]) -> dict[str, dict]:
    return {name: given for names, given in zip(GROUPS, settings, strict=True) for name in names}


@pytest.mark.parametrize("key", [*SETTINGS, "everything"])
def test_every_setting_is_honoured_per_group(key):
    keys = SETTINGS if key == "everything" else [key]
    settings = [{each: SETTINGS[each][index] for each in keys} for index in range(3)]
    parts = [ADAM, Decay(0.1, metric="mad", by_name=by_name(settings)), LR]
    params = parameters()
    chain = distwd.Chain(grouped(params, settings), *transforms_of(parts))
    assert_close(train(chain, params), expected(parts))


@pytest.mark.parametrize("key", WHOLE_CHAIN)
def test_no_setting_in_a_group_is_silently_ignored(key):
    """Honoured, or refused by name; a group that sets `scope` must not be decayed by another scope."""
    settings = [{key: value} for value in WHOLE_CHAIN[key]]
    parts = [ADAM, Decay(0.1, metric="mad", by_name=by_name(settings)), LR]
    params = parameters()
    try:
        chain = distwd.Chain(grouped(params, settings), *transforms_of(parts))
    except ValueError as refusal:
        assert key in str(refusal)
        return
    assert_close(train(chain, params), expected(parts))


def test_the_second_rule_of_a_kind_has_keys_of_its_own():
    first = [{"weight_decay": 0.1}, {"weight_decay": 0.2}, {}]
    second = [{"weight_decay": 0.3, "ord": 1}, {}, {"weight_decay": 0.0}]
    settings = [a | {f"{key}_1": value for key, value in b.items()} for a, b in zip(first, second, strict=True)]
    parts = [ADAM, Decay(0.05, by_name=by_name(first)), LR, Decay(0.01, ord=3, by_name=by_name(second))]
    params = parameters()
    chain = distwd.Chain(grouped(params, settings), *transforms_of(parts))
    assert chain.param_groups[2]["weight_decay_1"] == 0.0
    assert chain.param_groups[1]["ord_1"] == 3
    assert_close(train(chain, params), expected(parts))


def test_learning_rates_are_per_group():
    rates = {"lr": [0.1, 0.01, 0.0]}
    settings = [{"lr": rate} for rate in rates["lr"]]
    parts = [ADAM, Decay(0.1, metric="mad"), LrPart(1, {n: s["lr"] for n, s in by_name(settings).items()}), Decay(0.01)]
    params = parameters()
    assert_close(train(distwd.Chain(grouped(params, settings), *transforms_of(parts)), params), expected(parts))


@pytest.mark.parametrize("rule", RULES)
def test_weight_decay_may_be_a_tensor_that_changes(rule):
    given = torch.tensor(0.02, dtype=torch.float64)
    parts = [ADAM, Decay(given, **RULES[rule]), LR]
    params = parameters()
    chain = distwd.Chain(grouped(params), *transforms_of(parts))
    oracle = Oracle(params, [ADAM, Decay(0.02, **RULES[rule]), LR], GROUPS)
    later = Oracle(params, [ADAM, Decay(0.5, **RULES[rule]), LR], GROUPS)
    train(chain, params, 1)
    oracle.step(grads_of(0, torch.float64))
    assert_close({n: p.detach() for n, p in params.items()}, oracle.params)
    for group in chain.param_groups:
        group["weight_decay"].fill_(0.5)
    for name, param in params.items():
        param.grad = grads_of(1, torch.float64)[name]
    later.params, later.memory, later.num_steps = oracle.params, oracle.memory, oracle.num_steps
    later.step(grads_of(1, torch.float64))
    chain.step()
    assert_close({n: p.detach() for n, p in params.items()}, later.params)
