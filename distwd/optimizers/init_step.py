"""Steps that are not what they seem: the hidden step of checkpoints, a step within a step, and who has called it."""

from __future__ import annotations

from collections.abc import Sequence
from types import FrameType

import torch

from .._torch import calling_frame
from ..step.runner import StepRunner
from .state import NO_PARAMS_KEY, mark_initialized


def is_init_step(hosts: Sequence[torch.optim.Optimizer], conductor: StepRunner, has_closure: bool) -> bool:
    """Whether this step only asks the hosts for their state, as torch.distributed.checkpoint does: none yet, lr 0, gradients 0.

    After the first real step only hosts that never keep state are asked again; this rank's gradients decide, and what
    other ranks may wait for must be measured all the same.
    """
    groups = [group for host in hosts for group in host.param_groups]
    has_state = any(set(host.state) - {NO_PARAMS_KEY} for host in hosts)
    idle = not (has_closure or has_state or any(group.get("lr", 1) != 0 for group in groups))
    if not conductor.has_agreed:
        return conductor.only_rehearses(idle)
    has_gradients = any(param.grad is not None for group in groups for param in group["params"])
    return idle and has_gradients and conductor.has_only_zero_grads()


def mark_idle(host: torch.optim.Optimizer) -> None:
    """See `mark_stateless`; SGD without momentum keeps no state on the other ranks either."""
    keeps_none = isinstance(host, torch.optim.SGD) and not any(group["momentum"] for group in host.param_groups)
    if not keeps_none and not any(group["params"] for group in host.param_groups):
        mark_initialized(host.state, [])


def is_within_a_step(host: torch.optim.Optimizer) -> bool:
    """Whether a step hook of `host` was called by a step that its own step has called.

    torch wraps `step` once for every class; a subclass whose step calls `super().step()` so calls the hooks twice. The stack is
    asked, and not a counter: a step that raises never comes to its post hook.
    """
    wrapper = type(host).step.__code__  # the same code for every class
    frame: FrameType | None = calling_frame()
    steps = 0
    while frame is not None:
        steps += frame.f_code is wrapper and frame.f_locals.get("self") is host
        frame = frame.f_back
    return steps > 1


def scaler_of_this_step() -> torch.amp.GradScaler | None:
    """The GradScaler whose `step` has called the present step, if one has. It tells nobody, so the stack is asked."""
    frame: FrameType | None = calling_frame()
    while frame is not None:
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler: torch.amp.GradScaler = frame.f_locals["self"]
            return scaler
        frame = frame.f_back
    return None
