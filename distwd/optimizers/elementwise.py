"""Optimizers that can run on any shard."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.apply import count
from ..kernels.zeros import ZeroPool
from ..sharding.local import local_tensor
from ..step.step import Batch
from .base import InnerOptimizer

# Elementwise, linear in lr, and blind to the parameters' values: these can run on any shard, and on zeros in the
# parameters' stead. Exactly these classes: a subclass may do anything.
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
KNOWS_DECOUPLED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


class ElementwiseOptimizer(InnerOptimizer):
    """Runs on local tensors: on the parameters' own storage, or on zeros, which it leaves at −lr·update."""

    reads_params = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._zeros = ZeroPool()

    def begins_whole(self, groups: Sequence[dict[str, Any]]) -> bool:
        """All but SGD with dampening, whose buffer begins as the first gradient."""
        settings = [self.bound.settings(group) for group in groups]
        return not any(own.get("momentum") and own.get("dampening") for own in settings)

    def _stand_in(self, param: Tensor) -> Tensor:
        return local_tensor(param).detach()

    def direct(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Unless a mask has to see the update first, torch would refuse the learning rate, or bf16 be rounded otherwise than once."""
        return [batch for batch in batches if self._takes(batch) and self._may_write(batch)]

    def _may_write(self, batch: Batch) -> bool:
        if batch.is_low and (batch.random_stream is not None or (batch.terms and self._handed(batch) is None)):
            return False
        return not any(term.cautious for term in batch.terms)

    def step(self, batches: Sequence[Batch]) -> None:
        """p ← p − pulls, then p ← p − scale·update, by the optimizer itself. It may do a decay that it knows, in its own kernel."""
        decays = []
        for batch in batches:
            handed = self._handed(batch)
            decays.append(handed or 0.0)
            if handed is not None:
                count(batch.params, batch.terms, batch.tally, batch.workspace)
            elif batch.terms:
                batch.apply_(batch.terms)
        targets = [
            batch.whole if _is_as_given(batch) else [local.detach() for local in batch.params] for batch in batches
        ]
        self._step_on(targets, batches, [batch.scale for batch in batches], decays)

    def update(self, batches: Sequence[Batch]) -> None:
        """batch.update ← what zeros become: −scale·update."""
        targets = [self._zeros.take(batch.index, batch.params) for batch in batches]
        aheads = [self._lr_ahead(batch) for batch in batches]
        # bf16 and fp16 hold the update itself better than lr times it, which fp16 may not hold at all.
        own = [batch.scale if self._takes(batch) and not batch.is_low else 1.0 for batch in batches]
        scales = [scale if ahead is None else ahead for scale, ahead in zip(own, aheads, strict=True)]
        self._step_on(targets, batches, scales, [0.0] * len(batches))
        for batch, target, scale, ahead in zip(batches, targets, own, aheads, strict=True):
            batch.scale, batch.ahead = batch.scale if scale is not batch.scale else 1.0, ahead
            batch.update, batch.owns_update, batch.flipped = target, True, True

    def _lr_ahead(self, batch: Batch) -> float | None:
        """The learning rate that the chain comes to later: what the optimizer multiplies by it needs no multiplication there."""
        key = self.bound.lr_key
        lr = batch.group[key] if key is not None and batch.is_unscaled and not batch.is_low else None
        return lr if isinstance(lr, float) and lr > 0 else None

    def _takes(self, batch: Batch) -> bool:
        """Whether the scale may be given to the optimizer as its lr; torch's foreach kernels refuse most tensors."""
        settings = self.bound.settings(batch.group)
        takes_tensors = settings.get("fused") or settings.get("capturable") or not settings.get("foreach")
        return not isinstance(batch.scale, Tensor) or bool(takes_tensors)

    def _handed(self, batch: Batch) -> float | None:
        """λ, if what is pending is the optimizer's own decoupled decay p ← p·(1 − lr·λ): one absolute linear pull, scaled alike."""
        if self.cls not in KNOWS_DECOUPLED or len(batch.terms) != 1:
            return None
        (term,) = batch.terms
        return term.before_lr if term.is_linear and isinstance(term.before_lr, (int, float)) else None

    def _step_on(
        self, targets: list[list[Tensor]], batches: Sequence[Batch], scales: Sequence[Any], decays: Sequence[Any]
    ) -> None:
        groups: list[dict[str, Any]] = []
        steps_on: list[tuple[Tensor, Tensor]] = []
        for batch, tensors, scale, decay in zip(batches, targets, scales, decays, strict=True):
            extra = {"lr": scale, "weight_decay": decay}
            if self.cls in KNOWS_DECOUPLED:
                extra["decoupled_weight_decay"] = True
            groups.append(self._group(batch.group, tensors, **extra))
            steps_on += zip(tensors, batch.whole, strict=True)
            if tensors is not batch.whole:
                for tensor, update in zip(tensors, batch.update, strict=True):
                    tensor.grad = update if update.dtype == tensor.dtype else update.to(tensor.dtype)
        states = self.chain.state
        is_own = all(tensors is batch.whole for batch, tensors in zip(batches, targets, strict=True))
        if is_own and not self.suffix and isinstance(states, defaultdict):
            self._run_with(states, groups)  # nothing has to be lent
        else:
            self._run(groups, steps_on)
        for batch, tensors in zip(batches, targets, strict=True):
            if tensors is not batch.whole:
                for tensor in tensors:
                    tensor.grad = None

    def cleared(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._zeros.cleared(batch.index, batch.update)


def _is_as_given(batch: Batch) -> bool:
    """Whether the parameters are plain tensors with the very gradients that the optimizer is to see."""
    return batch.update is batch.grads and all(
        local is whole and grad is whole.grad
        for local, whole, grad in zip(batch.params, batch.whole, batch.grads, strict=True)
    )
