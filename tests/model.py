"""One small model, whole, and the meshes it is cut over.

The sizes are odd on purpose: over 2, 3 and 4 ranks some shards are uneven and some are empty.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

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
def submesh(name: str | tuple[str, ...], *sizes: int, names: tuple[str, ...]) -> DeviceMesh:
    return mesh_of(*sizes, names=names)[name]
