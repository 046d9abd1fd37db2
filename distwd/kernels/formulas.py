"""The formulas of a step, as plain functions:  t ← keep·t − Σ rate·[sign·u·p > 0]·d(p) − scale·u,  d(p) = sign(p)·|p|^(ord−1).

They work on lists of local tensors of one dtype and device, a block at a time. Their first argument is the operations that
they are made of: a Workspace, which does them at once, or TRACED, which torch.compile reads. So each formula stands here
once. Everything gives the same bits wherever a tensor is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Operand, Ops
from .stochastic import LOW

# A number for all tensors of a list (float or 0-d tensor), or one for each (1-d tensor).
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
    cautious: bool
    sign: int


@dataclass(frozen=True, slots=True)
class DecayTerm:
    """A decay that waits to be written:  rate · [sign·u·p > 0] · d(p),  with d(p) = sign(p)·|p|^(ord−1).

    rate: the factor of d(p).
    ord: ≥ 1; for 1, d(p) is sign(p), for 2 it is p.
    cautious: whether the bracket applies; its u is given beside the term, as a Mask.
    sign: −1 where u is something that will be ascended (the gradient before a maximizing optimizer), so that decay stays
        decay.
    before_lr: the rate without the learning rate that scales the update as well; None if they are not scaled alike.
    """

    rate: Rate
    ord: float = 2.0
    cautious: bool = False
    sign: int = 1
    before_lr: Rate | None = None

    def scaled(self, factor: Rate) -> DecayTerm:
        """The same term, `factor` times as strong."""
        return replace(self, rate=self.rate * factor)

    @property
    def is_l2(self) -> bool:
        """Whether p ← p·(1 − rate) is all there is to it."""
        return self.ord == 2 and not self.cautious

    @property
    def kind(self) -> TermKind:
        """What is left without the numbers."""
        return TermKind(self.ord, self.cautious, self.sign)


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
    """

    keep: Operand | None
    rates: Sequence[Operand]
    scale: Operand | None

    def each(self, function: Callable[[Any], Any]) -> Numbers:
        """The same with a function applied to each number that there is."""
        keep, scale = (one if one is None else function(one) for one in (self.keep, self.scale))
        return Numbers(keep, [function(rate) for rate in self.rates], scale)


@dataclass(frozen=True, slots=True)
class Write:
    """What a step writes:  t ← keep·t − Σ rate·mask·d(p) − scale·u,  without its tensors and numbers.

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

    def mask_of(self, ops: Ops, lists: Sequence[list[Tensor]]) -> Mask | None:
        """The mask of a block, with nothing left to subtract."""
        if self.mask_us is None:
            return None
        us = lists[self.mask_us]
        return Mask(us if self.mask_minus is None else difference(ops, us, lists[self.mask_minus]), self.mask_sign)


def update_(ops: Ops, write: Write, numbers: Numbers, lists: Sequence[list[Tensor]]) -> None:
    """t ← keep·t − Σ rate·mask·d(p) − scale·u, in place; every term is of p as it was before.

    write: which terms there are, and which list has which role.
    numbers: as operations take them.
    lists: float32 or float64.
    """
    ts, ps = lists[0], lists[write.ps]
    mask = write.mask_of(ops, lists)
    # All terms before the first write: `ts` may be `ps`, and each term is of the parameter before the step.
    decays = [decay(ops, kind, rate, ps, mask) for kind, rate in zip(write.kinds, numbers.rates, strict=True)]
    # L2 decay is a factor, as in torch's AdamW: another rounding than p − rate·p, and no temporary.
    if numbers.keep is not None:
        ops.mul_(ts, numbers.keep)
    for one in decays:
        ops.sub_(ts, one)
    # The update last, as in torch's AdamW: sums of floats depend on their order.
    if write.us is None:
        return
    us, scale = lists[write.us], numbers.scale
    if write.unit_scale is not None:
        # ±1 times u is exact: one rounding, of the sum, and no temporary.
        ops.add_(ts, us, alpha=-write.unit_scale)
        return
    assert scale is not None, "the scale is either a number or a unit"
    if write.spends_us:
        # In place: another temporary would push something out of the cache.
        ops.mul_(us, scale)
        ops.sub_(ts, us)
    elif isinstance(scale, (Tensor, list)):
        # A tensor cannot be alpha without being read, which would wait for the device.
        ops.sub_(ts, ops.mul(us, scale))
    else:
        # u is another's (the gradients, say) and stays; one operation needs no temporary.
        ops.add_(ts, us, alpha=-scale)


def decay(ops: Ops, kind: TermKind, rate: Operand, ps: list[Tensor], mask: Mask | None) -> list[Tensor]:
    """rate · [sign·u·p > 0] · d(p), apart from `ps`. mask: for a cautious term, with nothing left to subtract."""
    if kind.cautious:
        assert mask is not None, "a cautious term needs a mask"
        # [sign·u·p > 0]·p, whose direction is the masked one, since d(0) = 0. By the sign of u and not by u itself: a
        # product of two small numbers would vanish.
        signs = ops.sign(mask.us)
        ps = ops.mul(ps, signs)
        # p·sign(u) is |p| where both have one sign, and −|p| where not. What shall not decay is cut off to 0, and the
        # second product gives the rest the sign of p again. No boolean mask: it would be a temporary of another dtype.
        if kind.sign * mask.sign > 0:
            ops.clamp_min_(ps, 0.0)
        else:
            ops.clamp_max_(ps, 0.0)
        ops.mul_(ps, signs)
        if kind.ord == 2:  # in place: a temporary less in the cache is worth more than an operation less
            ops.mul_(ps, rate)
            return ps
    if kind.ord == 2:
        return ops.mul(ps, rate)
    # Not |p|^(ord−2)·p, which is 0·inf at p = 0 for ord < 2; and p^(ord−1) would push negative weights outwards for odd ord.
    found = ops.sign(ps)
    if kind.ord != 1:
        magnitudes, exponent = ops.abs(ps), kind.ord - 1
        # Products have the same bits on every device and in every vector width; `pow` has not.
        if kind.ord in ELEMENTARY_ORDS:
            powers = ops.mul(magnitudes, magnitudes)
            for _ in range(int(exponent) - 2):
                ops.mul_(powers, magnitudes)
        else:
            powers = magnitudes  # in place, since nothing else needs them
            for power in powers:
                _steady_pow_(power, exponent)
        ops.mul_(powers, found)
        found = powers
    ops.mul_(found, rate)
    return found


def with_terms(
    ops: Ops,
    us: list[Tensor],
    scale: Operand,
    ps: list[Tensor],
    terms: Sequence[DecayTerm],
    rates: Sequence[Operand],
    mask: Mask | None,
) -> list[Tensor]:
    """scale·u + Σ sign·rate·mask·d(p), apart from `us` and `ps`; or `us` itself if that is all.

    scale, rates: as operations take them; one rate for each term.
    mask: with nothing left to subtract.
    """
    # A tensor is never known to be 1 without reading it.
    result = us if not isinstance(scale, (Tensor, list)) and scale == 1 else ops.mul(us, scale)
    for term, rate in zip(terms, rates, strict=True):
        if term.is_l2 and not isinstance(rate, (Tensor, list)):
            # With one rounding, as torch's own optimizers add their weight_decay to the gradient.
            result = ops.add(result, ps, alpha=term.sign * rate)
        else:
            # `add` and not `add_`: the first result may be `us` itself, which may be another's.
            result = ops.add(result, decay(ops, term.kind, rate, ps, mask), alpha=term.sign)
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
