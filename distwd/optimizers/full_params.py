"""Optimizers that must see the parameters themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..kernels.apply import differences
from ..step.step import Batch
from .base import InnerOptimizer
from .state import like_whole


class FullParamOptimizer(InnerOptimizer):
    """Runs on the parameters themselves, as the optimizer would alone (DTensors included); the update is the difference that makes."""

    reads_params = True

    def _stand_in(self, param: Tensor) -> Tensor:
        return param.detach()

    def direct(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Only at lr 1 and without decay: whether the step is linear in lr, or reads the parameters, is not known."""
        return batches if all(batch.is_plain and not batch.flipped for batch in batches) else []

    def step(self, batches: Sequence[Batch]) -> None:
        """Step the parameters with `batch.update` as their gradients."""
        groups = [self._group(batch.group, params) for batch in batches for params in _by_mesh(batch.whole)]
        kept = [param.grad for batch in batches for param in batch.whole]
        for batch in batches:
            if batch.update is not batch.grads:
                for param, update in zip(batch.whole, batch.update, strict=True):
                    param.grad = like_whole(update.to(param.dtype), param)
        self._run(groups, ((param, param) for batch in batches for param in batch.whole))
        for param, grad in zip((param for batch in batches for param in batch.whole), kept, strict=True):
            param.grad = grad

    def update(self, batches: Sequence[Batch]) -> None:
        """batch.update ← p after − p before; the parameters stay as they are."""
        before = [[param.clone() for param in batch.params] for batch in batches]
        self.step(batches)
        for batch, old in zip(batches, before, strict=True):
            batch.update, batch.owns_update, batch.flipped = moved_back(batch.params, old), True, True


def moved_back(params: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """How far `params` have come from `old`, where they are put back."""
    moved = differences(params, old)
    torch._foreach_copy_(params, old)
    return moved


def _by_mesh(params: Sequence[Tensor]) -> list[list[Tensor]]:
    # torch's foreach kernels refuse a list of DTensors on two meshes, or of DTensors and plain tensors.
    found: dict[Any, list[Tensor]] = {}
    for param in params:
        found.setdefault(param.device_mesh if isinstance(param, DTensor) else None, []).append(param)
    return list(found.values())
