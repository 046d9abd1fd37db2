"""Proximal decay: the pull is of the parameter that the step leaves, after everything else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from distwd import (
    LR,
    Adam,
    CautiousWeightDecay,
    Chain,
    RelativeWeightDecay,
    Rule,
    WeightDecay,
    Wrap,
    attach,
    decay_weights_,
)
from distwd.kernels import formulas
from distwd.kernels.apply import apply_
from distwd.kernels.blocks import Workspace
from distwd.kernels.formulas import DecayTerm
from tests.chains import transforms_of
from tests.one_process import assert_close, expected, fp32_parameters, grouped, parameters, train
from tests.oracle import AdamPart, Decay, LrPart, SgdPart
from tests.oracle import proximal as exactly
from tests.runs import grads_of

ADAM, SGD_PART, LR_PART = AdamPart(), SgdPart(0.9), LrPart(0.01)
KINDS = {"ord 2": {}, "ord 1": {"ord": 1}, "capped": {"cap": 0.2}, "ord 3": {"ord": 3}, "ord 1.5": {"ord": 1.5}}


def rule_of(kind: str, weight_decay: float | Tensor = 1.0) -> WeightDecay:
    return WeightDecay(weight_decay, **{"ord": 2, **KINDS[kind]}, proximal=True)


# --- numbers to check by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.1])])
@pytest.mark.parametrize(
    ("kind", "result"),
    [
        ({}, [2.727273, -0.0454545, 0.181818]),
        ({"ord": 1.0}, [2.9, 0.0, 0.1]),
        ({"cap": 1.0}, [2.9, -0.0454545, 0.181818]),
    ],
)
def test_by_hand(kind, result, rate):
    new = [torch.tensor([3.0, -0.05, 0.2])]
    apply_(new, [DecayTerm(rate, proximal=True, **kind)], workspace=Workspace())
    assert new[0].tolist() == pytest.approx(result, abs=1e-6)


@pytest.mark.parametrize("way", ["chain", "lr", "none"])
@pytest.mark.parametrize(
    ("settings", "result"),
    [({}, [2.727273, -0.0454545, 0.181818]), ({"ord": 1}, [2.9, 0, 0.1]), ({"cap": 1.0}, [2.9, -0.0454545, 0.181818])],
)
def test_by_hand_after_a_step(way, settings, result):
    """θ̃ = [3, −.05, .2] is what the optimizer makes of the parameter, and ord 1 leaves an exact zero."""
    w = nn.Parameter(torch.tensor([3.1, -0.15, 0.3]))
    w.grad = torch.tensor([1.0, -1.0, 1.0])
    if way == "chain":
        Chain([w], Wrap(torch.optim.SGD), WeightDecay(1.0, proximal=True, **settings), LR(0.1)).step()
    else:
        optimizer = torch.optim.SGD([w], lr=0.1)
        attach(optimizer, WeightDecay(1.0 if way == "lr" else 0.1, proximal=True, **settings), coupling=way)
        optimizer.step()
    assert w.tolist() == pytest.approx(result, abs=1e-6)
    assert ((w == 0).tolist() == [False, True, False]) == (settings == {"ord": 1})


def test_exact_zeros_come_and_go():
    w = nn.Parameter(torch.tensor([0.5, -0.5]))
    chain = Chain([w], Wrap(torch.optim.SGD), WeightDecay(1.0, ord=1, proximal=True), LR(0.1))
    for _ in range(6):
        w.grad = torch.zeros(2)
        chain.step()
    assert w.tolist() == [0.0, 0.0]
    w.grad = torch.tensor([3.0, 0.5])
    chain.step()
    assert w.tolist() == [pytest.approx(-0.2), 0.0]


# --- against the oracle -----------------------------------------------------------------------------------------------

PLACES = {
    "middle": lambda decay: [ADAM, decay, LR_PART],
    "last": lambda decay: [ADAM, LR_PART, decay],
    "alone": lambda decay: [decay, LR_PART],
    "before a linear one": lambda decay: [SGD_PART, decay, LR_PART, LrPart(0.5)],
    # In the order of the sentence, and behind all others, wherever they stand.
    "before another": lambda decay: [ADAM, decay, Decay(0.1, 3), LR_PART, Decay(0.02, cautious=True)],
    "elastic net": lambda decay: [ADAM, Decay(0.2, 1, proximal=True), decay, LR_PART],
    "between relative ones": lambda decay: [ADAM, Decay(0.1, metric="mad"), decay, Decay(0.1, metric="mad"), LR_PART],
    "before a decay at once": lambda decay: [ADAM, decay, LR_PART, Decay(0.02, target="params_direct")],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_every_place(kind, place):
    decay = Decay(0.5, proximal=True, **KINDS[kind])
    # Where something writes at once, |p|^(ord−2) is of what that leaves, and the oracle's is of the step's beginning.
    if place == "before a decay at once" and kind in ("ord 3", "ord 1.5"):
        return
    parts, params = PLACES[place](decay), parameters()
    chain = Chain(grouped(params), *transforms_of(parts))
    assert_close(train(chain, params), expected(parts), 1e-6 if "relative" in place else 1e-10)


class Unknown(torch.optim.AdamW):
    """Not one of those that are known to be elementwise: its update is learnt from a copy of the parameters."""


@pytest.mark.parametrize("cls", [torch.optim.AdamW, Unknown])
@pytest.mark.parametrize("coupling", ["lr", "none"])
@pytest.mark.parametrize("other", [None, Decay(0.1, cautious=True), Decay(0.1, metric="mad")])
@pytest.mark.parametrize("kind", KINDS)
def test_attached_equals_the_chain_at_that_place(kind, other, coupling, cls):
    """Alone it waits for the optimizer's own step; beside a rule that looks at the update it is part of one write."""
    decays = [Decay(0.5, proximal=True, **KINDS[kind])] + ([] if other is None else [other])
    parts = [ADAM, *decays, LR_PART] if coupling == "lr" else [ADAM, LR_PART, *decays]
    params = parameters()
    optimizer = cls(grouped(params), lr=0.01, weight_decay=0)
    attach(optimizer, *(one for one in transforms_of(parts) if isinstance(one, Rule)), coupling=coupling)
    assert_close(train(optimizer, params), expected(parts), 1e-6)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_ord_2_is_the_optimizers_own_decay_with_a_smaller_lr_and_nothing_of_that_stays(cls):
    """(p − lr·u)/(1 + lr·λ), in the chain and attached alike; also where the step raises."""
    results = []
    for way in ("chain", "attach", "by hand"):
        params = fp32_parameters()
        optimizer = cls(params.items(), lr=0.1, weight_decay=0, foreach=False)
        if way == "chain":
            optimizer = Chain(params.items(), Wrap(cls, foreach=False), rule_of("ord 2"), LR(0.1))
        elif way == "attach":
            attach(optimizer, rule_of("ord 2"))
        for step in range(2):
            for name, grad in grads_of(step).items():
                params[name].grad = grad
            optimizer.step()
            if way == "by hand":
                for param in params.values():
                    param.data /= 1.1
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert optimizer.param_groups[0]["weight_decay"] == (1.0 if way == "chain" else 0)
        results.append({name: param.detach() for name, param in params.items()})
    assert all(torch.equal(one, two) for one, two in zip(results[0].values(), results[1].values(), strict=True))
    assert_close(results[0], results[2], 1e-5)


def test_the_lr_is_put_back_after_a_step_that_raises():
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0, foreach=False)
    attach(optimizer, rule_of("ord 2"))
    optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.1
    assert w.tolist() == [1.0, 1.0]


def test_groups_have_settings_of_their_own():
    settings = [{"proximal": True, "ord": 1}, {}, {"proximal": True, "cap": 0.2}]
    names = [[name for name, _ in group["params"]] for group in grouped(parameters())]
    by_name = {name: own for some, own in zip(names, settings, strict=True) for name in some}
    parts, params = [ADAM, Decay(0.3, by_name=by_name), LR_PART], parameters()
    chain = Chain(grouped(params, settings), Adam(), WeightDecay(0.3), LR(0.01))
    assert_close(train(chain, params), expected(parts), 1e-10)


def test_a_mask_or_a_metric_does_not_see_it():
    """Before or behind it, other rules decay by the same numbers and masks."""
    for other in (CautiousWeightDecay(0.1), RelativeWeightDecay(0.1)):
        seen = []
        for rules in ([rule_of("ord 1"), other], [other, rule_of("ord 1")], [other]):
            params = fp32_parameters()
            chain = Chain(params.items(), Adam(), *rules, LR(0.01))
            for name, grad in grads_of(0).items():
                params[name].grad = grad
            chain.step()
            coefficient = [own["coefficient"].item() for own in chain.stats().values()]
            seen.append((coefficient, [param.tolist() for param in params.values()]))
        assert seen[0] == seen[1] and seen[0][0] == seen[2][0] and seen[0][1] != seen[2][1]


def test_a_mutant_that_shrinks_before_the_update_is_seen(monkeypatch):
    """Prox of the old parameter, and then the update: that is explicit decay of another rate."""
    update = formulas.update_

    def wrong(ops, write, numbers, lists):
        taus, others = numbers.proximal[::2], numbers.proximal[1::2]
        for kind, tau, other in zip(write.proximal, taus, others, strict=True):
            formulas.shrink_(ops, kind, tau, other, lists[0], [])
        update(ops, replace(write, proximal=()), numbers._replace(proximal=()), lists)

    monkeypatch.setattr("distwd.kernels.apply.update_", wrong)
    parts, params = [SGD_PART, Decay(1.0, proximal=True), LR_PART], parameters()
    # Momentum SGD with a tensor for lr, so that the write is ours.
    chain = Chain(grouped(params), Wrap(torch.optim.SGD, momentum=0.9, foreach=True), rule_of("ord 2"), LR(0.01))
    for group in chain.param_groups:
        group["lr"] = torch.tensor(0.01)
    with pytest.raises(AssertionError):
        assert_close(train(chain, params), expected(parts), 1e-6)


# --- off, zeros, precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_lr_0_and_a_decay_of_0_are_off_bitwise(kind):
    """Also at p = 0, where |p|^(ord−2) may be infinite, and for numbers that are tensors."""
    start = [3.0, 0.0, -1e-30, -2.0]
    for lr, decay in ((0.0, 1.0), (torch.tensor(0.0), 1.0), (0.1, 0.0), (0.1, torch.tensor(0.0))):
        for way in ("chain", "attach"):
            w = nn.Parameter(torch.tensor(start))
            w.grad = torch.tensor([1.0, 1.0, 1.0, 1.0]) * (lr == 0)
            if way == "chain":
                optimizer = Chain([w], Wrap(torch.optim.SGD), rule_of(kind, decay), LR(lr))
            else:
                optimizer = torch.optim.SGD([w], lr=lr)
                attach(optimizer, rule_of(kind, decay))
            optimizer.step()
            assert w.tolist() == torch.tensor(start).tolist(), (way, lr, decay)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_leaves_the_parameters(kind, fused):
    params = fp32_parameters()
    before = {name: param.detach().clone() for name, param in params.items()}
    optimizer = torch.optim.AdamW(params.items(), lr=0.1, weight_decay=0, fused=True)
    attach(optimizer, rule_of(kind), *([] if fused else [CautiousWeightDecay(0.1)]))
    for skips in (0.0, 1.0):
        for name, grad in grads_of(0).items():
            params[name].grad = grad
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(skips)
        if skips:
            before = {name: param.detach().clone() for name, param in params.items()}
        optimizer.step()
        assert all(torch.equal(before[name], param) for name, param in params.items()) == bool(skips)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_rounded_once(kind, dtype):
    """Computed in float32 with the update in it: at most half a step from the exact value."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=generator).to(dtype)
    w = nn.Parameter(start.clone())
    w.grad = torch.randn(1000, generator=generator).to(dtype)
    Chain([w], Wrap(torch.optim.SGD), rule_of(kind, 0.5), LR(0.125)).step()
    settings = {"ord": 2, **KINDS[kind]}
    new = start.double() - 0.125 * w.grad.double()
    exact = exactly(new, start.double(), 0.0625, settings["ord"], settings.get("cap"))
    assert torch.equal(w.detach(), exact.float().to(dtype))


def test_nan_is_not_hidden():
    for kind in KINDS:
        w = nn.Parameter(torch.tensor([1.0, torch.nan]))
        w.grad = torch.zeros(2)
        Chain([w], Wrap(torch.optim.SGD), rule_of(kind), LR(0.1)).step()
        assert w.isnan().tolist() == [False, True]


# --- compiled ---------------------------------------------------------------------------------------------------------

COMPILED = {
    "ord 2": [WeightDecay(0.1, proximal=True)],
    "elastic net": [WeightDecay(0.1, ord=1, proximal=True), WeightDecay(0.1, cap=0.3, proximal=True)],
    "anchors": [CautiousWeightDecay(0.1, inclusive=True, toward="initial"), WeightDecay(0.1, toward=1.0, cap=0.5)],
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_formulas_give_the_same_bits(name, monkeypatch):
    monkeypatch.setattr("distwd.kernels.apply.TOGETHER", 2)
    found = []
    for compile in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(n, generator=generator)) for n in (40_000, 70_003, 7)]
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        # An lr that is a tensor leaves the write to us.
        chain = Chain(params, Adam(foreach=True), *COMPILED[name], LR(torch.tensor(1e-2)), compile=compile)
        for _ in range(2):
            chain.step()
        found.append(params)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"toward": 1.0}, "pulls to 0 only, and toward=1.0"),
        ({"toward": "initial"}, "pulls to 0 only, and toward='initial'"),
        ({"cap": 1.0, "ord": 1}, "with a cap is known for ord=2 only, not 1"),
        ({"cap": 1.0, "ord": 3}, "with a cap is known for ord=2 only, not 3"),
        ({"target": "grad"}, "has no target='grad'"),
        ({"target": "params_direct"}, "has no target='params_direct'"),
        ({"ord": 0.5}, "ord=0.5 is not usable"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        WeightDecay(0.1, proximal=True, **settings)


def test_it_is_refused_before_an_optimizer():
    w = nn.Parameter(torch.ones(2))
    words = "it would be part of the gradient of Adam; put it behind the optimizer"
    with pytest.raises(ValueError, match=words):
        Chain([w], rule_of("ord 2"), Adam(), LR(0.1))
    with pytest.raises(ValueError, match=words):
        Chain([{"params": [w], "proximal": True}], WeightDecay(0.1), Adam(), LR(0.1))
    optimizer = torch.optim.AdamW([w], weight_decay=0)
    with pytest.raises(ValueError, match="part of the gradient of the optimizer"):
        attach(optimizer, rule_of("ord 2"), coupling="gradient")
    assert "distwd_weight_decay" not in optimizer.param_groups[0]
    # Others have no such setting.
    with pytest.raises(TypeError):
        CautiousWeightDecay(0.1, proximal=True)
    with pytest.raises(TypeError):
        decay_weights_([w], 0.1, proximal=True)
    chain = Chain([w], Adam(), WeightDecay(0.1), LR(0.1))
    w.grad = torch.ones(2)
    chain.step()
    before = w.detach().clone()
    chain.param_groups[0]["proximal"], chain.param_groups[0]["toward"] = True, 1.0
    with pytest.raises(ValueError, match="pulls to 0 only"):
        chain.step()
    assert torch.equal(w, before)
