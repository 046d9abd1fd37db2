"""Schedules of weight decay: their formulas by hand, beside lr schedulers, on any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler

from distwd import LR, Adam, Chain, WeightDecay, attach
from distwd.groups.param_groups import param_groups
from distwd.groups.schedulers import (
    CorrectedWeightDecay,
    CosineWeightDecay,
    InverseTimeWeightDecay,
    LambdaWeightDecay,
    LinearWeightDecay,
)


def adamw(weight_decay: Any = 0.5, lr: Any = 0.125) -> torch.optim.AdamW:
    groups = [
        {"params": [nn.Parameter(torch.ones(2, 3))]},
        {"params": [nn.Parameter(torch.ones(3))], "weight_decay": 0.0},
        {"params": [nn.Parameter(torch.ones(4))]},
    ]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)


def walk(optimizer: torch.optim.Optimizer, num_steps: int, *schedulers: Any) -> list[float]:
    """The decay that each of the steps used."""
    used = []
    for _ in range(num_steps):
        used.append(float(optimizer.param_groups[0]["weight_decay"]))
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return used


def falling(step: int) -> float:
    return 1 / (1 + step)


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_lambda_is_the_base_value_times_a_factor_per_group():
    optimizer = adamw(weight_decay=0.5)
    assert walk(optimizer, 3, LambdaWeightDecay(optimizer, lambda t: 2**-t)) == [0.5, 0.25, 0.125]
    optimizer = adamw(weight_decay=0.5)
    scheduler = LambdaWeightDecay(optimizer, [lambda t: 2**-t, lambda t: 9.0, lambda t: 1 + t])
    walk(optimizer, 2, scheduler)
    assert scheduler.get_last_wd() == [0.125, 0.0, 1.5]


def test_linear_is_a_line_and_then_its_end():
    optimizer = adamw(weight_decay=0.5)
    used = walk(optimizer, 6, LinearWeightDecay(optimizer, start_factor=0.0, end_factor=2.0, total_iters=4))
    assert used == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("end", [0.0, 0.1, 0.4])
def test_cosine_goes_down_or_up_after_its_warm_up_and_stays(end):
    base, warmup, length = 0.2, 3, 6
    optimizer = adamw(weight_decay=base)
    used = walk(optimizer, 12, CosineWeightDecay(optimizer, T_max=length, wd_min=end, warmup_iters=warmup))
    arc = [end + (base - end) * (1 + math.cos(math.pi * t / length)) / 2 for t in range(length + 1)]
    assert used == pytest.approx([0.0, base / 3, 2 * base / 3, *arc, end, end], abs=1e-15)
    assert used[warmup] == base
    assert used[-1] == end


def test_inverse_time_halves_at_the_timescale():
    optimizer = adamw(weight_decay=0.5)
    used = walk(optimizer, 7, InverseTimeWeightDecay(optimizer, 2))
    assert used == pytest.approx([0.5 / (1 + t / 2) for t in range(7)], rel=1e-15)
    assert used[2] == 0.25
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


TWINS = {
    "lambda": (lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)), lambda o: LambdaWeightDecay(o, lambda t: 1 / (1 + t))),
    "linear": (lambda o: lr_scheduler.LinearLR(o, 0.25, 0.75, 5), lambda o: LinearWeightDecay(o, 0.25, 0.75, 5)),
    "linear by default": (lr_scheduler.LinearLR, LinearWeightDecay),
    "cosine": (lambda o: lr_scheduler.CosineAnnealingLR(o, 8, 0.01), lambda o: CosineWeightDecay(o, 8, 0.01)),
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_values_are_those_of_the_lr_twin(name):
    """With the decay where the twin has its lr; both stepped in every iteration."""
    optimizer = adamw(weight_decay=0.125, lr=0.125)
    lr_twin, twin = TWINS[name][0](optimizer), TWINS[name][1](optimizer)
    seen = []
    for _ in range(9):
        lr, decay = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]
        assert decay == pytest.approx(lr, rel=1e-12)
        assert optimizer.param_groups[1]["weight_decay"] == 0.0  # what does not decay never begins to
        seen.append(decay)
        optimizer.step()
        lr_twin.step()
        twin.step()
    assert len(set(seen)) > 4


def peaks_so_far(lrs: list[float]) -> list[float]:
    return [max(lrs[: index + 1]) for index in range(len(lrs))]


@pytest.mark.parametrize("form", ["corrected", "independent"])
@pytest.mark.parametrize("given", [None, 0.25, [0.5, 1.0, 0.25]])
def test_corrected_divides_by_the_peak_of_each_group(form, given):
    optimizer = adamw(weight_decay=0.5, lr=0.0)
    lrs = [[0.0, 0.1, 0.25, 0.2, 0.0], [0.0, 0.1, 0.25, 0.2, 0.0], [0.0, 1.0, 2.5, 2.0, 0.0]]
    scheduler = None
    for step in range(5):
        for group, values in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = values[step]
        if scheduler is None:
            scheduler = CorrectedWeightDecay(optimizer, given, form=form)
        else:
            scheduler.step()
        for index in (0, 2):
            peak = (
                peaks_so_far(lrs[index])[step] if given is None else given[index] if isinstance(given, list) else given
            )
            eta = lrs[index][step] if form == "corrected" else 1.0
            expected = 0.5 * eta / peak if peak else 0.0
            assert optimizer.param_groups[index]["weight_decay"] == pytest.approx(expected, rel=1e-12)
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


@pytest.mark.parametrize(("form", "power"), [("corrected", 2), ("independent", 1), ("squared", 2)])
def test_what_adamw_takes_off_is_adamc_the_independent_decay_or_palms(form, power):
    """With gradients of 0 AdamW only decays:  p ← p·(1 − ηλ_t), which is to be (η²/η_max)·λ, (η/η_max)·λ or η²·λ."""
    optimizer = adamw(weight_decay=0.5, lr=0.25)
    one_cycle = lr_scheduler.OneCycleLR(optimizer, max_lr=0.25, total_steps=8, cycle_momentum=False)
    peak = 1.0 if form == "squared" else 0.25
    scheduler = CorrectedWeightDecay(optimizer, lr_max=None if form == "squared" else peak, form=form)
    param, expected, lrs = optimizer.param_groups[0]["params"][0], 1.0, []
    for _ in range(7):
        lrs.append(optimizer.param_groups[0]["lr"])
        expected *= 1 - lrs[-1] ** power / peak * 0.5
        param.grad = torch.zeros_like(param)
        optimizer.step()
        one_cycle.step()
        scheduler.step()
    torch.testing.assert_close(param.detach(), torch.full((2, 3), expected), rtol=1e-5, atol=0)
    assert max(lrs) / min(lrs) > 10


def test_squared_follows_the_lr_of_each_group():
    optimizer = adamw(weight_decay=0.5, lr=0.25)
    optimizer.param_groups[2]["lr"] = 0.125
    scheduler = CorrectedWeightDecay(optimizer, form="squared")
    assert scheduler.get_last_wd() == [0.125, 0.0, 0.0625]
    optimizer.param_groups[0]["lr"] = 0.0
    scheduler.step()
    assert scheduler.get_last_wd() == [0.0, 0.0, 0.0625]


# --- any optimizer ----------------------------------------------------------------------------------------------------


def test_a_chain_is_scheduled_in_all_its_rules_or_in_one():
    def chain() -> Chain:
        return Chain([nn.Parameter(torch.ones(3))], WeightDecay(0.5), Adam(), WeightDecay(0.25), LR(0.125))

    optimizer = chain()
    scheduler = LambdaWeightDecay(optimizer, lambda t: 1 / (1 + t))
    scheduler.step()
    assert [optimizer.param_groups[0][key] for key in ("weight_decay", "weight_decay_1")] == [0.25, 0.125]
    assert (scheduler.get_last_wd(), scheduler.get_last_wd("weight_decay_1")) == ([0.25], [0.125])
    optimizer = chain()
    LambdaWeightDecay(optimizer, lambda t: 0.5, keys=["weight_decay_1"])
    assert [optimizer.param_groups[0][key] for key in ("weight_decay", "weight_decay_1")] == [0.5, 0.125]
    assert "initial_weight_decay" not in optimizer.param_groups[0]


@pytest.mark.parametrize("scheduled_first", [False, True])
def test_an_attached_rule_is_scheduled(scheduled_first):
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.5)
    scheduler = LambdaWeightDecay(optimizer, lambda t: 1 / (1 + t)) if scheduled_first else None
    attachment = attach(optimizer, WeightDecay(0.5))
    scheduler = scheduler or LambdaWeightDecay(optimizer, lambda t: 1 / (1 + t))
    expected = 1.0
    for t in range(3):
        param.grad = torch.zeros(3)
        optimizer.step()
        scheduler.step()
        expected *= 1 - 0.5 * 0.5 / (1 + t)
    torch.testing.assert_close(param.detach(), torch.full((3,), expected))
    assert scheduler.get_last_wd() == [0.125]
    attachment.remove()
    scheduler.step()
    assert "distwd_weight_decay" not in optimizer.param_groups[0]


def test_a_group_that_comes_later_is_scheduled_from_then_on():
    optimizer = adamw(weight_decay=0.5)
    scheduler = LambdaWeightDecay(optimizer, lambda t: 1 / (1 + t))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.25})
    scheduler.step()
    assert scheduler.get_last_wd() == [0.25, 0.0, 0.25, 0.125]


def stage_values() -> list[float]:
    """Stages that hold different parameters."""
    parts = [nn.Linear(3, 3), nn.LayerNorm(3)]
    model = nn.ModuleDict({f"part{dist.get_rank()}": parts[dist.get_rank()]})
    optimizer = Chain(param_groups(model, 0.5, [("part1.*", {"weight_decay": 0.25})]), WeightDecay(0.9), LR(0.1))
    scheduler = LambdaWeightDecay(optimizer, [lambda t: 1.0, lambda t: 1.0, lambda t: 1 / (1 + t)])
    optimizer.step()
    scheduler.step()
    return scheduler.get_last_wd()


def test_stages_are_scheduled_alike(worlds):
    assert worlds.run(2, stage_values) == [[0.5, 0.0, 0.125]] * 2


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_a_tensor_is_filled_in_place_and_is_each_groups_own():
    optimizer = adamw(weight_decay=torch.tensor(0.5))
    shared = optimizer.param_groups[0]["weight_decay"]
    assert optimizer.param_groups[2]["weight_decay"] is shared  # so torch does it
    scheduler = LambdaWeightDecay(optimizer, [lambda t: 2**-t, lambda t: 1.0, lambda t: 1 + t])
    own = optimizer.param_groups[2]["weight_decay"]
    for _ in range(2):
        scheduler.step()
    assert optimizer.param_groups[0]["weight_decay"] is shared
    assert optimizer.param_groups[2]["weight_decay"] is own
    assert (shared, own) == (torch.tensor(0.125), torch.tensor(1.5))
    last = scheduler.get_last_wd()[0]
    scheduler.step()
    assert last == torch.tensor(0.125)  # a copy


READS = ("__float__", "__bool__", "__int__", "item", "tolist")


@pytest.mark.parametrize(
    ("form", "given", "value"),
    [
        ("corrected", None, 0.25),
        ("corrected", 0.25, 0.25),
        ("independent", None, 2.0),
        ("independent", 0.25, 2.0),
        ("squared", None, 0.0625),
    ],
)
def test_tensors_are_not_read_on_the_host(monkeypatch, form, given, value):
    optimizer = adamw(weight_decay=torch.tensor(0.5), lr=torch.tensor(0.0))
    scheduler = CorrectedWeightDecay(optimizer, given, form=form)
    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a tensor was read"))
        for lr in (0.25, 0.125):
            optimizer.param_groups[0]["lr"].fill_(lr)
            scheduler.step()
    assert optimizer.param_groups[0]["weight_decay"] == value
    # A number beside a tensor lr has to be read.
    optimizer = adamw(weight_decay=0.5, lr=torch.tensor(0.25))
    CorrectedWeightDecay(optimizer, None if form == "squared" else 0.5, form=form)
    assert optimizer.param_groups[0]["weight_decay"] == {"corrected": 0.25, "independent": 1.0, "squared": 0.125}[form]


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a count of 0": (lambda: LinearWeightDecay(adamw(), total_iters=0), "total_iters=0 is not usable"),
    "a count in parts": (lambda: CosineWeightDecay(adamw(), 2.5), "T_max=2.5"),
    "a negative factor": (lambda: LinearWeightDecay(adamw(), -0.5), "start_factor=-0.5"),
    "a negative end": (lambda: CosineWeightDecay(adamw(), 2, -0.5), "wd_min=-0.5"),
    "a negative warm-up": (lambda: CosineWeightDecay(adamw(), 2, warmup_iters=-1), "warmup_iters=-1"),
    "a negative value": (lambda: LambdaWeightDecay(adamw(), lambda t: -1.0), r"param_groups\[0\] weight_decay=-0.5"),
    "a value that is no number": (lambda: LambdaWeightDecay(adamw(), lambda t: math.nan), "weight_decay=nan"),
    "functions for some groups": (lambda: LambdaWeightDecay(adamw(), [lambda t: 1.0]), "wd_lambda has 1 entries"),
    "a peak of 0": (lambda: CorrectedWeightDecay(adamw(), 0.0), "lr_max=0.0 is not usable"),
    "peaks for some groups": (lambda: CorrectedWeightDecay(adamw(), [1.0, 1.0]), "lr_max has 2 entries"),
    "an unknown form": (lambda: CorrectedWeightDecay(adamw(), form="cubed"), "form='cubed' is not known"),
    "a peak for what has none": (lambda: CorrectedWeightDecay(adamw(), 0.5, form="squared"), "knows no lr_max=0.5"),
    "a timescale of 0": (lambda: InverseTimeWeightDecay(adamw(), 0), "timescale=0 is not usable"),
    "a timescale without end": (lambda: InverseTimeWeightDecay(adamw(), math.inf), "timescale=inf is not usable"),
    "a key that no group has": (lambda: LambdaWeightDecay(adamw(), falling, keys=["wd"]), "no group with 'wd'"),
    "an optimizer without decay": (lambda: LambdaWeightDecay(torch.optim.Rprop([torch.ones(1)]), falling), "Rprop has no group with"),
    "a resume without base values": (lambda: LambdaWeightDecay(adamw(), falling, 3), "lack 'initial_weight_decay'"),
    "a state of other groups": (lambda: fresh().load_state_dict({**fresh().state_dict(), "bases": []}), "0 param groups"),
    "a state of another scheduler": (lambda: CosineWeightDecay(adamw(), 2).load_state_dict(fresh().state_dict()), "lacks 'T_max'"),
}  # fmt: skip


def fresh() -> LambdaWeightDecay:
    return LambdaWeightDecay(adamw(), falling)


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_value_changes_nothing():
    optimizer = adamw(weight_decay=0.5)
    scheduler = LambdaWeightDecay(optimizer, [lambda t: 1 + t, lambda t: 1.0, lambda t: 1.0 if t < 1 else -1.0])
    with pytest.raises(ValueError, match=r"param_groups\[2\]"):
        scheduler.step()
    assert (scheduler.last_epoch, scheduler.get_last_wd()) == (0, [0.5, 0.0, 0.5])


def test_only_an_optimizer_is_scheduled():
    with pytest.raises(TypeError, match="list is not an optimizer"):
        LambdaWeightDecay([], falling)
    without_lr = Chain([nn.Parameter(torch.ones(2))], WeightDecay(0.5))
    with pytest.raises(ValueError, match=r"param_groups\[0\] has no 'lr'"):
        CorrectedWeightDecay(without_lr)
