"""Decay that is written before the optimizer steps: to its gradients, to the parameters, or into its own settings."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..optimizers.elementwise import own_decay
from ..optimizers.state import like_whole
from ..step.runner import StepRunner
from ..step.step import Batch, Step, zero_where
from .joint import JointStep
from .overrides import Overrides

Optimizer = torch.optim.Optimizer


class WriteBefore:
    """Rules that need not know what the optimizer will do: those before it, and absolute ones around elementwise optimizers.

    coupling: "gradient": the optimizer sees g + λ·d(p) as its gradient. "lr", "none": the parameters are decayed.
    """

    def __init__(self, runner: StepRunner, joint: JointStep, coupling: str, overrides: Overrides) -> None:
        self._runner, self._joint, self._coupling, self._overrides = runner, joint, coupling, overrides
        self._step: Step | None = None

    def begin(self, optimizer: Optimizer) -> None:
        """The first optimizer of a joint step is about to step."""
        self._step = None

    def proxy_of(self, optimizer: Optimizer) -> Optimizer | None:
        """The optimizer steps itself."""
        return None

    def before(self, optimizer: Optimizer, is_first: bool) -> None:
        """The gradients of `optimizer` are there, and it steps next."""
        if is_first or self._step is None:
            # One step for all optimizers that step together: its metrics are over all of them.
            self._step = self._joint.new_step(optimizer, decays_gradients=self._coupling == "gradient")
            self._runner.run(self._step)
        own = self._joint.batches_of(optimizer, self._step)
        if not self._joint.each_alone:
            self._apply_grad_scaler(optimizer, own)
        if self._coupling == "gradient":
            for batch in own:
                if not batch.is_materialized:
                    batch.materialize()
                if batch.pending.tensors is not batch.grads:
                    for param, update in zip(batch.whole, batch.pending.tensors, strict=True):
                        self._overrides.set_grad(param, like_whole(update, param))
        else:
            self._write_terms(optimizer, own)

    def after(self, optimizer: Optimizer, stepped: Optimizer) -> None:
        """The optimizer has stepped."""
        if self._step is not None:
            self._runner.finish(self._step, optimizer.param_groups)

    def complete(self, optimizer: Optimizer) -> None:
        """All optimizers of a joint step have stepped; `optimizer` was the last."""
        self._step = None

    def abort(self) -> None:
        """A step was broken off."""
        self._step = None

    def forget(self) -> None:
        """Let go of all memory."""
        self._step = None

    def _write_terms(self, optimizer: Optimizer, batches: list[Batch]) -> None:
        """p ← p − Σ terms; or let the optimizer do it, if it knows that decay itself."""
        # Its kernels round to the nearest, and a group's setting decays all of its parameters.
        stochastic = {id(batch.group) for batch in batches if batch.random_stream is not None}
        for batch in batches:
            group, decay = batch.group, None
            if self._coupling == "lr" and id(group) not in stochastic:
                decay = own_decay(type(optimizer), batch.terms)
            # Another attachment may have put its own decay there already; then this one is written.
            if decay is None or (id(group) not in self._overrides.groups and group["weight_decay"] != 0):
                batch.apply_(batch.terms)
                continue
            batch.count_unchanged()
            self._overrides.set_decay(group, decay)

    def _apply_grad_scaler(self, optimizer: Optimizer, batches: list[Batch]) -> None:
        """Let no term act in a step that a GradScaler will skip; its verdict on this optimizer is known only now."""
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        for batch in batches:
            if self._coupling == "gradient" and grad_scale is not None:
                batch.terms = [term.scaled(grad_scale) for term in batch.terms]
            if found_inf is not None:
                batch.terms = [replace(term, rate=zero_where(found_inf, term.rate)) for term in batch.terms]
