"""Optimizers and rules that `attach` refuses, and what to do instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .decays.rule import Decay
from .hosts import needs_closure
from .keys import attachments_of

_TWICE = "param_groups[{index}] already has weight_decay={decay}; set it to 0, or it decays twice"


def check_decays(decays: Sequence[Any]) -> None:
    """Raise ValueError unless there is at least one rule, and only rules."""
    if not decays:
        raise ValueError("attach needs at least one rule, e.g. attach(optimizer, WeightDecay(0.1))")
    for decay in decays:
        if isinstance(decay, type):
            raise ValueError(f"{decay.__name__} is a class; write {decay.__name__}(...)")
        if not isinstance(decay, Decay):
            raise ValueError(
                f"{decay!r} is not a decay rule; attach takes rules only, and leaves the optimizer as it is"
            )


def check_host(host: Any, decays: Sequence[Decay], coupling: str) -> None:
    """Raise ValueError if decay cannot be attached to `host`, by class name, with what to attach to instead."""
    if not isinstance(host, torch.optim.Optimizer):
        raise ValueError(f"attach takes a torch.optim.Optimizer, not {type(host).__name__}")
    name = type(host).__name__
    inside = next((key for key, value in vars(host).items() if isinstance(value, torch.optim.Optimizer)), None)
    if inside is not None:
        raise ValueError(
            f"{name} is a wrapper, and its step hooks do not see the step; attach to the {type(getattr(host, inside)).__name__} in its "
            f"`.{inside}` instead"
        )
    if not getattr(type(host).step, "hooked", False) or "_optimizer_step_pre_hooks" not in vars(host):
        raise ValueError(
            f"{name} has no step hooks (it does not call torch.optim.Optimizer.__init__); attach to the optimizer that it steps"
        )
    for index, group in enumerate(host.param_groups):
        decay = group.get("weight_decay")
        if isinstance(decay, Tensor) and bool(decay != 0):  # read once, here
            raise ValueError(_TWICE.format(index=index, decay=decay.item()))
    check_groups(host, coupling)
    searching = needs_closure(type(host)) and any(decay.target != "closure" for decay in decays)
    if searching and coupling == "gradient":
        raise ValueError(f"{name} evaluates the gradient itself, many times in a step; give the rule target='closure'")


def check_groups(host: torch.optim.Optimizer, coupling: str) -> None:
    """Raise ValueError if a group decays by itself, or has no lr to couple with; for every step, since groups change."""
    lent = {group for other in attachments_of(host) for group in other.lent_groups}
    for index, group in enumerate(host.param_groups):
        decay = group.get("weight_decay")
        if isinstance(decay, (int, float)) and decay != 0 and id(group) not in lent:
            raise ValueError(_TWICE.format(index=index, decay=decay))
        if coupling == "lr" and group.get("lr") is None:
            raise ValueError(f"param_groups[{index}] has no 'lr' to couple with; use coupling='none'")


def as_hosts(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers that `attach` was given. Raises ValueError for none, for one twice, and for a parameter in two of them."""
    hosts = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not hosts:
        raise ValueError("attach got no optimizer; pass one, or a list of those that step one model")
    seen: dict[int, int] = {}
    for number, host in enumerate(hosts):
        for group in getattr(host, "param_groups", ()):
            for param in group["params"]:
                if seen.setdefault(id(param), number) != number or hosts.index(host) != number:
                    raise ValueError(
                        "a parameter, or a whole optimizer, is listed twice in attach([...]) and would decay twice"
                    )
    return hosts
