"""Trains a chain on a layout, as each rank does it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tests import layouts
from tests.chains import CHAINS, numbers_of, transforms_of
from tests.layouts import EVERY, LARGE, whole_model
from tests.oracle import Oracle
from tests.wire import Wire
from tests.world import Worlds

PARAMS_SEED, GRADS_SEED = 7, 100


@dataclass
class Run:
    """What one rank saw: whole parameters at the end, and per step coefficients, metrics and collectives."""

    params: dict[str, Tensor]
    phases: int
    coefficients: list[list[Tensor]] = field(default_factory=list)
    metrics: list[list[Tensor]] = field(default_factory=list)
    wires: list[list[str]] = field(default_factory=list)


def grads_of(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return whole_model(GRADS_SEED + step, dtype, scale=0.1)


@functools.cache
def _placed_grads(layout: str, step: int, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    return layouts.place(layout, grads_of(step, dtype))


def feed(layout: str, held: Mapping[str, nn.Parameter], step: int, without: Sequence[str] = ()) -> None:
    """Give the held parameters this step's gradients, but those named in `without`."""
    for name, param in held.items():
        grad = _placed_grads(layout, step, param.dtype)[name].detach().clone()
        param.grad = None if name in without else grad


def feed_model(model: nn.Module, step: int) -> None:
    """Give every parameter of a model its part of a gradient that is the same on any sharding."""
    for number, param in enumerate(model.parameters()):
        whole = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + number))
        is_whole = not isinstance(param, DTensor)
        param.grad = whole if is_whole else distribute_tensor(whole, param.device_mesh, param.placements)


def wholes_of(model: nn.Module) -> list[Tensor]:
    """The whole parameters of a model. A collective where they are DTensors."""
    wholes = [param.full_tensor() if isinstance(param, DTensor) else param for param in model.parameters()]
    return [whole.detach().clone() for whole in wholes]


def train(layout: str, chain_name: str, num_steps: int = 3, dtype: torch.dtype = torch.float32, **adam) -> Run:
    """Runs on a rank: `num_steps` of the chain from the seeded model, with the seeded gradients."""
    import distwd

    held = layouts.place(layout, whole_model(PARAMS_SEED, dtype))
    chain = distwd.Chain(held.items(), *transforms_of(CHAINS[chain_name].parts, **adam), layout=held.marks)
    return train_chain(chain, layout, held, num_steps)


def train_chain(chain, layout: str, held: Mapping[str, nn.Parameter], num_steps: int, first_step: int = 0) -> Run:
    run = Run({}, 0)
    for step in range(first_step, first_step + num_steps):
        feed(layout, held, step)
        with Wire() as wire:
            chain.step()
        run.wires.append(wire.calls)
        run.coefficients.append([number.clone() for number in numbers_of(chain.stats(), "coefficient")])
        run.metrics.append([number.clone() for number in numbers_of(chain.stats(), "metric")])
    run.phases = chain.phases
    run.params = layouts.view(layout, held)
    return run


# Runs are seeded, so the same run is made once in a pytest process, however many laws look at it.
_known: dict[tuple, list[Run]] = {}


def alone(worlds: Worlds, chain_name: str, num_steps: int = 3, dtype: torch.dtype = torch.float32, **adam) -> Run:
    """The same run in one process without a process group."""
    return spread(worlds, "single", chain_name, num_steps, dtype, **adam)[0]


def spread(worlds: Worlds, layout: str, chain_name: str, num_steps: int = 3, dtype=torch.float32, **adam) -> list[Run]:
    """The run on every rank of the layout."""
    key = (layout, chain_name, num_steps, dtype, *sorted(adam.items()))
    if key not in _known:
        fn = functools.partial(train, **adam)
        _known[key] = worlds.run((EVERY | LARGE)[layout].ranks, fn, layout, chain_name, num_steps, dtype)
    return _known[key]


def oracle_after(chain_name: str, num_steps: int = 3, dtype: torch.dtype = torch.float32) -> Oracle:
    """The oracle after the same steps."""
    oracle = Oracle(whole_model(PARAMS_SEED, dtype), CHAINS[chain_name].parts)
    for step in range(num_steps):
        oracle.step(grads_of(step, dtype))
    return oracle


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Names whose bits differ."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name].double(), theirs[name].double())]
