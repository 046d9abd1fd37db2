"""Several optimizers of one model under one attachment: whose steps belong together, and what a GradScaler does to them."""

from __future__ import annotations

from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..rules.base import Rule
from ..step.runner import StepRunner
from ..step.step import Step
from .overrides import attachments_on

Optimizer = torch.optim.Optimizer


class JointStep:
    """The steps of optimizers that share their metrics: each steps once, in any order, and the first measures for all.

    A joint step ends when all have stepped. A new one begins before that where an optimizer steps again, or a GradScaler
    has been updated since: then the others were skipped, by the scaler or by the training loop, which is legal. They were
    skipped, too, where an optimizer has other gradients than when the last one stepped; but decay that waits for all
    updates can wait for those, whatever gradients they come from.

    runner: runs the transforms.
    optimizers: all of the attachment.
    each_alone: whether they share nothing; then every step is a joint step of its own.
    needs_updates: whether the decay waits until all have stepped.
    shared: the Step that the first optimizer has measured for all, where rules act before the optimizers; None: the next
        optimizer measures.
    """

    def __init__(
        self, runner: StepRunner, optimizers: Sequence[Optimizer], each_alone: bool, needs_updates: bool
    ) -> None:
        self.each_alone, self.optimizers = each_alone, optimizers
        self.shared: Step | None = None
        self._runner, self._needs_updates = runner, needs_updates
        self._found_inf: dict[int, Tensor | None] = {}  # of those that have stepped
        self._grads: dict[int, list[Tensor | None]] = {}  # all gradients, when the last one stepped
        self._scaler_states: Any = None

    # --- which steps belong together -------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """Whether all optimizers have stepped."""
        return self.each_alone or len(self._found_inf) == len(self.optimizers)

    def join(self, optimizer: Optimizer, has_raised: bool) -> bool:
        """Count a step of `optimizer` to the joint step that is open, or begin a new one.

        has_raised: whether the last joint step was broken off by an error.
        Returns whether a new one has begun.
        Raises ValueError if the decay of the last one still waits for updates.
        """
        is_open = not self.each_alone and bool(self._found_inf)  # some have stepped, and others have not
        scaler = None if self.each_alone else _scaler_of_this_step()
        # A scaler has these only until its next update: the same object as long as that has not come.
        scaler_states = None if scaler is None else _torch.scaler_states(scaler)
        is_same = is_open and id(optimizer) not in self._found_inf and scaler_states is self._scaler_states
        if is_same and not self._needs_updates:
            # New gradients: the training loop has left out the optimizers that have not stepped, and has gone on.
            then = self._grads.get(id(optimizer), [])
            is_same = all(new is old for new, old in zip(_grads_of(optimizer), then, strict=False))
        if is_same:
            return False
        is_waiting = is_open and self._needs_updates and not has_raised
        self.end()
        if is_waiting:
            raise ValueError(
                f"{type(optimizer).__name__} steps a second time before the others have stepped, but their decay depends on the "
                "updates of all; step each once, or attach to each on its own"
            )
        self._scaler_states = scaler_states
        return True

    def enter(self, optimizer: Optimizer) -> None:
        """`optimizer` steps, and nothing has been refused."""
        # A GradScaler unscales and judges one optimizer after the other. Its verdict on this one is known now.
        self._found_inf[id(optimizer)] = getattr(optimizer, "found_inf", None)

    def note_gradients(self, optimizer: Optimizer) -> None:
        """The gradients of `optimizer`, which steps next, are there now: a closure may have just made them."""
        if not (self.each_alone or self._needs_updates):
            # The tensors, and not only their ids: a new gradient may come to lie where an old one was.
            self._grads = {id(each): _grads_of(each) for each in self.optimizers}

    def end(self) -> None:
        """The joint step is over: let go of its gradients."""
        self._found_inf, self._grads, self._scaler_states = {}, {}, None
        self.shared = None

    # --- what a step of them is ------------------------------------------------------------------

    def new_step(self, optimizer: Optimizer, decays_gradients: bool = False, of_all: bool = True) -> Step:
        """A Step of the gradients as they are now.

        decays_gradients: whether its terms are added to gradients.
        of_all: whether it has the gradients of all optimizers that step together, or of this one alone.
        """
        groups = self._runner.now.groups
        owner_of = {id(group): id(each) for each in self.optimizers for group in each.param_groups}
        # Groups that are hidden now (DeepSpeed) belong to no optimizer, and those of optimizers that have not stepped
        # yet have no verdict. Each optimizer applies its own when it steps.
        found_inf = {i: self._found_inf.get(owner_of.get(id(group), 0)) for i, group in enumerate(groups)}
        own = {index for index, group in enumerate(groups) if owner_of.get(id(group)) == id(optimizer)}
        grad_scale = getattr(optimizer, "grad_scale", None) if self.each_alone else None
        return self._runner.new_step(
            {},
            only=own if self.each_alone or not of_all else None,
            grad_scale=grad_scale,
            found_inf=found_inf,
            decays_gradients=decays_gradients,
        )


def refuse_under_scaler(
    optimizers: Sequence[Optimizer], rules: Sequence[Rule], coupling: str, needs_updates: bool
) -> None:
    """Raise ValueError where a GradScaler that skips one of several optimizers would leave shared metrics undefined.

    It unscales and judges them one after the other. So metrics of gradients are not to be had together; nor is the update
    of an optimizer that it may pass over without a word. On every rank alike: all use a scaler, or none.
    """
    # Fused optimizers carry the scale themselves, also where something else than a GradScaler's `step` has called them.
    uses_scaler = _scaler_of_this_step() is not None
    if not uses_scaler and not any(getattr(each, "grad_scale", None) is not None for each in optimizers):
        return
    sources = {of for rule in rules for of in rule.sources(rule.defaults)}
    # Before the optimizer, "update" is the gradient, and so is what a mask compares with.
    of_gradients = "grad" in sources or (coupling == "gradient" and "update" in sources)
    of_gradients |= coupling == "gradient" and any(rule.is_cautious(rule.defaults) for rule in rules)
    # Written for all optimizers when the first one steps, before the verdict on the others is known.
    at_once = any(rule.target != "update" for rule in rules)
    # A scaler calls the step of an optimizer that skips by itself, and passes over all others: no hook runs then.
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
    """The GradScaler whose `step` has called the present step, if one has."""
    # It leaves no trace on optimizers that are not fused, so the stack is searched; only where several share a metric.
    frame: FrameType | None = _torch.calling_frame()
    while frame is not None:
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler: torch.amp.GradScaler = frame.f_locals["self"]
            return scaler
        frame = frame.f_back
    return None


def _grads_of(optimizer: Optimizer) -> list[Tensor | None]:
    """The optimizer's gradients: its own where an attachment shows it others."""
    own = {id(each.shown): each.own for other in attachments_on(optimizer) for each in other.overrides.grads}
    grads = (param.grad for group in optimizer.param_groups for param in group["params"])
    return [own.get(id(grad), grad) for grad in grads]
