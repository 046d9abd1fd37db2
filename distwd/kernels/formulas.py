"""The formulas of a step, as plain functions:  t ← prox(keep·t − Σ rate·[sign·u·(p−a) > 0]·d(p−a) − scale·u).

The direction is d(x) = sign(x)·min(|x|, cap)^(ord−1); a is what decay pulls to, 0 for most.

They work on lists of local tensors of one dtype and device, a block at a time. Their first argument is the operations that
they are made of: a Workspace, which does them at once, or TRACED, which torch.compile reads. So each formula stands here
once. Everything gives the same bits wherever a tensor is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Operand, Ops
from .stochastic import LOW

# A number for all tensors of a list (float or 0-d tensor), or one for each (1-d tensor), or for each matrix of each.
Rate = float | Tensor

# `pow_` on so many elements is serial in ATen (its parallel grain is 32768), so that the only ends are ours.
_POW_PIECE = 1 << 14
_WHOLE_VECTORS = 64

# Where d(p) is made of operations that round once in IEEE arithmetic, so that anyone who computes it gets the same bits:
# sign(p), p, and from 3 on products |p|·|p|·... Products of more factors lose digits that `pow` keeps.
ELEMENTARY_ORDS = (1, 2, 3, 4, 5, 6, 7, 8, 9)


class TermKind(NamedTuple):
    """A DecayTerm without its numbers: what is the same in every step, and can be hashed."""

    ord: float
    cautious: bool = False
    sign: int = 1
    inclusive: bool = False
    cap: float | None = None
    toward: float = 0.0
    anchors: int | None = None  # which list of a Write holds a, where that is no number
    masked_by: int | None = None  # and which holds the u of the bracket, where the term has its own


@dataclass(frozen=True, slots=True)
class DecayTerm:
    """A decay that waits to be written:  rate · [sign·u·(p−a) > 0] · d(p−a),  with d(x) = sign(x)·min(|x|, cap)^(ord−1).

    rate: the factor of d, τ.
    ord: ≥ 1; for 1, d(x) is sign(x), for 2 it is x.
    cautious: whether the bracket applies; its u is given beside the term, as a Mask, if the term does not have its own.
    sign: −1 where u is something that will be ascended (the gradient before a maximizing optimizer), so that decay stays
        decay.
    before_lr: the rate without the learning rate that scales the update as well; None if they are not scaled alike.
    toward: a, a number, or local tensors: one for each parameter that the term is of, shaped like it, any float dtype.
    cap: > 0; beyond it the pull is that of |x| = cap; None: nowhere.
    inclusive: whether the bracket is ≥ 0.
    proximal: whether the pull is of the parameter after the step, and not of the one before it; see `shrink_`.
    index: the position of the rule among the transforms that it stands with.
    own_us: the u of the bracket, where that is not what is given beside the term: local tensors as in `toward`.
    """

    rate: Rate
    ord: float = 2.0
    cautious: bool = False
    sign: int = 1
    before_lr: Rate | None = None
    toward: float | list[Tensor] = 0.0
    cap: float | None = None
    inclusive: bool = False
    proximal: bool = False
    index: int = 0
    own_us: list[Tensor] | None = None

    def scaled(self, factor: Rate) -> DecayTerm:
        """The same term, `factor` times as strong."""
        return replace(self, rate=self.rate * factor)

    @property
    def is_l2(self) -> bool:
        """Whether p ← p·(1 − rate) is all there is to it."""
        return not self.proximal and self.kind == TermKind(2.0, sign=self.sign)

    @property
    def reads_old(self) -> bool:
        """Whether it is proximal and yet looks at the parameter before the step."""
        return self.proximal and self.ord not in (1, 2)

    @property
    def kind(self) -> TermKind:
        """What is left without the numbers and tensors (of a list of anchors: NaN, which is no number to pull to)."""
        toward = math.nan if isinstance(self.toward, list) else self.toward
        return TermKind(self.ord, self.cautious, self.sign, self.inclusive, self.cap, toward)

    def only(self, number: int, rates: slice) -> DecayTerm:
        """The same term of one of its parameters alone; rates: which of the numbers of a 1-d rate are that one's."""
        rate = self.rate[rates] if isinstance(self.rate, Tensor) and self.rate.dim() else self.rate
        toward = [self.toward[number]] if isinstance(self.toward, list) else self.toward
        return replace(self, rate=rate, toward=toward, own_us=None if self.own_us is None else [self.own_us[number]])


@dataclass(frozen=True, slots=True)
class Mask:
    """What cautious terms look at: the tensors `us`, read as sign·u, or as sign·(u − minus).

    The difference is taken a block at a time: as a whole it would cost the memory of another shard.
    """

    us: list[Tensor]
    sign: int = 1
    minus: list[Tensor] | None = None


class Numbers(NamedTuple):
    """The numbers of a Write: floats, 0-d tensors, or one number for each tensor of a list (a 1-d tensor, or a list of 0-d ones).

    keep: 1 − Σ rate of the terms that are one product (`is_l2`); None if there is none.
    rates: of the other terms, by `Write.kinds`.
    scale: the factor of the update; None where `Write.unit_scale` has it.
    proximal: of the proximal terms, by `Write.proximal`: τ and its companion, one after the other (see `companion`).
    """

    keep: Operand | None
    rates: Sequence[Operand]
    scale: Operand | None
    proximal: Sequence[Operand] = ()

    def each(self, function: Callable[[Any], Any]) -> Numbers:
        """The same with a function applied to each number that there is."""
        keep, scale = (one if one is None else function(one) for one in (self.keep, self.scale))
        return Numbers(keep, [function(one) for one in self.rates], scale, [function(one) for one in self.proximal])


@dataclass(frozen=True, slots=True)
class Write:
    """What a step writes:  t ← prox(keep·t − Σ rate·mask·d(p−a) − scale·u),  without its tensors and numbers.

    It is the same in every step and can be hashed: torch.compile makes one function for each. Its tensors come as several
    lists, each list once even if it has two roles: then it is widened once, and seen by the compiler as one. Fields of type
    `int | None` say which list has a role; None: no list. List 0 is t, what is written.

    kinds: the terms, but for those that are part of `keep`.
    has_keep: whether there is such a factor.
    unit_scale: 1 or −1 where that is surely the scale, so that u is subtracted or added as it is; None: it is a number.
    ps: what the terms are of; 0 where that is t itself.
    us: the update.
    mask_us, mask_minus, mask_sign: as in Mask.
    spends_us: whether u is not needed any more, and is to be left at zero.
    proximal: the proximal terms, in order.
    """

    kinds: tuple[TermKind, ...]
    has_keep: bool
    unit_scale: float | None
    ps: int = 0
    us: int | None = None
    mask_us: int | None = None
    mask_minus: int | None = None
    mask_sign: int = 1
    spends_us: bool = False
    proximal: tuple[TermKind, ...] = ()

    def mask_of(self, ops: Ops, lists: Sequence[list[Tensor]]) -> Mask | None:
        """The mask of a block, with nothing left to subtract."""
        if self.mask_us is None:
            return None
        us = lists[self.mask_us]
        return Mask(us if self.mask_minus is None else difference(ops, us, lists[self.mask_minus]), self.mask_sign)


def update_(ops: Ops, write: Write, numbers: Numbers, lists: Sequence[list[Tensor]]) -> None:
    """t ← prox(keep·t − Σ rate·mask·d(p−a) − scale·u), in place; every term is of p as it was before.

    write: which terms there are, and which list has which role.
    numbers: as operations take them.
    lists: float32 or float64; anchors as they are.
    """
    ts, ps = lists[0], lists[write.ps]
    mask = write.mask_of(ops, lists)
    # All terms before the first write: `ts` may be `ps`, and each term is of the parameter before the step. So is the
    # |p|^|ord−2| of proximal terms.
    decays = [decay(ops, kind, rate, ps, mask, lists) for kind, rate in zip(write.kinds, numbers.rates, strict=True)]
    powers = [power(ops, ops.abs(ps), abs(one.ord - 2)) if one.ord not in (1, 2) else [] for one in write.proximal]
    # L2 decay is a factor, as in torch's AdamW: another rounding than p − rate·p, and no temporary.
    if numbers.keep is not None:
        ops.mul_(ts, numbers.keep)
    for one in decays:
        ops.sub_(ts, one)
    # The update behind the terms, as in torch's AdamW: sums of floats depend on their order.
    if write.us is not None:
        us, scale = lists[write.us], numbers.scale
        if write.unit_scale is not None:
            # ±1 times u is exact: one rounding, of the sum, and no temporary.
            ops.add_(ts, us, alpha=-write.unit_scale)
        elif write.spends_us:
            assert scale is not None, "the scale is either a number or a unit"
            # In place: another temporary would push something out of the cache.
            ops.mul_(us, scale)
            ops.sub_(ts, us)
        elif isinstance(scale, (Tensor, list)):
            # A tensor cannot be alpha without being read, which would wait for the device.
            ops.sub_(ts, ops.mul(us, scale))
        else:
            assert scale is not None, "the scale is either a number or a unit"
            # u is another's (the gradients, say) and stays; one operation needs no temporary.
            ops.add_(ts, us, alpha=-scale)
    taus, companions = numbers.proximal[::2], numbers.proximal[1::2]
    for kind, tau, other, old in zip(write.proximal, taus, companions, powers, strict=True):
        shrink_(ops, kind, tau, other, ts, old)


def decay(
    ops: Ops,
    kind: TermKind,
    rate: Operand,
    ps: list[Tensor],
    mask: Mask | None,
    lists: Sequence[list[Tensor]] = (),
) -> list[Tensor]:
    """rate · [sign·u·(p−a) > 0] · d(p−a), apart from `ps`.

    mask: for a cautious term, with nothing left to subtract.
    lists: as in `update_`; needed for terms with anchors.
    """
    xs = ps
    if kind.anchors is not None:
        anchors, dtype = lists[kind.anchors], ps[0].dtype
        # Someone's own anchors may have any float dtype.
        xs = ops.sub(ps, anchors if all(a.dtype == dtype for a in anchors) else ops.copies(anchors, dtype))
    elif kind.toward:
        xs = ops.sub(ps, kind.toward)
    if kind.cautious:
        if kind.masked_by is not None:
            us = lists[kind.masked_by]
            mask = Mask(us if us[0].dtype == ps[0].dtype else ops.copies(us, ps[0].dtype))
        assert mask is not None, "a cautious term needs a mask"
        # [sign·u·x > 0]·x, whose direction is the masked one, since d(0) = 0. By the sign of u and not by u itself: a
        # product of two small numbers would vanish.
        signs = ops.sign(mask.us)
        masked = ops.mul(xs, signs)
        # x·sign(u) is |x| where both have one sign, and −|x| where not. What shall not decay is cut off to 0, and the
        # second product gives the rest the sign of x again. No boolean mask: it would be a temporary of another dtype.
        keeps_positive = kind.sign * mask.sign < 0 if kind.inclusive else kind.sign * mask.sign > 0
        if keeps_positive:
            ops.clamp_min_(masked, 0.0)
        else:
            ops.clamp_max_(masked, 0.0)
        ops.mul_(masked, signs)
        # Inclusive: all of x but what has the other sign, so that also those decay where u is 0.
        xs = ops.sub(xs, masked) if kind.inclusive else masked
    if kind.ord == 2:
        if kind.cap is not None:
            xs = ops.copies(xs, xs[0].dtype) if xs is ps else xs
            ops.clamp_max_(ops.clamp_min_(xs, -kind.cap), kind.cap)
        # In place where it may be: a temporary less in the cache is worth more than an operation less.
        return ops.mul(xs, rate) if xs is ps else ops.mul_(xs, rate)
    # Not |x|^(ord−2)·x, which is 0·inf at x = 0 for ord < 2; and x^(ord−1) would push negative weights outwards for odd ord.
    found = ops.sign(xs)
    if kind.ord != 1:
        magnitudes = ops.abs(xs)
        if kind.cap is not None:
            ops.clamp_max_(magnitudes, kind.cap)
        # Products have the same bits on every device and in every vector width; `pow` has not.
        found = ops.mul_(power(ops, magnitudes, kind.ord - 1), found)
    return ops.mul_(found, rate)


def companion(ord: float, tau: Rate) -> Rate:
    """The second number of a proximal term: 1 + τ; for ord 1: −τ; for other ord < 2: 1 where τ is 0, else 0.

    Made of float64, so that it is rounded once.
    """
    if ord >= 2:
        return 1 + tau
    if ord == 1:
        return -tau
    return (tau == 0).to(tau.dtype) if isinstance(tau, Tensor) else float(tau == 0)


def shrink_(ops: Ops, kind: TermKind, tau: Operand, other: Operand, ts: list[Tensor], powers: list[Tensor]) -> None:
    """t ← prox(t), in place: a step of length τ along −d, taken so that d is of where it ends.

    ord 1: sign(t)·max(|t| − τ, 0).  ord 2: t/(1+τ), with a cap t − τ·cap·sign(t) beyond (1+τ)·cap.
    Other ord: t/(1 + τ·|p|^(ord−2)), with p before the step.

    other: the companion of τ. powers: |p|^|ord−2|, used up; only for other ord than 1 and 2.
    Source: ord 1 is soft thresholding; the cap is AdamHD's, arXiv 2511.14721; other ord are pWD's, arXiv 2404.10824.
    """
    if kind.ord == 2 and kind.cap is not None:
        # Both cases at once: the pull is of where t ends, t/(1+τ), or the cap.
        pulls = ops.div_(ops.copies(ts, ts[0].dtype), other)
        ops.clamp_max_(ops.clamp_min_(pulls, -kind.cap), kind.cap)
        ops.sub_(ts, ops.mul_(pulls, tau))
    elif kind.ord == 2:
        ops.div_(ts, other)
    elif kind.ord == 1:
        # t less what of it lies within ±τ. (foreach clamps by a number, or by a tensor for each.)
        low, high = ([one] * len(ts) if isinstance(one, Tensor) else one for one in (other, tau))
        ops.sub_(ts, ops.clamp_max_(ops.clamp_min(ts, low), high))
    elif kind.ord > 2:
        ops.div_(ts, ops.add_(ops.mul_(powers, tau), 1.0))
    else:
        # t·m/(m + τ) with m = |p|^(2−ord): at p = 0 that is 0, and with τ = 0 it is t, for which the companion stands.
        ops.add_(powers, other)
        ops.mul_(ts, ops.div_(powers, ops.add(powers, tau)))


def power(ops: Ops, xs: list[Tensor], exponent: float) -> list[Tensor]:
    """x^exponent for x ≥ 0 and an exponent > 0, each element with the same bits wherever it stands; `xs` may be used up."""
    if exponent == 1:
        return xs
    # Products have the same bits on every device and in every vector width; `pow` has not.
    if exponent + 1 in ELEMENTARY_ORDS:
        powers = ops.mul(xs, xs)
        for _ in range(int(exponent) - 2):
            ops.mul_(powers, xs)
        return powers
    for x in xs:
        _steady_pow_(x, exponent)
    return xs


def with_terms(
    ops: Ops,
    us: list[Tensor],
    scale: Operand,
    ps: list[Tensor],
    terms: Sequence[DecayTerm],
    kinds: Sequence[TermKind],
    rates: Sequence[Operand],
    mask: Mask | None,
    lists: Sequence[list[Tensor]],
) -> list[Tensor]:
    """scale·u + Σ sign·rate·mask·d(p−a), apart from `us` and `ps`; or `us` itself if that is all.

    scale, rates: as operations take them; one rate for each term.
    kinds: of the terms.
    mask: with nothing left to subtract.
    lists: as in `update_`.
    """
    # A tensor is never known to be 1 without reading it.
    result = us if not isinstance(scale, (Tensor, list)) and scale == 1 else ops.mul(us, scale)
    for term, kind, rate in zip(terms, kinds, rates, strict=True):
        if term.is_l2 and not isinstance(rate, (Tensor, list)):
            # With one rounding, as torch's own optimizers add their weight_decay to the gradient.
            result = ops.add(result, ps, alpha=term.sign * rate)
        else:
            # `add` and not `add_`: the first result may be `us` itself, which may be another's.
            result = ops.add(result, decay(ops, kind, rate, ps, mask, lists), alpha=term.sign)
    return result


def difference(ops: Ops, xs: list[Tensor], minus: list[Tensor]) -> list[Tensor]:
    """x − minus, apart from both; of bf16 and fp16 in float32, where it is not rounded to 8 or 11 bits again."""
    if xs[0].dtype in LOW:
        xs, minus = ops.copies(xs, torch.float32), ops.copies(minus, torch.float32)
    return ops.sub(xs, minus)


def _steady_pow_(x: Tensor, exponent: float) -> None:
    """x ← x^exponent, each element with the same bits wherever it stands.

    On a CPU, torch computes whole vectors with one algorithm and the rest of a tensor with another that rounds differently;
    a tensor cut elsewhere has its rest elsewhere. Padded to whole vectors, there is no rest.
    """
    # A GPU has one algorithm for all elements.
    if x.device.type != "cpu":
        x.pow_(exponent)
        return
    flat = x.reshape(-1)
    # A copy, since there is no room behind the elements of x.
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % _WHOLE_VECTORS), value=1.0)
    for piece in padded.split(_POW_PIECE):
        piece.pow_(exponent)
    x.copy_(padded[: flat.numel()].view_as(x))
