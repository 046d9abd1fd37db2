"""Optimizers, rules and steps that are refused, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import has_step_hooks, is_in_backward, optimizers_in_backward
from ..optimizers.closure import needs_closure
from ..rules.base import Measure, Rule
from ..step.group_keys import attachments_on

_TWICE = "param_groups[{index}] already has weight_decay={decay}; set it to 0, or it decays twice"


_IN_BACKWARD = (
    "{label} needs a number over parameters, but the optimizer steps inside backward(), one parameter at a time: the others' "
    "gradients are not there yet, and ranks need not come to it in one order; step after backward(), or use an absolute rule"
)
_IN_PARTS = (
    "this step is of {shown} of the optimizer's {all} param groups (DeepSpeed's ZeRO-1 and 2 step one group at a time), so {label} "
    "never sees the whole model: give it scope='group' (or 'tensor'), or put all parameters into one group"
)
_PIECE_BY_PIECE = (
    "{label} needs a number over parameters, but DeepSpeed's ZeRO-3 shows the optimizer one piece after the other; use ZeRO-1 or 2, "
    "FSDP2, or an absolute rule"
)


def validate_optimizers(hosts: Sequence[Any], decays: Sequence[Any], coupling: str) -> None:
    """Raise ValueError if there are no rules, or if decay cannot be attached to one of `hosts`."""
    _check_decays(decays)
    for host in hosts:
        _check_host(host, decays, coupling)


def _check_decays(decays: Sequence[Any]) -> None:
    """Raise ValueError unless there is at least one rule, and only rules."""
    if not decays:
        raise ValueError("attach needs at least one rule, e.g. attach(optimizer, WeightDecay(0.1))")
    for decay in decays:
        if isinstance(decay, type):
            raise ValueError(f"{decay.__name__} is a class; write {decay.__name__}(...)")
        if not isinstance(decay, Rule):
            raise ValueError(
                f"{decay!r} is not a decay rule; attach takes rules only, and leaves the optimizer as it is"
            )


def _check_host(host: Any, decays: Sequence[Rule], coupling: str) -> None:
    """Raise ValueError if decay cannot be attached to `host`, by class name, with what to attach to instead."""
    name = type(host).__name__
    _refuse_wrapper(host, name)
    if not isinstance(host, torch.optim.Optimizer):
        raise ValueError(f"attach takes a torch.optim.Optimizer, not {name}")
    _refuse_in_backward(host, name, decays)
    if not getattr(type(host).step, "hooked", False) or not has_step_hooks(host):
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


def _refuse_wrapper(host: Any, name: str) -> None:
    """Refuse what only passes steps on to optimizers that it holds in an attribute: one, or a list or dict of them."""
    for key, value in getattr(host, "__dict__", {}).items():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        held = list(held)
        if not held or not all(isinstance(one, torch.optim.Optimizer) for one in held):
            continue
        if held == [value]:
            words = f"attach to the {type(value).__name__} in its `.{key}` instead"
            if _num_params(value) < _num_params(host):
                words += ", which holds this rank's parameters only: give it named_parameters=model.named_parameters()"
        else:
            words = f"attach to all {len(held)} optimizers in its `.{key}` together instead, attach([...], rule)"
        raise ValueError(f"{name} is a wrapper, and its step hooks do not see the step; {words}")


def _num_params(host: Any) -> int:
    return sum(len(group["params"]) for group in getattr(host, "param_groups", ()))


def _refuse_in_backward(host: torch.optim.Optimizer, name: str, decays: Sequence[Rule]) -> None:
    """Refuse optimizers that step inside backward, as far as they show it before the first step."""
    if hasattr(host, "fused_backward"):
        raise ValueError(
            f"{name} changes the parameters inside its own `fused_backward`, and its step does nothing, so no hook would ever "
            "decay; use its own weight_decay, or another optimizer"
        )
    params = [param for group in host.param_groups for param in group["params"]]
    if any(host in optimizers_in_backward(param) for param in params):
        for decay in decays:
            if decay.need(decay.defaults) is not None:
                raise ValueError(_IN_BACKWARD.format(label=type(decay).__name__))


def check_numbers(
    asks: Iterable[tuple[int, Measure]],
    labels: Mapping[int, str],
    in_play: frozenset[int],
    groups: Sequence[Mapping[str, Any]],
    is_alone: bool,
) -> None:
    """Raise ValueError where a rule asks for a number that this step cannot have; on every rank alike, since all step alike.

    asks: (index of the rule, its need). in_play: the groups that the step is shown. is_alone: whether there is one rank.
    """
    in_backward = is_in_backward()
    for index, need in asks:
        if in_backward and (need.scope == "all" or not is_alone):
            raise ValueError(_IN_BACKWARD.format(label=labels[index]))
        if len(in_play) < len(groups) and need.scope == "all":
            raise ValueError(_IN_PARTS.format(label=labels[index], shown=len(in_play), all=len(groups)))
        # DeepSpeed numbers its tensors; it shows one at a time, so the first of a group is all.
        if any(hasattr(param, "ds_id") for group in groups for param in group["params"][:1]):
            raise ValueError(_PIECE_BY_PIECE.format(label=labels[index]))


def check_groups(host: torch.optim.Optimizer, coupling: str) -> None:
    """Raise ValueError if a group decays by itself, or has no lr to couple with; for every step, since groups change."""
    lent = {group for other in attachments_on(host) for group in other.lent_groups}
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
