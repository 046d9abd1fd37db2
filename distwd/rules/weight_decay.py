"""Absolute decay: WeightDecay, CautiousWeightDecay, DirectWeightDecay, and decay_weights_ without an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._torch import local_tensor
from ..checks import check_nonnegative, check_ord, plain_number
from ..kernels.apply import apply_
from ..kernels.blocks import Workspace
from ..kernels.formulas import DecayTerm
from ..kernels.stochastic import LOW
from ..sharding.params import entries_of
from ..sharding.pieces import check_tensor
from ..step.rounding import Rounding, RoundingMode, rate_of, warn_if_lost
from .base import Rule, Target


class WeightDecay(Rule):
    """Weight decay at its place in a chain:  u ← u + λ·d(p − a),  d(x) = sign(x)·min(|x|, cap)^(ord−1).

    weight_decay: λ ≥ 0, float or 0-d tensor, per step; scaled by the learning rate if `LR` stands behind the rule.
    ord: ≥ 1; 2 is ordinary (L2) decay, 1 decays by the sign (L1).
    target: "update" (as above) · "grad" (the same, to the gradient that later transforms see) ·
        "params_direct" (p ← p − λ·d(p−a) at once) · "closure" (to the gradient in every evaluation of the closure, as
        LBFGS needs).
    toward: a, in units of p: a number · "initial": the parameters as the first real step begins, kept in the optimizer's
        state (`anchor`, shaped, sharded and typed like p) · {name: tensor}: tensors with the shapes and placements of the
        parameters, any float dtype, used as they are and not saved; in the param groups they are called "given".
    cap: > 0, in units of p: beyond it the pull is that of |p − a| = cap (Huber); None: no cap.
    proximal: whether the pull is of the parameter θ̃ that the step would leave, with τ = λ (times the learning rate):
        ord 2: θ̃/(1+τ), or θ̃ − τ·cap·sign(θ̃) beyond (1+τ)·cap · ord 1: sign(θ̃)·max(|θ̃|−τ, 0), with exact zeros ·
        other: θ̃/(1 + τ·|p|^(ord−2)). It acts last, wherever the rule stands, and no mask or metric sees it.
    All but `target` are keys of the param groups. p: any float dtype and sharding; bf16 and fp16 are computed in float32.
        No communication.
    Raises ValueError for λ < 0, ord < 1, cap ≤ 0 or another target; for proximal with an anchor, with a cap and ord ≠ 2,
        with another target or before an optimizer; in the first step for given tensors that do not fit, by name.
    Source: torchzero's `WeightDecay`; Loshchilov & Hutter, arXiv 1711.05101, for the decoupled place; arXiv 1802.01483
        (L2-SP) and 2308.11958 (L2-Init) for anchors; 2511.14721 (AdamHD) for the cap; 2404.10824 (pWD) for other ord.

    >>> import torch
    >>> from distwd import LR, Chain, WeightDecay
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0])); w.grad = torch.zeros(2)
    >>> Chain([w], WeightDecay(0.1), LR(0.5)).step()
    >>> w.detach()
    tensor([ 0.9500, -1.9000])
    >>> Chain([w], LR(0.5), WeightDecay(0.1, ord=1, proximal=True)).step()
    >>> w.detach()
    tensor([ 0.8500, -1.8000])
    """

    silent: ClassVar[Mapping[str, Any]] = {"toward": 0.0, "cap": None, "proximal": False, "inclusive": False}

    def __init__(
        self,
        weight_decay: float | Tensor,
        ord: float = 2,
        target: Target = "update",
        *,
        toward: float | Literal["initial"] | Mapping[str, Tensor] = 0.0,
        cap: float | None = None,
        proximal: bool = False,
    ) -> None:
        self._set(target, toward, weight_decay=weight_decay, ord=ord, cap=cap, proximal=proximal)

    def _set(self, target: Target, toward: float | str | Mapping[str, Tensor], **settings: Any) -> None:
        # Param groups are saved with every checkpoint, and somebody's own tensors shall not be.
        if isinstance(toward, Mapping):
            self.given, toward = dict(toward), "given"
        Rule.__init__(self, target=target, **settings, toward=toward)

    def check(self, settings: Mapping[str, Any]) -> None:
        super().check(settings)
        name = type(self).__name__
        toward, cap = plain_number(settings.get("toward", 0.0)), plain_number(settings.get("cap"))
        is_number = isinstance(toward, (int, float)) and not isinstance(toward, bool) and math.isfinite(toward)
        if toward == "given" and self.given is None:
            raise ValueError(f"toward='given' needs the tensors: pass {name}(..., toward={{name: tensor}})")
        if isinstance(toward, Mapping):
            raise ValueError(
                f"a dict of tensors in a param group would be saved with it: pass {name}(..., toward={{name: tensor}}), and "
                "toward='given' in the group"
            )
        if not (is_number or toward in ("initial", "given")):
            raise ValueError(
                f"toward={settings['toward']!r} is not known; use a finite number, 'initial', or a dict {{name: tensor}}"
            )
        for flag in ("proximal", "inclusive"):
            if not isinstance(settings.get(flag, False), bool):
                raise ValueError(f"{flag}={settings[flag]!r} must be True or False")
        if cap is not None and (not isinstance(cap, (int, float)) or isinstance(cap, bool) or not 0 < cap < math.inf):
            raise ValueError(f"cap={settings['cap']!r} is not usable: pass a finite number > 0, or None for no cap")
        if not settings.get("proximal"):
            return
        if toward != 0:
            raise ValueError(f"{name}: proximal=True pulls to 0 only, and toward={toward!r}; leave out one of the two")
        if cap is not None and settings["ord"] != 2:
            raise ValueError(
                f"{name}: proximal=True with a cap is known for ord=2 only, not {settings['ord']:g}; leave out cap, or "
                "proximal"
            )
        if self.target != "update":
            raise ValueError(
                f"{name}: proximal=True acts on the parameters that the whole step leaves, so it has no target={self.target!r}; "
                "use target='update'"
            )

    def check_place(self, settings: Mapping[str, Any], optimizer_behind: str) -> None:
        if settings.get("proximal") and optimizer_behind:
            raise ValueError(
                f"{type(self).__name__}: proximal=True acts on the parameters that the whole step leaves, and here it would "
                f"be part of the gradient of {optimizer_behind}; put it behind the optimizer (attach: coupling 'lr' or 'none')"
            )

    def toward(self, settings: Mapping[str, Any]) -> float | str:
        toward: float | str = settings.get("toward", 0.0)
        return toward

    def term(self, settings: Mapping[str, Any], *args: Any, **kwargs: Any) -> DecayTerm:
        cap = settings.get("cap")
        return replace(
            super().term(settings, *args, **kwargs),
            cap=None if cap is None else float(cap),
            proximal=bool(settings.get("proximal", False)),
            inclusive=bool(settings.get("inclusive", False)),
        )

    def describe(self, settings: Mapping[str, Any]) -> str:
        words = [super().describe(settings)]
        for name, nothing in self.silent.items():
            if (value := settings.get(name, nothing)) != nothing:
                words.append(name if value is True else f"{name} {value}")
        return ", ".join(filter(None, words))


class CautiousWeightDecay(WeightDecay):
    """Decay only where the update shrinks the weight anyway:  u ← u + λ·[u·(p−a) > 0]·sign(p−a)·|p−a|^(ord−1).

    The mask is taken of the update as it stands at the rule's place in the chain (before a maximizing optimizer: of its
    negative).
    inclusive: whether the mask is ≥ 0, so that also weights decay whose update is 0: rows of an embedding without gradient,
        say. A key of the param groups.
    toward: a, as in `WeightDecay`. Other arguments as there; shapes, dtypes, units and errors as `WeightDecay`. No
        communication.
    Source: Chen et al., arXiv 2510.12402, with ≥ 0, as nanochat and dion have it; torchzero and modded-nanogpt use > 0.

    >>> import torch
    >>> from distwd import LR, CautiousWeightDecay, Chain
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0])); w.grad = torch.tensor([1.0, 1.0])
    >>> Chain([w], CautiousWeightDecay(0.1), LR(0.5)).step()
    >>> w.detach()
    tensor([ 0.4500, -2.5000])
    """

    def __init__(
        self,
        weight_decay: float | Tensor,
        ord: float = 2,
        target: Target = "update",
        *,
        inclusive: bool = False,
        toward: float | Literal["initial"] | Mapping[str, Tensor] = 0.0,
    ) -> None:
        self._set(target, toward, weight_decay=weight_decay, ord=ord, inclusive=inclusive)

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
    rounding: RoundingMode = "nearest",
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
            warn_if_lost(entries[index[0]].name, rate_of([term]), dtype)
        apply_(
            [local_tensor(entries[i].tensor) for i in index],
            [term],
            workspace=Workspace(),
            random_bits=random_bits,
        )
