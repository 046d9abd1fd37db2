"""Decay that rounds away: a warning where it is certain, a share where it is measured."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import distwd
from tests import layouts, runs, wire
from tests.layouts import LAYOUTS, NUM_ELEMENTS, whole_model
from tests.runs import PARAMS_SEED

BF16, FP16 = torch.bfloat16, torch.float16
SGD = distwd.Wrap(torch.optim.SGD)

# --- the share ------------------------------------------------------------------------------------------------------

# λ times a factor, which is 1, or 0 for the same step without decay.
CHAINS = {
    "after lr": lambda on: [distwd.Adam(), distwd.LR(1e-3), distwd.WeightDecay(on * 3e-3)],
    "sgd": lambda on: [SGD, distwd.WeightDecay(on * 0.1), distwd.LR(0.01)],
    "cautious": lambda on: [distwd.Adam(), distwd.CautiousWeightDecay(on * 3.0, 1), distwd.LR(1e-3)],
    "direct": lambda on: [distwd.DirectWeightDecay(on * 3e-3), distwd.LR(0.0)],
    "relative": lambda on: [SGD, distwd.RelativeWeightDecay(on * 10.0), distwd.LR(1e-3)],
    "two": lambda on: [SGD, distwd.WeightDecay(on * 0.1), distwd.LR(0.01), distwd.WeightDecay(on * 1e-3, 3)],
}
ATTACHED = {
    "before": ([torch.optim.SGD, {}], lambda on: [distwd.WeightDecay(on * 0.3)]),
    "behind": ([torch.optim.SGD, {}], lambda on: [distwd.CautiousWeightDecay(on * 0.3)]),
    "a host that reads parameters": ([torch.optim.ASGD, {"lambd": 0.0}], lambda on: [distwd.WeightDecay(on * 0.3)]),
}


def halves(dtype: torch.dtype) -> tuple[dict[str, torch.nn.Parameter], list[dict]]:
    """The model in two groups; a tensor without gradient is nobody's."""
    params = {name: torch.nn.Parameter(value) for name, value in whole_model(PARAMS_SEED, dtype).items()}
    for name, grad in runs.grads_of(0, dtype).items():
        params[name].grad = grad if name != "head.weight" else None
    pairs = list(params.items())
    return params, [{"params": pairs[:4]}, {"params": pairs[4:]}]


def shares(with_decay: dict, without: dict) -> list[float]:
    """By group, of the elements that had a gradient."""
    names = list(with_decay)
    groups = [names[:4], [name for name in names[4:] if name != "head.weight"]]
    same = [torch.cat([(with_decay[n] == without[n]).flatten() for n in group]) for group in groups]
    return [one.double().mean().item() for one in same]


def chain_step(chain_name: str, on: float, dtype: torch.dtype, **kwargs) -> tuple[dict, dict]:
    params, groups = halves(dtype)
    chain = distwd.Chain(groups, *CHAINS[chain_name](on), track_unchanged=True, **kwargs)
    chain.step()
    return {name: param.detach() for name, param in params.items()}, chain.stats()


def attached_step(chain_name: str, on: float, dtype: torch.dtype, **kwargs) -> tuple[dict, dict]:
    params, groups = halves(dtype)
    (cls, settings), rules = ATTACHED[chain_name]
    optimizer = cls(groups, lr=0.01, **settings)
    attachment = distwd.attach(optimizer, *rules(on), track_unchanged=True, **kwargs)
    optimizer.step()
    return {name: param.detach() for name, param in params.items()}, attachment.stats()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("step", "chain_name"),
    [(chain_step, chain_name) for chain_name in CHAINS] + [(attached_step, chain_name) for chain_name in ATTACHED],
)
def test_the_share_is_of_what_would_be_the_same_without_decay(step, chain_name, dtype, rounding):
    after, stats = step(chain_name, 1.0, dtype, rounding=rounding)
    without, _ = step(chain_name, 0.0, dtype, rounding=rounding)
    measured = [stats["unchanged_here"][group].item() for group in (0, 1)]
    assert measured == pytest.approx(shares(after, without), abs=1e-6)
    assert min(measured) < 1


def test_some_shares_are_neither_all_nor_nothing():
    measured = [chain_step(chain_name, 1.0, BF16)[1]["unchanged_here"][0].item() for chain_name in CHAINS]
    assert sum(0.05 < share < 0.95 for share in measured) > len(measured) / 2


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("through", ["chain", "attach"])
def test_a_decay_that_the_optimizer_does_itself_counts_as_written_alone(through, fused):
    """As torch's kernels but the fused ones do write it."""
    params, groups = halves(BF16)
    before = {name: param.detach().clone() for name, param in params.items()}
    if through == "chain":
        rules = distwd.Adam(fused=fused), distwd.WeightDecay(0.3), distwd.LR(0.01)
        optimizer = with_stats = distwd.Chain(groups, *rules, track_unchanged=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0, fused=fused)
        with_stats = distwd.attach(optimizer, distwd.WeightDecay(0.3), track_unchanged=True)
    optimizer.step()
    expected = shares(before, {name: (p.float() * (1 - 0.003)).to(BF16) for name, p in before.items()})
    assert [share.item() for share in with_stats.stats()["unchanged_here"].values()] == pytest.approx(
        expected, abs=1e-6
    )


def test_nothing_is_counted_unless_asked():
    _, groups = halves(BF16)
    chain = distwd.Chain(groups, *CHAINS["sgd"](1.0))
    chain.step()
    assert chain.stats() == {}
    assert distwd.Chain(groups, *CHAINS["sgd"](1.0), track_unchanged=True).stats() == {"unchanged_here": {}}


def tracked(layout: str, chain_name: str) -> tuple[float, int, list[str]]:
    """The share of what this rank holds, how much that is, and what went over the wire in a step that reads nothing."""
    held = layouts.place(layout, whole_model(PARAMS_SEED, BF16))
    chain = distwd.Chain(held.items(), *CHAINS[chain_name](1.0), track_unchanged=True)
    runs.feed(layout, held, 0)
    chain.step()
    first = chain.stats()["unchanged_here"]
    with wire.no_host_sync(), wire.Wire() as seen:
        chain.step()
        chain.stats()
    share = first[0].item() if first else 0.0
    return share, sum(layouts.local_of(param).numel() for param in held.values()), seen.calls


@pytest.mark.parametrize(("chain_name", "num_calls"), [("sgd", 0), ("relative", 1)])
def test_the_share_of_a_rank_is_of_its_own_elements(worlds, chain_name, num_calls):
    ((whole, total, _),) = worlds.run(0, tracked, "single", chain_name)
    ranks = worlds.run(LAYOUTS["fsdp3"].ranks, tracked, "fsdp3", chain_name)
    assert sum(size for _, size, _ in ranks) == total == NUM_ELEMENTS
    assert sum(share * size for share, size, _ in ranks) / total == pytest.approx(whole, abs=1e-6)
    assert [len(calls) for *_, calls in ranks] == [num_calls] * 3


# --- the warning ----------------------------------------------------------------------------------------------------


def parameter(dtype: torch.dtype = BF16) -> Tensor:
    w = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    w.grad = torch.ones_like(w)
    return w


def chained(*transforms, dtype: torch.dtype = BF16, **kwargs):
    return distwd.Chain([parameter(dtype)], *transforms, **kwargs)


def attached(*rules, dtype: torch.dtype = BF16, cls=torch.optim.AdamW, **kwargs):
    optimizer = cls([parameter(dtype)], lr=1e-3, weight_decay=0)
    distwd.attach(optimizer, *rules, **kwargs)
    return optimizer


DECAY, LR = distwd.WeightDecay(0.1), distwd.LR(1e-3)
LOST = {
    "handed": lambda: chained(distwd.Adam(), DECAY, LR),
    "written": lambda: chained(SGD, DECAY, LR),
    "after lr": lambda: chained(distwd.Adam(), LR, distwd.WeightDecay(1e-4)),
    "cautious": lambda: chained(distwd.Adam(), distwd.CautiousWeightDecay(0.1), LR),
    "direct": lambda: chained(distwd.DirectWeightDecay(1e-4), LR),
    "two": lambda: chained(SGD, DECAY, LR, distwd.WeightDecay(1e-3)),
    "fp16": lambda: chained(SGD, DECAY, LR, dtype=FP16),
    # A number on the device is read in first steps only.
    "a tensor lr": lambda: chained(SGD, DECAY, distwd.LR(torch.tensor(1e-3))),
    "a tensor decay": lambda: chained(SGD, distwd.WeightDecay(torch.tensor(0.1)), LR),
    "relative": lambda: chained(SGD, distwd.RelativeWeightDecay(0.1), LR),
    "attached": lambda: attached(DECAY),
    "attached, behind": lambda: attached(distwd.CautiousWeightDecay(1e-3), coupling="none"),
}
KEPT = {
    "float32": lambda: chained(distwd.Adam(), DECAY, LR, dtype=torch.float32),
    "stochastic": lambda: chained(distwd.Adam(), DECAY, LR, rounding="stochastic"),
    "large": lambda: chained(SGD, distwd.WeightDecay(2.01), LR),
    "two that are large together": lambda: chained(SGD, distwd.WeightDecay(1.01), LR, distwd.WeightDecay(1e-3)),
    "no decay": lambda: chained(SGD, distwd.WeightDecay(0.0), LR),
    "of another order": lambda: chained(SGD, distwd.WeightDecay(0.1, 1), LR),
    "coupled": lambda: chained(DECAY, SGD, LR),
    "coupled, attached": lambda: attached(DECAY, cls=torch.optim.Adam, coupling="gradient"),
    "fp16": lambda: chained(SGD, distwd.WeightDecay(0.25), LR, dtype=FP16),
}


@pytest.mark.parametrize("name", LOST)
def test_a_decay_that_rounds_away_is_a_warning_once(name):
    optimizer = LOST[name]()
    with pytest.warns(UserWarning, match=r"param_groups\[0\].*float16 parameter.*rounding='stochastic'") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("name", KEPT)
def test_a_decay_that_may_be_seen_is_none(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KEPT[name]().step()


def test_decay_weights_warns_too():
    with pytest.warns(UserWarning, match="param 0: the decay takes 0.0001 of a bfloat16"):
        distwd.decay_weights_([parameter()], 1e-4)


@pytest.mark.parametrize(("dtype", "half"), [(BF16, 2.0**-9), (FP16, 2.0**-12)], ids=str)
def test_the_warning_is_true(dtype, half):
    """Every number of the dtype but the subnormals stays under a smaller decay; not so under a larger one."""
    every = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite() & (every >= torch.finfo(dtype).tiny)]

    def decayed(rate: float) -> Tensor:
        w = every.clone()
        distwd.decay_weights_([w], rate)
        return w

    assert torch.equal(decayed(half * 0.999), every)
    assert not torch.equal(decayed(half * 1.001), every)
