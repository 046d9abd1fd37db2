"""What a user may pass as `params`, read into one flat list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class NamedParam:
    """One parameter: its name ("param 3" if it has none), the tensor, the index of its param group, and its decay in words."""

    name: str
    tensor: Tensor
    group: int = 0
    named: bool = False
    decay: str = ""


def entries_of(params: Iterable[Any]) -> tuple[NamedParam, ...]:
    """Tensors, (name, tensor) pairs or group dicts, in order. Raises ValueError for a lone tensor, TypeError for anything else."""
    if isinstance(params, Tensor):
        raise ValueError("params must be an iterable of tensors, not one tensor; pass [tensor]")
    items = list(params)
    if any(isinstance(item, Mapping) for item in items):
        return entries_of_groups(items)
    return entries_of_groups([{"params": items}])


def entries_of_groups(groups: Sequence[Mapping[str, Any]]) -> tuple[NamedParam, ...]:
    """The same from param groups, as they are given to torch.optim or as it keeps them (`param_names` beside `params`)."""
    entries: list[NamedParam] = []
    for index, group in enumerate(groups):
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        decay = _decay(group)
        names = group.get("param_names") or []
        if len(names) != len(members):  # DeepSpeed puts one flat tensor in their place and leaves the names
            names = [None] * len(members)
        for name, member in zip(names, members, strict=True):
            if isinstance(member, tuple):
                name, member = member
            if not isinstance(member, Tensor):
                raise TypeError(f"params must hold tensors or (name, tensor) pairs, not {type(member).__name__}")
            entries.append(NamedParam(name or f"param {len(entries)}", member, index, name is not None, decay))
    return tuple(entries)


def _decay(group: Mapping[str, Any]) -> str:
    values = [value for key, value in group.items() if key.startswith(("weight_decay", "distwd_weight_decay"))]
    return " ".join(
        f"{value:g}" if isinstance(value, (int, float)) else type(value).__name__.lower() for value in values
    )


class Roster:
    """The entries of param groups, read anew only when the groups hold other tensors: others may replace them between steps."""

    def __init__(self) -> None:
        self._seen: tuple[list[int], list[int]] = [], []
        self._entries: tuple[NamedParam, ...] = ()

    def read(self, groups: Sequence[Mapping[str, Any]]) -> tuple[NamedParam, ...]:
        """The entries of `groups` as they are now."""
        # The entries keep their tensors alive, so an id cannot come to mean another one.
        seen = [len(group["params"]) for group in groups], [id(param) for group in groups for param in group["params"]]
        if seen != self._seen:
            self._seen, self._entries = seen, entries_of_groups(groups)
        return self._entries
