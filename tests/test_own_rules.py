"""Rules of one's own in one process: their numbers against an oracle, what they keep, and what is refused."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import warnings

import pytest
import torch

import distwd
from distwd import LR, Adam, Chain, Measure, Rule, WeightDecay, Wrap, attach
from tests import own_rules, wire
from tests.one_process import GROUPS, equal, fp32_parameters, grouped, parameters
from tests.own_rules import COUPLING, KEPT, PLACES, RULES, AdaptiveWeightDecay, OwnOracle, Radius, kept_of, rule_of
from tests.runs import differing, grads_of

MATRICES = ("embed.weight", "up.weight", "down.weight", "head.weight")


def feed(params: dict, step: int, without: tuple = ()) -> None:
    for name, param in params.items():
        param.grad = None if name in without else grads_of(step, param.dtype)[name]


def train(optimizer, params: dict, steps=range(3)) -> dict:
    for step in steps:
        feed(params, step)
        optimizer.step()
    return {name: param.detach().clone() for name, param in params.items()}


def chain_at(place: str, rule: Rule, params, **adam) -> Chain:
    return Chain(params, *(_transform(one, rule, adam) for one in PLACES[place](rule)))


def _transform(one, rule: Rule, adam: dict):
    return rule if one is rule else LR(one.lr) if hasattr(one, "lr") else Adam(**adam)


# --- against the oracle -----------------------------------------------------------------------------------------------


def oracle_of(rule: str, place: str, steps=range(3), without: dict | None = None) -> tuple[OwnOracle, object]:
    own = own_rules.part(rule)
    oracle = OwnOracle(parameters(), PLACES[place](own), GROUPS)
    for step in steps:
        missing = (without or {}).get(step, ())
        oracle.step({name: grad for name, grad in grads_of(step, torch.float64).items() if name not in missing})
    return oracle, own


def assert_as_oracle(params: dict, optimizer, oracle: OwnOracle, own) -> None:
    for name, param in params.items():
        torch.testing.assert_close(
            param.detach(), oracle.params[name], rtol=1e-6, atol=1e-6, msg=lambda text: f"{name}: {text}"
        )
    expected = oracle.kept_numbers(own)
    for name, numbers in kept_of(optimizer, params).items():
        assert numbers.keys() == KEPT[own.rule]
        assert numbers == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", RULES)
def test_a_chain_equals_the_oracle(rule, place):
    params = parameters()
    chain = chain_at(place, rule_of(rule), grouped(params))
    train(chain, params)
    assert_as_oracle(params, chain, *oracle_of(rule, place))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", RULES)
def test_attached_to_adamw_it_equals_the_oracle(rule, place):
    params = parameters()
    optimizer = torch.optim.AdamW(grouped(params), lr=0.01, weight_decay=0)
    attach(optimizer, rule_of(rule), coupling=COUPLING[place])
    train(optimizer, params)
    assert_as_oracle(params, optimizer, *oracle_of(rule, place))


@pytest.mark.parametrize(
    "settings", [{"target": "grad"}, {"target": "params_direct"}, {"cautious": True, "ord": 1}], ids=str
)
@pytest.mark.parametrize("rule", ["multiplier", "two scopes", "radius of all", "mean of update", "fading", "by update"])
def test_targets_masks_and_orders_are_of_rules_of_ones_own_too(rule, settings):
    cls, weight_decay = type(rule_of(rule)), RULES[rule][1]
    params = parameters()
    chain = chain_at("between", cls(weight_decay=weight_decay, **settings), grouped(params))
    train(chain, params)
    own = own_rules.part(rule, **settings)
    oracle = OwnOracle(parameters(), PLACES["between"](own), GROUPS)
    for step in range(3):
        oracle.step(grads_of(step, torch.float64))
    assert_as_oracle(params, chain, oracle, own)


# The whole second group, and one of many.
LATE = {0: ("up.bias", GROUPS[1][0]), 2: ("up.bias", "norm.weight")}


@pytest.mark.parametrize("way", ["chain", "attach"])
@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_that_comes_late_or_not_in_every_step(rule, way):
    """A parameter's own number rests with it; shared ones move in every step, also where AdamW has begun no state yet."""
    params = parameters()
    if way == "chain":
        optimizer = chain_at("between", rule_of(rule), grouped(params))
    else:
        optimizer = torch.optim.AdamW(grouped(params), lr=0.01, weight_decay=0)
        attach(optimizer, rule_of(rule))
    for step in range(4):
        feed(params, step, LATE.get(step, ()))
        optimizer.step()
    assert_as_oracle(params, optimizer, *oracle_of(rule, "between", range(4), LATE))


# --- other optimizers -------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0}),
    "AdamW, fused": (torch.optim.AdamW, {"weight_decay": 0, "fused": True}),
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Muon": (getattr(torch.optim, "Muon", None), {"weight_decay": 0}),
}


def params_for(optimizer: str) -> dict:
    params = fp32_parameters()
    return {name: params[name] for name in MATRICES} if optimizer == "Muon" else params


def attached(optimizer: str, params: dict, *rules: Rule, coupling: str = "lr"):
    cls, settings = OPTIMIZERS[optimizer]
    made = cls(list(params.items()), lr=1.0 if optimizer == "Muon" else 0.01, **settings)
    return made, attach(made, *rules, coupling=coupling)


@pytest.mark.parametrize("coupling", ["gradient", "lr", "none"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["adaptive", "multiplier", "mean of update", "fading"])
def test_attached_it_does_as_in_a_chain(rule, optimizer, coupling):
    """Muon at lr 1: a chain runs it so."""
    ours, theirs = params_for(optimizer), params_for(optimizer)
    made, attachment = attached(optimizer, ours, rule_of(rule), coupling=coupling)
    cls, settings = OPTIMIZERS[optimizer]
    own, wrapped, lr = rule_of(rule), Wrap(cls, **settings), LR(made.param_groups[0]["lr"])
    parts = {"gradient": [own, wrapped, lr], "lr": [wrapped, own, lr], "none": [wrapped, lr, own]}[coupling]
    chain = Chain(theirs.items(), *parts)
    values, expected = train(made, ours), train(chain, theirs)
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")
    expected = kept_of(chain, theirs)
    for name, numbers in kept_of(made, ours).items():
        assert numbers == pytest.approx(expected[name], rel=1e-5)
    assert attachment.stats().keys() == chain.stats().keys()


@pytest.mark.parametrize("coupling", ["gradient", "lr", "none"])
@pytest.mark.parametrize("rule", ["adaptive", "multiplier", "mean of update", "radius of all"])
def test_optimizers_under_one_attachment_are_as_one(rule, coupling):
    """The same two groups: of one AdamW, and of two. The model's numbers are the same, and what is kept lies where its parameter is."""
    ours, theirs = fp32_parameters(), fp32_parameters()
    halves = [list(itertools.islice(ours.items(), 5)), list(itertools.islice(ours.items(), 5, None))]
    two = [torch.optim.AdamW(half, lr=0.01, weight_decay=0) for half in halves]
    attach(two, rule_of(rule), coupling=coupling)
    groups = [{"params": list(theirs.items())[:5]}, {"params": list(theirs.items())[5:]}]
    one = torch.optim.AdamW(groups, lr=0.01, weight_decay=0)
    attach(one, rule_of(rule), coupling=coupling)
    for step in range(3):
        feed(ours, step)
        for each in two if step != 1 else reversed(two):
            each.step()
        feed(theirs, step)
        one.step()
    expected = kept_of(one, theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
        (own,) = (each for each in two if ours[name] in each.state)
        # An update is learnt from zeros for one, and from a copy of the parameters for two: that is fp32's difference.
        assert kept_of(own, {name: ours[name]})[name] == pytest.approx(expected[name], rel=1e-4)


def test_a_count_is_each_optimizers_own():
    """A rule that measures nothing shares nothing: an optimizer that steps twice has counted twice."""
    params = fp32_parameters()
    halves = [list(itertools.islice(params.items(), 5)), list(itertools.islice(params.items(), 5, None))]
    two = [torch.optim.SGD(half, lr=0.01) for half in halves]
    attach(two, rule_of("fading"))
    feed(params, 0)
    for each in (two[0], two[1], two[0]):
        each.step()
    assert kept_of(two[0], dict(halves[0]))["embed.weight"] == {"distwd_Fading_steps": 2}
    assert kept_of(two[1], dict(halves[1]))["head.bias"] == {"distwd_Fading_steps": 1}


# --- two attachments --------------------------------------------------------------------------------------------------


def count_of(state: dict) -> dict[str, float]:
    return {key: value.item() for key, value in state.items() if key.startswith("distwd_")}


def test_two_attachments_keep_numbers_of_their_own():
    params = fp32_parameters()
    optimizer = torch.optim.AdamW(params.items(), lr=0.01, weight_decay=0)
    first = attach(optimizer, rule_of("fading"))
    train(optimizer, params, [0])
    attach(optimizer, rule_of("fading"), coupling="none")
    train(optimizer, params, [1, 2])
    one = params["up.weight"]
    assert sorted(count_of(optimizer.state[one]).values()) == [2, 3]
    first.remove()
    assert list(count_of(optimizer.state[one]).values()) == [2], "what the other keeps stays"
    attach(optimizer, rule_of("fading"))
    train(optimizer, params, [3])
    assert sorted(count_of(optimizer.state[one]).values()) == [1, 3], "a third takes no keys that are in use"


def test_an_attachment_to_several_keeps_apart_from_one_on_the_second():
    params = fp32_parameters()
    halves = [list(itertools.islice(params.items(), 5)), list(itertools.islice(params.items(), 5, None))]
    two = [torch.optim.SGD(half, lr=0.01) for half in halves]
    attach(two[1], rule_of("fading"))
    attach(two, rule_of("fading"), coupling="none")  # an equal one would be refused
    feed(params, 0)
    for each in two:
        each.step()
    assert len(count_of(two[1].state[params["head.bias"]])) == 2


# --- two faults that there were ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Muon"])
@pytest.mark.parametrize("coupling", ["lr", "none"])
def test_a_rule_that_measures_the_update_gets_it_and_not_the_gradient(name, coupling):
    params = params_for(name)
    before = {key: param.detach().clone() for key, param in params.items()}
    bare = params_for(name)
    optimizer, attachment = attached(name, params, own_rules.ByUpdate(weight_decay=0.01), coupling=coupling)
    cls, settings = OPTIMIZERS[name]
    alone = cls(list(bare.items()), lr=optimizer.param_groups[0]["lr"], **settings)
    feed(params, 0)
    feed(bare, 0)
    optimizer.step()
    alone.step()
    moved = torch.cat([(before[key] - bare[key].detach()).double().flatten() for key in bare]).norm()
    expected = moved / (alone.param_groups[0]["lr"] if coupling == "lr" else 1)
    torch.testing.assert_close(attachment.stats()["ByUpdate"]["update"], expected.float(), rtol=1e-4, atol=0)


class WhereOn(own_rules.ByUpdate):
    """Measures nothing where λ is 0."""

    def measures(self, settings):
        return super().measures(settings) if settings["weight_decay"] else {}

    def coefficient(self, settings, measured, kept):
        return super().coefficient(settings, measured, kept) if measured else 0.0


def test_a_group_that_switches_a_rule_on_gets_the_update_too():
    params = fp32_parameters()
    optimizer = torch.optim.AdamW(params.items(), lr=0.01, weight_decay=0)
    attachment = attach(optimizer, WhereOn(weight_decay=0.0))
    train(optimizer, params, [0])
    optimizer.param_groups[0]["distwd_weight_decay"] = 0.1
    train(optimizer, params, [1])
    other = fp32_parameters()
    chain = Chain(other.items(), Adam(), WhereOn(weight_decay=0.0), LR(0.01))
    train(chain, other, [0])
    chain.param_groups[0]["weight_decay"] = 0.1
    train(chain, other, [1])
    torch.testing.assert_close(attachment.stats()["WhereOn"]["update"], chain.stats()["WhereOn"]["update"])


@pytest.mark.parametrize("factor", [0.5, 0.0, 1.0])
@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("way", ["chain", "attach"])
def test_a_scaled_coefficient_is_never_handed_over_at_its_old_strength(way, settings, factor):
    """The same as λ·factor, which AdamW may do in its own kernel; that rounds in another way."""

    def run(rule: Rule) -> dict:
        params = fp32_parameters()
        if way == "chain":
            optimizer = Chain(params.items(), Adam(**settings), rule, LR(0.1))
        else:
            optimizer = torch.optim.AdamW(params.items(), lr=0.1, weight_decay=0, **settings)
            attach(optimizer, rule)
        return train(optimizer, params)

    ours, expected, full = run(own_rules.Scaled(0.5, factor)), run(WeightDecay(0.5 * factor)), run(WeightDecay(0.5))
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert (differing(ours, full) == list(ours)) or factor == 1


class Powered(distwd.RelativeWeightDecay):
    """c = λ·M^power: a setting that the base class does not know."""

    def __init__(self, weight_decay, power):
        super().__init__(weight_decay, norm_input="params")
        self.defaults["power"] = power

    def coefficient(self, settings, measured, kept):
        return settings["weight_decay"] * measured["metric"] ** settings["power"]


def test_groups_that_differ_in_a_setting_of_ones_own_share_no_coefficient():
    params = fp32_parameters()
    chain = Chain(grouped(params, [{}, {"power": 2.0}, {"power": 3.0}]), Powered(0.1, 1.0))
    train(chain, params, [0])
    numbers = chain.stats()["Powered"]
    for index, power in enumerate([1, 2, 3]):
        torch.testing.assert_close(numbers["coefficient"][index], 0.1 * numbers["metric"] ** power)


# --- how kept numbers begin, rest and travel --------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [name for name in RULES if KEPT[name]])
def test_a_chain_has_every_number_from_the_start(rule):
    params = fp32_parameters()
    chain = Chain(params.items(), Adam(), rule_of(rule), LR(0.01))
    for param in params.values():
        numbers = {key: value for key, value in chain.state[param].items() if key.startswith("distwd_")}
        assert numbers.keys() == KEPT[rule]
        assert all(value.shape == () and value.dtype == torch.float32 for value in numbers.values())


def test_a_group_that_is_added_begins_its_numbers_as_its_first_step_begins():
    for way in ("chain", "attach"):
        params = fp32_parameters()
        first, second = dict(itertools.islice(params.items(), 5)), dict(itertools.islice(params.items(), 5, None))
        if way == "chain":
            optimizer = Chain(
                first.items(), Adam(), own_rules.RadiusOfAll(weight_decay=0.1), Radius(weight_decay=0.1), LR(0.01)
            )
        else:
            optimizer = torch.optim.AdamW(first.items(), lr=0.01, weight_decay=0)
            attach(optimizer, own_rules.RadiusOfAll(weight_decay=0.1), Radius(weight_decay=0.1))
        train(optimizer, params, [0])
        before = kept_of(optimizer, first)
        optimizer.add_param_group({"params": list(second.items())})
        norms = {name: param.detach().double().norm().item() for name, param in params.items()}
        train(optimizer, params, [1, 2])
        for name, numbers in kept_of(optimizer, params).items():
            radius, whole = numbers["distwd_Radius_radius"], numbers["distwd_RadiusOfAll_radius"]
            if name in first:
                assert (radius, whole) == (
                    before[name]["distwd_Radius_radius"],
                    before[name]["distwd_RadiusOfAll_radius"],
                )
            else:
                assert radius == pytest.approx(norms[name])
                assert whole == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5)
            assert numbers["distwd_Radius_num_steps"] == (3 if name in first else 2)


def test_a_parameter_that_is_thawed_takes_part():
    """Numbers lie in its state before Adam has begun its own there."""
    params = fp32_parameters()
    params["up.bias"].requires_grad_(False)
    chain = Chain(params.items(), Adam(), rule_of("adaptive"), rule_of("multiplier"), LR(0.01))
    for step in range(3):
        feed(params, step, ("up.bias",))
        chain.step()
        params["up.bias"].requires_grad_(True)
    before = params["up.bias"].detach().clone()
    train(chain, params, [3])
    assert not torch.equal(before, params["up.bias"])
    numbers = kept_of(chain, params)
    assert (
        numbers["up.bias"]["distwd_AdaptiveWeightDecay_mean"] == numbers["up.weight"]["distwd_AdaptiveWeightDecay_mean"]
    )


@pytest.mark.parametrize("way", ["loaded", "attached"])
def test_a_shared_number_goes_on_while_the_first_parameter_is_frozen(way):
    """A load parts the tensors that parameters share, and so does a host that begins their states one by one."""

    def make():
        if way == "loaded":
            return Chain(params.items(), Adam(), rule_of("adaptive"), LR(0.01))
        optimizer = torch.optim.AdamW(params.items(), lr=0.01, weight_decay=0)
        attach(optimizer, rule_of("adaptive"))
        return optimizer

    params = fp32_parameters()
    first, second, *_ = params
    optimizer = make()
    feed(params, 0, (second,))  # attached, the state of the second begins later
    optimizer.step()
    if way == "loaded":
        saved = optimizer.state_dict()
        optimizer = make()
        optimizer.load_state_dict(saved)
    params[first].requires_grad_(False)
    train(optimizer, params, [1, 2])
    params[first].requires_grad_(True)
    key = "distwd_AdaptiveWeightDecay_mean"
    numbers = [own[key] for own in kept_of(optimizer, params).values()]
    assert len(numbers) == len(params) and len(set(map(float, numbers))) == 1


@pytest.mark.parametrize("rule", ["adaptive", "radius of all"])
def test_a_shared_number_is_loaded_for_a_parameter_that_was_frozen_when_it_was_saved(rule):
    """It has none in the checkpoint, and goes on with that of its group; nothing begins anew, so nothing warns."""
    params = fp32_parameters()
    first, *_ = params
    params[first].requires_grad_(False)
    chain = Chain(params.items(), Adam(), rule_of(rule), LR(0.01))
    train(chain, params, [0, 1])
    saved, before = chain.state_dict(), kept_of(chain, params)
    assert first not in before or not before[first]
    params[first].requires_grad_(True)
    chain = Chain(params.items(), Adam(), rule_of(rule), LR(0.01))
    chain.load_state_dict(saved)
    shared = next(numbers for numbers in before.values() if numbers)
    assert set(shared.values()) != {0.0}
    assert kept_of(chain, params) == dict.fromkeys(params, shared)


def test_a_decay_in_the_closure_keeps_one_step_for_all_evaluations():
    params = fp32_parameters()
    rules = [
        own_rules.Multiplier(weight_decay=0.01, target="closure"),
        own_rules.Fading(weight_decay=0.1, target="closure"),
    ]
    # The metric in the step itself is measured after the closure, and must not make the resting parameter move.
    chain = Chain(params.items(), *rules, Adam(), rule_of("by update"), LR(0.01))

    def closure():
        feed(params, 0, ("up.bias",))
        return 0.0

    for _ in range(2):
        chain.step(closure)
    numbers = kept_of(chain, params)
    assert {each["distwd_Fading_steps"] for each in numbers.values()} == {2}
    assert numbers["up.bias"]["distwd_Multiplier_multiplier"] == 1
    assert numbers["up.weight"]["distwd_Multiplier_multiplier"] > 1


CARRIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda chain: pickle.loads(pickle.dumps(chain)),
}


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("rule", ["adaptive", "multiplier", "radius", "fading"])
def test_a_copied_chain_goes_on_bit_for_bit_and_alone(rule, carrier):
    params = fp32_parameters()
    chain = Chain(
        params.items(), Adam(), RULES[rule][0](RULES[rule][1]) if rule != "fading" else rule_of(rule), LR(0.01)
    )
    train(chain, params, [0, 1])
    twin = CARRIERS[carrier](chain)
    theirs = dict(zip(params, twin.param_groups[0]["params"], strict=True))
    kept = kept_of(twin, theirs)
    expected = train(chain, params, [2, 3])
    assert kept_of(twin, theirs) == kept, "the copy has numbers of its own"
    assert equal(train(twin, theirs, [2, 3]), expected)
    assert kept_of(twin, theirs) == kept_of(chain, params)


def make(way: str, params: dict, rules: list[Rule]):
    if way == "chain":
        return Chain(params.items(), Adam(foreach=False), *rules, LR(0.01))
    optimizer = OPTIMIZERS[way][0](list(params.items()), lr=0.01, **OPTIMIZERS[way][1])
    attach(optimizer, *rules)
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["chain", "AdamW", "SGD", "momentum"])
def test_saved_and_loaded_it_goes_on_bit_for_bit(way, dtype):
    """torch casts what it loads to the parameter's dtype; kept numbers keep all bits of their own."""
    names = ["adaptive", "multiplier", "radius", "mean of update", "fading"]
    params = {name: torch.nn.Parameter(param.detach().to(dtype)) for name, param in fp32_parameters().items()}
    optimizer = make(way, params, [rule_of(name) for name in names])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of decay that bf16 rounds away
        train(optimizer, params, [0, 1])
        file = io.BytesIO()
        torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
        kept = kept_of(optimizer, params)
        expected = train(optimizer, params, [2, 3])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = {name: torch.nn.Parameter(value.detach()) for name, value in saved["params"].items()}
    resumed = make(way, other, [rule_of(name) for name in names])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(saved["optimizer"])
    assert kept_of(resumed, other) == kept
    state = resumed.state[other["up.weight"]]
    assert all(value.dtype == torch.float32 for key, value in state.items() if key.startswith("distwd_"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert equal(train(resumed, other, [2, 3]), expected)
    assert kept_of(resumed, other) == kept_of(optimizer, params)


@pytest.mark.parametrize("way", ["chain", "AdamW", "momentum"])
def test_a_checkpoint_without_kept_numbers_loads_with_one_warning(way):
    params = fp32_parameters()
    optimizer = make(way, params, [WeightDecay(0.1)])
    train(optimizer, params, [0, 1])
    saved = optimizer.state_dict()
    other = fp32_parameters()
    resumed = make(way, other, [rule_of("adaptive"), rule_of("radius")])
    with pytest.warns(UserWarning, match="no kept numbers of AdaptiveWeightDecay, Radius; they begin anew") as seen:
        resumed.load_state_dict(saved)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(saved)
    norms = {name: param.detach().double().norm().item() for name, param in other.items()}
    train(resumed, other, [2])
    for name, numbers in kept_of(resumed, other).items():
        assert numbers["distwd_Radius_radius"] == pytest.approx(norms[name])
        assert numbers["distwd_Radius_num_steps"] == 1


@pytest.mark.parametrize("rule", [name for name in RULES if KEPT[name]])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_remove_leaves_no_trace(name, rule):
    ours, theirs = params_for(name), params_for(name)
    optimizer, attachment = attached(name, ours, rule_of(rule))
    cls, settings = OPTIMIZERS[name]
    bare = cls(list(theirs.items()), lr=optimizer.param_groups[0]["lr"], **settings)
    train(optimizer, ours, [0, 1])
    train(bare, theirs, [0, 1])
    attachment.remove()
    assert [list(optimizer.state.get(param, {"none": 0})) for param in ours.values()] == [
        list(bare.state.get(param, {"none": 0})) for param in theirs.values()
    ]
    assert [set(group) for group in optimizer.param_groups] == [set(group) for group in bare.param_groups]


# --- steps that do not count ------------------------------------------------------------------------------------------


def scaled(way: str, fused: bool, rules: list[Rule], infinite: tuple[int, ...], steps: int = 3) -> tuple:
    """Kept numbers and parameters after steps under a GradScaler; of some the gradients are not finite."""
    params = fp32_parameters()
    if way == "chain":
        optimizers = [Chain(params.items(), Adam(fused=fused), *rules, LR(0.01))]
    else:
        halves = [list(itertools.islice(params.items(), 5)), list(itertools.islice(params.items(), 5, None))]
        parts = [list(params.items())] if way == "attach" else halves
        optimizers = [torch.optim.AdamW(half, lr=0.01, weight_decay=0, fused=fused) for half in parts]
        attach(optimizers, *rules)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for step in range(steps):
        grads = grads_of(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(sum((params[name] * grads[name]).sum() for name in params)).backward()
        if step in infinite:
            for name in ("embed.weight", "head.weight"):  # one of each optimizer
                params[name].grad[0, 0] = torch.inf
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update(2.0**10)
    kept: dict[str, dict] = {}
    for each in optimizers:
        kept |= {name: kept_of(each, params)[name] for name in params if params[name] in each.state}
    return kept, {name: param.detach().clone() for name, param in params.items()}


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("way", ["chain", "attach", "attach to two"])
@pytest.mark.parametrize("rule", ["radius of all", "multiplier", "fading", "adaptive", "mean of update"])
def test_a_step_that_a_grad_scaler_skips_moves_nothing(rule, way, fused):
    if way == "attach to two" and (rule == "adaptive" or (rule == "mean of update" and not fused)):
        pytest.skip("refused: a GradScaler may skip one of two")
    # The first step and a later one: numbers that begin as a metric begin with the first that counts.
    kept, params = scaled(way, fused, [rule_of(rule)], infinite=(0, 2))
    params_before = fp32_parameters()
    once, expected = scaled(way, fused, [rule_of(rule)], infinite=(0,), steps=2)
    assert kept == once
    assert differing(params, expected) == []
    assert differing(params, params_before) != []
    if rule == "radius of all":
        whole = torch.cat([param.detach().double().flatten() for param in params_before.values()]).norm().item()
        assert {numbers["distwd_RadiusOfAll_num_steps"] for numbers in kept.values()} == {1}
        assert kept["up.weight"]["distwd_RadiusOfAll_radius"] == pytest.approx(whole)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_a_number_of_scaled_gradients_is_of_the_unscaled_ones(fused):
    kept, _ = scaled("attach", fused, [rule_of("adaptive")], infinite=(), steps=2)
    params = fp32_parameters()
    optimizer, _ = attached("AdamW, fused" if fused else "AdamW", params, rule_of("adaptive"))
    train(optimizer, params, [0, 1])
    assert kept == kept_of(optimizer, params)


# --- what a step costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["chain", "AdamW", "AdamW, fused", "SGD", "momentum"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_reads_nothing_on_the_host(rule, way):
    params = fp32_parameters()
    optimizer = make(way, params, [rule_of(rule)])
    train(optimizer, params, [0])
    for step in (1, 2):
        feed(params, step, ("up.bias",))
        with wire.no_host_sync():
            optimizer.step()


@pytest.mark.parametrize("way", ["chain", "AdamW"])
def test_live_tensors_stay_as_many_as_they_are(way):
    params = fp32_parameters()
    optimizer = make(way, params, [rule_of(name) for name in RULES])

    def live(step: int) -> int:
        feed(params, step % 3, ("up.bias",))  # never begun by AdamW
        optimizer.step()
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    numbers = [live(step) for step in range(6)]
    assert numbers[2:] == numbers[2:3] * 4


# --- errors -----------------------------------------------------------------------------------------------------------


def class_of(name: str, **methods) -> type[Rule]:
    """A rule class with these methods; what is no function is what the method returns."""
    functions = {
        key: value if callable(value) else lambda self, *_, value=value: value for key, value in methods.items()
    }
    return type(name, (Rule,), functions)


def answer(value):
    return lambda self, settings, measured, kept: value


WRONG = {
    "an unknown source": ({"measures": lambda self, settings: {"x": Measure("weights", "l2")}}, r"Wrong\.measures.*'weights'"),
    "an unknown metric": ({"measures": lambda self, settings: {"x": Measure("grad", "l5x")}}, r"Wrong\.measures.*'l5x'"),
    "an unknown scope": ({"measures": lambda self, settings: {"x": Measure("grad", "l2", "row")}}, r"Wrong\.measures.*'row'"),
    "a kept one of an unknown source": ({"keeps": lambda self, settings: {"x": Measure("g", "l2")}}, r"Wrong\.keeps.*'g'"),
    "measures no Measure": ({"measures": {"x": "l2"}}, r"Wrong\.measures.*'x' is 'l2'"),
    "measures no dict": ({"measures": ["l2"]}, r"Wrong\.measures must return a dict"),
    "keeps no dict": ({"keeps": ["mean"]}, r"Wrong\.keeps must return a dict"),
    "keeps no number": ({"keeps": {"x": "0"}}, r"Wrong\.keeps.*'x' begins as '0'"),
    "a name with a dot": ({"keeps": {"a.b": 0.0}}, r"Wrong\.keeps.*'a\.b'"),
    "a name that is none": ({"keeps": {1: 0.0}}, r"Wrong\.keeps: 1 begins"),
    "a name twice": ({"measures": {"x": Measure("grad", "l2")}, "keeps": {"x": 0.0}}, r"Wrong\.keeps.*'x'"),
    "the count's name": ({"keeps": {"num_steps": 0.0}}, r"Wrong\.keeps.*'num_steps'"),
    "a name of stats": ({"measures": {"coefficient": Measure("grad", "l2")}}, r"Wrong\.measures: 'coefficient'"),
    "text": ({"coefficient": answer("x")}, r"Wrong\.coefficient.*'x'"),
    "nothing": ({"coefficient": answer(None)}, r"Wrong\.coefficient.*None"),
    "a pair without keeps": ({"coefficient": answer((1.0, {}))}, r"Wrong\.coefficient"),
    "no pair with keeps": ({"keeps": {"x": 0.0}, "coefficient": answer(1.0)}, r"Wrong\.coefficient must return a pair.*float"),
    "a missing name": ({"keeps": {"x": 0.0, "y": 0.0}, "coefficient": answer((1.0, {"x": 1.0}))}, r"Wrong\.coefficient.*'x', 'y'"),
    "one name more": ({"keeps": {"x": 0.0}, "coefficient": answer((1.0, {"x": 1.0, "y": 1.0}))}, r"Wrong\.coefficient.*'x', 'y'"),
    "another shape": ({"coefficient": answer(torch.ones(3))}, r"Wrong\.coefficient.*shape \(3,\)"),
    "a kept one too long": ({"keeps": {"x": 0.0}, "coefficient": answer((1.0, {"x": torch.ones(3)}))}, r"Wrong\.coefficient.*'x'.*shape"),
}  # fmt: skip


@pytest.mark.parametrize("way", ["chain", "AdamW"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_had_is_refused_at_construction_by_rule_and_method(wrong, way):
    methods, text = WRONG[wrong]
    params = fp32_parameters()
    optimizer = torch.optim.AdamW(params.items(), lr=0.01, weight_decay=0)
    before = copy.deepcopy(optimizer.state_dict())
    rule = class_of("Wrong", **methods)(weight_decay=0.1)
    with pytest.raises(ValueError, match=text):
        _ = Chain(params.items(), Adam(), rule, LR(0.01)) if way == "chain" else attach(optimizer, rule)
    assert optimizer.state_dict() == before
    train(optimizer, params, [0])
    bare = fp32_parameters()
    assert equal(train(torch.optim.AdamW(bare.items(), lr=0.01, weight_decay=0), bare, [0]), params), "no hook is left"


def test_what_only_one_group_asks_for_is_refused_with_the_group():
    bad = class_of(
        "Wrong", coefficient=lambda self, settings, measured, kept: None if settings["weight_decay"] > 1 else 0.1
    )
    params = fp32_parameters()
    with pytest.raises(ValueError, match=r"Wrong\.coefficient"):
        Chain(grouped(params, [{}, {"weight_decay": 2.0}, {}]), bad(weight_decay=0.1))
    chain = Chain(grouped(params)[:1], bad(weight_decay=0.1))
    with pytest.raises(ValueError, match=r"Wrong\.coefficient"):
        chain.add_param_group({**grouped(params)[1], "weight_decay": 2.0})
    assert len(chain.param_groups) == 1
    optimizer = torch.optim.AdamW(
        [{"params": list(params.values()), "distwd_weight_decay": 2.0}], lr=0.1, weight_decay=0
    )
    with pytest.raises(ValueError, match=r"Wrong\.coefficient"):
        attach(optimizer, bad(weight_decay=0.1))


def test_a_rule_needs_a_weight_decay_or_a_coefficient():
    with pytest.raises(ValueError, match="Bare has no weight_decay and no `coefficient`"):
        class_of("Bare")(strength=0.1)
    params = fp32_parameters()
    rule = class_of("Free", coefficient=lambda self, settings, measured, kept: settings["strength"])(strength=0.1)
    before = {name: param.detach().clone() for name, param in params.items()}
    optimizer = torch.optim.SGD(params.items(), lr=0.1)
    attachment = attach(optimizer, rule, coupling="none")
    for param in params.values():
        param.grad = torch.zeros_like(param)
    params["up.bias"].grad = torch.ones_like(params["up.bias"])  # or it would be taken for a hidden step
    optimizer.step()
    torch.testing.assert_close(params["up.weight"].detach(), 0.9 * before["up.weight"])
    assert "Free" in str(attachment)


@pytest.mark.parametrize("name", ["params", "lr", "maximize", "param_names"])
def test_a_setting_cannot_be_called_like_what_optimizers_read(name):
    with pytest.raises(ValueError, match=f"Fading: '{name}' is a key that optimizers read"):
        own_rules.Fading(weight_decay=0.1, **{name: 1.0})


def test_a_setting_of_ones_own_is_a_key_of_the_groups():
    params = fp32_parameters()
    settings = [{"smoothing": 0.0}, {"smoothing": 0.5}, {"smoothing": 1.0}]
    chain = Chain(grouped(params, settings), AdaptiveWeightDecay(0.1))
    train(chain, params, [0])
    first, second, third = (kept_of(chain, params)[names[0]]["distwd_AdaptiveWeightDecay_mean"] for names in GROUPS)
    assert second == pytest.approx(first / 2)
    assert third == 0


# --- mutants ----------------------------------------------------------------------------------------------------------


def test_numbers_that_moved_in_a_skipped_step_would_be_seen(monkeypatch):
    from distwd.step import coefficients

    keep = coefficients.Coefficients.keep

    def moving(self, bound, step, groups):
        step.found_inf = {}
        keep(self, bound, step, groups)

    monkeypatch.setattr(coefficients.Coefficients, "keep", moving)
    kept, _ = scaled("attach", True, [rule_of("fading")], infinite=(1,), steps=2)
    assert kept["up.weight"] != scaled("attach", True, [rule_of("fading")], infinite=(), steps=1)[0]["up.weight"]


def test_numbers_that_moved_without_a_gradient_would_be_seen(monkeypatch):
    from distwd.step import coefficients

    keep = coefficients.Coefficients.keep

    def moving(self, bound, step, groups):
        by_group = self._last.get(bound.label, {})
        for index, known in by_group.items():
            by_group[index] = coefficients.replace(known, has_gradient=None)
        keep(self, bound, step, groups)

    monkeypatch.setattr(coefficients.Coefficients, "keep", moving)
    params = parameters()
    chain = chain_at("between", rule_of("multiplier"), grouped(params))
    for step in range(4):
        feed(params, step, LATE.get(step, ()))
        chain.step()
    oracle, own = oracle_of("multiplier", "between", range(4), LATE)
    with pytest.raises(AssertionError):
        assert_as_oracle(params, chain, oracle, own)
