"""Our rules against optimizers of other libraries that have the same decay built in, number by number.

Each library's kernels round in their own way, so numbers agree to some roundings of float32. With a setting that is off by one part
in a hundred or a thousand they are fifty times further apart, which each test shows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distwd import LR, Adam, CautiousWeightDecay, Chain, CorrectedWeightDecay, Hyperball, WeightDecay, attach

SHAPES = {"a": (5, 7), "b": (3, 4), "c": (6,)}
NUM_STEPS = 6
BETA, EPS = 0.95, 1e-12
Params = dict[str, torch.nn.Parameter]


def library(name: str) -> Any:
    """The module, or a skip that says what is not installed."""
    return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture
def heavyball(monkeypatch: pytest.MonkeyPatch) -> Any:
    """HeavyBall without its compiler, which would take longer than all steps, and rounds otherwise."""
    found = library("heavyball")
    monkeypatch.setattr(importlib.import_module("heavyball.utils"), "compile_mode", None)
    return found


def made(seed: int, names: tuple[str, ...] = tuple(SHAPES)) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(SHAPES[name], generator=generator)) for name in names}


def stepped(params: Params, step: Callable[[], Any]) -> list[torch.Tensor]:
    """The parameters after steps with gradients that depend on the step alone."""
    for number in range(NUM_STEPS):
        for param, grad in zip(params.values(), made(100 + number, tuple(params)).values(), strict=True):
            param.grad = grad.detach().clone()
        step()
    return [param.detach().clone() for param in params.values()]


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference of an element, relative to the mean square of its tensor."""
    return max(
        float((one - other).abs().max() / other.square().mean().sqrt()) for one, other in zip(ours, theirs, strict=True)
    )


CLOSE, FAR = 2e-6, 1e-4


# --- Hyperball --------------------------------------------------------------------------------------------------------


def hyperball(lr: float) -> list[torch.Tensor]:
    """Of HeavyBall's optimizer the update is the gradient over the root of its second moment: Adam without a first one."""
    params = made(0, ("a", "b"))
    return stepped(params, Chain(list(params.items()), Adam(betas=(0.0, BETA), eps=EPS), Hyperball(), LR(lr)).step)


def test_hyperball_is_heavyballs(heavyball):
    theirs = made(0, ("a", "b"))
    optimizer = heavyball.HyperBallAdamW(theirs.values(), lr=0.05, betas=(0.9, BETA), eps=EPS)
    after = stepped(theirs, optimizer.step)
    assert distance(hyperball(0.05), after) < CLOSE
    assert distance(hyperball(0.05 * 1.001), after) > FAR


# --- AdamC ------------------------------------------------------------------------------------------------------------


def corrected(lr_max: float) -> list[torch.Tensor]:
    """AdamW whose λ follows the learning rate, which halves each second step."""
    params = made(1)
    optimizer = torch.optim.AdamW(params.values(), lr=0.1, betas=(0.9, BETA), eps=EPS, weight_decay=0.3)
    lr = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    decay = CorrectedWeightDecay(optimizer, lr_max)
    return stepped(params, lambda: (optimizer.step(), lr.step(), decay.step()))


@pytest.mark.filterwarnings("ignore:Learning rate changed between steps")
def test_corrected_decay_is_heavyballs_adamc(heavyball):
    theirs = made(1)
    optimizer = heavyball.AdamC(
        theirs.values(), lr=0.1, betas=(0.9, BETA), eps=EPS, weight_decay=0.3, max_lr=0.1, consume_grad=False
    )
    lr = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    after = stepped(theirs, lambda: (optimizer.step(), lr.step()))
    assert distance(corrected(0.1), after) < CLOSE
    assert distance(corrected(0.1 * 1.01), after) > FAR


@pytest.mark.parametrize("foreach", [False, True])
def test_corrected_decay_is_pytorch_optimizers_adamc(foreach):
    theirs = made(1)
    # Only groups that are marked as normalized have it there; the others decay as in AdamW.
    group = {"params": list(theirs.values()), "normalized": True}
    optimizer = library("pytorch_optimizer").AdamC(
        [group], lr=0.1, betas=(0.9, BETA), eps=EPS, weight_decay=0.3, foreach=foreach
    )
    lr = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    after = stepped(theirs, lambda: (optimizer.step(), lr.step()))
    assert distance(corrected(0.1), after) < CLOSE
    assert distance(corrected(0.1 * 1.01), after) > FAR


# --- decay toward the initial parameters, and cautious decay, beside Adam-atan2 ---------------------------------------


@pytest.mark.parametrize(
    ("theirs", "rule"),
    [
        ({"regen_reg_rate": 0.5}, lambda decay: WeightDecay(decay, toward="initial")),
        ({"weight_decay": 0.5, "cautious_wd": True}, CautiousWeightDecay),
        ({"weight_decay": 0.5}, WeightDecay),
    ],
    ids=["initial", "cautious", "plain"],
)
def test_decays_of_adam_atan2(theirs, rule):
    """The same optimizer with its own decay, and without one and with a rule attached."""
    kind = library("adam_atan2_pytorch").AdamAtan2
    expected = made(2)
    after = stepped(expected, kind(expected.values(), lr=0.1, **theirs).step)

    def ours(decay: float) -> list[torch.Tensor]:
        params = made(2)
        optimizer = kind(params.values(), lr=0.1)
        attach(optimizer, rule(decay))
        return stepped(params, optimizer.step)

    assert distance(ours(0.5), after) < CLOSE
    assert distance(ours(0.5 * 1.01), after) > FAR
