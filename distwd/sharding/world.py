"""The ranks that together hold the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import device_types
from .error_store import ErrorStore


@dataclass(frozen=True, slots=True)
class World:
    """The ranks that together hold the model.

    group: their process group, None for this process alone. rank, size: of this process within it.
    serves: device types that the group's backends can send from; device: where to put a tensor of another type first.
    board: where ranks that have a plan together leave word for one another.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    serves: tuple[str, ...]
    device: torch.device
    error_store: ErrorStore | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> World:
        """The world of `group`; for None all ranks if torch.distributed is initialised, else this process."""
        if group is None:
            group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if group is None:
            return cls(None, 0, 1, (), torch.device("cpu"))
        check_group(group)
        serves = device_types(group)
        return cls(group, dist.get_rank(group), dist.get_world_size(group), serves, _device(serves))

    def sendable(self, tensor: Tensor) -> Tensor:
        """`tensor` on a device that the group serves: where it is, if possible."""
        return tensor if tensor.device.type in self.serves else tensor.to(self.device)

    def words(self) -> str:
        """Why other ranks cannot go on, where they have left word: to ask when a collective has failed."""
        return "" if self.error_store is None else self.error_store.read()


def check_group(group: Any) -> None:
    """Raise ValueError for what is not a process group that this process belongs to."""
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "group: this process is not a member of it; build the optimizer only on the ranks of the group"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a torch.distributed.ProcessGroup, not {type(group).__name__}; for a DeviceMesh pass mesh.get_group(...)"
        )


def _device(serves: tuple[str, ...]) -> torch.device:
    if "cpu" in serves:
        return torch.device("cpu")
    return torch.device(serves[0], getattr(torch, serves[0]).current_device())
