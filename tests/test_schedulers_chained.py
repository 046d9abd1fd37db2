"""Schedules of weight decay beside chained lr schedules, on a plain optimizer, a chain and an attached rule; formulas of others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from distwd import LR, Adam, Chain, CorrectedWeightDecay, CosineWeightDecay, LinearWeightDecay, WeightDecay, attach

DECAY, PEAKS = 0.5, (0.125, 0.5)


def made(kind: str) -> tuple[torch.optim.Optimizer, str]:
    """An optimizer of two groups with an lr of their own, and the key of its decay."""
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))]
    groups = [{"params": [param], "lr": lr} for param, lr in zip(params, PEAKS, strict=True)]
    if kind == "chain":
        return Chain(groups, Adam(), WeightDecay(DECAY), LR(0.1)), "weight_decay"
    optimizer = torch.optim.AdamW(groups, weight_decay=0 if kind == "attached" else DECAY)
    if kind == "attached":
        attach(optimizer, WeightDecay(DECAY))
    return optimizer, "distwd_weight_decay" if kind == "attached" else "weight_decay"


def sequence(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(optimizer, 5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


CHAINED = {
    "sequential": sequence,
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=list(PEAKS), total_steps=9, cycle_momentum=False),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.25, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("given", [None, list(PEAKS)], ids=["running peak", "given peak"])
@pytest.mark.parametrize(("form", "power"), [("corrected", 2), ("independent", 1)])
@pytest.mark.parametrize("schedule", CHAINED)
@pytest.mark.parametrize("kind", ["plain", "chain", "attached"])
def test_decay_is_scheduled_by_a_chained_lr_with_the_peak_of_each_group(kind, schedule, form, power, given):
    """With gradients of 0 every step is p·(1 − (η²/η_max)·λ), or η/η_max."""
    optimizer, key = made(kind)
    rates = CHAINED[schedule](optimizer)
    decays = CorrectedWeightDecay(optimizer, given, form=form)
    expected, tops = [1.0, 1.0], [0.0, 0.0]
    for _ in range(8):
        lrs = [group["lr"] for group in optimizer.param_groups]
        tops = list(PEAKS) if given else [max(top, lr) for top, lr in zip(tops, lrs, strict=True)]
        shares = [(lr if power == 2 else 1.0) / top for lr, top in zip(lrs, tops, strict=True)]
        assert [group[key] for group in optimizer.param_groups] == pytest.approx(
            [DECAY * share for share in shares], rel=1e-12
        )
        expected = [p * (1 - lr * DECAY * share) for p, lr, share in zip(expected, lrs, shares, strict=True)]
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.zeros_like(group["params"][0])
        optimizer.step()
        rates.step()
        decays.step()
    for value, group in zip(expected, optimizer.param_groups, strict=True):
        torch.testing.assert_close(
            group["params"][0].detach(), torch.full_like(group["params"][0], value), rtol=1e-5, atol=0
        )


def values_of(optimizer: torch.optim.Optimizer, scheduler, count: int) -> list[float]:
    seen = []
    for _ in range(count):
        seen.append(optimizer.param_groups[0]["weight_decay"])
        optimizer.step()
        scheduler.step()
    return seen


def test_a_cosine_up_is_dinos():
    """final + (base − final)·(1 + cos(π·i/n))/2, for i of n iterations."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], weight_decay=0.04)
    dino = [0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * i / 50)) for i in range(50)]
    assert values_of(optimizer, CosineWeightDecay(optimizer, T_max=50, wd_min=0.4), 50) == pytest.approx(
        dino, rel=1e-12
    )


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_an_increase_is_megatrons(style):
    """start + c·(end − start) with c the ratio of steps done, or (cos(π·(1 − ratio)) + 1)/2; the end from then on."""
    start, end, steps = 0.03, 0.3, 20
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], weight_decay=start)
    if style == "linear":
        scheduler = LinearWeightDecay(optimizer, 1.0, end / start, steps)
    else:
        scheduler = CosineWeightDecay(optimizer, T_max=steps, wd_min=end)
    ratios = [min(i / steps, 1.0) for i in range(steps + 5)]
    shares = ratios if style == "linear" else [0.5 * (math.cos(math.pi * (1 - ratio)) + 1) for ratio in ratios]
    expected = [start + share * (end - start) for share in shares]
    assert values_of(optimizer, scheduler, steps + 5) == pytest.approx(expected, rel=1e-12)
