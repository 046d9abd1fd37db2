"""Norm rules in one process: numbers to check by hand, what is off, skipped, zero or not finite, and what is refused."""

from __future__ import annotations

import copy
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
    ConstrainedWeightDecay,
    DirectWeightDecay,
    Hyperball,
    Measure,
    NormControl,
    PlanError,
    RadialBrake,
    Rule,
    WeightDecay,
    Wrap,
    attach,
)

SGD = torch.optim.SGD


def step(*transforms, p=(3.0, -4.0), u=(1.0, 2.0), steps=1) -> Tensor:
    """What becomes of p in a chain without an optimizer."""
    param = nn.Parameter(torch.tensor(p, dtype=torch.float64))
    chain = Chain([param], *transforms)
    for _ in range(steps):
        param.grad = torch.tensor(u, dtype=torch.float64)
        chain.step()
    return param.detach()


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        ([LR(0.1), NormControl(0.1, radius=5.0)], [2.9, -4.2]),
        ([LR(0.1), NormControl(0.1)], [2.9, -4.2]),
        ([LR(0.1), NormControl(0.1, radius=4.0)], [2.84, -4.12]),
        ([LR(0.1), NormControl(0.1, 2.0, radius=5.0)], [3.2, -4.6]),
        ([LR(0.1), NormControl(0.1, 0.0)], [2.6, -3.8]),
        ([Hyperball(5.0), LR(0.1)], [2.6478578639, -4.2413262940]),
        ([Hyperball(), LR(0.1)], [2.6478578639, -4.2413262940]),
        ([RadialBrake(0.5, 1.0), LR(0.1)], [2.8704767927, -4.1572422515]),
        ([RadialBrake(0.0, 0.0), LR(0.1)], [2.9 / 1.0207840, -4.2 / 1.0207840]),
        ([ConstrainedWeightDecay(10.0, rate=0.002), LR(0.0)], [2.97, -3.96]),
        # The decay in front is not braked, the one behind is not rescaled.
        ([WeightDecay(1.0), RadialBrake(0.0, 0.0), LR(0.1)], [2.6 * 4.5 / 4.6043458, -3.8 * 4.5 / 4.6043458]),
        ([Hyperball(), WeightDecay(1.0), LR(0.1)], [2.3478578639, -3.8413262940]),
        ([Hyperball(), LR(0.1), CautiousWeightDecay(0.1)], [2.3478578639, -4.2413262940]),
    ],
)
def test_numbers_that_can_be_checked_by_hand(transforms, expected):
    # A gain is rounded to float32.
    torch.testing.assert_close(step(*transforms), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)


def test_a_scale_is_of_the_update_that_rules_in_front_have_scaled():
    """unit(s·u) is unit(u), so what scales the update in front of a ball changes nothing; a second ball takes the first's place."""
    alone = step(Hyperball(), LR(0.1))
    for front in ([TrustRatio(scope="matrix")], [RadialBrake(0.2)], [Hyperball(2.0)]):
        torch.testing.assert_close(step(*front, Hyperball(), LR(0.1)), alone, rtol=2e-6, atol=0)
    twice = step(LR(0.5), TrustRatio(), TrustRatio(), LR(0.2))
    torch.testing.assert_close(twice, torch.tensor([3 - 0.2 * 5**0.5, -4 - 0.4 * 5**0.5]).double(), rtol=2e-6, atol=0)
    # A mutant gives every rule the bare update.
    bare = distwd.step.norms.StepNorms.update

    def unscaled(self, bound, is_rms):
        self._scale = 1.0
        return bare(self, bound, is_rms)

    with mock.patch("distwd.step.norms.StepNorms.update", unscaled):
        assert (step(Hyperball(2.0), Hyperball(), LR(0.1)) - alone).abs().max() > 1e-2


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_masks_behind_a_learning_rate_of_0_are_the_same_for_norm_rules(lr):
    """The update is 0 there, so an inclusive mask lets all pass, and behind another pull a mask is of that pull alone."""
    bound = ConstrainedWeightDecay(5.0, rate=0.002)
    for ord, after in ((2, [2.7, -3.6]), (1, [2.9, -3.9])):
        after = torch.tensor(after, dtype=torch.float64)
        expected = (1 - 0.004 * (after.square().mean() - 5)) * after
        inclusive = CautiousWeightDecay(0.1, ord, inclusive=True)
        for front in ([], [RadialBrake()]):
            torch.testing.assert_close(step(*front, LR(lr), inclusive, bound), expected, rtol=2e-6, atol=0)
    # 0.1 by the sign, and a tenth of 3 and −4.
    pulls = [LR(lr), WeightDecay(0.1, 1), CautiousWeightDecay(0.1)]
    after = torch.tensor([2.6, -3.5], dtype=torch.float64)
    torch.testing.assert_close(step(*pulls), after, rtol=2e-6, atol=0)
    expected = (1 - 0.004 * (after.square().mean() - 5)) * after
    torch.testing.assert_close(step(*pulls, bound), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(step(RadialBrake(), *pulls), after, rtol=2e-6, atol=0)


def test_groups_may_differ_in_whether_a_pull_in_front_is_proximal():
    """Whichever comes first: a brake sees the pulls of each group."""
    proximal, plain = ({"proximal": kind} for kind in (True, False))
    results = []
    for kinds in ([proximal, plain], [plain, proximal], [plain, plain]):
        params = [nn.Parameter(torch.tensor([3.0, -4.0])) for _ in kinds]
        groups = [{"params": [param], **kind} for param, kind in zip(params, kinds, strict=True)]
        chain = Chain(groups, WeightDecay(0.5), RadialBrake(0.5, 0.5), LR(0.1))
        for param in params:
            param.grad = torch.tensor([1.0, 2.0])
        chain.step()
        results.append([param.detach() for param in params])
    assert torch.equal(results[0][1], results[2][0]) and torch.equal(results[1][0], results[2][0])
    assert torch.equal(results[0][0], results[1][1])


def test_an_update_next_to_nothing_is_no_nan():
    param = nn.Parameter(torch.tensor([3.0, -4.0]))
    chain = Chain([param], Wrap(SGD), Hyperball(), LR(0.1))
    param.grad = torch.tensor([1e-39, 2e-39])
    chain.step()
    torch.testing.assert_close(param.detach().norm(), torch.tensor(5.0))


def test_an_update_of_zeros_leaves_a_ball_as_it_is():
    assert step(Hyperball(), LR(0.1), u=(0.0, 0.0), steps=3).tolist() == [3.0, -4.0]


def params_and_grads(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 3), (7,), (2, 4, 3))]
    return params, [[torch.randn(p.shape, generator=generator).to(dtype) for p in params] for _ in range(4)]


def run(make, grads, params, start=0) -> list[Tensor]:
    for some in grads[start:]:
        for param, grad in zip(params, some, strict=True):
            param.grad = None if grad is None else grad.clone()
        make.step()
    return [param.detach().clone() for param in params]


def trained(*transforms, optimizer=None, **kwargs) -> list[Tensor]:
    params, grads = params_and_grads(**kwargs)
    return run(Chain(params, optimizer or Adam(foreach=True), *transforms), grads, params)


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_later_pull_that_is_rescaled_is_seen():
    write_numbers = distwd.step.norms.NormRules.write_numbers

    def rescaling(batch, factors):
        write_numbers(batch, {10_000 + index: one for index, one in factors.items()})  # as if it stood behind all pulls

    with mock.patch("distwd.step.norms.NormRules.write_numbers", staticmethod(rescaling)):
        found = step(Hyperball(), WeightDecay(1.0), LR(0.1))
    assert (found - torch.tensor([2.3478578639, -3.8413262940]).double()).abs().max() > 1e-3


def test_what_param_groups_excludes_is_left_alone():
    """Biases and norms have no decay; no norm rule acts on them either."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[0].bias.data.zero_()
    for way in ("chain", "attach"):
        groups = distwd.param_groups(model, 0.1)
        if way == "chain":
            optimizer = Chain(groups, Wrap(SGD), Hyperball(), RadialBrake(), ConstrainedWeightDecay(0.01), LR(0.1))
        else:
            optimizer = SGD(groups, lr=0.1)
            attach(optimizer, WeightDecay(0.1), Hyperball(), ConstrainedWeightDecay(0.01), take_over=True)
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        for name, param in model.named_parameters():
            assert torch.equal(param, before[name] - 0.1) == (name != "0.weight"), (way, name)


# --- off, skipped, lr 0 -----------------------------------------------------------------------------------------------

OFF = [Hyperball(None), RadialBrake(1.0, 1.0), ConstrainedWeightDecay("inflection"), NormControl(0.0)]
OFF += [ConstrainedWeightDecay("initial", after=50), ConstrainedWeightDecay(1e9)]


@pytest.mark.parametrize("rule", OFF, ids=repr)
@pytest.mark.parametrize("behind", [[], [CautiousWeightDecay(0.1), WeightDecay(0.1)]], ids=["alone", "with pulls"])
def test_off_is_bitwise_off(rule, behind):
    off = trained(rule, *behind, LR(0.01))
    assert equal(off, trained(*behind, LR(0.01)))
    assert not equal(off, trained(RadialBrake(0.1), *behind, LR(0.01)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("off", [CautiousWeightDecay(0.0), WeightDecay(0.0, target="params_direct")], ids=repr)
def test_a_pull_that_is_off_leaves_the_rounding_of_others(off, dtype):
    """It needs no plain update at its place, which would round what stands in front of it."""
    front, behind = [WeightDecay(0.1), WeightDecay(0.1, 1)], [LR(0.1)]
    assert equal(trained(*front, off, *behind, dtype=dtype), trained(*front, *behind, dtype=dtype))
    on = type(off)(0.1, target=off.target)
    assert not equal(trained(*front, on, *behind, dtype=dtype), trained(*front, *behind, dtype=dtype))


def test_a_group_is_switched_off_alone():
    params, grads = params_and_grads()
    groups = [{"params": params[:1]}, {"params": params[1:], "radius": None}]
    found = run(Chain(groups, Adam(foreach=True), Hyperball(), LR(0.01)), grads, params)
    assert equal(found[1:], trained(LR(0.01))[1:])
    assert equal(found[:1], trained(Hyperball(), LR(0.01))[:1])


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("rule", [Hyperball(2.0), RadialBrake(0.1, 0.2), NormControl(0.5, 2.0)], ids=repr)
def test_at_a_learning_rate_of_0_nothing_is_written(rule, lr):
    params, _ = params_and_grads()
    assert equal(trained(WeightDecay(0.1), rule, CautiousWeightDecay(0.1), LR(lr), optimizer=Wrap(SGD)), params)


def test_a_constrained_decay_is_not_scaled_by_the_learning_rate():
    params, _ = params_and_grads()
    found = trained(ConstrainedWeightDecay(0.1, rate=0.01), LR(0.0), optimizer=Wrap(SGD))
    assert all(now.norm() < before.norm() for now, before in zip(found, params, strict=True))


@pytest.mark.parametrize("rules", [[Hyperball()], [WeightDecay(0.1), RadialBrake(0.3)]], ids=repr)
def test_a_learning_rate_that_is_a_tensor_does_the_same(rules):
    for one, other in zip(trained(*rules, LR(torch.tensor(0.01))), trained(*rules, LR(0.01)), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)


def skipped_step(optimizer: torch.optim.Optimizer, params) -> None:
    """A step that a GradScaler skips: it hands a fused optimizer the verdict."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    for param in params:
        param.grad = torch.full_like(param, torch.inf)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


RULES = [Hyperball(), RadialBrake(0.2, 0.3), ConstrainedWeightDecay("initial", rate=0.1), NormControl(0.5)]


def skipping(rule: Rule) -> tuple[list, list]:
    """Parameters and kept numbers before and after a skipped step."""
    params, grads = params_and_grads()
    optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0, fused=True)
    attach(optimizer, rule)
    run(optimizer, grads[:2], params)

    def seen() -> list[Tensor]:
        kept = [v.clone() for p in params for key, v in optimizer.state[p].items() if key.startswith("distwd")]
        return [p.detach().clone() for p in params] + kept

    before = seen()
    skipped_step(optimizer, params)
    return before, seen()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_skipped_step_changes_neither_parameters_nor_kept_numbers(rule):
    before, after = skipping(rule)
    assert equal(before, after) and not any(one.isnan().any() for one in after)


def test_state_that_moves_in_a_skipped_step_is_seen():
    keep = distwd.step.coefficients.Coefficients.keep

    def forgetful(self, bound, step, groups):
        step.found_inf = {}
        keep(self, bound, step, groups)

    with mock.patch("distwd.step.coefficients.Coefficients.keep", forgetful):
        before, after = skipping(Hyperball())
    assert not equal(before, after)


# --- kept numbers -----------------------------------------------------------------------------------------------------


def test_a_radius_is_kept_and_not_measured_anew():
    """Decay behind the rule shrinks the sphere only if it is recomputed: that is what a kept radius is for."""
    params, grads = params_and_grads()
    chain = Chain(params, Adam(), Hyperball(), LR(0.1), WeightDecay(0.05))
    norms = [param.detach().norm() for param in params[:2]]
    run(chain, grads * 5, params)
    kept = [chain.state[param]["distwd_Hyperball_radius"] for param in params[:2]]
    torch.testing.assert_close(kept, norms)
    for param, norm in zip(params[:2], norms, strict=True):
        assert param.detach().norm() > 0.85 * norm
    # A mutant measures it in every step.
    with (
        mock.patch("distwd.step.state.COUNT", "other"),
        mock.patch.object(Hyperball, "gain", lambda self, settings, before, after, kept: (before / after, dict(kept))),
    ):
        params, _ = params_and_grads()
        run(Chain(params, Adam(), Hyperball(), LR(0.1), WeightDecay(0.05)), grads * 5, params)
        assert all(param.detach().norm() < 0.5 * norm for param, norm in zip(params[:2], norms, strict=True))


@pytest.mark.parametrize(
    "rule",
    [
        Hyperball(),
        ConstrainedWeightDecay("initial", after=3, rate=0.1),
        ConstrainedWeightDecay("inflection", every=1, smoothing=0.1, rate=0.1),
        NormControl(0.5, 1.5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("way", ["chain", "attach"])
def test_a_run_that_is_loaded_in_the_middle_goes_on_with_the_same_bits(rule, way):
    def make(params):
        if way == "chain":
            return Chain(params, Adam(), rule, LR(0.05))
        optimizer = torch.optim.AdamW(params, lr=0.05, weight_decay=0)
        attach(optimizer, rule)
        return optimizer

    params, grads = params_and_grads()
    grads = grads + params_and_grads(seed=1)[1]
    first = make(params)
    run(first, grads[:3], params)
    saved, at = copy.deepcopy(first.state_dict()), [param.detach().clone() for param in params]
    expected = run(first, grads, params, start=3)
    params, _ = params_and_grads()
    second = make(params)
    second.load_state_dict(saved)
    for param, value in zip(params, at, strict=True):
        param.data.copy_(value)
    assert equal(run(second, grads, params, start=3), expected)


def test_a_parameter_without_a_gradient_rests_with_its_numbers():
    params, grads = params_and_grads()
    chain = Chain(params, Adam(), Hyperball(), ConstrainedWeightDecay(0.1), LR(0.1))
    run(chain, [[grads[0][0], None, grads[0][2]]], params)
    keys = ("distwd_Hyperball_num_steps", "distwd_ConstrainedWeightDecay_multiplier")
    assert [chain.state[params[1]][key].item() for key in keys] == [0.0, 0.0]
    assert chain.state[params[0]]["distwd_Hyperball_num_steps"] == 1


# --- zeros, and what is not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["chain", "attach"])
def test_zeros_that_would_stay_zeros_are_refused_by_name(way):
    params, grads = params_and_grads()
    params[1].data.zero_()
    named = [("a", params[0]), ("lora_B", params[1]), ("c", params[2])]
    if way == "chain":
        optimizer = Chain(named, Adam(), Hyperball(), LR(0.1))
    else:
        optimizer = torch.optim.AdamW(named, lr=0.1, weight_decay=0)
        attach(optimizer, Hyperball())
    before = [param.detach().clone() for param in params]
    for _ in range(2):
        with pytest.raises(PlanError, match=r"lora_B: all zeros .* radius=None"):
            run(optimizer, grads[:1], params)
    assert equal(before, params)
    assert not any("exp_avg" in state and state["exp_avg"].any() for state in optimizer.state.values())
    params[1].data.fill_(1.0)
    run(optimizer, grads[:1], params)


@pytest.mark.parametrize("way", ["chain", "attach"])
def test_zeros_of_a_group_that_is_switched_on_later_are_refused(way):
    w, zeros = nn.Parameter(torch.tensor([3.0, -4.0])), nn.Parameter(torch.zeros(2))
    key = "radius" if way == "chain" else "distwd_radius"
    groups = [{"params": [("w", w)]}, {"params": [("zeros", zeros)], key: None}]
    if way == "chain":
        optimizer = Chain(groups, Adam(), Hyperball(), LR(0.1))
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0)
        attach(optimizer, Hyperball())
    run(optimizer, [[torch.ones(2)]], [w])
    optimizer.param_groups[1][key] = "initial"
    for _ in range(2):
        with pytest.raises(PlanError, match="zeros: all zeros"):
            run(optimizer, [[torch.ones(2), torch.ones(2)]], [w, zeros])
    optimizer.param_groups[1][key] = 2.0
    run(optimizer, [[torch.ones(2), torch.ones(2)]], [w, zeros])
    torch.testing.assert_close(zeros.detach().norm(), torch.tensor(2.0))


@pytest.mark.parametrize("way", ["chain", "attach"])
@pytest.mark.parametrize("scope", ["matrix", "tensor"])
def test_zeros_that_were_frozen_in_the_first_step_are_refused_when_they_are_trained(way, scope):
    w, zeros = nn.Parameter(torch.tensor([3.0, -4.0])), nn.Parameter(torch.zeros(2), requires_grad=False)
    named = [("w", w), ("zeros", zeros)]
    if way == "chain":
        optimizer = Chain(named, Adam(), Hyperball(scope=scope), LR(0.1))
    else:
        optimizer = torch.optim.AdamW(named, lr=0.1, weight_decay=0)
        attach(optimizer, Hyperball(scope=scope))
    run(optimizer, [[torch.ones(2)]] * 2, [w])
    before = w.detach().clone()
    zeros.requires_grad_(True)
    for _ in range(2):
        with pytest.raises(PlanError, match=r"zeros: all zeros .* radius=None"):
            run(optimizer, [[torch.ones(2), torch.ones(2)]], [w, zeros])
    assert equal([before], [w])
    zeros.data.fill_(1.0)
    run(optimizer, [[torch.ones(2), torch.ones(2)]] * 2, [w, zeros])
    torch.testing.assert_close(zeros.detach().norm(), torch.tensor(2.0).sqrt())


def test_zeros_have_a_gain_of_1_and_a_rate_of_0():
    found = step(NormControl(0.5, radius=2.0), RadialBrake(0.5), LR(0.1), p=(0.0, 0.0), u=(0.0, 0.0))
    assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("rule", [*RULES, Hyperball(1.0)], ids=repr)
def test_a_nan_is_a_nan_in_its_matrix_and_nowhere_else(rule):
    params, grads = params_and_grads()
    grads[0][2][1, 0, 0] = torch.nan
    found = run(Chain(params, Wrap(SGD), rule, LR(0.1)), grads[:1], params)
    is_pull = isinstance(rule, NormControl)  # it asks for no norm of the update
    assert found[2][1].isnan().sum() == (1 if is_pull else found[2][1].numel())
    assert not any(one.isnan().any() for one in (found[0], found[1], found[2][0]))


def test_a_gain_near_1_is_not_lost_in_bf16():
    """Rounded to bf16, a gain within 2e-3 of 1 would be 1, and norms would drift."""
    params, grads = params_and_grads(torch.bfloat16)
    before = [param.detach().float().norm() for param in params[:2]]
    run(Chain(params, Wrap(SGD), Hyperball(), LR(0.03)), grads * 30, params)
    for param, norm in zip(params[:2], before, strict=True):
        assert abs(param.detach().float().norm() / norm - 1) < 4e-3


# --- rules of one's own -----------------------------------------------------------------------------------------------


class Ceiling(Rule):
    """No norm grows beyond a ceiling:  γ = min(1, ceiling/‖θ̃‖); it counts how often it has acted."""

    def keeps(self, settings):
        return {"acted": 0.0}

    def gain(self, settings, before, after, kept):
        gain = (settings["ceiling"] / after).clamp(max=1.0)
        return gain, {"acted": kept["acted"] + (gain < 1)}


class TrustRatio(Rule):
    """s = ‖θ‖/‖u‖, as LARS."""

    def scale(self, settings, before, update, kept):
        return before / update


def test_a_norm_rule_of_ones_own():
    torch.testing.assert_close(
        step(Ceiling(ceiling=5.0), LR(0.1)), torch.tensor([2.9, -4.2]).double() * 5 / 5.1039200, rtol=2e-6, atol=0
    )
    torch.testing.assert_close(
        step(TrustRatio(), LR(0.1)), torch.tensor([3 - 0.1 * 5**0.5, -4 - 0.2 * 5**0.5]).double(), rtol=2e-6, atol=0
    )
    param = nn.Parameter(torch.tensor([3.0, -4.0]))
    chain = Chain([("w", param)], Ceiling(ceiling=5.0), LR(0.1))
    param.grad = torch.tensor([1.0, 2.0])
    chain.step()
    assert chain.state[param]["distwd_Ceiling_acted"] == 1
    assert set(chain.stats()["Ceiling"]) == {"acted", "gain"}


class NoPair(Ceiling):
    def gain(self, settings, before, after, kept):
        return 1.0


class OtherNames(Ceiling):
    def gain(self, settings, before, after, kept):
        return 1.0, {"other": 1.0}


class WrongShape(Rule):
    def scale(self, settings, before, update, kept):
        return torch.ones(3)


class TwoKinds(Rule):
    def gain(self, settings, before, after, kept):
        return 1.0

    def coefficient(self, settings, measured, kept):
        return 1.0


class Measuring(Rule):
    def gain(self, settings, before, after, kept):
        return 1.0

    def measures(self, settings):
        return {"norm": Measure("params", "l2")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain([w()], NoPair(ceiling=1.0)), r"NoPair\.gain must return a pair \(gain, "),
        (lambda: Chain([w()], OtherNames(ceiling=1.0)), r"OtherNames\.gain returned kept numbers \['other'\]"),
        (lambda: Chain([w()], WrongShape()), r"WrongShape\.scale: the scale has shape \(3,\)"),
        (lambda: TwoKinds(), "TwoKinds overrides `coefficient`"),
        (lambda: Measuring(), "Measuring overrides `measures`"),
        (lambda: TrustRatio(target="grad"), "no target='grad'"),
        (lambda: TrustRatio(scope="all"), "TrustRatio: scope='all' has no meaning .* use scope='group'"),
        (lambda: Hyperball(scope="tensors"), "scope='tensors' is not known"),
        # Places.
        (lambda: Chain([w()], Hyperball(), Adam(), LR(0.1)), "Hyperball .* stands before Adam"),
        (lambda: Chain([w()], RadialBrake(), Adam(), LR(0.1)), "RadialBrake .* stands before Adam"),
        (lambda: Chain([w()], Adam(), LR(0.1), Hyperball()), "put it between the optimizer and LR"),
        (lambda: attach(SGD([w()], lr=0.1), Hyperball(), coupling="none"), "put it between the optimizer and LR"),
        (lambda: attach(SGD([w()], lr=0.1), Hyperball(), coupling="gradient"), "use coupling='lr'"),
        (lambda: attach(SGD([w()], lr=0.1), RadialBrake(), coupling="gradient"), "use coupling='lr'"),
        (
            lambda: Chain([w()], Adam(), RadialBrake(), DirectWeightDecay(0.1), LR(0.1)),
            "DirectWeightDecay has target='params_direct'",
        ),
        (
            lambda: Chain([w()], Adam(), WeightDecay(0.1), WeightDecay(0.1, target="grad"), RadialBrake(), LR(0.1)),
            "WeightDecay_1 has target='grad'",
        ),
        (
            lambda: Chain([w()], RadialBrake(scope="tensor"), Hyperball(2.0), LR(0.1)),
            "RadialBrake and Hyperball have different scopes",
        ),
        (
            lambda: Chain([w()], NormControl(0.1), RadialBrake(scope="tensor"), LR(0.1)),
            "NormControl has scope='matrix', and RadialBrake behind it scope='tensor'",
        ),
        # Values.
        (lambda: RadialBrake(-0.1), "outward=-0.1"),
        (lambda: RadialBrake(inward=-1), "inward=-1"),
        (lambda: NormControl(0.1, -1.0), "ratio=-1.0"),
        (lambda: NormControl(-0.1), "weight_decay=-0.1"),
        (lambda: NormControl(0.1, radius="first"), "radius='first'"),
        (lambda: Hyperball(0.0), "radius=0 would make parameters zero"),
        (lambda: Hyperball(-1.0), "radius=-1.0"),
        (lambda: ConstrainedWeightDecay(-1.0), "bound=-1.0"),
        (lambda: ConstrainedWeightDecay("warm"), "bound='warm'"),
        (lambda: ConstrainedWeightDecay(rate=-1.0), "rate=-1.0"),
        (lambda: ConstrainedWeightDecay(after=-1), "after=-1"),
        (lambda: ConstrainedWeightDecay(smoothing=1.0), r"smoothing=1.0 must be in \[0, 1\)"),
        (lambda: ConstrainedWeightDecay(every=0), "every=0 must be"),
        (lambda: ConstrainedWeightDecay(every=2.5), r"every=2.5 must be a whole number of steps, 1 or more"),
        (lambda: ConstrainedWeightDecay(every=float("inf")), "every=inf must be a whole number"),
        (lambda: ConstrainedWeightDecay("initial", after=2.5), r"after=2.5 must be a whole number of steps, 0 or more"),
        (lambda: ConstrainedWeightDecay("initial", after=torch.tensor(3)), r"after=tensor\(3\) must be a whole number"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def w() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


# --- precision --------------------------------------------------------------------------------------------------------


def test_a_step_that_cancels_a_tensor_has_a_norm_that_is_known_less_well():
    """Norms come from sums of θ and u: where a step leaves a part ε of θ, their relative error is about 1e-16/ε²."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(10_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(10_000, generator=generator, dtype=torch.float64)
    for left, bound in ((1.0, 1e-7), (1e-2, 1e-7), (1e-4, 1e-6), (1e-6, 1e-3)):
        param = nn.Parameter(theta.clone())
        param.grad = (theta - left * noise) / 0.1
        chain = Chain([param], RadialBrake(0.0, 0.0), LR(0.1))
        chain.step()
        assert abs(param.detach().norm() / theta.norm() - 1) < bound
