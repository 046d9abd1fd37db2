"""Every rule, by every ord, target and place, against the oracle."""

from __future__ import annotations

import copy

import pytest
import torch

import distwd
from tests.chains import transforms_of
from tests.one_process import assert_close, expected, grouped, parameters, train
from tests.oracle import AdamPart, Decay, LrPart, SgdPart, direction
from tests.runs import grads_of

ORDS = [1, 1.5, 2, 2.5, 3, 4]
TARGETS = ["update", "grad", "params_direct", "closure"]
RULES = {
    "absolute": {},
    "cautious": {"cautious": True},
    "relative": {"metric": "mad"},
    "relative_grad": {"metric": "l2", "norm_input": "grad"},
    "relative_params": {"metric": "rms", "norm_input": "params"},
    "relative_cautious": {"metric": "std", "cautious": True},
    "relative_group": {"metric": "l1", "scope": "group"},
    "relative_tensor": {"metric": "linf", "scope": "tensor"},
}
ADAM, LR = AdamPart(), LrPart(0.01)


def places(decay: Decay) -> dict[str, list]:
    return {
        "first": [decay, ADAM, LR],
        "middle": [ADAM, decay, LR],
        "last": [ADAM, LR, decay],
        "between optimizers": [SgdPart(0.9), decay, ADAM, LR],
        "alone": [decay],
    }


@pytest.mark.parametrize("place", places(Decay(0)))
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_target_and_place(rule, target, place):
    parts = places(Decay(0.02, target=target, **RULES[rule]))[place]
    params = parameters()
    chain = distwd.Chain(grouped(params), *transforms_of(parts))
    assert_close(train(chain, params), expected(parts), 1e-6 if rule.startswith("relative") else 1e-10)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", ["absolute", "cautious", "relative"])
def test_every_ord(rule, target, ord):
    parts = [ADAM, LR, Decay(0.02, ord=ord, target=target, **RULES[rule])]
    params = parameters()
    chain = distwd.Chain(grouped(params), *transforms_of(parts))
    assert_close(train(chain, params), expected(parts))


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decay_shrinks_negative_and_positive_alike(ord, dtype):
    values = torch.tensor([-2.0, -0.5, -0.0, 0.0, 0.5, 2.0], dtype=dtype)
    param = values.clone()
    distwd.decay_weights_([param], 0.1, ord)
    assert (param.abs() <= values.abs()).all()
    assert torch.equal(param, -param.flip(0))
    torch.testing.assert_close(param.double(), values.double() - 0.1 * direction(values, ord))


@pytest.mark.parametrize("ord", ORDS)
def test_direct_decay_is_seen_by_what_comes_later(ord):
    parts = [
        Decay(0.3, target="params_direct", ord=ord),
        ADAM,
        Decay(0.1, metric="rms", norm_input="params"),
        LR,
        Decay(0.1, cautious=True),
    ]
    params = parameters()
    assert_close(train(distwd.Chain(params.items(), *transforms_of(parts)), params), expected(parts, groups=[]))


def test_a_term_is_of_the_parameter_as_it_was_at_its_place():
    """The pending decay of the update must not see a direct decay that comes later."""
    parts = [ADAM, Decay(0.5), Decay(0.5, target="params_direct"), LR, Decay(0.5), Decay(0.25, target="params_direct")]
    params = parameters()
    assert_close(train(distwd.Chain(params.items(), *transforms_of(parts)), params), expected(parts, groups=[]))


def test_an_edited_gradient_is_seen_by_later_transforms_only():
    parts = [
        Decay(0.1, metric="l2", norm_input="grad", target="grad"),
        Decay(0.1, metric="l2", norm_input="grad", target="grad"),
        ADAM,
        Decay(0.1, metric="l1", norm_input="grad"),
        Decay(0.5, target="grad"),
        Decay(0.1, metric="l1", norm_input="grad"),
        LR,
    ]
    params = parameters()
    assert_close(train(distwd.Chain(params.items(), *transforms_of(parts)), params), expected(parts, groups=[]))


def test_metrics_of_the_update_see_pending_decay_and_rate():
    parts = [
        ADAM,
        Decay(0.5),
        Decay(0.2, metric="mad"),
        LrPart(0.5),
        Decay(0.3, metric="std", ord=1),
        LR,
        Decay(0.4, metric="l1", cautious=True),
    ]
    params = parameters()
    assert_close(train(distwd.Chain(params.items(), *transforms_of(parts)), params), expected(parts, groups=[]))


def test_the_rate_may_come_before_the_optimizer():
    parts = [LrPart(3.0), Decay(0.1), SgdPart(0.9), LR, Decay(0.1, ord=3), SgdPart(0.5)]
    params = parameters()
    assert_close(train(distwd.Chain(params.items(), *transforms_of(parts)), params), expected(parts, groups=[]))


@pytest.mark.parametrize("nothing", [distwd.WeightDecay(0.0), distwd.RelativeWeightDecay(0.0, norm_input="params")])
def test_zero_weight_decay_changes_no_bit(nothing):
    plain, params = parameters(torch.float32), parameters(torch.float32)
    chains = [
        distwd.Chain(plain.values(), distwd.Adam(), distwd.LR(0.01)),
        distwd.Chain(params.values(), distwd.Adam(), nothing, distwd.LR(0.01)),
    ]
    for name in plain:
        plain[name].grad = grads_of(0)[name]
        params[name].grad = grads_of(0)[name]
    for chain in chains:
        chain.step()
    assert all(torch.equal(plain[name], params[name]) for name in plain)


# --- cautious ---------------------------------------------------------------------------------------------------------


def test_cautious_decay_is_only_where_update_and_parameter_agree():
    param = torch.nn.Parameter(torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, 0.0]))
    param.grad = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0])
    chain = distwd.Chain([param], distwd.CautiousWeightDecay(0.25))
    before, grad = param.detach().clone(), param.grad.clone()
    chain.step()
    pulled = before - grad - param.detach()
    assert torch.equal(pulled, torch.tensor([0.5, 0.0, 0.0, -0.5, 0.0, 0.0]))


def test_the_mask_does_not_underflow():
    """1e-30 · 1e-30 is zero in fp32, but the signs agree."""
    param = torch.nn.Parameter(torch.tensor([1e-30, -1e-30, 1.0]))
    param.grad = torch.tensor([1e-30, -1e-30, 0.0])
    distwd.Chain([param], distwd.CautiousWeightDecay(0.5)).step()
    assert param[0].item() == pytest.approx(-5e-31, rel=1e-3)
    assert param[1].item() == pytest.approx(5e-31, rel=1e-3)


# --- decay_weights_ ---------------------------------------------------------------------------------------------------


def test_decay_weights_needs_no_optimizer():
    params = parameters()
    before = copy.deepcopy(params)
    distwd.decay_weights_(params.values(), 0.1, ord=3)
    for name in params:
        torch.testing.assert_close(params[name].detach(), before[name] - 0.1 * direction(before[name], 3).detach())


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 4)])
@pytest.mark.parametrize("ord", ORDS)
def test_any_shape_decays(shape, ord):
    param = torch.nn.Parameter(torch.full(shape, -2.0))
    distwd.decay_weights_([param, torch.ones(3)], 0.5, ord)
    torch.testing.assert_close(param.detach(), torch.full(shape, -2.0 + 0.5 * 2.0 ** (ord - 1)))


def test_decay_keeps_the_parameter_and_its_gradient_as_objects():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    storage, grad = param.data_ptr(), param.grad
    distwd.Chain([param], distwd.RelativeWeightDecay(0.5), distwd.LR(0.1)).step()
    assert param.data_ptr() == storage
    assert param.grad is grad
    assert torch.equal(grad, torch.ones(3))


@pytest.mark.parametrize("metric", ["sum", "std", "var"])
def test_groups_whose_lr_is_1_have_the_sign_of_the_others(metric):
    """An optimizer leaves −update behind; groups that LR has scaled are folded, those at lr 1 are not. The metric sees one sign."""
    grads = {"a": torch.tensor([1.0, 2.0, -3.0]), "b": torch.tensor([4.0, -5.0, 6.0, 7.0])}
    lrs = {"a": 1.0, "b": 0.1}
    params = {name: torch.nn.Parameter(torch.ones_like(grad)) for name, grad in grads.items()}
    for name, param in params.items():
        param.grad = grads[name].clone()
    groups = [{"params": [(name, param)], "lr": lrs[name]} for name, param in params.items()]
    transforms = distwd.Wrap(torch.optim.SGD), distwd.LR(0.5), distwd.RelativeWeightDecay(0.1, metric=metric)
    chain = distwd.Chain(groups, *transforms)
    chain.step()
    update = torch.cat([grads[name].double() * lrs[name] for name in grads])
    expected = {"sum": update.sum(), "std": update.std(), "var": update.var()}[metric].item()
    assert chain.stats()["RelativeWeightDecay"]["metric"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "settings", [None, {"foreach": False}, {"foreach": True}], ids=["no optimizer", "single", "foreach"]
)
def test_cautious_decay_behind_a_learning_rate_of_0_decays_nothing(lr, settings):
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    w.grad = torch.tensor([1.0, -1.0])
    inner = [] if settings is None else [distwd.Wrap(torch.optim.SGD, **settings)]
    chain = distwd.Chain([w], *inner, distwd.LR(lr), distwd.CautiousWeightDecay(0.1))
    chain.step()
    assert w.tolist() == [1.0, -2.0]
    chain.param_groups[0]["lr"] = torch.tensor(0.5) if isinstance(lr, torch.Tensor) else 0.5
    chain.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.4, -1.3]))
