"""Chains over the whole model in the pytest process itself, and what the oracle makes of the same steps."""

from __future__ import annotations

import torch

import distwd
from tests.layouts import SHAPES, whole_model
from tests.oracle import Oracle
from tests.runs import grads_of

NAMES = list(SHAPES)
GROUPS = [NAMES[:4], NAMES[4:5], NAMES[5:]]


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(value) for name, value in whole_model(7, dtype, scale=0.3).items()}


def train(chain, params: dict, num_steps: int = 3) -> dict:
    for step in range(num_steps):
        chain.zero_grad()
        grads = grads_of(step, torch.float64)

        def closure(grads=grads):
            for name, param in params.items():
                param.grad = grads[name].clone()
            return sum(param.sum() for param in params.values()).detach()

        chain.step(closure)
    return {name: param.detach() for name, param in params.items()}


def expected(parts: list, num_steps: int = 3, groups: list = GROUPS) -> dict:
    oracle = Oracle(parameters(), parts, groups)
    for step in range(num_steps):
        oracle.step(grads_of(step, torch.float64))
    return oracle.params


def grouped(params: dict, settings: list[dict] | None = None) -> list[dict]:
    """The param groups of GROUPS, with a dict of settings each."""
    settings = settings or [{}, {}, {}]
    return [
        {"params": [(name, params[name]) for name in names]} | given
        for names, given in zip(GROUPS, settings, strict=True)
    ]


def assert_close(ours: dict, theirs: dict, rtol: float = 1e-6) -> None:
    """Float64 all along, but for coefficients, which are rounded to fp32 so that they are the same on any sharding."""
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=rtol, msg=lambda text: f"{name}: {text}")


# --- a chain with a bit of everything, in fp32 ---


def fp32_parameters(seed: int = 7) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(value) for name, value in whole_model(seed).items()}


def make(params, lr: float = 0.01, rate: float = 0.1):
    decay = distwd.RelativeWeightDecay(rate)
    return distwd.Chain(params, distwd.Adam(), decay, distwd.LR(lr), distwd.WeightDecay(1e-4))


def step(chain, params: dict, index: int = 0) -> None:
    for name, param in params.items():
        param.grad = grads_of(index)[name]
    chain.step()


def equal(ours: dict, theirs: dict) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- what ranks did, done again ---


def relative(how: str, params, layout: dict | None = None) -> tuple:
    """Adam, and decay relative to updates, parameters and gradients; as a chain, or attached to torch's own.

    Returns what steps, and what has `stats()` and `plan`.
    """
    rules = [distwd.RelativeWeightDecay(0.1, norm_input=of) for of in ("update", "params", "grad")]
    if how == "chain":
        chain = distwd.Chain(params, distwd.Adam(foreach=True), *rules, distwd.LR(0.01), layout=layout)
        return chain, chain
    # torch's own foreach step refuses a list of DTensors and plain tensors.
    optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0.0, foreach=False)
    return optimizer, distwd.attach(optimizer, *rules, layout=layout)


def seen_of(rule) -> dict:
    """What was measured in the last step, as numbers."""
    return {name: (numbers["metric"].item(), numbers["coefficient"].item()) for name, numbers in rule.stats().items()}


def replay(whole: dict, grads: list[dict], how: str) -> tuple[dict, list[dict]]:
    """The parameters after steps with these whole gradients in one process, and what was measured in each."""
    params = {name: torch.nn.Parameter(value.clone()) for name, value in whole.items()}
    optimizer, rule = relative(how, params.items())
    seen = []
    for given in grads:
        for name, param in params.items():
            param.grad = given[name].clone()
        optimizer.step()
        seen.append(seen_of(rule))
    return {name: param.detach() for name, param in params.items()}, seen
