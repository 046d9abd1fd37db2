"""Tensors on meshes, as data: any mesh, any of its axes, any placements; plain copies, plain pieces, pipeline stages.

`look` is what one rank sees of a case, as a thread or as a process; `check` holds what all ranks saw against whole tensors.
Which elements a rank holds is never computed here: torch cuts a tensor of element numbers as it cuts the parameter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

import distwd
from distwd.sharding.layout import Sharded
from distwd.sharding.pieces import Piece
from tests.layouts import local_of
from tests.oracle import metric_of

METRICS = ("mad", "std", "sum", "l0", "l2", "linf", float("-inf"), 1.5)
PER_TENSOR = {"l2": "params", "mad": "grad"}
AXES = "abc"


@dataclass(frozen=True)
class TensorPlacement:
    """How one tensor lies on a mesh.

    axes: those of the mesh that its DTensor knows; over the others lie copies, which no DTensor shows. (): a plain tensor.
    placements: one for each of `axes`. fsdp: then FSDP2 cuts what is there along this axis, too.
    shares: a plain tensor's pieces along its one axis are about so long. stage: (axis, index), if only ranks there hold it.
    """

    axes: tuple[int, ...] = ()
    placements: tuple[Placement, ...] = ()
    shares: tuple[float, ...] = ()
    fsdp: int | None = None
    stage: tuple[int, int] | None = None

    def __str__(self) -> str:
        parts = [f"{AXES[axis]}={place}" for axis, place in zip(self.axes, self.placements, strict=False)]
        parts += [f"{AXES[axis]}={self.shares}" for axis in self.axes if self.shares]
        parts += [f"fsdp={AXES[self.fsdp]}"] if self.fsdp is not None else []
        return " ".join(parts + ([f"at {self.stage}"] if self.stage else [])) or "plain"

    @property
    def num_dims(self) -> int:
        """Dimensions that a tensor needs to lie this way."""
        cut = [place.dim + 1 for place in self.placements if isinstance(place, Shard)]
        return max([*cut, 1 if self.shares or self.fsdp is not None else 0], default=0)


@dataclass(frozen=True)
class Case:
    """Tensors on a mesh of the ranks `ranks` of a world: name -> way and shape."""

    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    tensors: tuple[tuple[TensorPlacement, tuple[int, ...]], ...]
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def named(self) -> dict[str, tuple[TensorPlacement, tuple[int, ...]]]:
        return {f"{n} {way} {list(shape)}": (way, shape) for n, (way, shape) in enumerate(self.tensors)}

    def whole(self, seed: int) -> dict[str, Tensor]:
        """Whole values, with zeros among them, of a size that differs by tensor."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        values = {}
        for number, (name, (_, shape)) in enumerate(self.named.items()):
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            values[name] = (torch.where(noise.abs() < 0.2, 0.0, noise) * (0.25 + number % 7)).to(self.dtype)
        return values

    def numbers(self) -> dict[str, Tensor]:
        return {name: torch.arange(math.prod(shape)).double().reshape(shape) for name, (_, shape) in self.named.items()}


def place(way: TensorPlacement, whole: Tensor, mesh: DeviceMesh) -> Tensor | None:
    """This rank's tensor, or None if it holds none."""
    coordinate = mesh.get_coordinate()
    if coordinate is None or (way.stage is not None and coordinate[way.stage[0]] != way.stage[1]):
        return None
    if way.shares:
        lengths = lengths_of(way.shares, whole.numel())
        return whole.reshape(-1).split(lengths)[coordinate[way.axes[0]]]
    if way.placements:
        axes = tuple(AXES[axis] for axis in way.axes)
        # Without a source rank: nothing is sent, each rank cuts its own copy.
        whole = distribute_tensor(whole, mesh[axes], way.placements, src_data_rank=None)
    if way.fsdp is None:
        return whole
    module = nn.Module()
    module.weight = nn.Parameter(whole)
    fully_shard(module, mesh=mesh[AXES[way.fsdp]])
    return module.weight.detach()


def lengths_of(shares: Sequence[float], numel: int) -> list[int]:
    """Whole numbers that add up to `numel`, about in these proportions."""
    total = sum(shares) or 1.0
    edges = [round(numel * part / total) for part in itertools.accumulate(shares, initial=0.0)]
    edges[-1] = numel
    return [stop - start for start, stop in itertools.pairwise(edges)]


@dataclass
class Seen:
    """What one rank saw of a case, by name."""

    held: dict[str, list[int]]  # numbers of the elements that lie here
    planned: dict[str, list[int]]  # the same, by the plan's pieces
    owned: set[str]
    metrics: dict[str | float, float]
    by_tensor: list[dict[str, float]]
    params: dict[str, Tensor]
    numel: int


def look(case: Case) -> Seen | None:
    """Runs on a rank: place, plan, measure, take two steps. None on a rank that is not of the case."""
    group = dist.new_group(case.ranks) if len(case.ranks) < dist.get_world_size() else None
    mesh, params, layout = set_up(case)
    if dist.get_rank() not in case.ranks:
        return None
    chain = chain_of(case, params, group=group, layout=layout)
    plan = chain.plan
    metrics = {metric: plan.metric([p.detach() for p in params.values()], metric).item() for metric in METRICS}
    for step in (2, 3):
        for name, grad in placed(case, case.whole(step), mesh).items():
            params[name].grad = grad
        chain.step()
    numbers = {name: local_of(t).flatten().long().tolist() for name, t in placed(case, case.numbers(), mesh).items()}
    planned = {piece.name: numbers_of(piece) for piece in plan.pieces if not piece.is_counted}
    owned = {entry.name for entry, own in zip(plan.entries, plan.owned, strict=True) if own}
    locals_ = {name: local_of(param).clone() for name, param in params.items()}
    return Seen(numbers, planned, owned, metrics, per_tensor(chain), locals_, plan.numel)


def set_up(case: Case) -> tuple[DeviceMesh, dict[str, nn.Parameter], dict]:
    """The mesh, this rank's parameters, and the layout. Every rank must call it."""
    ranks = torch.tensor(case.ranks).reshape(case.sizes)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=tuple(AXES[: len(case.sizes)]))
    if dist.get_rank() not in case.ranks:
        return mesh, {}, {}
    params = {name: nn.Parameter(tensor) for name, tensor in placed(case, case.whole(1), mesh).items()}
    return mesh, params, layout_of(case, mesh)


def placed(case: Case, whole: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    here = {name: place(way, whole[name], mesh) for name, (way, _) in case.named.items()}
    return {name: tensor for name, tensor in here.items() if tensor is not None}


def layout_of(case: Case, mesh: DeviceMesh) -> dict:
    """The marks of plain pieces, an entry for each axis along which there are some."""
    names: dict[int, set[str]] = {}
    for name, (way, _) in case.named.items():
        if way.shares:
            names.setdefault(way.axes[0], set()).add(name)
    return {
        (lambda name, _, some=some: name in some): Sharded(mesh.get_group(AXES[axis])) for axis, some in names.items()
    }


def chain_of(case: Case, params: dict[str, nn.Parameter], **where) -> distwd.Chain:
    """Relative decay before and after Adam. In low precision without Adam: torch's own kernels round by place there."""
    adam = [distwd.Adam(foreach=True, eps=1e-3)] if case.dtype in (torch.float32, torch.float64) else []
    some = [
        distwd.RelativeWeightDecay(0.1, metric=metric, norm_input=norm_input, scope="tensor")
        for metric, norm_input in PER_TENSOR.items()
    ]
    update = distwd.RelativeWeightDecay(0.05, metric="mad", norm_input="update")
    return distwd.Chain(params.items(), some[0], *adam, some[1], update, distwd.LR(0.1), **where)


def per_tensor(chain: distwd.Chain) -> list[dict[str, float]]:
    """The last metrics of the rules that have one for each tensor."""
    stats = [rule["metric"] for rule in chain.stats().values()]
    return [{name: value.item() for name, value in metric.items()} for metric in stats if isinstance(metric, dict)]


def numbers_of(piece: Piece) -> list[int]:
    """The numbers of the elements that a piece holds by its description, in order."""
    numbers = torch.arange(math.prod(piece.shape)).reshape(piece.shape)
    for dim, cut in enumerate(piece.cuts):
        indices = [index for start, stop in cut for index in range(start, stop)]
        numbers = numbers.index_select(dim, torch.tensor(indices, dtype=torch.long))
    return numbers.flatten().tolist()


# --- what must hold ---------------------------------------------------------------------------------------------------


def check(case: Case, everyone: Iterable[Seen | None]) -> None:
    """Pieces are what torch made, every element counts once, numbers are the oracle's, steps are one process's."""
    seen = [one for one in everyone if one is not None]
    check_pieces(case, seen)
    check_metrics(case, seen)
    check_steps(case, seen)


def check_pieces(case: Case, seen: Sequence[Seen]) -> None:
    for one in seen:
        for name, numbers in one.planned.items():
            assert numbers == one.held[name], f"{name}: the plan's piece has other elements than torch gave"
        assert one.numel == sum(math.prod(shape) for _, shape in case.tensors)
    for name, (_, shape) in case.named.items():
        counted = sorted(number for one in seen if name in one.owned for number in one.held[name])
        assert counted == list(range(math.prod(shape))), f"{name}: not every element counts once"


def check_metrics(case: Case, seen: Sequence[Seen]) -> None:
    whole = list(case.whole(1).values())
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    for metric in METRICS:
        values = {one.metrics[metric] for one in seen}
        assert len(values) == 1, f"{metric}: the ranks have different numbers"
        assert_close(values.pop(), metric_of(whole, metric), dtype, str(metric))


def assert_close(value: float, expected: float, dtype: torch.dtype, what: str) -> None:
    """Within 1 ulp of fp32; in float64 within what sums in another order may differ by."""
    rounded = torch.tensor(expected, dtype=torch.float32)
    ulp = (torch.nextafter(rounded.abs(), torch.tensor(torch.inf)) - rounded.abs()).item()
    bound = ulp if dtype == torch.float32 else 1e-12 * max(1.0, abs(expected))
    assert abs(value - expected) <= bound, f"{what}: {value} and not {expected}"


def check_steps(case: Case, seen: Sequence[Seen]) -> None:
    params = {name: nn.Parameter(value) for name, value in case.whole(1).items()}
    chain = chain_of(case, params)
    for step in (2, 3):
        for name, grad in case.whole(step).items():
            params[name].grad = grad
        chain.step()
    expected = per_tensor(chain)
    for one in seen:
        for name, local in one.params.items():
            mine = params[name].detach().flatten()[torch.tensor(one.held[name], dtype=torch.long)]
            assert torch.equal(local.flatten(), mine), f"{name}: other bits than in one process"
        for ours, theirs in zip(one.by_tensor, expected, strict=True):
            for name, value in ours.items():
                assert_close(value, theirs[name], torch.float32, name)
