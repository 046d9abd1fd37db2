"""What `bench.py` times beside steps: the float64 partial of a metric, and the building of a plan."""

from __future__ import annotations

import time
from typing import Any

import torch
from bench_ranks import Here
from bench_steps import spread
from torch import Tensor

from distwd.metrics.metric import ABS
from distwd.metrics.moments import local_moments
from distwd.plan.manifest import NUM_COLUMNS
from distwd.plan.owners import resolve


def measure_partial(here: Here, numel: int, rounds: int) -> dict[str, Any]:
    """Σ|x| in float64 of one large tensor, against `x.sum()` of the same, in turns."""
    x = torch.randn(numel, device=here.device)
    local_moments([x], (ABS,))
    times = [(here.seconds(x.sum), here.seconds(lambda: local_moments([x], (ABS,)))) for _ in range(rounds)]
    return {
        "numel": numel,
        "sum_seconds": spread([plain for plain, _ in times]),
        "partial_seconds": spread([partial for _, partial in times]),
        "ratio": spread([partial / plain for plain, partial in times]),
    }


def measure_plan(here: Here, num_params: int, num_ranks: int) -> dict[str, Any]:
    """Finding the owners of `num_params` tensors, each cut over `num_ranks`, from descriptions made up here.

    What the exchange itself takes is the network's and is not in it. bytes: at the peak, with the descriptions themselves.
    """
    rows = _descriptions(num_params, num_ranks)
    start = time.perf_counter()
    found = resolve(rows, 0, 1)
    seconds = time.perf_counter() - start
    assert [*found.mismatched, *found.uncovered, *found.drifted] == [], "the made-up descriptions should make a plan"
    assert int(found.owned.sum()) == num_params, "every piece has one holder here"
    _, peak = here.bytes_of(lambda: None, lambda: resolve(rows, 0, 1))
    described = num_params * num_ranks * NUM_COLUMNS * 8
    return {"params": num_params, "ranks": num_ranks, "seconds": seconds, "bytes": peak + described}


def _descriptions(num_params: int, num_ranks: int) -> list[Tensor]:
    """The rows of every rank (see distwd/plan/manifest.py) for tensors that are cut over all ranks, as by FSDP2."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-(1 << 62), 1 << 62, shape, generator=generator)

    names, metas, measures = numbers(num_params), numbers(num_params), numbers(num_ranks, num_params)
    wholes = measures.sum(0)  # wraps around, as measures do
    numel, group = torch.full_like(names, 4096), torch.zeros_like(names)
    return [torch.stack([names, metas, wholes, measure, numel, group, group], dim=1) for measure in measures]
