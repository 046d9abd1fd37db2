"""Law 10 in one process: what is refused is refused by name, before anything has changed."""

from __future__ import annotations

import pytest
import torch

import distwd


def parameter(value: float = 2.0) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.full((3,), value))
    param.grad = torch.ones(3)
    return param


RULES = {
    "WeightDecay": distwd.WeightDecay,
    "CautiousWeightDecay": distwd.CautiousWeightDecay,
    "RelativeWeightDecay": distwd.RelativeWeightDecay,
    "DirectWeightDecay": distwd.DirectWeightDecay,
}
TARGETED = [name for name in RULES if name != "DirectWeightDecay"]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wrong", [-0.1, NAN, INF, -INF, "0.1", None, torch.ones(2), [0.1], 1j], ids=str)
def test_a_bad_weight_decay_is_refused(rule, wrong):
    with pytest.raises(ValueError, match="weight_decay"):
        RULES[rule](wrong)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wrong", [0, 0.5, 0.999, -2, NAN, INF, "2", None, [2]], ids=str)
def test_a_bad_ord_is_refused(rule, wrong):
    with pytest.raises(ValueError, match="ord"):
        RULES[rule](0.1, wrong)


@pytest.mark.parametrize("rule", TARGETED)
@pytest.mark.parametrize("wrong", ["updates", "params", "", None, 2])
def test_a_bad_target_is_refused(rule, wrong):
    with pytest.raises(ValueError, match="target"):
        RULES[rule](0.1, target=wrong)


@pytest.mark.parametrize("rule", TARGETED)
@pytest.mark.parametrize("target", ["params_difference", "update_difference"])
def test_targets_that_would_grow_are_refused_with_the_reason(rule, target):
    with pytest.raises(ValueError, match=f"{target}(.|\n)*grow"):
        RULES[rule](0.1, target=target)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("norm_input", "gradient"),
        ("norm_input", None),
        ("norm_input", 1),
        ("metric", "median"),
        ("metric", NAN),
        ("metric", None),
        ("metric", True),
        ("scope", "layer"),
        ("scope", None),
        ("cautious", "yes"),
        ("cautious", None),
    ],
)
def test_a_bad_setting_of_a_relative_rule_is_refused(key, wrong):
    with pytest.raises(ValueError, match=key):
        distwd.RelativeWeightDecay(0.1, **{key: wrong})


@pytest.mark.parametrize("wrong", [-1.0, NAN, "fast", None, torch.ones(2)], ids=str)
def test_a_bad_learning_rate_is_refused(wrong):
    with pytest.raises(ValueError, match="lr"):
        distwd.LR(wrong)


GROUP_SETTINGS = [
    ("weight_decay", -0.1),
    ("weight_decay", "much"),
    ("ord", 0.5),
    ("metric", "median"),
    ("norm_input", "loss"),
]


@pytest.mark.parametrize(("key", "wrong"), GROUP_SETTINGS)
def test_a_bad_setting_in_a_group_is_refused_by_its_place(key, wrong):
    groups = [{"params": [parameter()]}, {"params": [parameter()], key: wrong}]
    with pytest.raises(ValueError, match=key):
        distwd.Chain(groups, distwd.RelativeWeightDecay(0.1), distwd.LR(0.1))


@pytest.mark.parametrize(("key", "wrong"), GROUP_SETTINGS)
def test_a_bad_setting_that_comes_later_changes_nothing(key, wrong):
    param = parameter()
    chain = distwd.Chain([("w", param)], distwd.DirectWeightDecay(0.5), distwd.RelativeWeightDecay(0.1), distwd.LR(0.1))
    place = key if key not in ("weight_decay", "ord") else f"{key}_1"
    assert place in chain.param_groups[0]
    chain.param_groups[0][place] = wrong
    with pytest.raises(ValueError, match=key):
        chain.step()
    assert torch.equal(param, torch.full((3,), 2.0))


def refused_params() -> dict[str, list]:
    sparse = torch.eye(3).to_sparse()
    return {
        "sparse": [("w", sparse.requires_grad_())],
        "complex": [("w", torch.ones(3, dtype=torch.complex64, requires_grad=True))],
        "meta": [("w", torch.ones(3, device="meta", requires_grad=True))],
        "not a tensor": [("w", [1.0, 2.0])],
    }


@pytest.mark.parametrize("kind", refused_params())
def test_parameters_that_cannot_decay_are_refused_by_name(kind):
    good = parameter()
    params = [("good", good), *refused_params()[kind]]
    with pytest.raises((ValueError, TypeError), match=r"w\b|Tensor") as refusal:
        distwd.Chain(params, distwd.RelativeWeightDecay(0.1), distwd.LR(0.1)).step()
    assert kind == "not a tensor" or kind[:3] in str(refusal.value)
    assert torch.equal(good, torch.full((3,), 2.0))


@pytest.mark.parametrize("kind", ["sparse", "complex", "meta", "integer", "bool", "not a tensor"])
def test_decay_weights_refuses_before_it_changes_anything(kind):
    good = parameter()
    # In an optimizer an integer tensor is frozen, and left alone; here it is asked for by name.
    integers = {"integer": [("w", torch.ones(3, dtype=torch.int64))], "bool": [("w", torch.ones(3, dtype=torch.bool))]}
    wrong = (refused_params() | integers)[kind][0][1]
    with pytest.raises((ValueError, TypeError)):
        distwd.decay_weights_([good, wrong], 0.1)
    assert torch.equal(good, torch.full((3,), 2.0))


def test_decay_weights_refuses_bad_settings_before_it_changes_anything():
    for settings, key in (((-0.1,), "weight_decay"), ((0.1, 0.5), "ord"), ((NAN,), "weight_decay")):
        good = parameter()
        with pytest.raises(ValueError, match=key):
            distwd.decay_weights_([good], *settings)
        assert torch.equal(good, torch.full((3,), 2.0))


def test_a_sparse_gradient_is_refused_by_name():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    chain = distwd.Chain(
        embedding.named_parameters(), distwd.Wrap(torch.optim.SGD), distwd.RelativeWeightDecay(), distwd.LR(1.0)
    )
    with pytest.raises(ValueError, match=r"weight(.|\n)*sparse|sparse(.|\n)*weight"):
        chain.step()
    assert torch.equal(embedding.weight, before)


def test_no_parameters_are_refused_as_torch_does():
    with pytest.raises(ValueError, match="empty"):
        distwd.Chain([], distwd.LR(0.1))


@pytest.mark.parametrize("wrong", [None, 0.1, torch.optim.Adam, "Adam"], ids=str)
def test_what_is_no_transform_is_refused(wrong):
    with pytest.raises((ValueError, TypeError), match=r"transform|Wrap"):
        distwd.Chain([parameter()], wrong)


def test_a_parameter_listed_twice_is_refused():
    param = parameter()
    with pytest.raises(ValueError, match=r"more than one|duplicate"):
        distwd.Chain([{"params": [param]}, {"params": [param]}], distwd.LR(0.1))


def test_names_listed_twice_are_refused():
    with pytest.raises(ValueError, match=r"\bw\b"):
        distwd.Chain([("w", parameter()), ("w", parameter())], distwd.RelativeWeightDecay(), distwd.LR(0.1)).step()


@pytest.mark.parametrize("wrong", ["world", 3, object()], ids=["text", "number", "object"])
def test_a_group_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="group"):
        distwd.Chain([parameter()], distwd.RelativeWeightDecay(), distwd.LR(0.1), group=wrong).step()


def test_a_closure_that_raises_changes_nothing():
    param = parameter()
    chain = distwd.Chain([param], distwd.DirectWeightDecay(0.5), distwd.Adam(), distwd.LR(0.1))

    def closure():
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        chain.step(closure)
    assert torch.equal(param, torch.full((3,), 2.0))
    chain.step()
    assert not torch.equal(param, torch.full((3,), 2.0))


def test_every_error_of_the_plan_is_a_value_error():
    assert issubclass(distwd.PlanError, ValueError)
