"""The oracle is checked against torch's own reductions and optimizers before it judges anything."""

from __future__ import annotations

import math

import pytest
import torch

from tests.layouts import whole_model
from tests.oracle import AdamPart, Decay, LrPart, Oracle, SgdPart, direction, metric_of

TENSORS = [value.double() for value in whole_model(0).values()]
FLAT = torch.cat([tensor.reshape(-1) for tensor in TENSORS])

EXPECTED = {
    "mad": FLAT.abs().mean(),
    "std": FLAT.std(),
    "var": FLAT.var(),
    "sum": FLAT.sum(),
    "rms": FLAT.square().mean().sqrt(),
    "l0": torch.linalg.vector_norm(FLAT, 0),
    "l1": torch.linalg.vector_norm(FLAT, 1),
    "l2": torch.linalg.vector_norm(FLAT, 2),
    "l3": torch.linalg.vector_norm(FLAT, 3),
    "l4": torch.linalg.vector_norm(FLAT, 4),
    "linf": torch.linalg.vector_norm(FLAT, math.inf),
    2.5: torch.linalg.vector_norm(FLAT, 2.5),
    0.5: torch.linalg.vector_norm(FLAT, 0.5),
    math.inf: torch.linalg.vector_norm(FLAT, math.inf),
    -math.inf: torch.linalg.vector_norm(FLAT, -math.inf),
}


@pytest.mark.parametrize("metric", EXPECTED, ids=str)
def test_metrics_agree_with_torch(metric):
    assert metric_of(TENSORS, metric) == pytest.approx(EXPECTED[metric].item(), rel=1e-13)


def test_directions_point_away_from_zero():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0]).double()
    assert torch.equal(direction(x, 1), x.sign())
    assert torch.equal(direction(x, 2), x)
    assert torch.equal(direction(x, 3), x * x.abs())
    assert torch.equal(direction(x, 4), x**3)
    # torch leaves square roots to MKL, which on some Intel processors is an ulp off for one number in 150.
    assert direction(x, 1.5)[0].item() == pytest.approx(-math.sqrt(2), rel=2**-52, abs=0)


@pytest.mark.parametrize(
    ("parts", "make"),
    [
        ([AdamPart(), LrPart(0.01)], lambda p: torch.optim.Adam(p, lr=0.01)),
        ([Decay(0.1), AdamPart(), LrPart(0.01)], lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
        ([AdamPart(), Decay(0.1), LrPart(0.01)], lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
        ([Decay(0.1), SgdPart(0.9), LrPart(0.01)], lambda p: torch.optim.SGD(p, 0.01, 0.9, weight_decay=0.1)),
    ],
    ids=["adam", "coupled", "decoupled", "sgd"],
)
def test_chains_agree_with_torch(parts, make):
    oracle = Oracle(whole_model(0), parts)
    params = {name: value.double().requires_grad_() for name, value in whole_model(0).items()}
    optimizer = make(list(params.values()))
    for step in range(3):
        grads = whole_model(1 + step)
        for name, param in params.items():
            param.grad = grads[name].double()
        oracle.step(grads)
        optimizer.step()
    for name, param in params.items():
        torch.testing.assert_close(oracle.params[name], param.detach(), rtol=1e-12, atol=1e-14)
