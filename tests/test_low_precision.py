"""bf16 and fp16 parameters: decay and update are rounded once; with noise, small decays are right in the mean."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import distwd
from distwd.kernels.formulas import DecayTerm
from distwd.step.rounding import rate_of
from tests import runs, wire
from tests.layouts import whole_model
from tests.one_process import equal
from tests.releases import needs_torch

BF16, FP16 = torch.bfloat16, torch.float16
LOW = [BF16, FP16]


# --- one rounding ---------------------------------------------------------------------------------------------------


def nearest(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 rounded once."""
    return exact.to(dtype)


def stepped(dtype: torch.dtype, *transforms, **kwargs) -> tuple[dict, dict, dict]:
    """Parameters before and after a step in `dtype`, and by how much the optimizer alone would move them, times 1/lr."""
    before = whole_model(7, dtype)
    params = {name: torch.nn.Parameter(value.clone()) for name, value in before.items()}
    chain = distwd.Chain(params.items(), *transforms, **kwargs)
    alone = {name: torch.nn.Parameter(torch.zeros_like(value)) for name, value in before.items()}
    optimizer = torch.optim.Adam(alone.values(), lr=1.0, eps=1e-3)
    for name in before:
        params[name].grad = alone[name].grad = runs.grads_of(0, dtype)[name]
    chain.step()
    optimizer.step()
    return before, {n: p.detach() for n, p in params.items()}, {n: p.detach() for n, p in alone.items()}


RULES = {
    "after lr": lambda: [distwd.LR(0.01), distwd.WeightDecay(0.003)],
    "cubic": lambda: [distwd.WeightDecay(0.1, 3), distwd.LR(0.01)],
    "cautious": lambda: [distwd.CautiousWeightDecay(0.3), distwd.LR(0.01)],
    "two": lambda: [distwd.WeightDecay(0.3), distwd.WeightDecay(0.1, 1), distwd.LR(0.01)],
}


def pulled(name: str, p: Tensor, u: Tensor) -> Tensor:
    """What the rules of RULES take off in a step, in float64."""
    return {
        "after lr": lambda: 0.003 * p,
        "cubic": lambda: 0.001 * p.abs() * p,
        "cautious": lambda: 0.003 * p * (u * p > 0),
        "two": lambda: 0.003 * p + 0.001 * p.sign(),
    }[name]()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_decay_and_update_are_rounded_once(dtype, name):
    """Against float64, rounded once, of what the optimizer leaves; two roundings are seen to differ."""
    before, after, moved = stepped(dtype, distwd.Adam(eps=1e-3), *RULES[name]())
    num_twice = num = 0
    for each, p in before.items():
        p, u = p.double(), -moved[each].double()
        term = pulled(name, p, u)
        once = nearest(p - term - 0.01 * u, dtype)
        twice = nearest(nearest(p - term, dtype).double() - 0.01 * u, dtype)
        # What float32 rounds on the way can only matter within its own rounding of a tie.
        differs = after[each] != once
        tie = (after[each].double() + once.double()) / 2 - (p - term - 0.01 * u)
        assert (tie[differs].abs() <= 2.0**-22 * p[differs].abs().clamp(min=1e-3)).all()
        num_twice, num = num_twice + int((twice != once).sum()), num + p.numel()
    assert num_twice > num / 50


def test_a_small_update_and_a_small_decay_add_up():
    """Each alone is less than half a step of bf16 at 1, both together are more."""
    w = torch.nn.Parameter(torch.ones(3, dtype=BF16))
    w.grad = torch.ones_like(w)
    distwd.Chain([w], distwd.Wrap(torch.optim.SGD), distwd.LR(0.0015), distwd.WeightDecay(0.0015)).step()
    assert (w < 1).all()


def test_fp16_updates_below_its_smallest_numbers_count():
    """lr·u may have no fp16 of its own: u is kept, and multiplied by lr in float32."""
    w = torch.nn.Parameter(torch.full((4,), 2.0**-14, dtype=FP16))
    w.grad = torch.full_like(w, 0.75)
    lr = 2.0**-24
    distwd.Chain([w], distwd.Wrap(torch.optim.SGD), distwd.LR(lr), distwd.WeightDecay(2.0**-12)).step()
    expected = nearest(torch.tensor(2.0**-14 * (1 - 2.0**-12) - 0.75 * lr, dtype=torch.float64), FP16)
    assert (w == expected).all()


def test_groups_of_full_precision_step_as_ever():
    """bf16 beside float32 in one chain: the float32 group has the bits of a chain of its own."""

    def trained(low: bool) -> Tensor:
        pairs = {"wide": whole_model(7)["up.weight"]} | ({"low": whole_model(7, BF16)["down.weight"]} if low else {})
        params = {name: torch.nn.Parameter(value.clone()) for name, value in pairs.items()}
        chain = distwd.Chain(
            params.items(), distwd.Adam(), distwd.WeightDecay(0.1), distwd.LR(0.01), rounding="stochastic"
        )
        for step in range(3):
            for param in params.values():
                param.grad = (param * (step + 1)).detach()
            chain.step()
        return params["wide"].detach()

    assert torch.equal(trained(low=True), trained(low=False))


# --- in the mean ----------------------------------------------------------------------------------------------------


def curve(make, num_steps: int = 100, dtype: torch.dtype = BF16) -> float:
    """The mean of many ones after steps without gradient, lr·λ = 1e-4."""
    w = torch.nn.Parameter(torch.ones(20_000, dtype=dtype))
    optimizer = make(w)
    for _ in range(num_steps):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    return w.detach().double().mean().item()


def attached(cls):
    def make(w, **kwargs):
        optimizer = cls(w)
        distwd.attach(optimizer, distwd.WeightDecay(0.1), **kwargs)
        return optimizer

    return make


MAKERS = {
    "fused": lambda w, **kw: distwd.Chain([w], distwd.Adam(fused=True), distwd.WeightDecay(0.1), distwd.LR(1e-3), **kw),
    "foreach": lambda w, **kw: distwd.Chain([w], distwd.Adam(), distwd.WeightDecay(0.1), distwd.LR(1e-3), **kw),
    "direct": lambda w, **kw: distwd.Chain([w], distwd.DirectWeightDecay(1e-4), distwd.Adam(), distwd.LR(1e-3), **kw),
    "relative": lambda w, **kw: distwd.Chain(
        [w],
        distwd.Adam(),
        distwd.RelativeWeightDecay(0.1, norm_input="params", metric="l0"),
        distwd.LR(1e-3 / 20_000),
        **kw,
    ),
    "tensor lr": lambda w, **kw: distwd.Chain(
        [w], distwd.Adam(), distwd.WeightDecay(0.1), distwd.LR(torch.tensor(1e-3)), **kw
    ),
    "attach": attached(lambda w: torch.optim.AdamW([w], lr=1e-3, weight_decay=0)),
    "attach fused": attached(lambda w: torch.optim.AdamW([w], lr=1e-3, weight_decay=0, fused=True)),
    "attach behind": attached(lambda w: torch.optim.ASGD([w], lr=1e-3, lambd=0)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_nearest_loses_the_decay_and_noise_keeps_it_in_the_mean(name):
    assert curve(MAKERS[name]) == 1.0
    # One element's noise of a step is at most 2^-8·√p(1−p) with p = 1e-4·2^8; over all and all steps:
    spread = 2.0**-8 * math.sqrt(1e-4 * 2**8 * 100 / 20_000)
    expected = (1 - 1e-4) ** 100
    assert abs(curve(lambda w: MAKERS[name](w, rounding="stochastic")) - expected) < 4 * spread
    assert 1 - expected > 20 * spread


def test_fp16_decays_in_the_mean_too():
    def make(w, rounding="nearest"):
        return distwd.Chain(
            [w], distwd.Wrap(torch.optim.SGD), distwd.WeightDecay(0.1), distwd.LR(1e-3), rounding=rounding
        )

    assert curve(make, dtype=FP16) == 1.0
    spread = 2.0**-11 * math.sqrt(1e-4 * 2**11 * 100 / 20_000)
    assert abs(curve(lambda w: make(w, "stochastic"), dtype=FP16) - (1 - 1e-4) ** 100) < 4 * spread


def test_a_skipped_step_writes_nothing():
    """A fused optimizer under a GradScaler skips by itself, and the decay with it."""
    for behind in ({}, {"norm_input": "update"}):
        w = torch.nn.Parameter(whole_model(7, BF16)["up.weight"].clone())
        optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0, fused=True)
        distwd.attach(
            optimizer, distwd.RelativeWeightDecay(0.1, **{"norm_input": "params", **behind}), rounding="stochastic"
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale((w * torch.inf).sum()).backward()
        scaler.step(optimizer)
        assert torch.equal(w, whole_model(7, BF16)["up.weight"])


# --- the number of the step -----------------------------------------------------------------------------------------


def bf16_parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(value) for name, value in whole_model(7, BF16).items()}


def chain_of(params, **kwargs) -> distwd.Chain:
    return distwd.Chain(
        params.items(), distwd.Adam(), distwd.WeightDecay(0.1), distwd.LR(0.01), **{"rounding": "stochastic", **kwargs}
    )


def go_on(chain, params, num_steps: int) -> dict:
    for _ in range(num_steps):
        for param in params.values():
            param.grad = torch.full_like(param, 1e-3)
        chain.step()
    return {name: param.detach().clone() for name, param in params.items()}


def test_a_chain_to_the_nearest_saves_what_it_always_saved():
    transforms = distwd.Adam(), distwd.WeightDecay(0.1), distwd.LR(0.01)
    plain = distwd.Chain(bf16_parameters().items(), *transforms).state_dict()["param_groups"][0]
    assert chain_of(bf16_parameters(), rounding="nearest").state_dict()["param_groups"][0] == plain
    assert "rounding_step" not in plain
    assert chain_of(bf16_parameters()).state_dict()["param_groups"][0] == {**plain, "rounding_step": 0}


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda chain: pickle.loads(pickle.dumps(chain))], ids=["copy", "pickle"]
)
def test_a_twin_draws_the_same_noise(twin):
    params = bf16_parameters()
    chain = chain_of(params, seed=3)
    go_on(chain, params, 2)
    other = twin(chain)
    twins = dict(zip(params, other.param_groups[0]["params"], strict=True))
    assert equal(go_on(chain, params, 2), go_on(other, twins, 2))


def test_a_state_dict_resumes_with_the_same_noise():
    params = bf16_parameters()
    chain = chain_of(params)
    go_on(chain, params, 2)
    twins = {name: torch.nn.Parameter(param.detach().clone()) for name, param in params.items()}
    other = chain_of(twins)
    other.load_state_dict(copy.deepcopy(chain.state_dict()))
    straight = go_on(chain, params, 2)
    assert equal(go_on(other, twins, 2), straight)
    assert not equal(go_on(other, twins, 1), straight)


def test_a_checkpoint_without_a_step_number_loads():
    params = bf16_parameters()
    chain = chain_of(params)
    chain.load_state_dict(chain_of(bf16_parameters(), rounding="nearest").state_dict())
    assert chain.param_groups[0]["rounding_step"] == 0
    go_on(chain, params, 2)
    assert chain.param_groups[0]["rounding_step"] == 2


def test_two_attachments_draw_noise_of_their_own_and_leave_no_key():
    params = bf16_parameters()
    sgd = torch.optim.SGD(params.values(), lr=0.1)
    before = set(sgd.param_groups[0])
    both = [distwd.attach(sgd, distwd.WeightDecay(decay), rounding="stochastic") for decay in (0.1, 0.2)]
    go_on(sgd, params, 2)
    assert {key: sgd.param_groups[0][key] for key in ("distwd_rounding_step", "distwd_rounding_step_1")} == {
        "distwd_rounding_step": 2,
        "distwd_rounding_step_1": 2,
    }
    for attachment in both:
        attachment.remove()
    assert set(sgd.param_groups[0]) == before


@needs_torch("2.9", "torch.optim.Muon")
def test_several_optimizers_count_together():
    params = bf16_parameters()
    matrices = [p for p in params.values() if p.ndim == 2]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0)
    adamw = torch.optim.AdamW([p for p in params.values() if p.ndim != 2], lr=0.01, weight_decay=0)
    distwd.attach([muon, adamw], distwd.RelativeWeightDecay(0.1), rounding="stochastic")
    for step in range(2):
        for param in params.values():
            param.grad = torch.full_like(param, 1e-3)
        # Muon's step at this lr moves a third of the elements; it is looked at once.
        with pytest.warns(UserWarning, match="Muon has moved") if step == 0 else nullcontext():
            muon.step()
        adamw.step()
    assert [each.param_groups[0]["distwd_rounding_step"] for each in (muon, adamw)] == [2, 2]


# --- warnings -----------------------------------------------------------------------------------------------------------

LOST = "on its own it is rounded away"
RELATIVE = {
    "chain": lambda w, decay, lr: distwd.Chain([w], distwd.Adam(), distwd.RelativeWeightDecay(decay), distwd.LR(lr)),
    "by tensor": lambda w, decay, lr: distwd.Chain(
        [w], distwd.Adam(), distwd.RelativeWeightDecay(decay, scope="tensor"), distwd.LR(lr)
    ),
    "tensor lr": lambda w, decay, lr: distwd.Chain(
        [w], distwd.Adam(), distwd.WeightDecay(decay), distwd.LR(torch.tensor(lr))
    ),
    "attach": lambda w, decay, lr: attached_with(torch.optim.AdamW([w], lr=lr, weight_decay=0), decay),
    "attach behind": lambda w, decay, lr: attached_with(torch.optim.ASGD([w], lr=lr, lambd=0), decay),
}


def attached_with(optimizer, decay):
    distwd.attach(optimizer, distwd.RelativeWeightDecay(decay, norm_input="grad"))
    return optimizer


@pytest.mark.parametrize("name", RELATIVE)
def test_a_relative_decay_that_rounds_away_is_told_once(name):
    """Half a step of bf16 is 2^-9 of the parameter. The metric of these ones is 1, so the rate is λ·lr."""

    def told(decay: float, lrs: list[float], dtype: torch.dtype = BF16) -> list[int]:
        w = torch.nn.Parameter(torch.ones(64, dtype=dtype))
        optimizer = RELATIVE[name](w, decay, lrs[0])
        found = []
        for number, lr in enumerate(lrs):
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(lr) if name == "tensor lr" else lr
            w.grad = torch.ones_like(w)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            found += [number for one in caught if LOST in str(one.message)]
            assert all(one.filename == __file__ for one in caught)
        return found

    assert told(0.01, [0.1] * 3) == [0]
    assert told(0.1, [0.1] * 3) == []
    assert told(0.01, [0.1] * 3, torch.float32) == []
    assert told(0.01, [0.0, 0.0, 0.1, 0.1]) == [2], "a warm-up that begins at 0 says nothing yet"


def test_the_rate_is_read_in_one_step_only():
    w = torch.nn.Parameter(torch.ones(64, dtype=BF16))
    optimizer = RELATIVE["chain"](w, 0.1, 0.1)
    w.grad = torch.ones_like(w)
    optimizer.step()
    with wire.no_host_sync():
        optimizer.step()


@pytest.mark.parametrize("settings", [{"cap": 0.5}, {"toward": 1.0}, {"ord": 1}], ids=str)
def test_a_rate_is_not_read_where_it_tells_nothing(settings):
    """What a pull with a cap, or to something else, takes of a parameter depends on the parameter."""
    with wire.no_host_sync():
        assert rate_of([DecayTerm(torch.tensor(0.1), **settings)], reads=True) == 0.0
