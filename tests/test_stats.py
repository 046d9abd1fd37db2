"""What `stats()` shows: one form for the whole run, decided by the rule's scope, and the numbers of the last step."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._pytree import tree_map

import distwd
from distwd import LR, Adam, Chain, Measure, RelativeWeightDecay, Rule, attach

WAYS = ("chain", "attach")


def made(way: str, rule: Rule, settings: list[dict]) -> tuple:
    """What steps, and what has `stats()`: two groups of one parameter, [3, −5] and [1]."""
    params = [torch.nn.Parameter(torch.tensor(values)) for values in ([3.0, -5.0], [1.0])]
    groups = [{"params": [(name, param)]} for name, param in zip("ab", params, strict=True)]
    for param in params:
        param.grad = torch.ones_like(param)
    if way == "chain":
        chain = Chain([group | own for group, own in zip(groups, settings, strict=True)], Adam(), rule, LR(0.1))
        return chain, chain
    ours = [{f"distwd_{key}": value for key, value in own.items()} for own in settings]
    optimizer = torch.optim.AdamW(
        [group | own for group, own in zip(groups, ours, strict=True)], lr=0.1, weight_decay=0
    )
    return optimizer, attach(optimizer, rule)


def form(stats: dict) -> dict:
    """The keys at every depth, with "0-d" in the place of every such tensor."""
    return tree_map(lambda number: "0-d" if number.shape == () else tuple(number.shape), stats)


def values(stats: dict) -> dict:
    return tree_map(lambda number: number.item(), stats)


FORMS = {
    "all": {"metric": "0-d", "coefficient": "0-d", "coefficients": {0: "0-d", 1: "0-d"}},
    "group": {"metric": {0: "0-d", 1: "0-d"}, "coefficient": {0: "0-d", 1: "0-d"}},
    "tensor": {"metric": {"a": "0-d", "b": "0-d"}, "coefficient": {"a": "0-d", "b": "0-d"}},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scope", FORMS)
def test_the_form_is_the_scopes_in_the_whole_run(way, scope):
    """Before the first step, while a warm-up is at 0 for all groups, and when the groups have parted."""
    rule = RelativeWeightDecay(0.5, norm_input="params", scope=scope)
    optimizer, shows = made(way, rule, [{"weight_decay": 0.0}] * 2)
    seen = [shows.stats()]
    assert all(math.isnan(number) for number in torch.utils._pytree.tree_leaves(values(seen[0])))
    key = "weight_decay" if way == "chain" else "distwd_weight_decay"
    for decays in ((0.0, 0.0), (0.5, 0.0), (0.25, 0.5), (0.5, 0.5)):
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group[key] = decay
        optimizer.step()
        seen.append(shows.stats())
    assert [form(stats["RelativeWeightDecay"]) for stats in seen] == [FORMS[scope]] * 5


@pytest.mark.parametrize("way", WAYS)
def test_the_coefficient_is_the_largest_and_every_groups_stands_beside_it(way):
    optimizer, shows = made(way, RelativeWeightDecay(0.5, norm_input="params"), [{"weight_decay": 0.0}, {}])
    optimizer.step()
    assert values(shows.stats()) == {
        "RelativeWeightDecay": {"metric": 3.0, "coefficient": 1.5, "coefficients": {0: 0.0, 1: 1.5}}
    }


def test_the_metric_is_that_of_the_largest_coefficient():
    settings = [{"metric": "linf"}, {"metric": "l1", "weight_decay": 0.25}]
    chain, _ = made("chain", RelativeWeightDecay(0.5, norm_input="params"), settings)
    assert form(chain.stats())["RelativeWeightDecay"] == FORMS["all"]
    chain.step()  # 0.5 · 5 and 0.25 · 9
    expected = {"metric": 5.0, "coefficient": 2.5, "coefficients": {0: 2.5, 1: 2.25}}
    assert values(chain.stats())["RelativeWeightDecay"] == expected


def test_a_number_that_is_not_finite_is_not_hidden_behind_the_largest():
    chain, _ = made("chain", RelativeWeightDecay(0.5, norm_input="params"), [{"metric": "linf"}, {"metric": "l1"}])
    with torch.no_grad():
        chain.param_groups[1]["params"][0].fill_(torch.nan)
    chain.step()
    assert all(
        math.isnan(number)
        for key, number in values(chain.stats())["RelativeWeightDecay"].items()
        if key != "coefficients"
    )


def test_a_group_that_has_come_since_the_last_step_has_no_numbers_yet():
    chain, _ = made("chain", RelativeWeightDecay(0.5, norm_input="params"), [{}, {}])
    chain.step()
    before = values(chain.stats())["RelativeWeightDecay"]
    chain.add_param_group({"params": [("c", torch.nn.Parameter(torch.ones(1)))]})
    assert values(chain.stats())["RelativeWeightDecay"] == before
    chain.step()
    assert set(chain.stats()["RelativeWeightDecay"]["coefficients"]) == {0, 1, 2}


class Own(Rule):
    """Measures one number of everything and one of each tensor or group, and keeps one."""

    def __init__(self, scope: str, **settings) -> None:
        self.by = scope
        super().__init__(weight_decay=0.1, **settings)

    def measures(self, settings):
        return {"size": Measure("params", "l2", scope=self.by)}

    def keeps(self, settings):
        return {"count": 0.0}

    def coefficient(self, settings, measured, kept):
        return settings["weight_decay"] * measured["size"], {"count": kept["count"] + 1}


class Plain(Own):
    def keeps(self, settings):
        return {}

    def coefficient(self, settings, measured, kept):
        return settings["weight_decay"] * measured["size"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scope", FORMS)
@pytest.mark.parametrize("cls", [Own, Plain])
@pytest.mark.parametrize("settings", [[{}, {}], [{}, {"weight_decay": 0.0}]], ids=["equal groups", "a group is off"])
def test_the_keys_of_a_rule_of_ones_own_are_there_before_the_first_step(way, scope, cls, settings):
    optimizer, shows = made(way, cls(scope), settings)
    before = shows.stats()
    optimizer.step()
    assert form(before) == form(shows.stats())
    assert list(before[cls.__name__]) == ["size", "count", "coefficient"][:: 1 if cls is Own else 2]
    assert all(math.isnan(number) for number in torch.utils._pytree.tree_leaves(values(before)))


def test_an_absolute_rule_shows_nothing():
    chain, _ = made("chain", distwd.WeightDecay(0.1), [{}, {}])
    assert chain.stats() == {}
    chain.step()
    assert chain.stats() == {}
