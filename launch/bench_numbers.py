"""What `bench.py` times beside steps: the float64 partial of a metric, and the building of a plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from distwd.cli.timing import Here, bytes_of, spread
from distwd.kernels.blocks import Workspace
from distwd.kernels.compile import check_compiler
from distwd.kernels.sums import ABS, local_statistics
from distwd.sharding.ownership import checksums_of, resolve, rows_of
from distwd.sharding.pieces import Meshes, describe


def measure_partial(here: Here, numel: int, rounds: int) -> dict[str, Any]:
    """Σ|x| in float64 of one large tensor, and the same compiled where that works, against `x.sum()` of the same, in turns."""
    x = torch.randn(numel, device=here.device)
    ways: dict[str, Callable[[], Any]] = {"sum": x.sum}
    for way, compiles in {"partial": False, "compiled": True}.items():
        if not compiles or _has_compiler(here.device.type):
            ways[way] = partial(local_statistics, [x], (ABS,), Workspace(compiles))
            ways[way]()  # compiles
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            times[way].append(here.times(run)[0])
    return {
        "numel": numel,
        "seconds": {way: spread(own) for way, own in times.items()},
        "ratio": {
            way: spread([one / plain for one, plain in zip(own, times["sum"], strict=True)])
            for way, own in times.items()
        },
    }


def _has_compiler(device_type: str) -> bool:
    try:
        return not check_compiler(device_type)
    except ValueError:
        return False


def measure_plan(here: Here, num_params: int, num_ranks: int, held: str = "cut") -> dict[str, Any]:
    """Finding the owners of `num_params` tensors over `num_ranks` from descriptions made up here; held: a key of HELD.

    What the exchange itself takes is the network's and is not in it. bytes: at the peak, with the descriptions themselves.
    """
    rows = HELD[held](num_params, num_ranks)
    start = time.perf_counter()
    found = resolve(rows, 0)
    seconds = time.perf_counter() - start
    assert [*found.mismatched, *found.uncovered, *found.drifted] == [], "the made-up descriptions should make a plan"
    assert int(found.owned.sum()) == len(rows[0]), "the first rank is the lowest holder of all it holds"
    _, peak = bytes_of(here.device, lambda: None, lambda: resolve(rows, 0))
    described = sum(part.numel() * part.element_size() for part in rows)
    return {
        "held": held,
        "params": num_params,
        "ranks": num_ranks,
        "rows": sum(map(len, rows)),
        "seconds": seconds,
        "bytes": peak + described,
    }


def measure_telling(num_params: int, num_ranks: int) -> dict[str, Any]:
    """One rank's own part: describing `num_params` DTensors of 4096 elements, cut over `num_ranks`, hashing, and checksums."""
    mesh = DeviceMesh("cpu", torch.arange(num_ranks), _init_backend=False, _rank=0)
    locals_ = [torch.zeros(64, 64) for _ in range(num_params)]
    shape, stride = torch.Size((64 * num_ranks, 64)), (64, 1)
    params = [DTensor.from_local(x, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride) for x in locals_]
    meshes: Meshes = {}
    start = time.perf_counter()
    pieces = [describe(f"layers.{number}.weight", param, meshes=meshes) for number, param in enumerate(params)]
    rows = rows_of(pieces, [0] * num_params, checksums_of(locals_), named=True)
    return {"params": len(rows), "ranks": num_ranks, "seconds": time.perf_counter() - start}


def _cut(num_params: int, num_ranks: int) -> list[Tensor]:
    """As by FSDP2: each rank has a piece of every tensor."""
    return _descriptions(torch.ones(num_ranks, num_params, dtype=torch.bool), copies=1)


def _copied(num_params: int, num_ranks: int) -> list[Tensor]:
    """As by HSDP: pieces of every tensor, and three copies of each piece beside it."""
    return _descriptions(torch.ones(num_ranks, num_params, dtype=torch.bool), copies=4)


def _uneven(num_params: int, num_ranks: int) -> list[Tensor]:
    """As by pipeline stages, or by small tensors: a rank holds one tensor in three or so, and no two the same number."""
    generator = torch.Generator().manual_seed(1)
    return _descriptions(torch.rand(num_ranks, num_params, generator=generator) < 0.3, copies=1)


HELD: dict[str, Callable[[int, int], list[Tensor]]] = {"cut": _cut, "copied": _copied, "uneven": _uneven}


def _descriptions(held: Tensor, copies: int) -> list[Tensor]:
    """The rows of every rank (see distwd/plan/manifest.py); held: [ranks, params], `copies` ranks in turn have equal pieces."""
    generator = torch.Generator().manual_seed(0)
    num_ranks, num_params = held.shape

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-(1 << 62), 1 << 62, shape, generator=generator)

    names, metas = numbers(num_params), numbers(num_params)
    measures = numbers(num_ranks // copies, num_params)
    wholes = torch.where(held[::copies], measures, 0).sum(0)  # wraps around, as measures do
    numel, group = torch.full_like(names, 4096), torch.zeros_like(names)
    parts = measures.repeat_interleave(copies, 0)
    return [
        torch.stack([names, metas, wholes, measure, numel, group, group], dim=1)[mine]
        for measure, mine in zip(parts, held, strict=True)
    ]
