"""Numbers of numpy, and whatever else is a real number: taken as Python's own, and saved as Python's own."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
import pytest
import torch

from distwd import (
    LR,
    Adam,
    Chain,
    CorrectedWeightDecay,
    CosineWeightDecay,
    LinearWeightDecay,
    Measure,
    RelativeWeightDecay,
    WeightDecay,
    attach,
    decay_weights_,
    param_groups,
)

NUMBERS = [np.float32(0.1), np.float64(0.1), np.float16(0.1), np.int64(1), Fraction(1, 10)]


def optimizer(weight_decay=0.1) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1, weight_decay=weight_decay)


def loads_alone(state: dict) -> bool:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    torch.load(file, weights_only=True)
    return True


@pytest.mark.parametrize(
    "make",
    [
        lambda o: CosineWeightDecay(o, T_max=np.int64(10), wd_min=np.float64(0.4), warmup_iters=np.int32(1)),
        lambda o: LinearWeightDecay(o, start_factor=np.float64(0.1), end_factor=np.float32(1), total_iters=np.int64(3)),
        lambda o: CorrectedWeightDecay(o, lr_max=np.float64(0.1)),
        lambda o: CorrectedWeightDecay(o, lr_max=[np.float32(0.1)]),
        lambda o: CorrectedWeightDecay(o),
    ],
)
def test_a_schedule_is_saved_as_plain_numbers(make):
    adam = optimizer()
    scheduler = make(adam)
    adam.param_groups[0]["lr"] = np.float64(0.2)
    scheduler.step()
    assert loads_alone(scheduler.state_dict())


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", ["chain", "attach"])
@pytest.mark.parametrize("rule", [WeightDecay, RelativeWeightDecay])
def test_a_decay_of_another_library_is_the_number_that_it_is(rule, kind, number):
    found = []
    for given in (number, float(number)):
        w = torch.nn.Parameter(torch.tensor([1.0, -3.0]))
        if kind == "chain":
            made = Chain([("w", w)], Adam(), rule(given), LR(np.float64(0.1)))
            key = "weight_decay"
        else:
            made = torch.optim.AdamW([("w", w)], lr=0.1, weight_decay=0)
            attach(made, rule(given))
            key = "distwd_weight_decay"
        assert loads_alone(made.state_dict())
        for _ in range(2):
            w.grad = torch.ones(2)
            made.step()
            made.param_groups[0][key] = given  # as a training loop assigns its schedule
        found.append(w.detach())
    assert torch.equal(*found)


def test_settings_of_groups_orders_and_metrics_too():
    w = torch.nn.Parameter(torch.tensor([1.0, -3.0]))
    decay_weights_([w], np.float32(0.5), ord=np.int64(2))
    assert torch.equal(w, torch.tensor([0.5, -1.5]))
    assert Measure("grad", np.int64(2)) == Measure("grad", "l2")
    (group,) = param_groups(torch.nn.Linear(2, 2, bias=False), np.float32(0.5), [("*", {"lr": np.float64(0.1)})])
    assert [type(group["weight_decay"]), type(group["lr"])] == [float, float]


@pytest.mark.parametrize("wrong", [np.float32(-0.1), np.float64("nan"), np.bool_(True), np.ones(2)])
def test_what_is_no_such_number_is_refused_still(wrong):
    with pytest.raises(ValueError, match="weight_decay"):
        WeightDecay(wrong)
