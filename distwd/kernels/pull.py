"""The one line where decay is written:  p ← p − Σ rate·mask·d(p) − scale·u,  on local tensors of one dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .blocks import blocks
from .direction import masked, strength
from .rounding import LOW, Noise, Span, spans_of, write_
from .scratch import Scratch
from .tally import Tally

# A number for all tensors of a list (float or 0-d tensor), or one for each (1-d tensor).
Rate = float | Tensor


@dataclass(frozen=True, slots=True)
class Pull:
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

    def scaled(self, factor: Rate) -> Pull:
        """The same pull, `factor` times as strong."""
        return replace(self, rate=self.rate * factor)

    @property
    def is_linear(self) -> bool:
        """Whether p ← p·(1 − rate) is all there is to it."""
        return self.ord == 2 and not self.cautious


@dataclass(frozen=True, slots=True)
class Mask:
    """What cautious pulls look at: the tensors `us`, read as sign·u."""

    us: list[Tensor]
    sign: int = 1


def pull_(
    params: list[Tensor],
    pulls: Sequence[Pull],
    updates: list[Tensor] | None = None,
    scale: Rate = 1.0,
    mask: Mask | None = None,
    *,
    scratch: Scratch,
    noise: Noise | None = None,
    clear: bool = False,
    tally: Tally | None = None,
) -> None:
    """p ← p − Σ pull(p) − scale·u, in place; every pull is of p as it was before.

    params, updates: local tensors of equal shapes; updates None: there is nothing but the pulls.
    For linear pulls this is one multiplication by 1 − Σ rate, as in torch's AdamW, without a temporary; anything
    else needs temporaries of a block. bf16 and fp16 are computed in float32 and rounded once: as `noise` decides, if given.
    clear: leave zeros in `updates`, which costs least while a block is in the cache.
    tally: counts the elements that come out as they would without the pulls; that costs computing them a second time.
    """
    lists = [params] if updates is None else [params, updates]
    tally = tally if pulls else None
    mask = _needed(mask, pulls, lists)
    factors = Factors.of(pulls, scale, params)
    if factors.is_one_product and updates is None and tally is None and params[0].dtype not in LOW:
        # Memory is read once and no temporary is made: blocks would gain nothing.
        torch._foreach_mul_(params, _factor(factors.keep, range(len(params)), params))
        return
    for places, (ps, *rest) in blocks(*lists):
        ps_wide, *rest_wide = _widened(scratch, ps, *rest)
        block_mask = None if mask is None else Mask(rest_wide[-1], mask.sign)
        us = None if updates is None else rest_wide[0]
        spans = spans_of(ps, places, params)
        without = None if tally is None else _without_pulls(ps, ps_wide, places, us, scale, scratch, noise, spans)
        _pull_block_(ps_wide, places, factors, us, block_mask, scratch)
        if ps_wide is not ps:
            write_(ps, ps_wide, noise, spans, scratch)
        if tally is not None and without is not None:
            tally.add(ps, without)
        if clear:
            torch._foreach_zero_(rest[0])


def drag_(
    targets: list[Tensor],
    params: list[Tensor],
    pulls: Sequence[Pull],
    mask: Mask | None = None,
    *,
    scratch: Scratch,
    noise: Noise | None = None,
    tally: Tally | None = None,
) -> None:
    """t ← t − Σ pull(p), in place: the pulls of one list of tensors, written to another of the same shapes."""
    lists = [targets, params]
    mask = _needed(mask, pulls, lists)
    for places, (ts, *rest) in blocks(*lists) if pulls else ():
        ts_wide, ps, *masks = _widened(scratch, ts, *rest)
        block_mask = None if mask is None else Mask(masks[0], mask.sign)
        without = None if tally is None else [t.clone() for t in ts]
        for pull in pulls:
            torch._foreach_sub_(ts_wide, _strength(pull, ps, places, block_mask, scratch))
        if ts_wide is not ts:
            write_(ts, ts_wide, noise, spans_of(ts, places, targets), scratch)
        if tally is not None and without is not None:
            tally.add(ts, without)


def count(params: list[Tensor], pulls: Sequence[Pull], tally: Tally | None, scratch: Scratch) -> None:
    """What linear pulls leave unchanged if they are written alone; nothing is."""
    factors = Factors.of(pulls, 1.0, params)
    for places, (ps,) in blocks(params) if tally is not None else ():
        copies = [p.clone() for p in ps]
        (wide,) = _widened(scratch, copies)
        _pull_block_(wide, places, factors, None, None, scratch)
        if wide is not copies:
            torch._foreach_copy_(copies, wide)
        if tally is not None:
            tally.add(copies, ps)


def fold(
    updates: list[Tensor],
    params: list[Tensor],
    pulls: Sequence[Pull],
    scale: Rate,
    out: list[Tensor],
    mask: Mask | None = None,
    *,
    scratch: Scratch,
) -> None:
    """out ← scale·u + Σ sign·pull(p): what is pending becomes part of the update. `out` may be `updates` itself."""
    lists = [params, out, updates]
    mask = _needed(mask, pulls, lists)
    for places, (ps, outs, *rest) in blocks(*lists):
        ps_wide, us_wide, *masks = _widened(scratch, ps, *rest)
        block_mask = None if mask is None else Mask((masks or [us_wide])[0], mask.sign)
        torch._foreach_copy_(outs, _folded(us_wide, ps_wide, places, pulls, scale, block_mask, scratch))


def _needed(mask: Mask | None, pulls: Sequence[Pull], lists: list[list[Tensor]]) -> Mask | None:
    """The mask, if a pull looks at it; its tensors then are the last of `lists`."""
    if mask is None or not any(pull.cautious for pull in pulls):
        return None
    if mask.us is not lists[-1]:
        lists.append(mask.us)
    return mask


def _widened(scratch: Scratch, *lists: list[Tensor]) -> list[list[Tensor]]:
    """The lists in float32 if they are narrower, else themselves."""
    if lists[0][0].dtype not in LOW:
        return list(lists)
    return [scratch.copies(f"wide {number}", tensors, torch.float32) for number, tensors in enumerate(lists)]


def _without_pulls(
    ps: list[Tensor],
    ps_wide: list[Tensor],
    places: list[int],
    us: list[Tensor] | None,
    scale: Rate,
    scratch: Scratch,
    noise: Noise | None,
    spans: Sequence[Span],
) -> list[Tensor]:
    """What would be written to a block without any pull, as new tensors."""
    wide = [p.clone() for p in ps_wide]
    _pull_block_(wide, places, Factors.of((), scale, ps), us, None, scratch)
    if ps_wide is ps:
        return wide
    written = [torch.empty_like(p) for p in ps]
    write_(written, wide, noise, spans, scratch)
    return written


def _folded(
    us: list[Tensor],
    ps: list[Tensor],
    places: list[int],
    pulls: Sequence[Pull],
    scale: Rate,
    mask: Mask | None,
    scratch: Scratch,
) -> list[Tensor]:
    result = us if _is_one(scale) else scratch.make("mul", "folded", us, _factor(scale, places, us))
    for pull in pulls:
        if pull.is_linear and not isinstance(pull.rate, Tensor):
            # With one rounding, as torch's own optimizers add their weight_decay to the gradient.
            result = list(torch._foreach_add(result, ps, alpha=pull.sign * pull.rate))
        else:
            result = list(torch._foreach_add(result, _strength(pull, ps, places, mask, scratch), alpha=pull.sign))
    return result


@dataclass(frozen=True, slots=True)
class Factors:
    """The numbers of p ← keep·p − Σ bent pulls − scale·u, as they are multiplied; made once for all blocks."""

    keep: Rate | None
    bent: list[Pull]
    scale: Rate

    @classmethod
    def of(cls, pulls: Sequence[Pull], scale: Rate, params: list[Tensor]) -> Factors:
        """keep: 1 − Σ rate of the linear pulls, rounded after the sum."""
        linear = [pull.rate for pull in pulls if pull.is_linear]
        keep = _fitted(1 - sum(linear[1:], start=linear[0]), params) if linear else None
        bent = [replace(pull, rate=_fitted(pull.rate, params)) for pull in pulls if not pull.is_linear]
        return cls(keep, bent, _fitted(scale, params))

    @property
    def is_one_product(self) -> bool:
        """Whether the pulls are p ← keep·p and nothing else."""
        return self.keep is not None and not self.bent


def _pull_block_(
    ps: list[Tensor],
    places: list[int],
    factors: Factors,
    us: list[Tensor] | None,
    mask: Mask | None,
    scratch: Scratch,
) -> None:
    strengths = [_strength(pull, ps, places, mask, scratch, f"strength {n}") for n, pull in enumerate(factors.bent)]
    if factors.keep is not None:
        torch._foreach_mul_(ps, _factor(factors.keep, places, ps))
    for one in strengths:
        torch._foreach_sub_(ps, one)
    if us is None:
        return
    if isinstance(factors.scale, Tensor):
        torch._foreach_sub_(ps, scratch.make("mul", "scaled", us, _factor(factors.scale, places, us)))
    else:
        torch._foreach_add_(ps, us, alpha=-factors.scale)


def _strength(
    pull: Pull, ps: list[Tensor], places: list[int], mask: Mask | None, scratch: Scratch, use: str = "strength 0"
) -> list[Tensor]:
    """rate · mask · d(p), in temporaries of the size of the block."""
    rate = _factor(pull.rate, places, ps)
    if pull.cautious:
        assert mask is not None, "a cautious pull needs a mask"
        ps = masked(ps, mask.us, pull.sign * mask.sign, scratch, f"masked {use}")
        if pull.ord == 2:  # in place: a temporary less in the cache is worth more than an operation less
            torch._foreach_mul_(ps, rate)
            return ps
    return strength(ps, pull.ord, rate, scratch, use)


def _fitted(rate: Rate, params: list[Tensor]) -> Rate:
    """The rate where `params` are and in the dtype that they are computed in."""
    if not isinstance(rate, Tensor) or not params:
        return rate
    return rate.to(params[0].device, torch.float32 if params[0].dtype in LOW else params[0].dtype)


def _factor(rate: Rate | None, places: Sequence[int], like: list[Tensor]) -> Any:
    """A rate in the form that foreach takes: a number, a 0-d tensor of the dtype of `like`, or one such for each tensor."""
    if not isinstance(rate, Tensor):
        return rate
    rate = rate.to(like[0].device, like[0].dtype)
    if rate.dim() == 0:
        return rate
    stretch = rate[places[0] : places[-1] + 1].unbind()
    return [stretch[place - places[0]] for place in places]


def _is_one(scale: Rate) -> bool:
    return not isinstance(scale, Tensor) and scale == 1
