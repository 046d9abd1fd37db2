"""Steps that do not go straight from the first hook to the last: steps that raise, steps within steps, saving and removing midway."""

from __future__ import annotations

import pytest
import torch

from distwd import LR as LearningRate
from distwd import Adam, Chain, RelativeWeightDecay, WeightDecay, attach
from tests.one_process import fp32_parameters
from tests.runs import differing, grads_of

LR, DECAY = 0.125, 0.25

RULES = {
    "absolute": WeightDecay(DECAY),
    "of params": RelativeWeightDecay(DECAY, norm_input="params"),
    "of the update": RelativeWeightDecay(DECAY),
}


# torch wraps the step of a class when the first optimizer of just that class is made. So hooks run for the base class,
# too.
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])


class Flaky(RuntimeError):
    pass


class TriesAgain(torch.optim.SGD):
    """An optimizer whose step calls the step of its base class a second time where the first has raised."""

    fails = False

    def _init_group(self, *args):
        if self.fails:
            self.fails = False
            raise Flaky
        return super()._init_group(*args)

    def step(self, closure=None):
        try:
            return super().step(closure)
        except Flaky:
            return super().step(closure)


class Smoothed(RelativeWeightDecay):
    """Keeps a running mean of its metric."""

    def keeps(self, settings):
        return {"mean": 0.0}

    def coefficient(self, settings, measured, kept):
        mean = 0.5 * kept["mean"] + 0.5 * measured["metric"]
        return settings["weight_decay"] * mean, {"mean": mean}


class FailsOnce(RelativeWeightDecay):
    """Cannot be computed once, after `fails` has been set."""

    fails = False

    def coefficient(self, settings, measured, kept):
        if self.fails:
            self.fails = False
            raise Flaky
        return super().coefficient(settings, measured, kept)


def feed(params: dict, step: int) -> None:
    for name, grad in grads_of(step).items():
        params[name].grad = grad.clone()


def values(params: dict) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in params.items()}


@pytest.mark.parametrize("coupling", ["gradient", "lr", "none"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_tries_again_is_decayed_once(rule, coupling):
    """Its last attempt is all that counts: the error of the first stays inside of the optimizer."""
    ends = []
    for fails in (False, True):
        params = fp32_parameters()
        optimizer = TriesAgain(params.items(), lr=LR)
        attach(optimizer, RULES[rule], coupling=coupling)
        for step in range(3):
            feed(params, step)
            grads = [param.grad for param in params.values()]
            optimizer.fails = fails and step == 1
            optimizer.step()
            assert all(param.grad is grad for param, grad in zip(params.values(), grads, strict=True))
        ends.append(values(params))
    assert differing(*ends) == []


def test_a_decay_of_several_optimizers_that_has_failed_can_be_tried_again():
    """All their steps are undone, so the next ones are the first."""
    ends = []
    for rule in (FailsOnce(DECAY), RelativeWeightDecay(DECAY)):
        params = fp32_parameters()
        members = list(params.items())
        optimizers = [torch.optim.SGD(some, lr=LR) for some in (members[:2], members[2:])]
        attach(optimizers, rule)
        feed(params, 0)
        before = values(params)
        if isinstance(rule, FailsOnce):
            rule.fails = True
            optimizers[0].step()
            with pytest.raises(Flaky):
                optimizers[1].step()
            assert differing(values(params), before) == []
        for optimizer in optimizers:
            optimizer.step()
        ends.append(values(params))
    assert differing(*ends) == []


def test_a_step_in_whose_closure_a_state_dict_is_taken_counts():
    """Its noise has been used: the next step must draw another."""
    params = {"w": torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    evaluations = []

    class EvaluatesTwice(torch.optim.AdamW):
        def step(self, closure=None):
            with torch.enable_grad():
                closure()
            return super().step(closure)

    optimizer = EvaluatesTwice(params.items(), lr=LR, weight_decay=0)
    attach(optimizer, WeightDecay(DECAY), coupling="gradient", rounding="stochastic", seed=1)

    def closure():
        evaluations.append(optimizer.state_dict()["param_groups"][0]["distwd_rounding_step"])
        params["w"].grad = torch.ones_like(params["w"])

    for _ in range(3):
        optimizer.step(closure)
    assert evaluations == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("coupling", ["gradient", "lr", "none"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_removed_in_the_closure_of_a_step_nothing_stays_behind(rule, coupling, fused):
    ends = []
    for attached in (False, True):
        params = fp32_parameters()
        optimizer = torch.optim.AdamW(params.items(), lr=LR, weight_decay=0, fused=fused)
        attachment = attach(optimizer, RULES[rule], coupling=coupling) if attached else None
        grads = grads_of(0)

        def closure():
            for name, param in params.items():
                param.grad = grads[name]
            if attachment is not None:
                attachment.remove()

        optimizer.step(closure)
        assert all(param.grad is grads[name] for name, param in params.items())
        settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        optimizer.step()
        ends.append((values(params), settings))
    assert ends[0][1] == ends[1][1]
    assert differing(ends[0][0], ends[1][0]) == []


@pytest.mark.parametrize("removed", ["of params", "of the update"])
@pytest.mark.parametrize("first", [False, True], ids=["attached last", "attached first"])
def test_one_of_two_attachments_is_removed_in_the_closure_of_a_step(removed, first):
    """The other one decays this step as it would have alone."""
    ends = []
    for attached in (False, True):
        params = fp32_parameters()
        optimizer = torch.optim.AdamW(params.items(), lr=LR, weight_decay=0)
        attachment = attach(optimizer, RULES[removed]) if attached and first else None
        attach(optimizer, RelativeWeightDecay(DECAY, metric="l2"))
        attachment = attach(optimizer, RULES[removed]) if attached and not first else attachment

        def closure():
            feed(params, 0)
            if attachment is not None:
                attachment.remove()

        for _ in range(2):
            optimizer.step(closure)
        ends.append(values(params))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6)


def test_a_third_attachment_does_not_share_the_kept_numbers_of_the_second():
    """Also where the first has been removed before, so that there are two again."""
    params = fp32_parameters()
    optimizer = torch.optim.SGD(params.items(), lr=LR, momentum=0.9)
    rules = [Smoothed(DECAY, norm_input="params", metric=metric) for metric in ("l1", "l2", "linf")]
    first, second = (attach(optimizer, rule) for rule in rules[:2])
    first.remove()
    third = attach(optimizer, rules[2])
    feed(params, 0)
    optimizer.step()
    state = optimizer.state[next(iter(params.values()))]
    kept = sorted(value.item() for key, value in state.items() if key.startswith("distwd_"))
    assert kept == sorted(each.stats()["Smoothed"]["mean"].item() for each in (third, second))
    third.remove()
    feed(params, 1)
    optimizer.step()
    assert second.stats()["Smoothed"]["mean"] > 0


def test_kept_numbers_do_not_hide_that_a_loaded_optimizer_has_to_begin_its_state():
    """A state dict without state, as of a run that has not stepped: torch's Adam begins its own only in an empty state."""
    params = fp32_parameters()
    chain = Chain(params.items(), Adam(), Smoothed(DECAY, norm_input="params"), LearningRate(LR))
    saved = chain.state_dict()
    saved["state"] = {}
    with pytest.warns(UserWarning, match="begin anew"):
        chain.load_state_dict(saved)
    feed(params, 0)
    chain.step()
    fresh = fp32_parameters()
    other = Chain(fresh.items(), Adam(), Smoothed(DECAY, norm_input="params"), LearningRate(LR))
    feed(fresh, 0)
    other.step()
    assert differing(values(params), values(fresh)) == []
