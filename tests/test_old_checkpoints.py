"""A checkpoint that distwd 0.1 wrote before the rooms were rebuilt loads, and training goes on with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distwd import LR, Adam, Chain, LinearWeightDecay, RelativeWeightDecay, WeightDecay, Wrap, attach

# Written by commit 27f6242 after three steps of the optimizers below, on torch 2.13: the state dicts of optimizer and
# schedule, the parameters then, the gradients of two more steps, and the parameters after those.
SAVED: dict[str, Any] = torch.load(Path(__file__).parent / "data/checkpoint_0_1.pt", weights_only=True)


def chain(params: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": [("w", params["w"])]},
        {"params": [("norm", params["norm"]), ("low", params["low"])], "weight_decay": 0.05, "weight_decay_1": 0.0},
    ]
    rules = [WeightDecay(0.1), RelativeWeightDecay(0.2, norm_input="params", metric="rms")]
    sgd = Wrap(torch.optim.SGD, momentum=0.9, foreach=False)
    return Chain(groups, Adam(foreach=False), *rules, LR(1e-2), sgd, rounding="stochastic", seed=3)


def attached(params: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    named = [("w", params["w"]), ("norm", params["norm"])]
    optimizer = torch.optim.AdamW(named, lr=1e-2, weight_decay=0, foreach=False)
    attach(optimizer, RelativeWeightDecay(0.3), WeightDecay(0.1))
    return optimizer


@pytest.mark.parametrize(("name", "make"), [("chain", chain), ("attach", attached)])
def test_a_checkpoint_of_0_1_goes_on_bit_for_bit(name, make):
    saved = SAVED[name]
    params = {key: torch.nn.Parameter(value.clone()) for key, value in saved["params"].items()}
    optimizer = make(params)
    schedule = LinearWeightDecay(optimizer, start_factor=1.0, end_factor=0.5, total_iters=4)
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    for grads in SAVED["grads"]:
        for key, grad in grads.items():
            params[key].grad = grad.clone()
        optimizer.step()
        schedule.step()
    assert all(torch.equal(params[key], value) for key, value in saved["after"].items())
    # And it was not nothing that happened.
    assert not torch.equal(saved["after"]["w"], saved["params"]["w"])
