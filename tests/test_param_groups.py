"""param_groups: which parameters decay, in one process."""

from __future__ import annotations

import copy
import fnmatch

import pytest
import torch
from torch import nn

from distwd import LR, Adam, Chain, RelativeWeightDecay, WeightDecay, attach, global_metric
from distwd.groups.param_groups import param_groups
from tests.layouts import NUM_ELEMENTS, SHAPES, Net, whole_model

VECTORS = {name for name, shape in SHAPES.items() if len(shape) < 2}
DECAYED = sum(torch.Size(shape).numel() for shape in SHAPES.values() if len(shape) >= 2)
RULES = [("embed.*", {"weight_decay": 0.0, "lr": 0.25}), (nn.LayerNorm, {"weight_decay": 0.5})]


def net() -> Net:
    torch.manual_seed(0)
    return Net(whole_model(7))


def contents(groups) -> list[tuple[dict, list[str]]]:
    """The groups as (hyperparameters, names)."""
    pairs = [({k: v for k, v in g.items() if k not in ("params", "param_names")}, g["params"]) for g in groups]
    return [(settings, [name for name, _ in params]) for settings, params in pairs]


def decays(groups) -> dict[str, float]:
    return {name: settings["weight_decay"] for settings, names in contents(groups) for name in names}


# --- which parameters -------------------------------------------------------------------------------------------------


def test_vectors_do_not_decay():
    assert decays(param_groups(net(), 0.1)) == {name: 0.0 if name in VECTORS else 0.1 for name in SHAPES}


def test_the_first_rule_that_matches_wins_whatever_kind_it_is():
    rules = [
        ("up.*", {"weight_decay": 0.2}),
        (lambda name, param: name.endswith("bias") and param.shape[0] == 6, {"weight_decay": 0.3}),
        ((nn.LayerNorm, nn.Embedding), {"weight_decay": 0.4}),
        ("*", {"weight_decay": 0.5}),
    ]
    expected = dict.fromkeys(SHAPES, 0.5) | {"up.weight": 0.2, "up.bias": 0.2, "norm.bias": 0.3, "down.bias": 0.3}
    expected |= {"norm.weight": 0.4, "embed.weight": 0.4}
    assert decays(param_groups(net(), 0.1, rules)) == expected
    assert decays(param_groups(net(), 0.1, rules[::-1])) == dict.fromkeys(SHAPES, 0.5)


def test_a_rule_without_weight_decay_leaves_it_to_the_default():
    groups = param_groups(net(), 0.1, [(nn.Linear, {"lr": 0.25})])
    assert decays(groups) == {name: 0.0 if name in VECTORS else 0.1 for name in SHAPES}
    linear = [name for settings, names in contents(groups) if settings.get("lr") == 0.25 for name in names]
    assert sorted(linear) == sorted(name for name in SHAPES if name.split(".")[0] in ("up", "down", "head"))


def test_a_module_type_means_all_that_is_inside():
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 1, 8), nn.Linear(4, 4))
    groups = param_groups(model, 0.1, [(nn.TransformerEncoderLayer, {"weight_decay": 0.3})])
    assert decays(groups) == {
        n: 0.3 if n.startswith("0.") else 0.1 * (n == "1.weight") for n, _ in model.named_parameters()
    }


def test_equal_groups_merge():
    rules = [(name, {"weight_decay": 0.0 if name in VECTORS else 0.1}) for name in SHAPES]
    groups = param_groups(net(), 0.1, rules)
    assert [len(names) for _, names in contents(groups)] == [len(SHAPES) - len(VECTORS), len(VECTORS)]
    # Non-vacuity: rules with other settings are groups of their own.
    apart = [(name, {"weight_decay": index / 8}) for index, name in enumerate(SHAPES)]
    assert len(param_groups(net(), 0.1, apart)) == len(SHAPES)


def test_only_what_trains_is_in_the_groups_and_a_rule_for_the_rest_is_no_mistake():
    model = net()
    model.embed.weight.requires_grad_(False)
    groups = param_groups(model, 0.1, [("embed.*", {"lr": 0.25})])
    assert sorted(decays(groups)) == sorted(set(SHAPES) - {"embed.weight"})
    assert "nothing by rules[0]: 'embed.*'" in str(groups)
    assert "not trained: 1 tensors" in str(groups)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.first = nn.Linear(3, 3)
        self.second = self.first


@pytest.mark.parametrize("pattern", ["embed.*", "head.*"])
def test_a_tied_parameter_comes_once_and_matches_by_all_its_names(pattern):
    groups = param_groups(Tied(), 0.1, [(pattern, {"weight_decay": 0.3}), ("second.*", {"weight_decay": 0.2})])
    assert decays(groups) == {"embed.weight": 0.3, "first.weight": 0.2, "first.bias": 0.2}


def test_parts_of_a_model_make_one_set_of_groups():
    model = net()
    parts = [nn.ModuleDict({name: child}) for name, child in model.named_children()]
    assert contents(param_groups(parts, 0.1, RULES)) == contents(param_groups(model, 0.1, RULES))
    with pytest.raises(ValueError, match=r"two parameters are called '0\.weight'"):
        param_groups([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))], 0.1)


def test_a_tensor_decay_is_each_groups_own():
    rules = [("embed.*", {"lr": 0.25})]
    groups = param_groups(net(), torch.tensor(0.1), rules)
    mine = [group["weight_decay"] for group in groups if isinstance(group["weight_decay"], torch.Tensor)]
    assert len(mine) == 2
    mine[0].fill_(0.7)
    assert mine[1] == torch.tensor(0.1)


# --- optimizers -------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.5),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.5),
    "chain": lambda groups: Chain(groups, WeightDecay(0.9), LR(0.5)),
    "attached": lambda groups: torch.optim.AdamW(groups, lr=0.5),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_decays_by_the_groups(kind):
    """With gradients of 0 a step is p − lr·λ·p."""
    model = net()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = OPTIMIZERS[kind](param_groups(model, 0.125, RULES, attached=kind == "attached"))
    if kind == "attached":
        attach(optimizer, WeightDecay(0.9))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        decay = {"embed": 0.0, "norm": 0.5}.get(name.split(".")[0], 0.0 if name in VECTORS else 0.125)
        lr = 0.25 if name == "embed.weight" else 0.5
        torch.testing.assert_close(param.detach(), before[name] * (1 - lr * decay), rtol=1e-6, atol=0)


# --- the audit and the refusals ---------------------------------------------------------------------------------------


def test_the_audit_shows_what_decays_and_why():
    groups = param_groups(net(), 0.1, RULES)
    audit = groups.audit()
    assert str(groups) == audit
    assert (
        f"{DECAYED + 12 - 66:,} elements; not decayed" in audit
    )  # the norm's 12 by a rule, but not the embedding's 66
    assert str(NUM_ELEMENTS - (DECAYED + 12 - 66)) in audit.split("not decayed")[1]
    rows = {line.split()[2]: line for line in audit.split("\n")[1:-1]}
    assert set(rows) == set(SHAPES)
    assert rows["embed.weight"].split("  ")[-1] == "rules[0]: 'embed.*'"
    assert "lr=0.25" in rows["embed.weight"]
    assert rows["norm.bias"].endswith("rules[1]: LayerNorm")
    assert rows["up.bias"].endswith("default, < 2 dimensions")


def test_the_audit_shows_layers_once():
    layers = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 3) for _ in range(12))})
    rows = [line.split() for line in str(param_groups(layers, 0.1)).split("\n")[1:-1]]
    assert [row[2:6] for row in rows] == [["layers.*.weight", "3×2", "12", "72"], ["layers.*.bias", "3", "12", "36"]]


def test_the_audit_stays_what_it_was_and_copies():
    groups = param_groups(net(), 0.1, RULES)
    before = groups.audit()
    torch.optim.AdamW(groups).param_groups[0]["weight_decay"] = 0.9
    assert groups.audit() == before == copy.deepcopy(groups).audit()


REFUSED = {
    "a pattern that matches nothing": (0.1, [("*.nrom*", {})], r"rules\[0\]: '\*\.nrom\*' matches no parameter"),
    "a type that matches nothing": (0.1, [("*", {}), (nn.Conv2d, {})], r"rules\[1\]: Conv2d matches no parameter"),
    "a predicate that matches nothing": (0.1, [(lambda name, param: False, {})], r"rules\[0\]: <lambda> matches no"),
    "a predicate that raises": (0.1, [(lambda name, param: 1 / 0, {})], r"<lambda> raised ZeroDivisionError for embed"),
    "a negative decay": (-0.1, [], "weight_decay=-0.1 is not usable"),
    "a negative decay in a rule": (0.1, [("*", {"weight_decay": -1.0})], r"weight_decay of rules\[0\]=-1.0"),
    "a rule that is no pair": (0.1, ["*.bias"], r"rules\[0\] must be a pair"),
    "one rule without its list": (0.1, ("*.bias", {}), r"rules\[0\] must be a pair"),
    "a type that is no module": (0.1, [(int, {})], "selects no parameters"),
    "an empty tuple of types": (0.1, [((), {})], "selects no parameters"),
    "parameters in a rule": (0.1, [("*", {"params": []})], "'params', which is no hyperparameter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused(case):
    weight_decay, rules, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        param_groups(net(), weight_decay, rules)


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        param_groups(net().requires_grad_(False), 0.1)
    with pytest.raises(ValueError, match="pass the model, not its parameters"):
        param_groups(list(net().parameters()), 0.1)


def test_globs_are_those_of_fnmatch():
    names = [name for name in SHAPES if fnmatch.fnmatchcase(name, "*n*.[wb]e*")]
    groups = param_groups(net(), 0.1, [("*n*.[wb]e*", {"weight_decay": 0.7})])
    assert names == ["norm.weight", "down.weight"]
    assert [name for name, decay in decays(groups).items() if decay == 0.7] == [n for n in SHAPES if n in names]


def test_a_lazy_module_is_named_with_the_way_out():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    calls = [
        lambda: param_groups(model, 0.1),
        lambda: Chain(model.named_parameters(), Adam(), LR(0.1)),
        lambda: Chain([{"params": list(model.named_parameters())}], Adam(), LR(0.1)),
        lambda: global_metric(model.named_parameters(), "l2"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"0\.weight is of a lazy module.*one forward pass first"):
            call()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    attach(optimizer, RelativeWeightDecay(0.1))  # has all the time until the first step
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    param_groups(model, 0.1)
