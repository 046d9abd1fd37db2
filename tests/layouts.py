"""One small model in every layout of the field: how whole tensors come to lie on ranks.

The model's sizes are odd on purpose: over 2, 3 and 4 ranks some shards are uneven and some are empty.
`place` wraps a model whose parameters have the given whole values; gradients are placed the same way
(a second model made of the gradients), so nothing here needs a forward pass or a layout's own arithmetic.
Everything runs on the ranks, except `LAYOUTS`, `whole_model` and `SHAPES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (11, 6),
    "norm.weight": (6,),
    "norm.bias": (6,),
    "up.weight": (10, 6),
    "up.bias": (10,),
    "down.weight": (6, 10),
    "down.bias": (6,),
    "experts.weight": (4, 5, 3),
    "head.weight": (7, 6),
    "head.bias": (7,),
    "gate.weight": (1,),  # on most ranks an empty shard
}
NUM_ELEMENTS = sum(torch.Size(shape).numel() for shape in SHAPES.values())

Whole = Mapping[str, Tensor]


class Weight(nn.Module):
    """A module that holds one parameter and nothing else."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class Net(nn.Module):
    """The model: its parameters are copies of the given whole tensors."""

    def __init__(self, whole: Whole):
        super().__init__()
        dtype = whole["embed.weight"].dtype
        self.embed = nn.Embedding(11, 6, dtype=dtype)
        self.norm = nn.LayerNorm(6, dtype=dtype)
        self.up = nn.Linear(6, 10, dtype=dtype)
        self.down = nn.Linear(10, 6, dtype=dtype)
        self.experts = Weight(torch.empty(4, 5, 3, dtype=dtype))
        self.head = nn.Linear(6, 7, dtype=dtype)
        self.gate = Weight(torch.empty(1, dtype=dtype))
        self.load_state_dict(dict(whole))


def whole_model(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    """Seeded whole tensors of the model, of sizes that differ by tensor, so that a mean of means is wrong."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        values[name] = ((0.25 + index) * scale * noise).to(dtype)
    return values


@functools.cache
def mesh_of(*sizes: int, names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


@functools.cache
def submesh(name: str, *sizes: int, names: tuple[str, ...]) -> DeviceMesh:
    return mesh_of(*sizes, names=names)[name]


def _shard_blocks(net: Net, mesh: DeviceMesh, ignored: set[nn.Parameter] | None = None) -> None:
    for block in (net.up, net.down):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh, ignored_params=ignored)


def _tensor_parallel(net: Net, mesh: DeviceMesh) -> None:
    parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _alone(net: Net) -> None:
    pass


def _fsdp(net: Net) -> None:
    _shard_blocks(net, mesh_of(dist.get_world_size(), names=("dp",)))


def _hsdp(net: Net) -> None:
    _shard_blocks(net, mesh_of(2, 2, names=("replicate", "shard")))


def _hsdp_wide(net: Net) -> None:
    """Three copies are not a power of two, and rows over one rank are whole."""
    _shard_blocks(net, mesh_of(3, 1, names=("replicate", "shard")))


def _tp(net: Net) -> None:
    _tensor_parallel(net, mesh_of(2, names=("tp",)))


def _fsdp_tp(net: Net) -> None:
    """The norm, the embedding and the head live on `dp` alone: their copies over `tp` show in no DTensor."""
    _tensor_parallel(net, submesh("tp", 2, 2, names=("dp", "tp")))
    _shard_blocks(net, submesh("dp", 2, 2, names=("dp", "tp")))


def _ddp(net: Net) -> None:
    DistributedDataParallel(net)


def _mixed(net: Net) -> None:
    ignored = {net.norm.weight, net.norm.bias, net.head.weight, net.gate.weight}
    _shard_blocks(net, mesh_of(2, names=("dp",)), ignored)


def _experts(net: Net) -> None:
    """Experts over `ep`, copied over the other axis where their DTensor does not show it; the rest over all four."""
    mesh = submesh("ep", 2, 2, names=("edp", "ep"))
    net.experts.weight = nn.Parameter(distribute_tensor(net.experts.weight.detach(), mesh, [Shard(0)]))
    _shard_blocks(net, mesh_of(4, names=("dp",)), {net.experts.weight})


def _experts_fsdp(net: Net) -> None:
    """Experts over `ep`, then over `edp` too; the rest over all four."""
    mesh = submesh("ep", 2, 2, names=("edp", "ep"))
    net.experts.weight = nn.Parameter(distribute_tensor(net.experts.weight.detach(), mesh, [Shard(0)]))
    fully_shard(net.experts, mesh=submesh("edp", 2, 2, names=("edp", "ep")))
    _shard_blocks(net, mesh_of(4, names=("dp",)))


@dataclass(frozen=True)
class Layout:
    """A way to wrap the model and the number of ranks it needs (0: no process group)."""

    ranks: int
    wrap: Callable[[Net], None]
    stages: bool = False

    def place(self, whole: Whole) -> dict[str, nn.Parameter]:
        """The parameters this rank holds, by name, with these whole values."""
        net = Net(whole)
        self.wrap(net)
        held = dict(net.named_parameters())
        if not self.stages:
            return held
        # A pipeline of two stages and a rank that holds nothing at all.
        cut = list(SHAPES).index("down.weight")
        stage = dist.get_rank()
        mine = {0: list(SHAPES)[:cut], 1: list(SHAPES)[cut:], 2: []}[stage]
        return {name: held[name] for name in mine}


LAYOUTS: dict[str, Layout] = {
    "single": Layout(0, _alone),
    "fsdp1rank": Layout(1, _fsdp),
    "fsdp2": Layout(2, _fsdp),
    "fsdp3": Layout(3, _fsdp),
    "fsdp4": Layout(4, _fsdp),
    "hsdp": Layout(4, _hsdp),
    "hsdp3x1": Layout(3, _hsdp_wide),
    "tp2": Layout(2, _tp),
    "fsdp_tp": Layout(4, _fsdp_tp),
    "ddp2": Layout(2, _ddp),
    "replicated3": Layout(3, _alone),
    "mixed": Layout(2, _mixed),
    "experts": Layout(4, _experts),
    "experts_fsdp": Layout(4, _experts_fsdp),
    "stages": Layout(3, _alone, stages=True),
}


def place(layout: str, whole: Whole) -> dict[str, nn.Parameter]:
    return LAYOUTS[layout].place(whole)


def set_gradients(layout: str, held: Mapping[str, nn.Parameter], whole: Whole) -> None:
    """Give each held parameter its part of the whole gradients; names that are absent get None."""
    full = {name: whole.get(name, torch.zeros(shape)) for name, shape in SHAPES.items()}
    dtype = next(iter(whole.values())).dtype if whole else torch.float32
    placed = place(layout, {name: value.to(dtype) for name, value in full.items()})
    for name, param in held.items():
        param.grad = placed[name].detach() if name in whole else None


def gather(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole model as this rank sees it, with what other pipeline stages hold."""
    mine = {name: whole_of(tensor) for name, tensor in held.items()}
    if len(mine) == len(SHAPES):  # on every rank alike: only pipeline stages hold less
        return mine
    theirs: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(theirs, mine)
    return {name: value for part in theirs for name, value in part.items()} | mine


@functools.cache
def _element_numbers(layout: str) -> list[Tensor]:
    """For every rank the numbers, in the whole model, of the elements it holds: the layout itself says, by placing them."""
    numbers = torch.arange(NUM_ELEMENTS, dtype=torch.float64).split(
        [torch.Size(shape).numel() for shape in SHAPES.values()]
    )
    whole = {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, numbers, strict=True)}
    mine = _flat(place(layout, whole)).long()
    if not dist.is_initialized():
        return [mine]
    theirs: list[Tensor] = [mine] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return theirs


def _flat(held: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([local_of(tensor).reshape(-1) for tensor in held.values()] or [torch.zeros(0)])


def view(layout: str, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `gather`, in one exchange and without DTensor's help; where this rank holds an element, its own copy counts."""
    numbers = _element_numbers(layout)
    # A rank that holds nothing has no dtype of its own; float64 carries the bits of all.
    dtype = next((tensor.dtype for tensor in held.values()), torch.float64)
    parts = [_flat(held).double()]
    if dist.is_initialized():
        padded = torch.zeros(max(map(len, numbers)), dtype=torch.float64)
        padded[: parts[0].numel()] = parts[0]
        parts = [torch.empty_like(padded) for _ in numbers]
        dist.all_gather(parts, padded)
    mine = dist.get_rank() if dist.is_initialized() else 0
    whole = torch.full((NUM_ELEMENTS,), torch.nan, dtype=torch.float64)
    for rank in [rank for rank in range(len(parts)) if rank != mine] + [mine]:
        whole[numbers[rank]] = parts[rank][: len(numbers[rank])]
    pieces = whole.to(dtype).split([torch.Size(shape).numel() for shape in SHAPES.values()])
    return {name: piece.reshape(SHAPES[name]) for name, piece in zip(SHAPES, pieces, strict=True)}


def whole_of(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return (detached.full_tensor() if isinstance(detached, DTensor) else detached).clone()


def local_of(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
