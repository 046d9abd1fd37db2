"""Absolute decay: WeightDecay, CautiousWeightDecay, DirectWeightDecay, and decay_weights_ without an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import local_tensor
from ..checks import check_nonnegative, check_ord
from ..kernels.apply import apply_
from ..kernels.blocks import Workspace
from ..kernels.formulas import DecayTerm
from ..kernels.stochastic import LOW
from ..sharding.params import entries_of
from ..sharding.pieces import check_tensor
from ..step.rounding import Rounding, warn_if_lost
from .base import Rule


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
        super().__init__(target=target, weight_decay=weight_decay, ord=ord)


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


class DirectWeightDecay(WeightDecay):
    """Decay the parameters at once, whatever else the chain does:  p ← p − λ·sign(p)·|p|^(ord−1).

    Not scaled by the learning rate, wherever it stands; transforms behind it see the decayed parameters.
    λ, ord, shapes, dtypes and errors as `WeightDecay`, of which this is target="params_direct". Parameters without a
    gradient are left alone, as by every transform. No communication. Source: torchzero's `DirectWeightDecay`.

    >>> import torch
    >>> from distwd import LR, Chain, DirectWeightDecay
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0])); w.grad = torch.zeros(2)
    >>> Chain([w], DirectWeightDecay(0.1), LR(0.5)).step()
    >>> w.detach()
    tensor([ 0.9000, -1.8000])
    """

    def __init__(self, weight_decay: float | Tensor, ord: float = 2) -> None:
        super().__init__(weight_decay, ord, target="params_direct")


@torch.no_grad()
def decay_weights_(
    params: Iterable[Tensor | tuple[str, Tensor]],
    weight_decay: float | Tensor | Sequence[float | Tensor],
    ord: float = 2,
    *,
    rounding: str = "nearest",
    seed: int | None = None,
) -> None:
    """Decay parameters in place, now:  p ← p − λ·sign(p)·|p|^(ord−1).

    params: tensors, DTensors or (name, tensor) pairs, any mix of meshes and float dtypes; only local shards are touched, no communication.
    weight_decay: λ ≥ 0, one number (float or 0-d tensor), or one per parameter; per call, not scaled by a learning rate. ord: ≥ 1.
    rounding: of bf16 and fp16, "nearest" or "stochastic", as in `Chain`; plain tensors count as wholes. seed: for "stochastic", an integer,
        the same on every rank and another at every call (the number of the step, say): the noise depends on nothing else that changes.
    Raises ValueError for λ < 0, ord < 1, a tensor that cannot be decayed or is listed twice, before anything is changed.
    Source: torchzero's `decay_weights_`.

    >>> import torch
    >>> from distwd import decay_weights_
    >>> w = torch.tensor([1.0, -2.0])
    >>> decay_weights_([w], 0.1, ord=1)
    >>> w
    tensor([ 0.9000, -1.9000])
    """
    entries = entries_of(params)
    decays = list(weight_decay) if isinstance(weight_decay, Sequence) else [weight_decay] * len(entries)
    check_ord(ord)
    if len(decays) != len(entries):
        raise ValueError(
            f"weight_decay has {len(decays)} entries for {len(entries)} parameters; give one number, or one for each"
        )
    for decay in decays:
        check_nonnegative("weight_decay", decay)
    # Everything is looked at before anything is written.
    seen: set[int] = set()
    for entry in entries:
        check_tensor(entry.name, entry.tensor)
        if id(entry.tensor) in seen:
            raise ValueError(f"{entry.name} is listed twice and would decay twice; pass every parameter once")
        seen.add(id(entry.tensor))
    # With a default, every call would draw the same noise, and the decay would be biased.
    if seed is None and rounding == "stochastic":
        raise ValueError(
            "decay_weights_ with rounding='stochastic' needs a seed, and another at every call; pass seed="
        )
    rounds = Rounding(rounding, seed or 0, {}, "decay_weights_")
    # What one call of the kernel can take: one device, one dtype, one number. A tensor is only equal to itself, since to
    # compare it would be to read it.
    batches: dict[Any, list[int]] = {}
    for position, (entry, decay) in enumerate(zip(entries, decays, strict=True)):
        local = local_tensor(entry.tensor)
        key = (local.device, local.dtype, id(decay) if isinstance(decay, Tensor) else decay)
        batches.setdefault(key, []).append(position)
    for (_, dtype, _), index in batches.items():
        random_bits = next(rounds.random_stream(entries, index, 0)) if rounds.is_stochastic and dtype in LOW else None
        term = DecayTerm(decays[index[0]], float(ord))
        if not rounds.is_stochastic:
            warn_if_lost(entries[index[0]].name, [term], dtype)
        apply_(
            [local_tensor(entries[i].tensor) for i in index],
            [term],
            workspace=Workspace(),
            random_bits=random_bits,
        )
