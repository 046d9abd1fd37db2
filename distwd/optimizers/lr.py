"""LR: the learning rate as a transform."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..checks import check_nonnegative
from ..step.step import Step
from ..step.transform import BoundTransform, Transform


class LR(Transform):
    """Multiply everything before it:  u ← lr·u, with all decay that is already part of u.

    lr: float or 0-d tensor, ≥ 0, per step. It becomes the key "lr" of the param groups, which torch's schedulers set.

    What stands behind `LR` in a chain is not scaled by it. Shapes and dtypes of u stay as they are.
    Raises ValueError for lr < 0.
    Source: torchzero's `LR`.

    >>> import torch
    >>> from distwd import LR, Chain
    >>> w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)
    >>> Chain([w], LR(0.5)).step()
    >>> w.detach()
    tensor([0.5000, 0.5000])
    """

    def __init__(self, lr: float | Tensor) -> None:
        self.defaults = {"lr": lr}
        self.check(self.defaults)

    def check(self, settings: Mapping[str, Any]) -> None:
        check_nonnegative("lr", settings["lr"])

    def apply(self, step: Step, bound: BoundTransform) -> None:
        # Only a factor is noted: where the update is written it is multiplied anyway.
        for batch in step.batches:
            batch.scale_by(batch.group[bound.keys["lr"]])
