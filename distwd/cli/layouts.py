"""A small transformer in each layout of the field that a number of ranks allows."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from .._torch import local_tensor

# No sizes that ranks divide: shards are uneven, and on many ranks empty.
HIDDEN, MLP, VOCAB, EXPERTS = 46, 131, 259, 5
NUM_BLOCKS = 2


class Stack(nn.Module):
    """The matrices of several experts as one tensor."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape))


class Block(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, MLP), nn.Linear(MLP, HIDDEN)
        self.experts = Stack(EXPERTS, 7, HIDDEN)


class Transformer(nn.Module):
    """The parameters of a small transformer; it is wrapped and stepped, and has no forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleDict({str(number): Block() for number in range(NUM_BLOCKS)})
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)


Whole = Mapping[str, Tensor]


def shapes() -> dict[str, tuple[int, ...]]:
    """The whole shapes of the model's parameters, by name."""
    # Not on the meta device, where torch imports a library of reference kernels to draw the first weights: 2 s.
    return {name: tuple(param.shape) for name, param in Transformer().named_parameters()}


def made_up(seed: int, scale: float) -> dict[str, Tensor]:
    """Whole tensors for all parameters: float32 on the CPU, in (−scale, scale), of sizes that differ by tensor.

    A hash of the element's number in whole integers, so the same bits on every machine, whatever its CPU or torch.
    """
    values = {}
    for name, shape in shapes().items():
        key = zlib.crc32(f"{seed} {name}".encode())
        bits = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) * 2654435761 + key
        for factor in (0x45D9F3B, 0x2C1B3C6D, 1):
            bits = (bits & 0xFFFFFFFF) * factor
            bits = (bits & 0xFFFFFFFF) ^ ((bits & 0xFFFFFFFF) >> 15)
        # 24 bits fit a float32. The size by tensor is a power of two, so that nothing is rounded here.
        unit = ((bits >> 8).to(torch.float32) + 0.5) / 2**23 - 1.0
        values[name] = (unit * (scale * 2.0 ** -(zlib.crc32(name.encode()) % 4))).reshape(shape)
    return values


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to spread the model over the ranks.

    name: what the field calls it.
    mesh: its axes and their sizes, as text.
    wrap: changes the model in place, or returns its wrapper.
    holds: the names of the top-level parts (and blocks) that this rank has; None: all of them.
    """

    name: str
    mesh: str
    wrap: Callable[[Transformer], nn.Module | None]
    holds: Collection[str] | None = None

    def build(self, whole: Whole, device: torch.device) -> tuple[nn.Module, list[tuple[str, nn.Parameter]]]:
        """The model with these whole values, spread over the ranks; and its parameters, by the names of `whole`."""
        dtype = next(iter(whole.values())).dtype
        net = Transformer().to(device, dtype)
        net.load_state_dict(dict(whole))
        if self.holds is not None:
            for parent, name in [(net, name) for name in ("embed", "norm", "head")] + [
                (net.blocks, number) for number in list(net.blocks)
            ]:
                if name not in self.holds:
                    delattr(parent, name) if parent is net else net.blocks.pop(name)
        model = self.wrap(net) or net
        return model, [(name.removeprefix("module."), param) for name, param in model.named_parameters()]

    def element_numbers(self, device: torch.device) -> dict[str, Tensor]:
        """For each parameter here, the numbers that its local elements have in the whole: [local shape] int64.

        Found by spreading a model of element numbers: so neither torch's placements nor distwd's plan is asked where a
        tensor is cut.
        """
        numbers = {
            name: torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
            for name, shape in shapes().items()
        }
        return {name: local_tensor(param).detach().long() for name, param in self.build(numbers, device)[1]}


def layouts_of(size: int, device_type: str) -> tuple[list[Layout], dict[str, str]]:
    """The layouts that `size` ranks allow, and why the others are left out. A collective call: it makes the meshes."""
    found: list[Layout] = []
    left_out: dict[str, str] = {}
    line = init_device_mesh(device_type, (size,), mesh_dim_names=("fsdp",))
    found.append(Layout("DDP", f"dp={size}", DistributedDataParallel))
    found.append(Layout("FSDP2", f"fsdp={size}", lambda net: shard_(net, line)))
    if size == 1:
        return found, dict.fromkeys(("HSDP", "TP", "FSDP2 x TP", "experts", "2 stages"), "it needs 2 ranks or more")

    inner = next(factor for factor in range(2, size + 1) if size % factor == 0)
    outer = size // inner
    # A prime number of ranks is no rectangle; then all ranks hold copies, and shards are whole.
    replicas = init_device_mesh(device_type, (inner, outer), mesh_dim_names=("dp", "fsdp"))
    found.append(Layout("HSDP", f"dp={inner},fsdp={outer}", lambda net: shard_(net, replicas)))
    row = init_device_mesh(device_type, (size,), mesh_dim_names=("tp",))
    found.append(Layout("TP", f"tp={size}", lambda net: tensor_parallel_(net, row)))
    if outer > 1:
        grid = init_device_mesh(device_type, (outer, inner), mesh_dim_names=("fsdp", "tp"))

        def fsdp_over_tp(net: Transformer) -> None:
            # The norms and the experts live on `fsdp` alone: their copies over `tp` show in no DTensor.
            tensor_parallel_(net, grid["tp"])
            shard_(net, grid["fsdp"])

        found.append(Layout("FSDP2 x TP", f"fsdp={outer},tp={inner}", fsdp_over_tp))
    else:
        left_out["FSDP2 x TP"] = f"it needs two factors, and {size} ranks are a prime number"

    experts = init_device_mesh(device_type, (outer, inner), mesh_dim_names=("edp", "ep"))

    def experts_apart(net: Transformer) -> None:
        # Experts over `ep`, copied over the other axis where their DTensor does not show it; the rest over all ranks.
        stacks = [module for module in net.modules() if isinstance(module, Stack)]
        for stack in stacks:
            distribute_(stack, "weight", experts["ep"], dim=0)
        shard_(net, line, ignored={stack.weight for stack in stacks})

    found.append(Layout("experts", f"fsdp={size}; edp={outer},ep={inner}", experts_apart))
    half = -(-size // 2)
    halves = [DeviceMesh(device_type, list(ranks)) for ranks in (range(half), range(half, size))]
    is_last = halves[1].get_coordinate() is not None
    parts = ("1", "norm", "head") if is_last else ("embed", "0")
    found.append(
        Layout("2 stages", f"pp=2,fsdp={half}", lambda net: shard_(net, halves[is_last]), holds=frozenset(parts))
    )
    return found, left_out


def shard_(net: Transformer, mesh: DeviceMesh, ignored: set[nn.Parameter] | None = None) -> None:
    """FSDP2 around each block, and around the whole."""
    for block in net.blocks.values():
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(net, mesh=mesh, ignored_params=ignored)


def tensor_parallel_(net: Transformer, mesh: DeviceMesh) -> None:
    """Into each block by columns, out of it by rows. Norms and experts stay whole and plain."""
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    plan |= {f"blocks.*.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")}
    plan |= {f"blocks.*.{name}": RowwiseParallel() for name in ("o", "down")}
    parallelize_module(net, mesh, plan)


def distribute_(module: nn.Module, name: str, mesh: DeviceMesh, dim: int) -> None:
    """Cut one parameter of a module over a mesh, in place. Every rank cuts its own copy: nothing is sent."""
    whole = getattr(module, name).detach()
    setattr(module, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)))
