"""The wrappers of the field, each a function that changes the model in place, or returns its wrapper.

Which rank holds which stage of a pipeline, and the marks that `layout=` needs, are functions beside them.
Everything runs on the ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from distwd.cli.layouts import distribute_
from tests.model import SHAPES, Net, mesh_of, submesh
from tests.releases import UNEVEN_OVER_TP, require_torch

PAIRS = ("outer", "inner")  # four ranks as two pairs of neighbours


def alone(net: Net) -> None:
    pass


# --- fully_shard, tensor parallel, DDP --------------------------------------------------------------------------------


def shard_blocks(net: Net, mesh: DeviceMesh, ignored: set[nn.Parameter] | None = None, **settings) -> None:
    for block in (net.up, net.down):
        fully_shard(block, mesh=mesh, **settings)
    fully_shard(net, mesh=mesh, ignored_params=ignored, **settings)


def tensor_parallel(net: Net, mesh: DeviceMesh) -> None:
    parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def fsdp(net: Net) -> None:
    shard_blocks(net, mesh_of(dist.get_world_size(), names=("dp",)))


def fsdp_columns(net: Net) -> None:
    """Matrices are cut by columns."""

    def columns(param: nn.Parameter) -> Shard:
        return Shard(1 if param.ndim == 2 else 0)

    shard_blocks(net, mesh_of(2, names=("dp",)), shard_placement_fn=columns)


def hsdp(net: Net) -> None:
    shard_blocks(net, mesh_of(2, 2, names=("replicate", "shard")))


def hsdp_wide(net: Net) -> None:
    """Three copies are not a power of two, and rows over one rank are whole."""
    shard_blocks(net, mesh_of(3, 1, names=("replicate", "shard")))


def tp(net: Net) -> None:
    tensor_parallel(net, mesh_of(2, names=("tp",)))


def fsdp_tp(net: Net) -> None:
    """The norm, the embedding and the head live on `dp` alone: their copies over `tp` show in no DTensor."""
    require_torch("2.9", UNEVEN_OVER_TP)
    tensor_parallel(net, submesh("tp", 2, 2, names=("dp", "tp")))
    shard_blocks(net, submesh("dp", 2, 2, names=("dp", "tp")))


def hsdp_tp(net: Net) -> None:
    """Eight ranks: copies that the DTensor shows over `copy`, and others that it does not over `tp`."""
    require_torch("2.9", UNEVEN_OVER_TP)
    names = ("copy", "dp", "tp")
    tensor_parallel(net, submesh("tp", 2, 2, 2, names=names))
    shard_blocks(net, submesh(("copy", "dp"), 2, 2, 2, names=names))


def columns(net: Net) -> None:
    """Everything by its last dimension, so that uneven and empty columns come."""
    distribute(net, mesh_of(4, names=("dp",)), list(SHAPES), dim=-1)


def some_ranks(net: Net) -> None:
    """Rank 0 holds nothing of what lives on the mesh of the others."""
    distribute(net, mesh_without_rank0(), ["up.weight", "up.bias", "experts.weight", "gate.weight"], dim=0)
    others = {net.up.weight, net.up.bias, net.experts.weight, net.gate.weight}
    fully_shard(net, mesh=mesh_of(3, names=("dp",)), ignored_params=others)


@functools.cache
def mesh_without_rank0() -> DeviceMesh:
    return DeviceMesh("cpu", list(range(1, dist.get_world_size())), mesh_dim_names=("some",))


def distribute(net: Net, mesh: DeviceMesh, names: list[str], dim: int) -> None:
    for name in names:
        module, own = net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        distribute_(module, own, mesh, dim % getattr(module, own).ndim)


def ddp(net: Net) -> nn.Module:
    return DistributedDataParallel(net)


def mixed(net: Net) -> None:
    ignored = {net.norm.weight, net.norm.bias, net.head.weight, net.gate.weight}
    shard_blocks(net, mesh_of(2, names=("dp",)), ignored)


# --- experts ----------------------------------------------------------------------------------------------------------


def experts(net: Net) -> None:
    """Experts over `ep`, copied over the other axis where their DTensor does not show it; the rest over all four."""
    distribute(net, submesh("ep", 2, 2, names=("edp", "ep")), ["experts.weight"], dim=0)
    shard_blocks(net, mesh_of(4, names=("dp",)), {net.experts.weight})


def experts_fsdp(net: Net) -> None:
    """Experts over `ep`, then over `edp` too; the rest over all four."""
    distribute(net, submesh("ep", 2, 2, names=("edp", "ep")), ["experts.weight"], dim=0)
    fully_shard(net.experts, mesh=submesh("edp", 2, 2, names=("edp", "ep")))
    shard_blocks(net, mesh_of(4, names=("dp",)))


def ep_group() -> dist.ProcessGroup:
    return submesh("ep", 2, 2, names=("edp", "ep")).get_group()


def experts_hidden(net: Net) -> None:
    """Each half of `ep` shards its own experts over `edp`, unevenly: no DTensor knows that there is another half."""
    net.experts.weight = nn.Parameter(net.experts.weight.detach().chunk(2)[ep_group().rank()].clone())
    distribute(net, submesh("edp", 2, 2, names=("edp", "ep")), ["experts.weight"], dim=1)
    shard_blocks(net, mesh_of(4, names=("dp",)), {net.experts.weight})


def experts_plain(net: Net) -> None:
    """Three experts here and one there, a gate that one rank of a pair has, all plain; copies in the other pair."""
    mine = ep_group().rank()
    net.experts.weight = nn.Parameter(net.experts.weight.detach().split([3, 1])[mine].clone())
    net.gate.weight = nn.Parameter(net.gate.weight.detach().split([0, 1])[mine].clone())
    shard_blocks(net, mesh_of(4, names=("dp",)), {net.experts.weight, net.gate.weight})


def experts_named(net: Net) -> None:
    """Each expert is a parameter of its own, plain, and only those of this rank's half are there, under their own numbers."""
    rows = net.experts.weight.detach()
    del net.experts.weight
    for number in ([0, 1, 2], [3])[ep_group().rank()]:
        net.experts.register_parameter(str(number), nn.Parameter(rows[number].clone()))
    shard_blocks(net, mesh_of(4, names=("dp",)), set(net.experts.parameters()))


def cut_by_hand(net: Net) -> None:
    """Every parameter is flattened and cut over all ranks, as ZeRO does; many pieces are empty."""
    for name in SHAPES:
        module, own = net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        flat = getattr(module, own).detach().reshape(-1)
        setattr(module, own, nn.Parameter(flat.tensor_split(dist.get_world_size())[dist.get_rank()].clone()))


# --- FSDP1 ------------------------------------------------------------------------------------------------------------


def fsdp1(strategy: str, use_orig_params: bool) -> Callable[[Net], nn.Module]:
    """Units within a unit, on CPU."""

    def wrap(net: Net) -> nn.Module:
        mesh = {"device_mesh": mesh_of(2, 2, names=("replicate", "shard"))} if "HYBRID" in strategy else {}
        wrapper = functools.partial(
            FullyShardedDataParallel,
            sharding_strategy=ShardingStrategy[strategy],
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
            **mesh,
        )
        net.up, net.down = wrapper(net.up), wrapper(net.down)
        return wrapper(net)

    return wrap


# --- which rank holds which stage of a pipeline -----------------------------------------------------------------------

_CUT = list(SHAPES).index("down.weight")
STAGES = (list(SHAPES)[:_CUT], list(SHAPES)[_CUT:])


def two_stages_and_nothing() -> list[str]:
    return [*STAGES, []][dist.get_rank()]


def stage_of_pair() -> list[str]:
    return STAGES[dist.get_rank() // 2]


def every_other_chunk() -> list[str]:
    """Interleaved: the first and the third chunk on rank 0, the second and the last on rank 1."""
    names = list(SHAPES)
    chunks = (names[:3], names[3:5], names[5:7], names[7:])
    return chunks[dist.get_rank()] + chunks[dist.get_rank() + 2]


def fsdp_of_pair(net: Net) -> None:
    shard_blocks(net, submesh("inner", 2, 2, names=PAIRS))


def tp_of_pair(net: Net) -> None:
    tensor_parallel(net, submesh("inner", 2, 2, names=PAIRS))


# --- marks ------------------------------------------------------------------------------------------------------------


def mark_experts(model: nn.Module) -> dict:
    import distwd

    return {"experts.*": distwd.Sharded(ep_group())}


def mark_experts_and_gate(model: nn.Module) -> dict:
    """By a glob and by a predicate."""
    import distwd

    def is_gate(name: str, tensor: Tensor) -> bool:
        return name == "gate.weight"

    return mark_experts(model) | {is_gate: distwd.Sharded(ep_group())}


def mark_all(model: nn.Module) -> dict:
    import distwd

    return {"*": distwd.Sharded()}


def mark_fsdp1(model: nn.Module) -> dict:
    import distwd

    return distwd.Sharded.from_fsdp1(model)
