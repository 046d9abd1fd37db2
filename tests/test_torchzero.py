"""torchzero is where these rules come from; where its code is right, a chain of distwd equals it."""

from __future__ import annotations

import pytest
import torch

import distwd
from tests import releases
from tests.layouts import whole_model
from tests.runs import grads_of

tz = releases.package("torchzero")

METRICS = ["mad", "std", "var", "sum", "l1", "l2", "l3", "l4", "linf"]
EPS = 1e-20  # its Adam adds eps before the bias correction, torch's after: both as good as none


def train(optimizer, params: dict, num_steps: int = 4) -> None:
    for step in range(num_steps):
        grads = grads_of(step, torch.float64)
        for name, param in params.items():
            param.grad = grads[name]
        optimizer.step()


def assert_same_chain(ours: list, theirs: list) -> None:
    """`ours` and `theirs`: transforms of distwd and modules of torchzero, in the same order."""
    mine, other = ({n: torch.nn.Parameter(v) for n, v in whole_model(7, torch.float64).items()} for _ in range(2))
    train(distwd.Chain(mine.items(), *ours), mine)
    train(tz.Optimizer(list(other.values()), *theirs), other)
    assert (
        max((param.detach() - whole_model(7, torch.float64)[name]).abs().max() for name, param in mine.items()) > 1e-3
    )
    for name in mine:
        torch.testing.assert_close(
            mine[name].detach(), other[name].detach(), rtol=1e-6, atol=1e-8, msg=lambda text: f"{name}: {text}"
        )


def around(decay, adam, rate) -> dict[str, list]:
    return {"coupled": [decay, adam, rate], "decoupled": [adam, decay, rate], "constant": [adam, rate, decay]}


PLACES = ["coupled", "decoupled", "constant"]


def both_around(place: str, ours, theirs) -> tuple[list, list]:
    return (
        around(ours, distwd.Adam(eps=EPS), distwd.LR(0.01))[place],
        around(theirs, tz.m.Adam(eps=EPS), tz.m.LR(0.01))[place],
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ord", [1, 2, 4])
def test_weight_decay(place, ord):
    assert_same_chain(*both_around(place, distwd.WeightDecay(0.03, ord), tz.m.WeightDecay(0.03, ord)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ord", [1, 2, 4])
def test_cautious_weight_decay(place, ord):
    ours, theirs = distwd.CautiousWeightDecay(0.03, ord), tz.m.CautiousWeightDecay(0.03, ord)
    assert_same_chain(*both_around(place, ours, theirs))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("norm_input", ["update", "grad", "params"])
def test_relative_weight_decay(place, metric, norm_input):
    settings = {"norm_input": norm_input, "metric": metric}
    ours, theirs = distwd.RelativeWeightDecay(1e-3, **settings), tz.m.RelativeWeightDecay(1e-3, **settings)
    assert_same_chain(*both_around(place, ours, theirs))


@pytest.mark.parametrize("place", PLACES)
def test_cautious_relative_weight_decay(place):
    ours, theirs = distwd.RelativeWeightDecay(0.1, cautious=True), tz.m.RelativeWeightDecay(0.1, cautious=True)
    assert_same_chain(*both_around(place, ours, theirs))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ord", [1, 2])
def test_direct_weight_decay(place, ord):
    assert_same_chain(*both_around(place, distwd.DirectWeightDecay(0.03, ord), tz.m.DirectWeightDecay(0.03, ord)))


@pytest.mark.parametrize("ord", [1, 2, 4])
def test_decay_weights(ord):
    ours, theirs = ([value.clone() for value in whole_model(7, torch.float64).values()] for _ in range(2))
    distwd.decay_weights_(ours, 0.1, ord)
    tz.m.decay_weights_(theirs, 0.1, ord)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_the_reference_grows_negative_weights_where_we_do_not():
    """Its sign is lost for odd orders above one; this is why these orders are not compared."""
    theirs, ours = torch.full((3,), -2.0), torch.full((3,), -2.0)
    tz.m.decay_weights_([theirs], 0.1, 3)
    distwd.decay_weights_([ours], 0.1, 3)
    assert (theirs < -2).all()
    assert (ours > -2).all()
