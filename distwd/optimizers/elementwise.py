"""Optimizers that can run on any shard, and on zero tensors in place of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.blocks import ZeroPool
from ..kernels.formulas import DecayTerm
from ..step.step import Batch, PendingUpdate
from .base import GradientOptimizer

# Elementwise, linear in lr, and blind to the parameters' values: these can run on any shard, and on zeros, which they
# leave at −lr·u. Exactly these classes: a subclass may do anything.
ELEMENTWISE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
)
# Of these, those that can do a decay p ← p·(1 − lr·λ) in their own kernel.
KNOWS_DECOUPLED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


def own_decay(cls: type[torch.optim.Optimizer], terms: Sequence[DecayTerm]) -> float | None:
    """λ, if `terms` are what an optimizer of this class can do itself:  p ← p·(1 − lr·λ), or p ← (p − lr·u)/(1 + lr·λ).

    Its kernels round the decay in their own way, and skip it together with the step, so it is theirs wherever it can
    be. The second, which is proximal, it does with a smaller lr (see `proximal_lr`).

    cls: the class of the optimizer.
    terms: the decay that waits to be written.
    Returns λ per step, to be multiplied by lr; None if the optimizer cannot do this decay.
    """
    if cls not in KNOWS_DECOUPLED or len(terms) != 1:
        return None
    (term,) = terms
    # `before_lr` is set for an absolute rule only, where lr scales decay and update alike. A tensor would have to be
    # read, which waits for the device: the kernels take a Python number.
    is_l2 = replace(term, proximal=False).is_l2
    return term.before_lr if is_l2 and isinstance(term.before_lr, (int, float)) else None


def proximal_lr(lr: Any, decay: float) -> Any:
    """The lr with which a decoupled decay λ is proximal:  (p − lr·u)/(1 + lr·λ) = p·(1 − l·λ) − l·u  for l = lr/(1 + lr·λ)."""
    return lr / (1 + lr * decay)


class ElementwiseOptimizer(GradientOptimizer):
    """Runs on local tensors: on the parameters' own storage, or on zeros, which it leaves at −lr·u."""

    reads_params = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._zeros = ZeroPool()

    def can_step(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Those whose update nobody has to see first."""
        found = []
        for batch in batches:
            # bf16 and fp16 are rounded once for decay and update together, unless the optimizer does both itself. Its
            # kernels round to the nearest, so a write with random bits cannot be theirs.
            is_decayed_apart = bool(batch.all_terms) and own_decay(self.cls, batch.all_terms) is None
            is_rounded_twice = batch.is_low and (batch.random_stream is not None or is_decayed_apart)
            # The mask of a cautious term is taken of the update.
            has_mask = any(term.cautious for term in batch.terms)
            reads_old = any(term.reads_old for term in batch.proximal)
            if self._accepts_scale(batch) and not (is_rounded_twice or has_mask or reads_old):
                found.append(batch)
        return found

    def _accepts_scale(self, batch: Batch) -> bool:
        """Whether the scale may be given to the optimizer as its lr. torch's foreach kernels refuse most tensors."""
        settings, scale = self.bound.settings(batch.group), batch.pending.scale
        if not isinstance(scale, Tensor) or settings.get("fused") or settings.get("capturable"):
            return True
        # Left to itself torch steps one parameter after the other then, and reads the tensor for each: on a card it waits.
        return not settings.get("foreach") and scale.device.type == "cpu"

    def step(self, batches: Sequence[Batch]) -> None:
        """p ← p − Σ terms, then p ← p − scale·u, by the optimizer itself, decay included where it can, proximal too."""
        decays, targets, scales = [], [], []
        for batch in batches:
            decay, scale = own_decay(self.cls, batch.all_terms), batch.pending.scale
            if decay is not None:
                batch.count_unchanged()
                if batch.proximal:
                    scale, batch.proximal = proximal_lr(scale, decay), []
            elif batch.terms:
                batch.apply_(batch.terms)
            decays.append(decay or 0.0)
            scales.append(scale)
            # Plain parameters with the very gradients that the optimizer is to see are stepped as they are. All others
            # are stepped through local tensors that share their storage: DTensors would be dispatched one by one, and
            # a gradient that rules have changed must not replace `p.grad`.
            is_as_given = batch.pending.tensors is batch.grads and all(
                local is whole and grad is whole.grad
                for local, whole, grad in zip(batch.params, batch.whole, batch.grads, strict=True)
            )
            targets.append(batch.whole if is_as_given else [local.detach() for local in batch.params])
        self._step_on(targets, batches, scales, decays)

    def update(self, batches: Sequence[Batch]) -> None:
        """−scale·u ← what zeros become."""
        targets, scales, updates = [], [], []
        for batch in batches:
            pending = batch.pending
            zeros = self._zeros.take(batch.index, batch.params)
            # bf16 and fp16 hold the update itself better than lr times it, which fp16 may not hold at all.
            scale = pending.scale if self._accepts_scale(batch) and not batch.is_low else 1.0
            # A learning rate that the chain comes to later is multiplied by here: the optimizer's kernels do it at no
            # cost, and with the rounding that they have alone, so that `attach` to that optimizer gives the same bits.
            key = self.bound.lr_key
            lr = batch.group[key] if key is not None and pending.is_unscaled and not batch.is_low else None
            # At lr 0 the update over lr would be 0/0, and reading a tensor would wait for the device.
            applied_lr = lr if isinstance(lr, float) and lr > 0 else None
            left = pending.scale if scale is not pending.scale else 1.0
            targets.append(zeros)
            scales.append(scale if applied_lr is None else applied_lr)
            updates.append(PendingUpdate(zeros, is_owned=True, is_negated=True, scale=left, applied_lr=applied_lr))
        self._step_on(targets, batches, scales, [0.0] * len(batches))
        for batch, update in zip(batches, updates, strict=True):
            batch.pending = update

    def note_cleared(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._zeros.cleared(batch.index, batch.pending.tensors)

    def _step_on(
        self, targets: list[list[Tensor]], batches: Sequence[Batch], scales: Sequence[Any], decays: Sequence[Any]
    ) -> None:
        """Step tensors with the pending updates as their gradients.

        targets: by batch, what is stepped: its parameters, their local tensors, or zeros.
        scales: by batch, the lr to step with.
        decays: by batch, the decoupled weight decay that the optimizer itself applies; 0: none.
        """
        groups: list[dict[str, Any]] = []
        steps_on: list[tuple[Tensor, Tensor]] = []
        for batch, tensors, scale, decay in zip(batches, targets, scales, decays, strict=True):
            extra = {"lr": scale, "weight_decay": decay}
            # Without this key Adam would add the decay to the gradient.
            if self.cls in KNOWS_DECOUPLED:
                extra["decoupled_weight_decay"] = True
            groups.append(self._group(batch.group, tensors, **extra))
            steps_on += zip(tensors, batch.whole, strict=True)
            if tensors is not batch.whole:
                for tensor, update in zip(tensors, batch.pending.tensors, strict=True):
                    # torch refuses a gradient of another dtype; a parameter's `grad_dtype` allows one.
                    tensor.grad = update if update.dtype == tensor.dtype else update.to(tensor.dtype)
        on_params = all(tensors is batch.whole for batch, tensors in zip(batches, targets, strict=True))
        self._run(groups, steps_on, on_params)
        for batch, tensors in zip(batches, targets, strict=True):
            # Zeros are kept for the next step, and must not keep this step's gradients alive.
            if tensors is not batch.whole:
                for tensor in tensors:
                    tensor.grad = None
