"""Where decay is written: the formulas of a step over whole lists of local tensors, block by block or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import blocks, is_large
from .compiled import TOGETHER, TRACED, compiled
from .pull import Factors, Mask, Pull, Rate, drag_block_, factor, folded, pull_block_
from .rounding import LOW, Noise, Span, spans_of, write_
from .scratch import Scratch
from .tally import Tally


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
    clear: `updates` are not needed any more: leave zeros there, which costs least while a block is in the cache.
    tally: counts the elements that come out as they would without the pulls; that costs computing them a second time.
    """
    lists = [params] if updates is None else [params, updates]
    tally = tally if pulls else None
    factors = Factors.of(pulls, scale, params)
    if factors.is_one_product and updates is None and tally is None and params[0].dtype not in LOW:
        # Memory is read once and no temporary is made: blocks would gain nothing.
        torch._foreach_mul_(params, factor(factors.keep, range(len(params)), params))
        return
    roles = _roles(lists, mask, pulls, has_updates=updates is not None, clear=clear)
    compiles = scratch.compiles and noise is None and tally is None and factors.is_exact(clear or updates is None)
    for places, (ps, *rest) in blocks(*lists, together=TOGETHER if compiles else 0):
        if compiles and is_large(ps):
            _run_compiled(_write_block_, factors, roles, places, [ps, *rest])
            continue
        spans = spans_of(ps, places, params)
        without = None if tally is None else _without_pulls(ps, rest, places, roles, scale, scratch, noise, spans)
        _write_block_(factors, roles, [ps, *rest], places, scratch, noise, spans)
        if tally is not None and without is not None:
            tally.add(ps, without)


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
    factors = Factors.apart(pulls, params)
    roles = _roles(lists, mask, pulls)
    compiles = scratch.compiles and noise is None and tally is None and factors.is_exact(is_last=True)
    for places, pieces in blocks(*lists, together=TOGETHER if compiles else 0) if pulls else ():
        if compiles and is_large(pieces[0]):
            _run_compiled(_write_dragged_, factors, roles, places, pieces)
            continue
        without = None if tally is None else [t.clone() for t in pieces[0]]
        _write_dragged_(factors, roles, list(pieces), places, scratch, noise, spans_of(pieces[0], places, targets))
        if tally is not None and without is not None:
            tally.add(pieces[0], without)


def count(params: list[Tensor], pulls: Sequence[Pull], tally: Tally | None, scratch: Scratch) -> None:
    """What linear pulls leave unchanged if they are written alone; nothing is."""
    factors = Factors.of(pulls, 1.0, params)
    for places, (ps,) in blocks(params) if tally is not None else ():
        copies = [p.clone() for p in ps]
        (wide,) = _widened(scratch, copies)
        pull_block_(wide, places, factors, None, None, scratch)
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
    roles = _roles(lists, mask, pulls)
    for places, (ps, outs, *rest) in blocks(*lists):
        ps_wide, us_wide, *more = _widened(scratch, ps, *rest)
        block_mask = roles.mask([ps_wide, us_wide, us_wide, *more])
        torch._foreach_copy_(outs, folded(us_wide, ps_wide, places, pulls, scale, block_mask, scratch))


def differences(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """new − old as new tensors; of bf16 and fp16 in float32, where it is not rounded to 8 or 11 bits again."""
    out = [torch.empty_like(one, dtype=torch.float32 if one.dtype in LOW else None) for one in new]
    for _, (outs, news, olds) in blocks(out, new, old):
        torch._foreach_copy_(outs, news)
        torch._foreach_sub_(outs, olds)
    return out


@dataclass(frozen=True, slots=True)
class Roles:
    """What the lists of a block are for: which of them a mask is taken of (us, minus), and whether the second is an update."""

    us: int | None = None
    minus: int | None = None
    sign: int = 1
    has_updates: bool = False
    clear: bool = False

    def mask(self, lists: Sequence[list[Tensor]]) -> Mask | None:
        """The mask of a block."""
        if self.us is None:
            return None
        return Mask(lists[self.us], self.sign, None if self.minus is None else lists[self.minus])


def _roles(
    lists: list[list[Tensor]], mask: Mask | None, pulls: Sequence[Pull], has_updates: bool = False, clear: bool = False
) -> Roles:
    """Adds to `lists` what a mask is taken of, if a pull looks at it and it is not among them."""
    if mask is None or not any(pull.cautious for pull in pulls):
        return Roles(has_updates=has_updates, clear=clear)
    minus = None if mask.minus is None else _place_in(lists, mask.minus)
    return Roles(_place_in(lists, mask.us), minus, mask.sign, has_updates, clear)


def _place_in(lists: list[list[Tensor]], one: list[Tensor]) -> int:
    for place, other in enumerate(lists):
        if one is other:
            return place
    lists.append(one)
    return len(lists) - 1


def _run_compiled(
    formula: Callable[..., None], factors: Factors, roles: Roles, places: list[int], pieces: Sequence[list[Tensor]]
) -> None:
    """A formula on a block of large tensors."""
    run = compiled(_traced, formula, factors.form(), roles, len(places))
    run(factors.numbers(places, pieces[0][0]), *pieces)


def _traced(
    formula: Callable[..., None],
    form: Factors,
    roles: Roles,
    num: int,
    numbers: list[Tensor],
    *pieces: list[Tensor],
) -> None:
    """form: what is alike in every step; numbers: the rest of the factors. num: tensors in each list."""
    formula(form.filled(numbers), roles, pieces, range(num), TRACED)


def _write_block_(
    factors: Factors,
    roles: Roles,
    pieces: Sequence[list[Tensor]],
    places: Sequence[int],
    scratch: Scratch,
    noise: Noise | None = None,
    spans: Sequence[Span] = (),
) -> None:
    """pieces: p, then u if there are updates, then what a mask is taken of."""
    wide = _widened(scratch, *pieces)
    us = wide[1] if roles.has_updates else None
    pull_block_(wide[0], places, factors, us, roles.mask(wide), scratch, roles.clear)
    _narrow(pieces[0], wide[0], scratch, noise, spans)
    if roles.clear:
        scratch.clear_(pieces[1])


def _write_dragged_(
    factors: Factors,
    roles: Roles,
    pieces: Sequence[list[Tensor]],
    places: Sequence[int],
    scratch: Scratch,
    noise: Noise | None = None,
    spans: Sequence[Span] = (),
) -> None:
    """pieces: what is written, what the pulls are of, then what a mask is taken of."""
    wide = _widened(scratch, *pieces)
    drag_block_(wide[0], wide[1], places, factors, roles.mask(wide), scratch)
    _narrow(pieces[0], wide[0], scratch, noise, spans)


def _widened(scratch: Scratch, *lists: list[Tensor]) -> list[list[Tensor]]:
    """The lists in float32 if they are narrower, else themselves."""
    if lists[0][0].dtype not in LOW:
        return list(lists)
    return [scratch.copies(f"wide {number}", tensors, torch.float32) for number, tensors in enumerate(lists)]


def _narrow(
    targets: list[Tensor], wide: list[Tensor], scratch: Scratch, noise: Noise | None, spans: Sequence[Span]
) -> None:
    """Write what was computed in float32 to bf16 or fp16; nothing where it was computed in place."""
    if wide is targets:
        return
    if noise is None:
        scratch.apply_("copy", targets, wide)
    else:
        write_(targets, wide, noise, spans, scratch)


def _without_pulls(
    ps: list[Tensor],
    rest: Sequence[list[Tensor]],
    places: list[int],
    roles: Roles,
    scale: Rate,
    scratch: Scratch,
    noise: Noise | None,
    spans: Sequence[Span],
) -> list[Tensor]:
    """What would be written to a block without any pull, as new tensors."""
    copies = [p.clone() for p in ps]
    updates = [[u.clone() for u in rest[0]]] if roles.has_updates else []
    plain = Roles(has_updates=roles.has_updates, clear=roles.clear)
    _write_block_(Factors.of((), scale, ps), plain, [copies, *updates], places, scratch, noise, spans)
    return copies
