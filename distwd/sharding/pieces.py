"""Which piece of a whole tensor does this rank hold? Pure arithmetic on shapes; no communication.

    whole [7, 2], FSDP2 on 3 ranks:  rank 0 has rows 0:3, rank 1 has 3:6, rank 2 has 6:7  (as torch.chunk cuts)

A piece is a box: for each dimension of the whole, the intervals of indices that are here. Usually that is one interval.
FSDP2 over TP can leave several, since each cuts what the other has left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._torch import ORDINARY, is_dtensor, is_flat_param, is_in_fsdp1, is_strided_shard, local_tensor, padding_of_shard
from .layout import Mark, Sharded
from .params import NamedParam, check_has_shape
from .world import World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Intervals = tuple[tuple[int, int], ...]  # ascending [start, stop) intervals of indices
Meshes = dict[DeviceMesh, tuple[int, ...]]  # the ranks of each mesh, flat
Axis = tuple[Any, int, int]  # of a mesh: what it does to the tensor, its number of ranks, which of them this is


@dataclass(frozen=True, slots=True)
class Piece:
    """This rank's part of one whole tensor.

    name: of the parameter.
    shape: of the whole.
    dtype: of both.
    cuts: for each dimension of the whole, the intervals of indices that are here.
    local_shape: of the tensor in memory.
    placements: how the whole is cut, as text: "S(0), R".
    mesh: the ranks of the DTensor's mesh; () for a plain tensor.
    padding: elements at the end of the local tensor that belong to nobody.
    is_counted: whether the whole is known as a number of pieces only. Then `shape` is (number of pieces,) and `cuts`
        says which.
    num_stacked: leading dimensions of the whole of which each index is a matrix of its own: all but the last two.
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
    num_stacked: int = 0

    @property
    def numel(self) -> int:
        """Elements of the whole that are here."""
        return math.prod(self.local_shape) - self.padding

    @property
    def num_cells(self) -> int:
        """Matrices of the whole: a cell is what has one number under scope="matrix"."""
        return math.prod(self.shape[: self.num_stacked])

    @property
    def local_stack(self) -> tuple[int, ...]:
        """How many indices of each stacked dimension are here; () for a single matrix."""
        return tuple(map(_length, self.cuts[: self.num_stacked]))

    def cells(self) -> list[int]:
        """The numbers, in the whole, of the matrices that this piece holds (a part of); in the order of its elements."""
        cells = [0]
        for cut, size in zip(self.cuts[: self.num_stacked], self.shape, strict=False):
            indices = [index for start, stop in cut for index in range(start, stop)]
            cells = [cell * size + index for cell in cells for index in indices]
        return cells


def describe(name: str, tensor: Tensor, mark: Mark | None = None, meshes: Meshes | None = None) -> Piece:
    """The piece of a parameter that this rank holds.

    name, tensor: of the parameter. A plain tensor is whole, unless its mark says otherwise.
    mark: what `layout=` says of it.
    meshes: the ranks of meshes that were met before; is added to. Thousands of parameters share one mesh.
    Raises ValueError for a local tensor of a shape that its placements do not give.
    """
    shape, local = tuple(tensor.shape), tuple(local_tensor(tensor).shape)
    whole = tuple(((0, size),) for size in shape)
    piece = Piece(name, shape, tensor.dtype, whole, local, "plain", (), num_stacked=max(len(shape) - 2, 0))
    if is_dtensor(tensor):
        meshes = {} if meshes is None else meshes
        mesh = tensor.device_mesh
        cuts = cuts_at(tensor, mesh.get_coordinate(), local)
        # Of an empty tensor nothing is measured or decayed; frameworks give it any shape.
        if math.prod(local) and not _fits(cuts, local):
            raise ValueError(
                f"{name}: the local tensor has shape {local}, but {tensor.placements} on a mesh of shape "
                f"{tuple(mesh.shape)} gives {tuple(_length(cut) for cut in cuts)}; "
                "distribute it with torch's own functions (distribute_tensor, fully_shard), or pass its true shape to DTensor.from_local"
            )
        # `mesh.mesh` is a tensor, and reading it for every parameter takes longer than all else here.
        if mesh not in meshes:
            meshes[mesh] = tuple(mesh.mesh.flatten().tolist())
        # As torch abbreviates them: S(0), R, SS(0,2).
        all_placements: Sequence[Any] = tensor.placements
        placements = [
            f"SS({p.dim},{p.split_factor})" if is_strided_shard(p) else f"S({p.dim})" if p.is_shard() else "R"
            for p in all_placements
        ]
        piece = replace(piece, cuts=cuts, placements=", ".join(placements), mesh=meshes[mesh])
    if not isinstance(mark, Sharded):
        return piece
    # The mark adds a cut, by the number of the piece. For a plain tensor it is the only one. A DTensor of experts keeps
    # its own cuts: their expert-parallel axis is not in its mesh. The pieces' lengths are known to their ranks alone,
    # so the whole is described as a row of numbered pieces.
    world = World.of(mark.group)
    ranks = tuple(dist.get_process_group_ranks(world.group)) if world.group is not None else ()
    own_shape, own_cuts = (piece.shape, piece.cuts) if piece.mesh else ((), ())
    # Hidden expert parallelism cuts a stack between its matrices; a lone matrix is cut itself.
    num_stacked = piece.num_stacked + 1 if piece.mesh and piece.num_stacked else 0
    return replace(
        piece,
        shape=(world.size, *own_shape),
        cuts=(((world.rank, world.rank + 1),), *own_cuts),
        placements=f"piece {world.rank} of {world.size}" + (f", {piece.placements}" if piece.mesh else ""),
        mesh=(*ranks, *piece.mesh),
        padding=padding_of_shard(tensor),
        is_counted=not piece.mesh,
        num_stacked=num_stacked,
    )


def stack_here(tensor: Tensor) -> tuple[int, ...]:
    """How many indices of each dimension but the last two are here, of a DTensor or a plain tensor as it is."""
    num_stacked = max(tensor.dim() - 2, 0)
    if not is_dtensor(tensor):
        return tuple(tensor.shape[:num_stacked])
    # Not the shape of the local tensor: that of an empty one may be any.
    return tuple(
        map(
            _length,
            cuts_at(tensor, tensor.device_mesh.get_coordinate(), tuple(local_tensor(tensor).shape))[:num_stacked],
        )
    )


def check_matrices(name: str, tensor: Tensor, mark: Mark | None) -> None:
    """Raise ValueError for a plain tensor that does not tell which matrices its elements are of."""
    if is_dtensor(tensor):
        return
    others = "scope='matrix' needs a number for each matrix of it"
    if is_flat_param(tensor):
        raise ValueError(
            f"{name} is a FlatParameter of FSDP1, many parameters in one, and {others}; wrap with use_orig_params=True or use "
            "FSDP2 (fully_shard), or give the rule another scope"
        )
    if not isinstance(mark, Sharded):
        return
    num_dims = tensor.dim() if mark.num_dims is None else mark.num_dims
    if is_in_fsdp1(tensor) and mark.num_dims is None:
        raise ValueError(
            f"{name} is a flat piece of a parameter in FSDP1, and {others}; pass layout=Sharded.from_fsdp1(model), which "
            "knows the shape of the parameter"
        )
    if num_dims > 2:
        raise ValueError(
            f"{name} is a plain piece of a tensor of {num_dims} dimensions, which does not tell how its matrices are cut, and "
            f"{others}; make it a DTensor (DTensor.from_local with its mesh and placements), or give the rule another scope"
        )


def check_params(entries: Sequence[NamedParam], frozen: Collection[int] = ()) -> None:
    """Raise ValueError for what no rule can work on, and for one weight under two names.

    Listed twice, a weight would be decayed twice and count twice in every metric.

    frozen: positions of parameters that may be anything: nobody reads or writes them.
    """
    by_id: dict[int, str] = {}
    by_address: dict[tuple[torch.device, int, int], str] = {}
    for position, entry in enumerate(entries):
        name, tensor = entry.name, entry.tensor
        if position in frozen:
            continue
        if (other := by_id.setdefault(id(tensor), name)) != name:
            raise ValueError(
                f"{name} is the same tensor as {other} (tied); pass every parameter once, as model.named_parameters() does"
            )
        check_tensor(name, tensor)
        local = local_tensor(tensor)
        # Tied by `.data`: two parameters with the same elements. A subclass need not have an address.
        if type(local) in ORDINARY and local.numel():
            other = by_address.setdefault((local.device, local.data_ptr(), local.numel()), name)
            if other != name:
                raise ValueError(
                    f"{name} lies in the memory of {other} (tied by .data): one step would decay it twice; make it one "
                    "parameter (head.weight = embedding.weight) and pass that once"
                )


def is_measurable(tensor: Tensor) -> bool:
    """Whether a rule can work on a tensor."""
    try:
        check_tensor("", tensor)
    except ValueError:
        return False
    return True


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise ValueError, with the name and the way out, for lazy, meta, sparse, complex, integer and `Partial` tensors."""
    check_has_shape(name, tensor)
    local = local_tensor(tensor)
    # During deferred initialisation either of the two may still be a meta tensor.
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
    if is_dtensor(tensor) and any(p.is_partial() for p in tensor.placements):
        raise ValueError(
            f"{name} has a Partial placement {tensor.placements}: its numbers are pending sums; "
            "call redistribute(placements=...) with Shard or Replicate first"
        )


# --- how a mesh cuts --------------------------------------------------------------------------------------------------


def cuts_at(
    tensor: DTensor, coordinate: Sequence[int] | None, local: tuple[int, ...] | None = None
) -> tuple[Intervals, ...]:
    """For each dimension of the whole, the intervals of indices that a rank of the mesh holds.

    coordinate: of the rank in the tensor's mesh; None for a rank outside of it.
    local: the shape of that rank's local tensor; None where it is not known, as of another rank.
    """
    # A rank outside of the mesh holds nothing. A scalar gets a dimension of no indices to say so.
    if coordinate is None:
        return tuple(() for _ in tensor.shape) or ((),)
    # torch cuts from the first mesh axis to the last, each cutting what the one before has left.
    axes = list(zip(tensor.placements, tensor.device_mesh.shape, coordinate, strict=True))
    as_written = _cut_along(axes, tuple(tensor.shape))
    if not any(is_strided_shard(placement) for placement in tensor.placements):
        return as_written
    # FSDP2 over TP cuts last along its first axis, and writes that as a _StridedShard. Where TP's pieces are uneven,
    # the two are not the same; then the local tensor's shape decides which it is. That the whole is covered is checked
    # later.
    nested = _cut_along(_as_fsdp_cuts(axes), tuple(tensor.shape))
    return nested if local is None or _fits(nested, local) or not _fits(as_written, local) else as_written


def _cut_along(axes: Iterable[Axis], shape: tuple[int, ...]) -> tuple[Intervals, ...]:
    """Cut a whole along each mesh axis in turn, in the order given."""
    cuts: list[Intervals] = [((0, size),) for size in shape]
    for placement, num_chunks, index in axes:
        if is_strided_shard(placement):
            # Cuts each of `split_factor` parts by itself, and takes the same chunk of all.
            num_parts = int(placement.split_factor)
            parts = (_chunk(cuts[placement.dim], num_parts, number) for number in range(num_parts))
            cuts[placement.dim] = _join(_chunk(part, num_chunks, index) for part in parts)
        elif placement.is_shard():
            cuts[placement.dim] = _chunk(cuts[placement.dim], num_chunks, index)
    return tuple(cuts)


def _as_fsdp_cuts(axes: Sequence[Axis]) -> list[Axis]:
    """The axes in the order in which FSDP2 over TP cuts.

    A _StridedShard(dim, k) comes after the axes that cut `dim` into k pieces; there it is an ordinary Shard. A
    _StridedShard for which no such axes are found keeps its place.
    """
    from torch.distributed.tensor import Shard

    order: list[Axis] = []
    # From the last axis, which for FSDP2 over TP is TP and cuts first.
    for axis in reversed(axes):
        placement, num_chunks, index = axis
        place, cut = 0, axis
        if is_strided_shard(placement):
            num_pieces = 1
            for after, (other, chunks, _) in enumerate(order, start=1):
                if other.is_shard() and other.dim == placement.dim:
                    num_pieces *= chunks
                    if num_pieces == placement.split_factor:
                        place, cut = after, (Shard(placement.dim), num_chunks, index)
                        break
        order.insert(place, cut)
    return order


# --- intervals --------------------------------------------------------------------------------------------------------


def _fits(cuts: Sequence[Intervals], local: tuple[int, ...]) -> bool:
    """Whether a local tensor of this shape can hold the piece. Empty ones are alike: torch writes some as (0,)."""
    lengths = tuple(map(_length, cuts))
    return lengths == local or math.prod(lengths) == math.prod(local) == 0


def _length(intervals: Intervals) -> int:
    return sum(high - low for low, high in intervals)


def _chunk(intervals: Intervals, num_chunks: int, index: int) -> Intervals:
    """The `index`-th of `num_chunks` parts, with the sizes of `torch.chunk`; the last ones may be empty."""
    # torch.chunk rounds the size up, so the last parts come out short or empty (numpy would make the first ones
    # longer).
    size = -(-_length(intervals) // num_chunks)
    return tuple(_take(intervals, size * index, size * (index + 1)))


def _take(intervals: Intervals, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The indices that are numbers `start` to `stop` of those in the intervals, as intervals."""
    for low, high in intervals:
        first, last = max(low, low + start), min(high, low + stop)
        if first < last:
            yield first, last
        # From here on counted from the end of this interval.
        start, stop = start - (high - low), stop - (high - low)


def _join(parts: Iterable[Intervals]) -> Intervals:
    """Concatenate, with neighbours merged: equal pieces must be written in the same way to be found equal."""
    joined: list[tuple[int, int]] = []
    for low, high in (interval for part in parts for interval in part):
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return tuple(joined)
