"""Pulls to something else than zero: numbers, the initial parameters, given tensors; with caps and inclusive masks."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import distwd
from distwd import (
    LR,
    Adam,
    CautiousWeightDecay,
    Chain,
    Measure,
    RelativeWeightDecay,
    Rule,
    WeightDecay,
    Wrap,
    attach,
)
from distwd.step import state as states
from distwd.step.state import Anchors
from tests import wire
from tests.chains import transforms_of
from tests.layouts import whole_model
from tests.one_process import assert_close, equal, expected, fp32_parameters, grouped, parameters, train
from tests.oracle import AdamPart, Decay, LrPart, SgdPart
from tests.runs import grads_of

ADAM, SGD_PART, LR_PART = AdamPart(), SgdPart(0.9), LrPart(0.01)
SGD = Wrap(torch.optim.SGD)


def param(values: list[float], grad: list[float] | None, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    made = nn.Parameter(torch.tensor(values, dtype=dtype))
    made.grad = None if grad is None else torch.tensor(grad, dtype=dtype)
    return made


def after(
    rule: WeightDecay, values: list[float], grad: list[float], way: str = "chain", lr: float = 0.1
) -> list[float]:
    """A parameter called w after one step of SGD."""
    w = param(values, grad)
    if way == "chain":
        Chain([("w", w)], SGD, rule, LR(lr)).step()
    elif way == "chain after LR":
        Chain([("w", w)], SGD, LR(lr), rule).step()
    else:
        optimizer = torch.optim.SGD([("w", w)], lr=lr)
        attach(optimizer, rule, coupling=way)
        optimizer.step()
    return w.tolist()


# --- numbers to check by hand -----------------------------------------------------------------------------------------

ANCHOR = {"w": torch.tensor([2.0, -2.0])}
FOUR = ([3.0, -4.0, 2.0, 0.0], [1.0, 2.0, 0.0, -1.0])


@pytest.mark.parametrize("way", ["chain", "lr"])
@pytest.mark.parametrize(
    ("rule", "values", "grad", "result"),
    [
        (WeightDecay(0.5, toward=1.0), [3.0, -4.0], [1.0, 2.0], [2.8, -3.95]),
        (WeightDecay(0.5, toward=ANCHOR), [3.0, -4.0], [1.0, 2.0], [2.85, -4.1]),
        (WeightDecay(0.5, 1, toward=ANCHOR), [3.0, -4.0], [1.0, 2.0], [2.85, -4.15]),
        (WeightDecay(0.5, cap=2.0), [3.0, -1.0], [0.0, 0.0], [2.9, -0.95]),
        (CautiousWeightDecay(0.1), *FOUR, [2.87, -4.2, 2.0, 0.1]),
        (CautiousWeightDecay(0.1, inclusive=True), *FOUR, [2.87, -4.2, 1.98, 0.1]),
        (CautiousWeightDecay(0.1, toward=4.0), [3.0, 5.0, 5.0], [-1.0, 1.0, -1.0], [3.11, 4.89, 5.1]),
    ],
)
def test_by_hand(way, rule, values, grad, result):
    assert after(rule, values, grad, way) == pytest.approx(result, abs=1e-6)


def test_soda_by_hand():
    """ADANA's schedule λ/(1 + t/T) of the pull to the initial parameters, not scaled by the learning rate."""
    rates = [0.5, 0.5 / 1.5]
    found = [after(WeightDecay(rate, toward=ANCHOR), [3.0, -4.0], [1.0, 2.0], "none") for rate in rates]
    assert found == [pytest.approx([2.4, -3.2], abs=1e-6), pytest.approx([2.566667, -3.533333], abs=1e-6)]


# --- against the oracle -----------------------------------------------------------------------------------------------

GIVEN = whole_model(3, torch.float64)
PULLS = {
    "number": {"toward": 0.5},
    "initial": {"toward": "initial"},
    "given": {"toward": GIVEN},
    "capped": {"cap": 0.3},
    "initial, capped": {"toward": "initial", "cap": 0.05},
    "inclusive": {"cautious": True, "inclusive": True},
    "cautious, initial": {"cautious": True, "toward": "initial"},
    "inclusive, given": {"cautious": True, "inclusive": True, "toward": GIVEN},
}
PLACES = {
    "first": lambda decay: [decay, ADAM, LR_PART],
    "middle": lambda decay: [ADAM, decay, LR_PART],
    "last": lambda decay: [ADAM, LR_PART, decay],
    "between optimizers": lambda decay: [SGD_PART, decay, ADAM, LR_PART],
    "behind another": lambda decay: [ADAM, Decay(0.1, 3), decay, LR_PART],
}


@pytest.mark.parametrize("ord", [1, 2, 3, 2.5])
@pytest.mark.parametrize("pull", PULLS)
def test_every_pull_and_ord_at_every_place(pull, ord):
    for parts_of in PLACES.values():
        parts, params = parts_of(Decay(0.3, ord=ord, **PULLS[pull])), parameters()
        assert_close(train(Chain(grouped(params), *transforms_of(parts)), params), expected(parts), 1e-10)


@pytest.mark.parametrize("target", ["grad", "params_direct", "closure"])
@pytest.mark.parametrize("pull", PULLS)
def test_every_pull_and_target(pull, target):
    parts, params = [ADAM, LR_PART, Decay(0.02, target=target, **PULLS[pull])], parameters()
    assert_close(train(Chain(grouped(params), *transforms_of(parts)), params), expected(parts), 1e-10)


def test_every_group_has_a_pull_of_its_own():
    """Keys of the param groups: gains of norms to 1, the embedding to where it began, the rest to 0."""
    settings = [{"toward": "initial"}, {"toward": 1.0, "cap": 0.4}, {"toward": "given"}]
    names = [[name for name, _ in group["params"]] for group in grouped(parameters())]
    values = [{"toward": "initial"}, {"toward": 1.0, "cap": 0.4}, {"toward": GIVEN}]
    parts = [
        ADAM,
        Decay(0.3, by_name={name: value for some, value in zip(names, values, strict=True) for name in some}),
        LR_PART,
    ]
    params = parameters()
    chain = Chain(grouped(params, settings), Adam(), WeightDecay(0.3, toward=GIVEN), LR(0.01))
    assert_close(train(chain, params), expected(parts), 1e-10)
    # Only what has an initial anchor keeps one, and what was given is not saved.
    kept = [name for name, each in params.items() if any("anchor" in key for key in chain.state[each])]
    assert kept == names[0]
    assert "embed" not in repr(chain.state_dict()["param_groups"][2]["toward"])


class Unknown(torch.optim.AdamW):
    """Not one of those that are known to be elementwise: its update is learnt from a copy of the parameters."""


@pytest.mark.parametrize("cls", [torch.optim.AdamW, Unknown])
@pytest.mark.parametrize("coupling", ["lr", "none", "gradient"])
@pytest.mark.parametrize("pull", PULLS)
def test_attached_equals_the_chain_at_that_place(pull, coupling, cls):
    decay = Decay(0.3, ord=1.5, **PULLS[pull])
    parts = {"lr": PLACES["middle"], "none": PLACES["last"], "gradient": PLACES["first"]}[coupling](decay)
    params = parameters()
    optimizer = cls(grouped(params), lr=0.01, weight_decay=0)
    (rule,) = (one for one in transforms_of(parts) if isinstance(one, WeightDecay))
    attach(optimizer, rule, coupling=coupling)
    assert_close(train(optimizer, params), expected(parts), 1e-10)


def test_at_lr_0_only_what_is_not_scaled_acts():
    for way in ("chain", "lr"):
        for rule in (WeightDecay(0.5, toward=1.0), CautiousWeightDecay(0.5, inclusive=True)):
            w = after(rule, [3.0, -4.0], [1.0, 1.0], way, lr=0.0)
            assert w == [3.0, -4.0]
    for lr in (0.0, torch.tensor(0.0)):
        # The update is 0 then, and u·p ≥ 0 everywhere: the same in both ways.
        for way in ("chain after LR", "none"):
            assert after(CautiousWeightDecay(0.5, inclusive=True), [4.0, -4.0], [1.0, 1.0], way, lr) == [2.0, -2.0]
            assert after(CautiousWeightDecay(0.5), [4.0, -4.0], [1.0, 1.0], way, lr) == [4.0, -4.0]


def test_a_decay_of_zero_is_off_bitwise_and_the_anchor_begins_all_the_same():
    w = param([3.0, torch.inf], [1.0, 1.0])
    chain = Chain([w], SGD, WeightDecay(0.0, toward="initial"), LR(0.5))
    chain.step()
    assert w.tolist() == [2.5, torch.inf]
    chain.param_groups[0]["weight_decay"] = 1.0
    w.grad = torch.zeros(2)
    chain.step()
    assert w[0] == 2.5 - 0.5 * (2.5 - 3.0)


# --- when anchors begin -----------------------------------------------------------------------------------------------


def anchor_of(optimizer: torch.optim.Optimizer, of: Tensor) -> tuple[Tensor, float]:
    (key,) = (key for key in optimizer.state[of] if key.endswith("_anchor"))
    return optimizer.state[of][key], optimizer.state[of][f"{key}_begun"].item()


@pytest.mark.parametrize("is_mutant", [False, True])
def test_they_begin_as_the_first_real_step_begins(is_mutant):
    """Weights are loaded after the optimizer is made, and the hidden step of checkpoint code begins nothing."""
    # The mutant leaves the anchor as it was made, before loading.
    mutant = mock.patch.object(Anchors, "_begin_one") if is_mutant else nullcontext()
    w = param([1.0, 1.0], [0.0, 0.0])
    chain = Chain([w], Adam(), WeightDecay(0.1, toward="initial"), LR(0.0))
    assert anchor_of(chain, w)[1] == 0
    chain.step()
    assert anchor_of(chain, w)[1] == 0
    with torch.no_grad():
        w.copy_(torch.tensor([3.0, -4.0]))
    chain.param_groups[0]["lr"], w.grad = 0.1, torch.ones(2)
    with mutant:
        for _ in range(2):
            chain.step()
    assert (anchor_of(chain, w)[0].tolist() == [3.0, -4.0] and anchor_of(chain, w)[1] == 1) != is_mutant


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, Unknown])
def test_attached_they_are_made_when_the_optimizer_begins_its_state(cls):
    """Adam begins a parameter's state only while it is empty; and that may come with its first gradient, later."""
    early, late = param([1.0], [0.0]), param([2.0], None)
    optimizer = cls([("early", early), ("late", late)], lr=0.0, weight_decay=0)
    attachment = attach(optimizer, WeightDecay(0.5, toward="initial"), coupling="none")
    assert not optimizer.state
    optimizer.step()  # the hidden one
    with torch.no_grad():
        early.fill_(3.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    early.grad = torch.ones(1)
    optimizer.step()
    assert anchor_of(optimizer, early)[0].item() == 3.0
    assert early.item() != 3.0
    # Somebody moves it before its first gradient: it began with the others.
    with torch.no_grad():
        late.fill_(5.0)
    late.grad = torch.zeros(1)
    optimizer.step()
    assert anchor_of(optimizer, late) == (torch.tensor([2.0]), 1.0)
    assert late.item() == 5.0 - 0.5 * 3.0
    attachment.remove()
    assert not any("distwd" in key for state in optimizer.state.values() for key in state)


def test_a_group_that_is_added_begins_with_its_own_first_step():
    first, second = param([1.0], [1.0]), param([2.0], [1.0])
    chain = Chain([first], SGD, WeightDecay(0.5, toward="initial"), LR(0.1))
    chain.step()
    chain.add_param_group({"params": [second]})
    with torch.no_grad():
        second.fill_(4.0)
    chain.step()
    assert anchor_of(chain, first)[0].item() == 1.0 and anchor_of(chain, second)[0].item() == 4.0


def test_what_was_frozen_begins_when_it_is_trained():
    first, frozen = param([1.0], [1.0]), param([2.0], None)
    frozen.requires_grad_(False)
    chain = Chain([first, frozen], SGD, WeightDecay(0.5, toward="initial"), LR(0.1))
    chain.step()
    frozen.requires_grad_(True).grad = torch.zeros(1)
    with torch.no_grad():
        frozen.fill_(3.0)
    chain.step()
    assert anchor_of(chain, frozen)[0].item() == 3.0 and frozen.item() == 3.0


def test_a_skipped_step_begins_nothing():
    w = param([3.0], [1.0])
    optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0, fused=True)
    attach(optimizer, WeightDecay(0.5, toward="initial"))
    for skips, value in ((1.0, 3.0), (0.0, 5.0), (0.0, 7.0)):
        with torch.no_grad():
            w.fill_(value)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(skips)
        optimizer.step()
        assert (w.item() == value) == bool(skips)
    assert anchor_of(optimizer, w) == (torch.tensor([5.0]), 1.0)


def test_later_steps_read_nothing():
    params = fp32_parameters()
    chain = Chain(params.items(), Adam(), WeightDecay(0.1, toward="initial"), LR(0.01))
    attached = torch.optim.AdamW(fp32_parameters().values(), lr=0.1, weight_decay=0)
    attach(attached, WeightDecay(0.1, toward="initial"))
    for optimizer in (chain, attached):
        for step in range(3):
            for one, grad in zip(optimizer.param_groups[0]["params"], grads_of(step).values(), strict=True):
                one.grad = grad
            with wire.no_host_sync() if step else nullcontext():
                optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9


# --- state dicts, copies ----------------------------------------------------------------------------------------------


def made(way: str, params: dict[str, nn.Parameter], **kwargs) -> torch.optim.Optimizer:
    rules = [WeightDecay(0.3, toward="initial"), CautiousWeightDecay(0.1, toward="initial")]
    if way == "chain":
        return Chain(params.items(), Adam(), *rules, LR(0.01))
    optimizer = torch.optim.AdamW(params.items(), lr=0.01, weight_decay=0)
    attach(optimizer, *rules)
    return optimizer


def run(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, grad in grads_of(step, next(iter(params.values())).dtype).items():
            params[name].grad = grad
        optimizer.step()


def reloaded(optimizer: torch.optim.Optimizer) -> dict:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def params_of(whole: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.detach().clone()) for name, value in whole.items()}


def resumed(way: str, dtype: torch.dtype, mutant) -> tuple[dict, dict]:
    """Two steps and two more; and the same from a checkpoint between."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rounded away")
        straight = params_of(whole_model(7, dtype))
        optimizer = made(way, straight)
        run(optimizer, straight, range(2))
        state, params = reloaded(optimizer), params_of(straight)
        run(optimizer, straight, range(2, 4))
        again = made(way, params)
        with mutant:
            again.load_state_dict(state)
            run(again, params, range(2, 4))
    return straight, params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["chain", "attach"])
def test_loaded_anchors_are_never_taken_anew(way, dtype):
    straight, params = resumed(way, dtype, nullcontext())
    assert equal(params, straight)
    # A mutant: nothing tells that what was loaded has begun.
    straight, params = resumed(way, dtype, mock.patch.object(states, "BEGUN", "nothing"))
    assert not equal(params, straight)


@pytest.mark.parametrize("has_key", [True, False])
def test_a_checkpoint_without_anchors_begins_them_with_one_warning(has_key):
    """Also if its groups say toward=0.0: else the new pull would be gone without a word."""
    params = params_of(whole_model(7))
    plain = Chain(params.items(), Adam(), WeightDecay(0.3), LR(0.01))
    run(plain, params, range(2))
    state = reloaded(plain)
    if not has_key:  # as before there was such a setting
        del state["param_groups"][0]["toward"]
    now = {name: value.detach().clone() for name, value in params.items()}
    chain = Chain(params.items(), Adam(), WeightDecay(0.2, toward="initial"), LR(0.01))
    with pytest.warns(UserWarning, match="no anchors of WeightDecay; they begin anew"):
        chain.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain.load_state_dict(state)
        run(chain, params, range(2, 4))
    assert all(torch.equal(anchor_of(chain, params[name])[0], value) for name, value in now.items())
    assert chain.param_groups[0]["weight_decay"] == 0.3


def test_a_checkpoint_with_anchors_tells_what_is_pulled_to():
    params = params_of(whole_model(7))
    chain = Chain(params.items(), Adam(), WeightDecay(0.3, toward="initial"), LR(0.01))
    run(chain, params, range(2))
    chain.param_groups[0]["toward"] = 0.0
    other = Chain(params.items(), Adam(), WeightDecay(0.3, toward="initial"), LR(0.01))
    other.load_state_dict(reloaded(chain))
    assert other.param_groups[0]["toward"] == 0.0
    # One that pulled to given tensors needs them again.
    given = Chain(params.items(), Adam(), WeightDecay(0.3, toward=params_of(whole_model(3))), LR(0.01))
    run(given, params, range(1))
    other.load_state_dict(reloaded(given))
    with pytest.raises(ValueError, match="toward='given' needs the tensors"):
        other.step()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_go_on_alike(copied, when):
    params = fp32_parameters()
    chain = made("chain", params)
    run(chain, params, range(2 * (when == "after")))
    others, twin = copied((params, chain))
    run(chain, params, range(2, 4))
    run(twin, others, range(2, 4))
    assert equal(params, others)


def test_given_tensors_are_used_as_they_are_and_not_saved():
    w = param([1.0, 2.0], [0.0, 0.0])
    anchor = torch.tensor([5.0, 6.0], dtype=torch.float64)
    chain = Chain([("w", w)], SGD, WeightDecay(0.5, toward={"w": anchor, "another": torch.ones(3)}), LR(1.0))
    chain.step()
    assert w.tolist() == [3.0, 4.0]
    with torch.no_grad():
        anchor.fill_(4.0)  # the caller's memory
    chain.step()
    assert w.tolist() == [3.5, 4.0]
    assert not any("distwd" in key for key in chain.state[w])
    assert chain.state_dict()["param_groups"][0]["toward"] == "given"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"toward": "final"}, "toward='final' is not known; use a finite number, 'initial', or a dict"),
        ({"toward": float("nan")}, "toward=nan is not known"),
        ({"toward": True}, "toward=True is not known"),
        ({"toward": torch.tensor(1.0)}, "is not known; use a finite number"),
        ({"toward": "given"}, "needs the tensors: pass WeightDecay"),
        ({"cap": 0.0}, "cap=0.0 is not usable: pass a finite number > 0"),
        ({"cap": -1.0}, "cap=-1.0 is not usable"),
        ({"cap": float("inf")}, "cap=inf is not usable"),
        ({"proximal": 1}, "proximal=1 must be True or False"),
    ],
)
def test_bad_settings_are_refused_in_the_rule_and_in_a_group(settings, words):
    with pytest.raises(ValueError, match=words):
        WeightDecay(0.1, **settings)
    with pytest.raises(ValueError, match=words):
        Chain([{"params": [param([1.0], None)], **settings}], WeightDecay(0.1), LR(0.1))


def test_a_dict_in_a_group_is_refused_since_it_would_be_saved():
    with pytest.raises(ValueError, match="would be saved with it: pass WeightDecay"):
        Chain([{"params": [param([1.0], None)], "toward": {}}], WeightDecay(0.1), LR(0.1))
    with pytest.raises(ValueError, match="inclusive='yes' must be True or False"):
        CautiousWeightDecay(0.1, inclusive="yes")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, r"WeightDecay: toward\['w'\] is missing; give a tensor for every parameter, or toward=0.0"),
        ({"w": torch.ones(3)}, r"toward\['w'\] has shape \(3,\), and the parameter \(2,\)"),
        ({"w": torch.ones(2, dtype=torch.int64)}, r"toward\['w'\] is a torch.int64 tensor; pass a dense tensor"),
        ({"w": 1.0}, r"toward\['w'\] is 'float'; pass a dense tensor"),
        ({"w": torch.ones(2, device="meta")}, r"toward\['w'\] lies on meta, and the parameter on cpu"),
    ],
)
@pytest.mark.parametrize("way", ["chain", "attach"])
def test_given_tensors_that_do_not_fit_are_refused_by_name_before_anything_changes(way, given, words):
    w = param([1.0, 2.0], [1.0, 1.0])
    rule = WeightDecay(0.1, toward=given)
    optimizer = torch.optim.SGD([("w", w)], lr=0.1)
    if way == "chain":
        optimizer = Chain([("w", w)], SGD, rule, LR(0.1))
    else:
        attach(optimizer, rule)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert w.tolist() == [1.0, 2.0]


def test_parameters_without_names_are_told_of():
    chain = Chain([param([1.0], [1.0])], SGD, WeightDecay(0.1, toward={"w": torch.ones(1)}), LR(0.1))
    with pytest.raises(
        ValueError, match=r"is missing; .*parameters without names are called so: pass named_parameters"
    ):
        chain.step()


def test_equal_rules_are_those_with_the_same_tensors():
    optimizer = torch.optim.SGD([("w", param([1.0], None))], lr=0.1)
    attach(optimizer, WeightDecay(0.1, toward=ANCHOR))
    attach(optimizer, WeightDecay(0.1, toward=dict(ANCHOR)))
    attach(optimizer, WeightDecay(0.1, toward="initial"))
    with pytest.raises(ValueError, match="is attached to SGD already"):
        attach(optimizer, WeightDecay(0.1, toward="initial"))


class Leash(Rule):
    """A rule of one's own: the further the whole model has gone, the harder it is pulled back to where it began."""

    def measures(self, settings):
        return {"size": Measure("params", "l2", scope="matrix")}

    def coefficient(self, settings, measured, kept):
        return settings["weight_decay"] * measured["size"]

    def toward(self, settings):
        return "initial"


@pytest.mark.parametrize("way", ["chain", "attach"])
def test_a_rule_of_ones_own_may_pull_to_the_initial_parameters(way):
    params = parameters()
    start = {name: value.detach().clone() for name, value in params.items()}
    if way == "chain":
        optimizer = Chain(params.items(), SGD, Leash(weight_decay=0.1), LR(0.5))
    else:
        optimizer = torch.optim.SGD(params.items(), lr=0.5)
        attach(optimizer, Leash(weight_decay=0.1))
    exact = dict(start)
    for step in range(3):
        for name, grad in grads_of(step, torch.float64).items():
            params[name].grad = grad
            # One number for each expert.
            old = exact[name]
            size = old.flatten(-2).norm(dim=-1)[..., None, None] if old.dim() > 1 else old.norm()
            exact[name] = old - 0.5 * (grad + 0.1 * size * (old - start[name]))
        optimizer.step()
    assert_close({name: value.detach() for name, value in params.items()}, exact, 1e-6)


@pytest.mark.parametrize("rules", [1, 2])
def test_two_optimizers_in_one_attachment(rules):
    """Each parameter's anchor lies with the optimizer that holds it, and begins with the first of the joint steps."""
    first, second = param([1.0, 2.0], [1.0, 1.0]), param([3.0], [1.0])
    optimizers = [torch.optim.SGD([("first", first)], lr=0.1), torch.optim.AdamW([("second", second)], weight_decay=0)]
    # A metric makes them one joint step; absolute rules act for each alone.
    more = [RelativeWeightDecay(0.1, norm_input="params")][: rules - 1]
    attachment = attach(optimizers, WeightDecay(0.5, toward="initial"), *more)
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    assert anchor_of(optimizers[0], first)[0].tolist() == [1.0, 2.0] and anchor_of(optimizers[0], first)[1] == 1
    assert anchor_of(optimizers[1], second) == (torch.tensor([3.0]), 1.0)
    assert first not in optimizers[1].state and second not in optimizers[0].state
    attachment.remove()
    assert not optimizers[0].state


def test_what_is_shown():
    w = param([1.0], [1.0])
    chain = Chain([("w", w)], WeightDecay(0.1), CautiousWeightDecay(0.1, inclusive=True, toward="initial"), LR(0.1))
    assert "WeightDecay(weight_decay=0.1, ord=2)\n" in repr(chain)
    assert "CautiousWeightDecay(weight_decay=0.1, ord=2, inclusive=True, toward='initial')" in repr(chain)
    assert "cautious, toward initial, inclusive, × lr" in str(chain)
    assert distwd.WeightDecay(0.1, cap=2).describe({"weight_decay": 0.1, "toward": 0.0, "cap": 2}) == "cap 2"
