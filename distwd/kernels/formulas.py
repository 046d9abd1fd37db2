"""The formulas of a step on one block of it:  p ← p − Σ rate·mask·d(p) − scale·u,  on local tensors of one dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .stochastic import LOW
from .terms import is_elementary, masked, strength
from .workspace import Workspace

# A number for all tensors of a list (float or 0-d tensor), or one for each (1-d tensor).
Rate = float | Tensor


@dataclass(frozen=True, slots=True)
class DecayTerm:
    """A decay that waits to be written: rate · [sign·u·p > 0] · d(p), with d(p) = sign(p)·|p|^(ord−1).

    cautious: whether the bracket applies; its u is given beside it, as a Mask.
    before_lr: the rate without the learning rate that scales the update as well; None if they are not scaled alike.
    sign: −1 where u is something that will be ascended (the gradient before a maximizing optimizer), so that decay stays decay.
    """

    rate: Rate
    ord: float = 2.0
    cautious: bool = False
    sign: int = 1
    before_lr: Rate | None = None

    def scaled(self, factor: Rate) -> DecayTerm:
        """The same pull, `factor` times as strong."""
        return replace(self, rate=self.rate * factor)

    @property
    def is_linear(self) -> bool:
        """Whether p ← p·(1 − rate) is all there is to it."""
        return self.ord == 2 and not self.cautious


@dataclass(frozen=True, slots=True)
class Mask:
    """What cautious pulls look at: the tensors `us`, read as sign·u, or as sign·(u − minus)."""

    us: list[Tensor]
    sign: int = 1
    minus: list[Tensor] | None = None

    def settled(self, workspace: Workspace) -> Mask:
        """The same of a block, with nothing left to subtract."""
        return self if self.minus is None else Mask(difference(self.us, self.minus, workspace), self.sign)


@dataclass(frozen=True, slots=True)
class Factors:
    """The numbers of p ← keep·p − Σ bent pulls − scale·u, as they are multiplied; made once for all blocks."""

    keep: Rate | None
    bent: tuple[DecayTerm, ...]
    scale: Rate

    @classmethod
    def of(cls, terms: Sequence[DecayTerm], scale: Rate, params: list[Tensor]) -> Factors:
        """keep: 1 − Σ rate of the linear pulls, rounded after the sum."""
        linear = [term.rate for term in terms if term.is_linear]
        keep = fitted(1 - sum(linear[1:], start=linear[0]), params) if linear else None
        return cls(keep, _bent([term for term in terms if not term.is_linear], params), fitted(scale, params))

    @classmethod
    def apart(cls, terms: Sequence[DecayTerm], params: list[Tensor]) -> Factors:
        """Those of t ← t − Σ pulls, each of which is subtracted."""
        return cls(None, _bent(terms, params), 1.0)

    @property
    def is_one_product(self) -> bool:
        """Whether the pulls are p ← keep·p and nothing else."""
        return self.keep is not None and not self.bent

    @property
    def has_unit_scale(self) -> bool:
        """Whether u is added or subtracted as it is (a tensor is never known to be 1)."""
        return not isinstance(self.scale, Tensor) and abs(self.scale) == 1

    @property
    def has_common_numbers(self) -> bool:
        """Whether no number is one for each tensor."""
        rates = [self.keep, self.scale, *(term.rate for term in self.bent)]
        return not any(isinstance(rate, Tensor) and rate.dim() for rate in rates)

    def is_exact(self, is_last: bool) -> bool:
        """Whether whoever computes this gets the same bits: p + alpha·u in one operation may be one rounding or two."""
        scale_is_exact = is_last or isinstance(self.scale, Tensor) or self.has_unit_scale
        return scale_is_exact and all(is_elementary(term.ord) for term in self.bent)

    def form(self) -> Factors:
        """The same without its numbers: what is alike in every step, and can be hashed."""
        bent = tuple(DecayTerm(0.0, term.ord, term.cautious, term.sign) for term in self.bent)
        return Factors(None if self.keep is None else 0.0, bent, self.scale if self.has_unit_scale else 0.0)

    def numbers(self, places: Sequence[int], like: Tensor) -> list[Tensor]:
        """What `form` has left out, for the tensors at `places`: each a 0-d tensor, or [len(places)]."""
        rates = [term.rate for term in self.bent] + ([] if self.keep is None else [self.keep])
        rates += [] if self.has_unit_scale else [self.scale]
        return [_number(rate, places, like) for rate in rates]

    def filled(self, numbers: Sequence[Tensor]) -> Factors:
        """A form with numbers again."""
        bent = tuple(DecayTerm(n, p.ord, p.cautious, p.sign) for n, p in zip(numbers, self.bent, strict=False))
        rest = list(numbers[len(bent) :])
        keep = None if self.keep is None else rest.pop(0)
        return Factors(keep, bent, rest[0] if rest else self.scale)


def difference(xs: list[Tensor], minus: list[Tensor], workspace: Workspace) -> list[Tensor]:
    """x − minus of a block; of bf16 and fp16 in float32, where it is not rounded to 8 or 11 bits again."""
    if xs[0].dtype in LOW:
        xs, minus = (workspace.copies(use, some, torch.float32) for use, some in (("new", xs), ("old", minus)))
    return workspace.make("sub", "moved", xs, minus)


def apply_block_(
    ps: list[Tensor],
    places: Sequence[int],
    factors: Factors,
    us: list[Tensor] | None,
    mask: Mask | None,
    workspace: Workspace,
    is_last: bool = False,
) -> None:
    """p ← keep·p − Σ bent pulls − scale·u; every pull is of p as it was before. is_last: u is not needed any more."""
    strengths = _strengths(factors.bent, ps, places, mask, workspace)
    if factors.keep is not None:
        workspace.apply_("mul", ps, factor(factors.keep, places, ps))
    for one in strengths:
        workspace.apply_("sub", ps, one)
    if us is None:
        return
    scale = factor(factors.scale, places, us)
    if is_last and not factors.has_unit_scale:
        workspace.apply_("mul", us, scale)
        workspace.apply_("sub", ps, us)
    elif isinstance(factors.scale, Tensor):
        workspace.apply_("sub", ps, workspace.make("mul", "scaled", us, scale))
    else:
        workspace.apply_("add", ps, us, alpha=-scale)


def apply_from_block_(
    ts: list[Tensor], ps: list[Tensor], places: Sequence[int], factors: Factors, mask: Mask | None, workspace: Workspace
) -> None:
    """t ← t − Σ pulls of p."""
    for one in _strengths(factors.bent, ps, places, mask, workspace):
        workspace.apply_("sub", ts, one)


def folded(
    us: list[Tensor],
    ps: list[Tensor],
    places: Sequence[int],
    terms: Sequence[DecayTerm],
    scale: Rate,
    mask: Mask | None,
    workspace: Workspace,
) -> list[Tensor]:
    """scale·u + Σ sign·pull(p)."""
    result = (
        us
        if not isinstance(scale, Tensor) and scale == 1
        else workspace.make("mul", "folded", us, factor(scale, places, us))
    )
    mask = mask and mask.settled(workspace)
    for term in terms:
        if term.is_linear and not isinstance(term.rate, Tensor):
            # With one rounding, as torch's own optimizers add their weight_decay to the gradient.
            result = list(torch._foreach_add(result, ps, alpha=term.sign * term.rate))
        else:
            one = _strength(term, ps, places, mask, workspace)
            result = list(torch._foreach_add(result, one, alpha=term.sign))
    return result


def _strengths(
    terms: Sequence[DecayTerm], ps: list[Tensor], places: Sequence[int], mask: Mask | None, workspace: Workspace
) -> list[list[Tensor]]:
    mask = mask and mask.settled(workspace)
    return [_strength(term, ps, places, mask, workspace, f"strength {n}") for n, term in enumerate(terms)]


def _strength(
    term: DecayTerm,
    ps: list[Tensor],
    places: Sequence[int],
    mask: Mask | None,
    workspace: Workspace,
    use: str = "strength 0",
) -> list[Tensor]:
    """rate · mask · d(p), in temporaries of the size of the block. mask: settled."""
    rate = factor(term.rate, places, ps)
    if term.cautious:
        assert mask is not None, "a cautious pull needs a mask"
        ps = masked(ps, mask.us, term.sign * mask.sign, workspace, f"masked {use}")
        if term.ord == 2:  # in place: a temporary less in the cache is worth more than an operation less
            workspace.apply_("mul", ps, rate)
            return ps
    return strength(ps, term.ord, rate, workspace, use)


def _bent(terms: Sequence[DecayTerm], params: list[Tensor]) -> tuple[DecayTerm, ...]:
    return tuple(replace(term, rate=fitted(term.rate, params)) for term in terms)


def fitted(rate: Rate, params: list[Tensor]) -> Rate:
    """The rate where `params` are and in the dtype that they are computed in."""
    if not isinstance(rate, Tensor) or not params:
        return rate
    return rate.to(params[0].device, torch.float32 if params[0].dtype in LOW else params[0].dtype)


def factor(rate: Rate | None, places: Sequence[int], like: list[Tensor]) -> Any:
    """A rate in the form that foreach takes: a number, a 0-d tensor of the dtype of `like`, or one such for each tensor."""
    if not isinstance(rate, Tensor):
        return rate
    rate = rate.to(like[0].device, like[0].dtype)
    if rate.dim() == 0:
        return rate
    stretch = rate[places[0] : places[-1] + 1].unbind()
    return [stretch[place - places[0]] for place in places]


def _number(rate: Rate, places: Sequence[int], like: Tensor) -> Tensor:
    """A rate as a tensor in the dtype that `like` is computed in; one by tensor as those at `places`."""
    if not isinstance(rate, Tensor):
        return torch.full((), rate, dtype=torch.float32 if like.dtype in LOW else like.dtype, device=like.device)
    return rate if rate.dim() == 0 else torch.stack([rate[place] for place in places])
