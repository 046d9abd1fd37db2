"""The keys with which an attachment keeps λ in its hosts' param groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .._torch import step_pre_hooks
from ..checks import check_number

KEY = "distwd_weight_decay"


def attachments_on(host: torch.optim.Optimizer) -> list[Any]:
    """The attachments that live in the step hooks of `host`."""
    owners = (getattr(hook, "__self__", None) for hook in step_pre_hooks(host))
    return [owner for owner in owners if hasattr(owner, "lent_groups")]


def unused_keys(hosts: Sequence[torch.optim.Optimizer], count: int, key: str = KEY) -> list[str]:
    """`count` group keys, called `key` or `key`_1, ..., that no other attachment of these hosts uses."""
    taken = {key for host in hosts for other in attachments_on(host) for key in other.keys}
    names = (key if not number else f"{key}_{number}" for number in range(count + len(taken)))
    return [name for name in names if name not in taken][:count]


def write_keys(groups: Sequence[dict[str, Any]], defaults: Mapping[str, Any]) -> None:
    """Give every group its own λ, where it has none yet. Raises ValueError for values that would not decay."""
    for key, default in defaults.items():
        for group in groups:
            check_number(key, group.setdefault(key, default))


def with_keys(state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """A state dict whose groups lack some of `keys`, with the values that the groups have now."""
    saved = state_dict["param_groups"]
    filled = [
        {**group, **{key: now[key] for key in keys if key in now and key not in group}}
        for now, group in zip(groups, saved, strict=False)
    ]
    return {**state_dict, "param_groups": filled + saved[len(filled) :]}
