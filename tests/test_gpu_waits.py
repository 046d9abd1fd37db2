"""Law 5 on a card: a step reads nothing, copies nothing from the host to wait for it, and mixes no devices.

On CUDA tensors that are fake (tests/fake_cuda.py), so that it is seen without a GPU. tests/test_gpu.py is for real ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

import distwd
from distwd import (
    CautiousWeightDecay,
    ConstrainedWeightDecay,
    DirectWeightDecay,
    Hyperball,
    NormControl,
    RadialBrake,
    RelativeWeightDecay,
    WeightDecay,
)
from distwd.attach.watch import Watch
from tests.fake_cuda import NoWaits, Waits, fake_cuda

SHAPES = {"p0": (4, 4), "p1": (4,), "p2": (2, 4, 4), "p3": (4, 4), "p4": (300, 300)}


def anchors(λ):
    return WeightDecay(λ, toward={name: torch.rand(shape, device="cuda") for name, shape in SHAPES.items()})


RULES = {
    "absolute": WeightDecay,
    "ord 3": lambda λ: WeightDecay(λ, 3),
    "ord 2.5": lambda λ: WeightDecay(λ, 2.5),
    "capped": lambda λ: WeightDecay(λ, cap=0.5),
    "cautious": CautiousWeightDecay,
    "of updates": RelativeWeightDecay,
    "std of gradients": lambda λ: RelativeWeightDecay(λ, metric="std", norm_input="grad"),
    "linf of parameters": lambda λ: RelativeWeightDecay(λ, metric="linf", norm_input="params"),
    "least update": lambda λ: RelativeWeightDecay(λ, metric=float("-inf")),
    "cautious, var of updates": lambda λ: RelativeWeightDecay(λ, metric="var", cautious=True),
    "by group": lambda λ: RelativeWeightDecay(λ, scope="group"),
    "by tensor": lambda λ: RelativeWeightDecay(λ, scope="tensor", metric="l2"),
    "by tensor, of parameters": lambda λ: RelativeWeightDecay(λ, scope="tensor", norm_input="params"),
    "by matrix": lambda λ: RelativeWeightDecay(λ, scope="matrix", norm_input="grad"),
    "ratio, running mean": lambda λ: RelativeWeightDecay(λ, per="params", power=2.0, smoothing=0.9),
    "of second moments": lambda λ: RelativeWeightDecay(λ, norm_input="second_moment"),
    "soft thresholds": lambda λ: WeightDecay(λ, 1, proximal=True),
    "proximal, ord 1.5": lambda λ: WeightDecay(λ, 1.5, proximal=True),
    "proximal, ord 2": lambda λ: WeightDecay(λ, proximal=True),
    "brake": lambda λ: RadialBrake(1 - λ),
    "sphere": lambda λ: Hyperball(2.0),
    "to a norm": lambda λ: NormControl(λ, radius=2.0),
    "bound": lambda λ: ConstrainedWeightDecay(λ),
    "toward tensors": anchors,
    "direct": DirectWeightDecay,
}
BEHIND = {"soft thresholds", "proximal, ord 1.5", "proximal, ord 2", "of second moments"}
BEHIND |= {"brake", "sphere", "to a norm", "bound"}


class Foreign(torch.optim.Optimizer):
    """An optimizer that distwd does not know."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad * group["lr"])


def attached(make, coupling):
    def build(groups, rule):
        optimizer = make(groups)
        distwd.attach(optimizer, rule, coupling=coupling)
        return optimizer

    return build


def adam_chain(**adam):
    return lambda groups, rule: distwd.Chain(groups, distwd.Adam(**adam), rule, distwd.LR(1e-3))


WAYS = {
    "chain, fused": adam_chain(fused=True),
    "chain, foreach": adam_chain(foreach=True),
    "chain, capturable": adam_chain(foreach=True, capturable=True),
    "chain, after lr": lambda groups, rule: distwd.Chain(groups, distwd.Adam(fused=True), distwd.LR(1e-3), rule),
    "chain, before": lambda groups, rule: distwd.Chain(groups, rule, distwd.Adam(fused=True), distwd.LR(1e-3)),
}
for _coupling in ("lr", "none", "gradient"):
    _adamw = attached(lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0, fused=True), _coupling)
    # Without momentum it never keeps state, so that each step might be a hidden one of checkpoint code.
    _sgd = attached(lambda groups: torch.optim.SGD(groups, lr=1e-3, fused=True), _coupling)
    WAYS |= {
        f"adamw, {_coupling}": _adamw,
        f"sgd, {_coupling}": _sgd,
        f"foreign, {_coupling}": attached(Foreign, _coupling),
    }

SITUATIONS = [
    "plain",
    "missing gradients",
    "missing groups",
    "groups",
    "GradScaler",
    "lr on the cpu",
    "lr on the card",
    "λ on the cpu",
    "λ on the card",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16]


def fits(rule: str, way: str, situation: str) -> bool:
    if rule in BEHIND and ("gradient" in way or "before" in way):
        return False  # refused: what is proximal, or of second moments, is behind the optimizer
    if rule == "sphere" and ("none" in way or way == "chain, after lr"):
        return False  # its angle is the learning rate behind it
    if rule == "of second moments" and not ("chain" in way or "adamw" in way):
        return False
    return not (situation == "GradScaler" and "foreign" in way)  # only fused optimizers are handed the scale


def cases_of(rule: str) -> Iterator[tuple[str, str, torch.dtype]]:
    """Every situation, each in another way and dtype: over all rules each way meets each situation."""
    number = list(RULES).index(rule)
    for place, situation in enumerate(SITUATIONS):
        ways = itertools.islice(itertools.cycle(WAYS), 3 * number + place, None)
        yield next(way for way in ways if fits(rule, way, situation)), situation, DTYPES[(number + place) % len(DTYPES)]


def step_on_a_card(
    rule: str,
    way: str,
    situation: str,
    dtype: torch.dtype,
    watch: Callable[[], AbstractContextManager] = NoWaits,
    num_steps: int = 4,
) -> None:
    """Some steps, of which the last must not wait, within `watch`."""
    params = {name: torch.nn.Parameter(torch.rand(shape, device="cuda").to(dtype)) for name, shape in SHAPES.items()}
    named = list(params.items())
    is_grouped = "groups" in situation
    optimizer = WAYS[way]([{"params": named[:2]}, {"params": named[2:]}] if is_grouped else named, RULES[rule](0.1))
    for number in range(num_steps):
        # Which are missing changes, as with experts that no token has come to.
        missing = {"missing gradients": {1, number % 4 + 1}, "missing groups": {0, 1}}.get(situation, set())
        for place, param in enumerate(params.values()):
            param.grad = None if place in missing else torch.rand_like(param)
        if number == 1 and " on the " in situation:
            what, device = situation.split(" on the ")
            key = (
                "lr"
                if what == "lr"
                else "weight_decay"
                if isinstance(optimizer, distwd.Chain)
                else "distwd_weight_decay"
            )
            for group in optimizer.param_groups:
                group[key] = torch.full((), 1e-3, device=device.replace("card", "cuda"))
        if situation == "GradScaler":
            optimizer.grad_scale, optimizer.found_inf = (torch.full((), x, device="cuda") for x in (1024.0, 0.0))
        if number < num_steps - 1:
            optimizer.step()
        else:
            with watch():
                optimizer.step()


@pytest.fixture
def card(monkeypatch):
    for name in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_"):
        # They have no fake kernels, or none that takes a learning rate as a tensor.
        monkeypatch.setattr(torch, name, lambda *_, **__: None)
    # What is read in first steps, and fake tensors cannot tell: that a learning rate is not 0, and what a foreign optimizer does.
    monkeypatch.setattr("distwd.optimizers.init_step.is_zero_now", lambda lr: False)
    monkeypatch.setattr(Watch, "look", lambda *_: None)
    with fake_cuda():
        yield


@pytest.mark.parametrize("rule", RULES)
def test_a_step_on_a_card_waits_for_nothing(card, rule):
    waits = []
    for way, situation, dtype in cases_of(rule):
        try:
            step_on_a_card(rule, way, situation, dtype)
        except (Waits, DataDependentOutputException) as error:
            waits.append(f"{way}, {situation}, {dtype}: {error}")
    assert waits == []


class Reading(RelativeWeightDecay):
    def coefficient(self, settings, measured, kept):
        return measured["metric"].item()


class Copying(RelativeWeightDecay):
    def coefficient(self, settings, measured, kept):
        return measured["metric"].cpu()


class Making(RelativeWeightDecay):
    def coefficient(self, settings, measured, kept):
        return measured["metric"] * torch.tensor(2.0, dtype=torch.float64, device="cuda")


class Mixing(RelativeWeightDecay):
    def coefficient(self, settings, measured, kept):
        torch._foreach_sub_([measured["metric"]], [torch.full((1,), 2.0, dtype=torch.float64)])
        return 1.0


@pytest.mark.parametrize("rule", [Reading, Copying, Making, Mixing])
def test_the_alarm_sees_what_waits(card, rule):
    with mock.patch.dict(RULES, {"slow": rule}), pytest.raises((Waits, DataDependentOutputException)):
        step_on_a_card("slow", "chain, fused", "plain", torch.float32)


def test_a_copy_of_a_number_would_be_seen(card):
    """A mutant: numbers of the CPU copied to the card, as they were."""
    with mock.patch("distwd.kernels.apply.number_on", lambda device, number, dtype: number.to(device, dtype)):
        for rule, way, situation in (
            ("absolute", "chain, after lr", "λ on the cpu"),
            ("cautious", "chain, fused", "lr on the cpu"),
            ("of updates", "chain, foreach", "lr on the cpu"),
        ):
            with pytest.raises(Waits, match="from one device to the other"):
                step_on_a_card(rule, way, situation, torch.float32)


def test_clipping_waits_for_nothing(card):
    params = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in SHAPES.values()]
    plan = distwd.Plan.build(params)
    for number in range(3):
        for place, param in enumerate(params):
            param.grad = None if place == number else torch.empty_like(param)
        for max_norm in (1.0, torch.full((), 1.0), torch.full((), 1.0, device="cuda")):
            with NoWaits():
                distwd.clip_grad_norm_(params, max_norm, plan=plan)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_a_hidden_step_is_told_apart_from_a_real_one_all_the_same(lr):
    """An optimizer that keeps no state is stepped by checkpoint code again and again, with gradients of 0 and an lr of 0."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=lr)
    distwd.attach(optimizer, WeightDecay(0.1), coupling="none")
    (group,) = optimizer.param_groups
    seen = []
    for own, grad in ((lr, 1.0), (lr * 0, 0.0), (lr, 1.0), (lr * 0, 0.0)):
        group["lr"], param.grad = own, torch.full_like(param, grad)
        optimizer.step()
        seen.append(param.detach().clone())
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
