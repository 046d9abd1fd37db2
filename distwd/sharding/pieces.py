"""Which piece of a whole tensor does this rank hold? Pure arithmetic on shapes; no communication."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.placement_types import Placement

from .._torch import StridedShard
from .layout import Mark, Sharded, padding_of
from .local import local_tensor
from .world import World

Intervals = tuple[tuple[int, int], ...]
Meshes = dict[DeviceMesh, tuple[int, ...]]
Axis = tuple[Placement, int, int]  # what it does to the tensor, its ranks, which of them is here


@dataclass(frozen=True, slots=True)
class Piece:
    """This rank's part of one whole tensor.

    cuts: for every dimension of the whole, the intervals [start, stop) of indices held here.
    mesh: the ranks of the DTensor's mesh, () for a plain tensor. padding: elements at the end that are nobody's.
    is_counted: the whole is known as a number of pieces only, which `shape` and `cuts` then count.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    cuts: tuple[Intervals, ...]
    local_shape: tuple[int, ...]
    placements: str
    mesh: tuple[int, ...]
    padding: int = 0
    is_counted: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole that are here."""
        return _product(self.local_shape) - self.padding


def describe(name: str, tensor: Tensor, mark: Mark | None = None, meshes: Meshes | None = None) -> Piece:
    """The piece of `name` that this rank holds in `tensor`; plain tensors are whole unless `mark` says otherwise.

    meshes: the ranks of those met before, which many pieces then share.
    Raises ValueError for what no rule can work on: sparse, complex, integer, meta, or `Partial` tensors.
    """
    check_tensor(name, tensor)
    piece = _told_by_tensor(name, tensor, {} if meshes is None else meshes)
    return _cut_by(mark, piece, tensor) if isinstance(mark, Sharded) else piece


def _cut_by(mark: Sharded, piece: Piece, tensor: Tensor) -> Piece:
    """The piece with the cut of `mark`: of a plain tensor the only one, of a DTensor one more than it tells."""
    world = World.of(mark.group)
    ranks = tuple(dist.get_process_group_ranks(world.group)) if world.group is not None else ()
    placements = f"piece {world.rank} of {world.size}" + (f", {piece.placements}" if piece.mesh else "")
    inner = (piece.shape, piece.cuts) if piece.mesh else ((), ())
    return replace(
        piece,
        shape=(world.size, *inner[0]),
        cuts=(((world.rank, world.rank + 1),), *inner[1]),
        placements=placements,
        mesh=(*ranks, *piece.mesh),
        padding=padding_of(tensor),
        is_counted=not piece.mesh,
    )


def _told_by_tensor(name: str, tensor: Tensor, meshes: Meshes) -> Piece:
    shape, local = tuple(tensor.shape), tuple(local_tensor(tensor).shape)
    if not isinstance(tensor, DTensor):
        return Piece(name, shape, tensor.dtype, _whole(shape), local, "plain", ())
    cuts = _cuts(tensor, local)
    if _product(local) and not _fits(cuts, local):
        raise ValueError(
            f"{name}: the local tensor has shape {local}, but {tensor.placements} on a mesh of shape "
            f"{tuple(tensor.device_mesh.shape)} gives {tuple(_length(cut) for cut in cuts)}; "
            "distribute it with torch's own functions (distribute_tensor, fully_shard), or pass its true shape to DTensor.from_local"
        )
    placements = ", ".join(map(short_placement, tensor.placements))
    mesh = tensor.device_mesh
    if mesh not in meshes:
        meshes[mesh] = tuple(mesh.mesh.flatten().tolist())
    return Piece(name, shape, tensor.dtype, cuts, local, placements, meshes[mesh])


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise ValueError, naming the tensor and the way out, if decay or metrics cannot be computed on it."""
    local = local_tensor(tensor)
    if tensor.is_meta or local.is_meta:
        raise ValueError(f"{name} is a meta tensor, without numbers; call model.to_empty(...) and initialise it first")
    if local.layout is not torch.strided:
        raise ValueError(f"{name} is sparse ({local.layout}); use a dense tensor (for an embedding: sparse=False)")
    if tensor.is_complex():
        raise ValueError(f"{name} is complex; pass torch.view_as_real of it instead")
    if not tensor.is_floating_point():
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; only floating-point tensors can be decayed or measured; leave it out"
        )
    if isinstance(tensor, DTensor) and any(isinstance(p, Partial) for p in tensor.placements):
        raise ValueError(
            f"{name} has a Partial placement {tensor.placements}: its numbers are pending sums; "
            "call redistribute(placements=...) with Shard or Replicate first"
        )


def short_placement(placement: Placement) -> str:
    """`S(0)`, `R` or `SS(0,2)`, as torch abbreviates placements."""
    if isinstance(placement, StridedShard):
        return f"SS({placement.dim},{placement.split_factor})"
    return f"S({placement.dim})" if isinstance(placement, Shard) else "R"


def _cuts(tensor: DTensor, local: tuple[int, ...]) -> tuple[Intervals, ...]:
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # this rank is not in the mesh and holds nothing; a scalar needs a dimension to say so
        return tuple(() for _ in tensor.shape) or ((),)
    # torch cuts from the first mesh dimension to the last, each cutting what the one before left.
    axes = list(zip(tensor.placements, tensor.device_mesh.shape, coordinate, strict=True))
    written = _cut_along(axes, tuple(tensor.shape))
    if not any(isinstance(placement, StridedShard) for placement in tensor.placements):
        return written
    # FSDP2 over TP cuts last along its first axis, and writes that as a StridedShard. Where TP's pieces are uneven, the two
    # are not the same; then the local tensor tells which it is, and that the whole is covered is checked later.
    nested = _cut_along(_as_fsdp_cuts(axes), tuple(tensor.shape))
    return nested if _fits(nested, local) or not _fits(written, local) else written


def _cut_along(axes: Iterable[Axis], shape: tuple[int, ...]) -> tuple[Intervals, ...]:
    cuts = list(_whole(shape))
    for placement, num_chunks, index in axes:
        if isinstance(placement, StridedShard):
            parts = (
                _chunk(cuts[placement.dim], int(placement.split_factor), k) for k in range(int(placement.split_factor))
            )
            cuts[placement.dim] = _join(_chunk(part, num_chunks, index) for part in parts)
        elif isinstance(placement, Shard):
            cuts[placement.dim] = _chunk(cuts[placement.dim], num_chunks, index)
    return tuple(cuts)


def _as_fsdp_cuts(axes: Sequence[Axis]) -> list[Axis]:
    """The axes in the order in which they cut: a StridedShard(dim, k) after those that make k pieces of `dim`, if there are such."""
    order: list[Axis] = []
    for axis in reversed(axes):
        place = _place_after(axis[0], order)
        order.insert(place or 0, axis if place is None else (Shard(axis[0].dim), *axis[1:]))  # type: ignore[attr-defined]
    return order


def _place_after(placement: Placement, order: Sequence[Axis]) -> int | None:
    pieces = 1
    for place, (other, num_chunks, _) in enumerate(order, start=1):
        if isinstance(placement, StridedShard) and isinstance(other, Shard) and other.dim == placement.dim:
            pieces *= num_chunks
            if pieces == placement.split_factor:
                return place
    return None


def _fits(cuts: Sequence[Intervals], local: tuple[int, ...]) -> bool:
    lengths = tuple(map(_length, cuts))
    return lengths == local or _product(lengths) == _product(local) == 0


def _whole(shape: tuple[int, ...]) -> tuple[Intervals, ...]:
    return tuple(((0, size),) for size in shape)


def _chunk(intervals: Intervals, num_chunks: int, index: int) -> Intervals:
    """The `index`-th of `num_chunks` parts, with the sizes of `torch.chunk`; the last ones may be empty."""
    size = -(-_length(intervals) // num_chunks)
    return tuple(_take(intervals, size * index, size * (index + 1)))


def _take(intervals: Intervals, start: int, stop: int) -> Iterator[tuple[int, int]]:
    for low, high in intervals:
        first, last = max(low, low + start), min(high, low + stop)
        if first < last:
            yield first, last
        start, stop = start - (high - low), stop - (high - low)


def _join(parts: Iterable[Intervals]) -> Intervals:
    """Concatenate, merging neighbours, so that the same piece is always written the same way."""
    joined: list[tuple[int, int]] = []
    for low, high in (interval for part in parts for interval in part):
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return tuple(joined)


def _length(intervals: Intervals) -> int:
    return sum(high - low for low, high in intervals)


def _product(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
