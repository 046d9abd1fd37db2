"""The first steps of an optimizer: which of them are hidden steps of checkpoint code, which must change nothing.

torch.distributed.checkpoint, torchtitan and others step an optimizer whose state is empty once, with every lr and every
gradient 0, so that its state exists. A decay that is not scaled by lr would change parameters in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._torch import local_tensor
from ..metrics.replica_check import check_gradients
from ..sharding.collectives import is_true_on_any_rank
from ..sharding.params import NamedParam
from ..step.runner import StepRunner
from .state import NO_PARAMS_KEY, mark_initialized

_MAX_KEPT = 64


class FirstStep:
    """Finds out, together with the other ranks, whether a step is real, until one is.

    The others are asked in every step until one is real, and all get the same answer. So no rank can be alone with its
    question, whatever differs between ranks (a loaded state, an lr of 0). From then on nobody is asked, and nothing
    read. A flag inside the phase's own all-reduce would not do: wrapped optimizers must not count a hidden step, so
    this process has to know before it runs them.
    """

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._moving: dict[int, torch.Tensor] = {}  # by identity, learning rates that were not 0
        self._ask_again()
        # Where the process group has been made anew, other ranks may be at their first step, and ask.
        runner.plans.on_new_world.append(self._ask_again)

    def _ask_again(self) -> None:
        self._num_asked = 0
        self.is_past = False  # whether a real step has been taken, on all ranks that there are now

    def is_init_step(self, is_idle: bool) -> bool:
        """Whether every rank is idle and has no gradient but zeros.

        is_idle: whether this rank is idle, by state and lr.
        Raises PlanError or CollectiveError if another rank does not take part.
        """
        if self.is_past:
            # Optimizers that never keep state (SGD without momentum) are stepped by checkpoint code again and again. The
            # ranks are not asked any more, so this rank's gradients decide; what others may wait for is measured all the
            # same.
            entries = self._runner.now.entries
            return is_idle and any(entry.tensor.grad is not None for entry in entries) and has_only_zero_grads(entries)
        is_real = not (is_idle and has_only_zero_grads(self._runner.now.entries))
        # Absolute rules measure nothing: then the ranks have nothing to do with one another.
        if self._runner.phases:
            world = self._runner.plan.world
            if world.error_store is None:
                is_real = is_true_on_any_rank(is_real, world)
            else:
                # Through the store a rank whose step is real need not wait for the others.
                is_real = world.error_store.is_true_on_any(is_real, self._num_asked)
                # Not counted before: who tries a failed step again asks the same question again.
                self._num_asked += 1
        if is_real and self._runner.has_built_plan:
            # This step has built the plan, so it talks and reads anyway.
            check_gradients(self._runner.plan)
        self.is_past = is_real
        return not is_real

    def may_stand_still(self, lr: float | torch.Tensor) -> bool:
        """Whether a learning rate is 0. A tensor is not read in a step once it has been seen to be another number.

        Nor is one on a card, after the first real step. For hidden steps checkpoint code puts a new 0 there, on the CPU.
        """
        if not isinstance(lr, torch.Tensor):
            return lr == 0
        if self.is_past and (lr.device.type != "cpu" or id(lr) in self._moving):
            return False
        if stands_still := is_zero_now(lr):
            return stands_still
        if len(self._moving) >= _MAX_KEPT:  # a loop may put a new tensor there in every step
            self._moving.clear()
        self._moving[id(lr)] = lr
        return False

    def is_init_step_of(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> bool:
        """Whether a step of an external optimizer only asks for its state.

        has_closure: whether it is stepped with a closure; checkpoint code never does that.
        """
        groups = optimizer.param_groups
        has_state = bool(set(optimizer.state) - {NO_PARAMS_KEY})
        is_idle = not (
            has_closure or has_state or not all(self.may_stand_still(group.get("lr", 1)) for group in groups)
        )
        return self.is_init_step(is_idle)


def is_zero_now(lr: torch.Tensor) -> bool:
    """Whether a learning rate is 0. Reads it."""
    return bool(lr == 0)


def has_only_zero_grads(entries: Sequence[NamedParam]) -> bool:
    """Whether all gradients of this rank are 0. Reads them."""
    grads = [local_tensor(entry.tensor.grad) for entry in entries if entry.tensor.grad is not None]
    return not any(bool(grad.count_nonzero() > 0) for grad in grads)


def mark_if_no_params(optimizer: torch.optim.Optimizer) -> None:
    """Mark an optimizer without parameters on this rank as initialized, if it keeps state on the others."""
    # SGD without momentum has no state anywhere. All ranks must look alike to checkpoint code: either all are stepped
    # by it, or none is.
    keeps_none = isinstance(optimizer, torch.optim.SGD) and not any(
        group["momentum"] for group in optimizer.param_groups
    )
    if not keeps_none and not any(group["params"] for group in optimizer.param_groups):
        mark_initialized(optimizer.state, [])
