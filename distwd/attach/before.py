"""Decay that is written before the optimizer steps: to its gradients, to the parameters, or into its own settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..optimizers.elementwise import own_decay, proximal_lr
from ..optimizers.state import like_whole
from ..step.runner import StepRunner
from ..step.step import Batch, Step, zero_where
from .joint import JointStep, Overrides, attachments_on

Optimizer = torch.optim.Optimizer


class WriteBefore:
    """Rules that need not know what the optimizer will do.

    These are the rules before it, and around elementwise optimizers those that look at no update. Proximal decay is written
    when the optimizer has stepped.

    runner: runs the rules.
    joint: the steps that belong together.
    coupling: "gradient": the optimizer sees g + λ·d(p) as its gradient. "lr", "none": the parameters are decayed.
    overrides: where what is changed for the length of a step is noted.
    """

    def __init__(self, runner: StepRunner, joint: JointStep, coupling: str, overrides: Overrides) -> None:
        self._runner, self._joint, self._coupling, self._overrides = runner, joint, coupling, overrides
        self._written: Step | None = None  # a step that is written, and whose optimizer has not stepped yet
        self._shrinking: list[
            Batch
        ] = []  # of that step: those with decay of the parameters as the optimizer leaves them
        self._groups: dict[int, dict[str, Any]] = {}  # by identity of a batch whose optimizer has not stepped yet

    def begin(self, optimizer: Optimizer, is_first: bool) -> Optimizer | None:
        """`optimizer` is about to step, by itself. Its gradients may not be there yet."""
        self._written, self._shrinking = None, []
        return None

    def act(self, optimizer: Optimizer, is_first: bool) -> None:
        """Decay: the gradients of `optimizer` are there, and it steps next; is_first: of its joint step."""
        decays_gradients = self._coupling == "gradient"
        if is_first or self._joint.shared is None:
            self._groups = {}
            # One step for all optimizers that step together: its metrics are over all of them.
            self._joint.shared = self._joint.new_step(optimizer, decays_gradients)
            if not self._joint.each_alone and self._coupling == "lr":
                # An optimizer's lr may change until it steps, so here its decay is of lr 1.
                for batch in self._joint.shared.batches:
                    self._groups[id(batch)], batch.group = batch.group, {**batch.group, "lr": 1.0}
            self._runner.run(self._joint.shared)
        step = self._written = self._joint.shared
        own_groups = set(map(id, optimizer.param_groups))
        batches = [batch for batch in step.batches if id(self._groups.get(id(batch), batch.group)) in own_groups]
        for batch in batches:
            if (group := self._groups.pop(id(batch), None)) is not None:
                batch.group = group
                batch.scale_by(group["lr"])

        if not self._joint.each_alone:
            # The step was made before this optimizer's scale and verdict were known: no term may act where a GradScaler
            # skips the step. By selection on the device; reading the verdict would wait for it.
            grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
            # Kept numbers go by it when the step is finished.
            own = [index for index, group in enumerate(step.groups) if id(group) in own_groups]
            step.found_inf = {**step.found_inf, **dict.fromkeys(own, found_inf)}
            for batch in batches:
                if decays_gradients and grad_scale is not None:
                    batch.terms = [term.scaled(grad_scale) for term in batch.terms]
                if found_inf is not None:
                    batch.terms, batch.proximal = (
                        [replace(term, rate=zero_where(found_inf, term.rate)) for term in terms]
                        for terms in (batch.terms, batch.proximal)
                    )

        if decays_gradients:
            for batch in batches:
                if not batch.is_materialized:
                    batch.materialize()
                # Where nothing decays, the optimizer sees the very tensors of `p.grad`.
                if batch.pending.tensors is not batch.grads:
                    for param, update in zip(batch.whole, batch.pending.tensors, strict=True):
                        self._overrides.set_grad(param, like_whole(update, param))
            return

        # The optimizer's own decay rounds to the nearest, and a group's setting decays all parameters of the group: it
        # must not be used where one of them is rounded with random bits.
        stochastic = {id(batch.group) for batch in batches if batch.random_stream is not None}
        for batch in batches:
            group, decay = batch.group, None
            # Its decay is scaled by lr, as "lr" is and "none" is not.
            if self._coupling == "lr" and id(group) not in stochastic:
                decay = own_decay(type(optimizer), batch.all_terms)
            # For a proximal one it gets a smaller lr for this step, which no other attachment may take for its own.
            if batch.proximal and (isinstance(group.get("lr"), Tensor) or len(attachments_on(optimizer)) > 1):
                decay = None
            # Another attachment may have put its own decay there already; then this one is written.
            if decay is None or (id(group) not in self._overrides.groups and group["weight_decay"] != 0):
                if batch.terms:
                    batch.apply_(batch.terms)
            else:
                batch.count_unchanged()
                lr = proximal_lr(group["lr"], decay) if batch.proximal else None
                self._overrides.set_decay(group, decay, lr)
                batch.proximal = []
        self._shrinking = [batch for batch in batches if batch.proximal]

    def after(self, optimizer: Optimizer, stepped: Optimizer, is_complete: bool) -> None:
        """`optimizer` has stepped: counters and kept numbers move on, for a step that raises has not counted."""
        for batch in self._shrinking:
            batch.apply_(batch.proximal)
        # A hidden step writes nothing.
        if self._written is not None:
            self._runner.finish(self._written, optimizer.param_groups)
        self._written, self._shrinking = None, []

    def forget(self) -> None:
        """Let go of all memory."""
        self._written, self._shrinking, self._groups = None, [], {}
