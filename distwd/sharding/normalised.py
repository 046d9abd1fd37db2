"""Param groups as torch.optim wants them, also where a rank or a group has no parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .world import World


def normalised_groups(params: Iterable[Any], group: dist.ProcessGroup | None) -> list[Any]:
    """What torch.optim.Optimizer takes: `params`, made acceptable where it is empty.

    A rank without parameters, in a world of several, gets one empty group; an empty group among named ones gets (no) names.
    Raises ValueError for no parameters in a world of one, TypeError for a lone tensor, both as torch.
    """
    if isinstance(params, Tensor):
        raise TypeError(
            "params must be an iterable of tensors, (name, tensor) pairs or group dicts, not one tensor; pass [tensor]"
        )
    items = list(params)
    if not items:
        if World.of(group).size == 1:
            raise ValueError("optimizer got an empty parameter list; pass model.named_parameters()")
        return [{"params": []}]
    if not isinstance(items[0], dict):
        return items
    groups = [{**item, "params": _members(item["params"])} for item in items]
    if any(_is_named(item) for item in groups):
        for item in groups:
            if not item["params"]:
                item["param_names"] = []
    return groups


def _members(params: Any) -> list[Any]:
    if isinstance(params, set):
        raise TypeError(
            "params of a group must be an ordered collection, not a set: ranks would disagree on the order; pass a list"
        )
    return [params] if isinstance(params, Tensor) else list(params)


def _is_named(group: dict[str, Any]) -> bool:
    return "param_names" in group or any(isinstance(member, tuple) for member in group["params"])
