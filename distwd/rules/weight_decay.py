"""Absolute decay: WeightDecay and CautiousWeightDecay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import Rule, check_target


class WeightDecay(Rule):
    """Weight decay at its place in a chain:  u ← u + λ·sign(p)·|p|^(ord−1).

    weight_decay: λ ≥ 0, float or 0-d tensor, per step; scaled by the learning rate if `LR` stands behind the rule.
    ord: ≥ 1; 2 is ordinary (L2) decay, 1 decays by the sign (L1). Both are keys of the param groups.
    target: "update" (as above) · "grad" (the same, to the gradient that later transforms see) ·
        "params_direct" (p ← p − λ·d(p) at once) · "closure" (to the gradient in every evaluation of the closure, as
        LBFGS needs).
    p: any float dtype and sharding; bf16 and fp16 are computed in float32. No communication.
    Raises ValueError for λ < 0, ord < 1, or another target.
    Source: torchzero's `WeightDecay`; Loshchilov & Hutter, arXiv 1711.05101, for the decoupled place.

    >>> import torch
    >>> from distwd import LR, Chain, WeightDecay
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0])); w.grad = torch.zeros(2)
    >>> Chain([w], WeightDecay(0.1), LR(0.5)).step()
    >>> w.detach()
    tensor([ 0.9500, -1.9000])
    """

    def __init__(self, weight_decay: float | Tensor, ord: float = 2, target: str = "update") -> None:
        check_target(target)
        self.target = target
        self.defaults = {"weight_decay": weight_decay, "ord": ord}
        self.check(self.defaults)


class CautiousWeightDecay(WeightDecay):
    """Decay only where the update shrinks the weight anyway:  u ← u + λ·[u·p > 0]·sign(p)·|p|^(ord−1).

    The mask is taken of the update as it stands at the rule's place in the chain (before a maximizing optimizer: of its
    negative). Arguments, shapes, dtypes, units and errors as `WeightDecay`. No communication.
    Source: Chen et al., arXiv 2510.12402 (written there with ≥ 0); torchzero and modded-nanogpt use > 0, as here.

    >>> import torch
    >>> from distwd import LR, CautiousWeightDecay, Chain
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0])); w.grad = torch.tensor([1.0, 1.0])
    >>> Chain([w], CautiousWeightDecay(0.1), LR(0.5)).step()
    >>> w.detach()
    tensor([ 0.4500, -2.5000])
    """

    def is_cautious(self, settings: Mapping[str, Any]) -> bool:
        return True
