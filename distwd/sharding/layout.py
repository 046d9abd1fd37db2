"""The argument `layout=`: who holds what, for plain tensors, which do not tell it themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import flat_param_of, original_params
from .world import check_group

Pattern = str | Callable[[str, Tensor], bool]


@dataclass(frozen=True, slots=True)
class Replicated:
    """A mark for `layout=`: every rank of `group` holds the tensor whole.

    Plain tensors without a mark are taken for this anyway. The bits of the copies are compared in both cases.

    group: a process group that this rank belongs to; None for all ranks.
    Source: torch's `Replicate` placement.

    >>> from distwd import Replicated
    >>> Replicated().group is None
    True
    """

    group: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class Sharded:
    """A mark for `layout=`: one whole is cut over `group`, and each rank holds the piece of its own number.

    Pieces may have any lengths, 0 too. Another group that holds the same name holds copies. On a DTensor it adds a cut
    that is not in its placements, as of experts whose expert-parallel axis is not in their mesh.

    group: a process group that this rank belongs to; None for all ranks.
    num_dims: dimensions of the whole, where its pieces are flat and do not show them (`from_fsdp1` tells it); None: theirs.
    Source: torch's `Shard` placement.

    >>> from distwd import Sharded
    >>> Sharded().group is None
    True
    """

    group: dist.ProcessGroup | None = None
    num_dims: int | None = field(default=None, repr=False, kw_only=True)

    @staticmethod
    def from_fsdp1(model: torch.nn.Module) -> Layout:
        """The layout of a model that is wrapped with FSDP1 (torch.distributed.fsdp.FullyShardedDataParallel).

        With use_orig_params=True every parameter is a piece, perhaps an empty one. With False every FlatParameter is;
        its padding counts for nothing.

        model: wrapped with any sharding strategy, the whole or in parts.
        Returns a layout for `Chain`, `attach`, `Plan.build` or `global_metric`.
        Raises ValueError if nothing in `model` is wrapped with FSDP1.
        """
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        # Nested modules may be wrapped with different groups and strategies (HYBRID_SHARD beside NO_SHARD), so one mark
        # for each. And the pieces are flat: how many dimensions the parameters have is said beside them.
        by_group: dict[Any, list[Tensor]] = {}
        for module in FullyShardedDataParallel.fsdp_modules(model):
            flat = flat_param_of(module)
            if flat is not None:
                is_whole = module.sharding_strategy is ShardingStrategy.NO_SHARD
                # The optimizer holds the original parameters if there are such, else the flat one.
                for tensor, shape in original_params(flat):
                    num_dims = None if is_whole else len(shape)
                    by_group.setdefault((module.process_group, is_whole, num_dims), []).append(tensor)
                if not original_params(flat):
                    by_group.setdefault((module.process_group, is_whole, None), []).append(flat)
        if not by_group:
            raise ValueError(
                "from_fsdp1: nothing in the model is wrapped with FullyShardedDataParallel; DTensors need no layout"
            )
        return {
            _IsOneOf(tuple(tensors)): Replicated(group) if is_whole else Sharded(group, num_dims=num_dims)
            for (group, is_whole, num_dims), tensors in by_group.items()
        }


@dataclass(frozen=True, slots=True, eq=False)
class _IsOneOf:
    """A predicate: whether a tensor is one of these very objects, whatever wrappers do to its name."""

    tensors: tuple[Tensor, ...]

    def __call__(self, name: str, tensor: Tensor) -> bool:
        # By identity: `==` of tensors compares their elements.
        return any(tensor is one for one in self.tensors)

    def __repr__(self) -> str:
        return f"the {len(self.tensors)} parameters of one FSDP1 process group"


Mark = Sharded | Replicated
Layout = Mapping[Pattern, Mark]


def find_mark(name: str, tensor: Tensor, layout: Layout) -> tuple[int, Mark] | None:
    """The first pattern that matches a parameter.

    Returns the number of the pattern in the layout, and its mark; None if none matches.
    Raises ValueError where a predicate raises anything.
    """
    for number, (pattern, mark) in enumerate(layout.items()):
        # The first match counts, as in a list of exceptions that ends with "*".
        if isinstance(pattern, str):
            matches = fnmatchcase(name, pattern)
        else:
            # The predicate is the user's and may raise anything, on one rank alone. As a ValueError it is sent to the
            # others when a plan is built, and raised there too.
            try:
                matches = bool(pattern(name, tensor))
            except Exception as error:
                raise ValueError(f"layout: {pattern!r} raised {type(error).__name__} for {name}: {error}") from error
        if matches:
            return number, mark
    return None


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
        # None means all ranks, and is looked up when it is needed: the layout may be written before init_process_group.
        if mark.group is not None:
            check_group(mark.group)
