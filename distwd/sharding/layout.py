"""layout=: who holds what, for tensors whose ownership no DTensor tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import flat_param_of, original_params, padding_of_shard
from .world import check_group

Pattern = str | Callable[[str, Tensor], bool]


@dataclass(frozen=True, slots=True)
class Replicated:
    """A mark for `layout=`: every rank of `group` holds the tensor whole.

    Says in words what is assumed of plain tensors anyway; the copies' bits are compared all the same.
    group: a process group that this rank belongs to, None for all ranks. Source: torch's `Replicate` placement.

    >>> from distwd import Replicated
    >>> Replicated().group is None
    True
    """

    group: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class Sharded:
    """A mark for `layout=`: this rank's tensor is the piece numbered by its rank in `group`, of one whole cut over `group`.

    Pieces may be of any lengths, 0 too. Another group that holds the same name holds copies. On a DTensor it adds a cut that the
    DTensor does not tell, as of experts whose expert-parallel axis is not in their mesh.
    group: a process group that this rank belongs to, None for all ranks. Source: torch's `Shard` placement.

    >>> from distwd import Sharded
    >>> Sharded().group is None
    True
    """

    group: dist.ProcessGroup | None = None

    @staticmethod
    def from_fsdp1(model: torch.nn.Module) -> Layout:
        """The layout of a model wrapped with FSDP1 (torch.distributed.fsdp.FullyShardedDataParallel), for any sharding strategy.

        With use_orig_params=True every parameter is a piece, perhaps an empty one; with False every FlatParameter is,
        and its padding counts for nothing.
        Raises ValueError if nothing in `model` is wrapped with FSDP1.
        """
        return dict(_fsdp1_marks(model))


Mark = Sharded | Replicated
Layout = Mapping[Pattern, Mark]


@dataclass(frozen=True, slots=True, eq=False)
class _IsOneOf:
    """A predicate: is the tensor one of these very objects?"""

    tensors: tuple[Tensor, ...]

    def __call__(self, name: str, tensor: Tensor) -> bool:
        return any(tensor is one for one in self.tensors)

    def __repr__(self) -> str:
        return f"the {len(self.tensors)} parameters of one FSDP1 process group"


def _fsdp1_marks(model: torch.nn.Module) -> Iterator[tuple[Pattern, Mark]]:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    by_group: dict[Any, list[Tensor]] = {}
    for module in FullyShardedDataParallel.fsdp_modules(model):
        flat = flat_param_of(module)
        if flat is not None:
            whole = module.sharding_strategy is ShardingStrategy.NO_SHARD
            tensors = [param for param, _ in original_params(flat)] or [flat]
            by_group.setdefault((module.process_group, whole), []).extend(tensors)
    if not by_group:
        raise ValueError(
            "from_fsdp1: nothing in the model is wrapped with FullyShardedDataParallel; DTensors need no layout"
        )
    for (group, whole), tensors in by_group.items():
        yield _IsOneOf(tuple(tensors)), Replicated(group) if whole else Sharded(group)


def padding_of(tensor: Tensor) -> int:
    """Elements at the end of a local tensor that belong to nobody: an FSDP1 FlatParameter's last shards are filled up."""
    return padding_of_shard(tensor)


def find_mark(name: str, tensor: Tensor, layout: Layout) -> tuple[int, Mark] | None:
    """The first pattern that matches, by its number, and its mark. Raises ValueError where a predicate raises anything."""
    for number, (pattern, mark) in enumerate(layout.items()):
        if fnmatchcase(name, pattern) if isinstance(pattern, str) else _asked(pattern, name, tensor):
            return number, mark
    return None


def _asked(predicate: Callable[[str, Tensor], bool], name: str, tensor: Tensor) -> bool:
    try:
        return bool(predicate(name, tensor))
    except Exception as error:  # it is the user's: anything may come out of it, on one rank alone
        raise ValueError(f"layout: {predicate!r} raised {type(error).__name__} for {name}: {error}") from error


def check_layout(layout: Layout) -> None:
    """Raise ValueError for what is not a mapping of patterns to marks."""
    if not isinstance(layout, Mapping):
        raise ValueError(
            f"layout must be a dict of patterns to Sharded(group) or Replicated(group), not {type(layout).__name__}"
        )
    for pattern, mark in layout.items():
        if not (isinstance(pattern, str) or callable(pattern)):
            raise ValueError(f"layout: {pattern!r} is neither a glob of names nor a predicate(name, tensor)")
        if not isinstance(mark, (Sharded, Replicated)):
            raise ValueError(f"layout[{pattern!r}] must be Sharded(group) or Replicated(group), not {mark!r}")
        if mark.group is not None:
            check_group(mark.group)
