"""Several optimizers of one model under one attachment: whose steps belong together, and what a GradScaler does to them."""

from __future__ import annotations

from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..optimizers.init_step import FirstStep, is_init_step_of
from ..rules.base import Rule
from ..step.runner import StepRunner
from ..step.step import Batch, Step
from .overrides import attachments_on

Optimizer = torch.optim.Optimizer


class JointStep:
    """The steps of optimizers that share their metrics: each steps once, in any order, and the first measures for all.

    A joint step ends when all have stepped. A new one begins before that where an optimizer steps again, or a GradScaler
    has been updated since: then the others were skipped, by the scaler or by the training loop, which is legal. They were
    skipped, too, where an optimizer has other gradients than when the last one stepped; but decay that waits for all
    updates can wait for those, whatever gradients they come from.

    optimizers: all of the attachment.
    each_alone: whether they share nothing; then every step is a joint step of its own.
    needs_updates: whether the decay waits until all have stepped.
    """

    def __init__(
        self, runner: StepRunner, optimizers: Sequence[Optimizer], each_alone: bool, needs_updates: bool
    ) -> None:
        self.each_alone = each_alone
        self._runner, self.optimizers, self._needs_updates = runner, optimizers, needs_updates
        self._first_step = FirstStep(runner)
        self._found_inf: dict[int, Tensor | None] = {}  # of those that have stepped
        self._grads: dict[int, list[Tensor | None]] = {}  # all gradients, when the last one stepped
        self._updated: list[Tensor] = []  # parameters that have been updated
        self._scaler_states: Any = None

    # --- which steps belong together -------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether some optimizer has stepped, and another has not."""
        return not self.each_alone and bool(self._found_inf)

    def is_begun_by(self, optimizer: Optimizer) -> bool:
        """Whether a step of `optimizer` is the first of a joint step."""
        if not self.is_open or id(optimizer) in self._found_inf or _scaler_states() is not self._scaler_states:
            return True
        then = self._grads.get(id(optimizer), [])
        return not self._needs_updates and any(
            new is not old for new, old in zip(_grads_of(optimizer), then, strict=False)
        )

    def begin(self, optimizer: Optimizer, has_raised: bool) -> None:
        """Nobody has stepped yet.

        Raises ValueError if the last joint step waits for updates, unless it was broken off by an error (`has_raised`).
        """
        is_waiting = self.is_open and self._needs_updates and not has_raised
        self.end()
        if is_waiting:
            raise ValueError(
                f"{type(optimizer).__name__} steps a second time before the others have stepped, but their decay depends on the "
                "updates of all; step each once, or attach to each on its own"
            )
        self._scaler_states = None if self.each_alone else _scaler_states()

    def enter(self, optimizer: Optimizer) -> None:
        """`optimizer` steps. A GradScaler's verdict on it is known now; on the others it may not be.

        Raises ValueError if what stepped before has lost its gradients: they tell which parameters were updated.
        """
        if any(param.grad is None for param in self._updated):
            self.end()
            raise ValueError(
                f"gradients were cleared before {type(optimizer).__name__} stepped, but decay of several optimizers depends on the "
                "updates of all; call zero_grad when all have stepped"
            )
        self._found_inf[id(optimizer)] = getattr(optimizer, "found_inf", None)

    def note_gradients(self, optimizer: Optimizer) -> None:
        """The gradients of `optimizer`, which steps next, are there now: a closure may have just made them."""
        if self.each_alone:
            return
        if self._needs_updates:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            self._updated += [param for param in params if param.grad is not None]
        else:
            # The tensors, and not only their ids: a new gradient may come to lie where an old one was.
            self._grads = {id(each): _grads_of(each) for each in self.optimizers}

    def is_complete(self) -> bool:
        """Whether all optimizers have stepped."""
        return self.each_alone or len(self._found_inf) == len(self.optimizers)

    def end(self) -> None:
        """The joint step is over: let go of its gradients."""
        self._found_inf, self._grads, self._updated, self._scaler_states = {}, {}, [], None

    # --- what a step of them is ------------------------------------------------------------------

    def is_init_step(self, optimizer: Optimizer, has_closure: bool) -> bool:
        """Whether this is the hidden step of checkpoint code. It asks each optimizer alone: no part of a joint step."""
        entries = self._runner.now.entries
        found = is_init_step_of(optimizer, self._first_step, entries, has_closure)
        if found:
            self.end()
        return found

    def new_step(self, optimizer: Optimizer, decays_gradients: bool = False, is_unscaled: bool = False) -> Step:
        """A Step of the gradients as they are now: of this optimizer alone, or of all.

        is_unscaled: whether the optimizer's kernel has divided the gradients by a GradScaler's scale already.
        """
        groups = self._runner.now.groups
        owner_of = {id(group): id(each) for each in self.optimizers for group in each.param_groups}
        found_inf = {i: self._found_inf.get(owner_of.get(id(group), 0)) for i, group in enumerate(groups)}
        grad_scale = getattr(optimizer, "grad_scale", None) if self.each_alone and not is_unscaled else None
        own = {index for index, group in enumerate(groups) if owner_of.get(id(group)) == id(optimizer)}
        return self._runner.new_step(
            {},
            only=own if self.each_alone else None,
            grad_scale=grad_scale,
            found_inf=found_inf,
            decays_gradients=decays_gradients,
        )

    def batches_of(self, optimizer: Optimizer, step: Step) -> list[Batch]:
        """What a step holds of one optimizer."""
        own = set(map(id, optimizer.param_groups))
        return [batch for batch in step.batches if id(batch.group) in own]


def refuse_under_scaler(
    optimizers: Sequence[Optimizer], rules: Sequence[Rule], coupling: str, needs_updates: bool
) -> None:
    """Raise ValueError where a GradScaler that skips one of several optimizers would leave shared metrics undefined.

    It unscales and judges them one after the other. So metrics of gradients are not to be had together; nor is the update
    of an optimizer that it may pass over without a word. On every rank alike: all use a scaler, or none.
    """
    uses_scaler = _scaler_of_this_step() is not None
    if not uses_scaler and not any(getattr(each, "grad_scale", None) is not None for each in optimizers):
        return
    sources = {of for rule in rules for of in rule.sources(rule.defaults)}
    of_gradients = "grad" in sources or (coupling == "gradient" and "update" in sources)
    of_gradients |= coupling == "gradient" and any(rule.is_cautious(rule.defaults) for rule in rules)
    at_once = any(rule.target != "update" for rule in rules)
    is_unheard = needs_updates and not all(_torch.applies_grad_scaler(each) for each in optimizers)
    if of_gradients or at_once or is_unheard:
        what = (
            "a number of the gradients" if of_gradients else "a decay at once" if at_once else "a number of the updates"
        )
        way_out = " (or use fused optimizers)" if is_unheard and not of_gradients and not at_once else ""
        raise ValueError(
            f"a GradScaler unscales and may skip one of several optimizers and not the others, so {what} over all of them is not "
            f"defined; attach to each on its own, or use norm_input='params'{way_out}"
        )


def _scaler_of_this_step() -> torch.amp.GradScaler | None:
    """The GradScaler whose `step` has called the present step, if one has. It tells nobody, so the stack is asked.

    Only where several optimizers share a metric.
    """
    frame: FrameType | None = _torch.calling_frame()
    while frame is not None:
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler: torch.amp.GradScaler = frame.f_locals["self"]
            return scaler
        frame = frame.f_back
    return None


def _scaler_states() -> Any:
    """What a GradScaler has only until its next update: the same object as long as that has not come."""
    scaler = _scaler_of_this_step()
    return None if scaler is None else _torch.scaler_states(scaler)


def _grads_of(optimizer: Optimizer) -> list[Tensor | None]:
    """The optimizer's gradients: its own where an attachment shows it others."""
    own = {id(each.shown): each.own for other in attachments_on(optimizer) for each in other.overrides.grads}
    grads = (param.grad for group in optimizer.param_groups for param in group["params"])
    return [own.get(id(grad), grad) for grad in grads]
