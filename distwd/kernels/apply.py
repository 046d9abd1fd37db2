"""Where decay is written: the formulas of a step over whole lists of local tensors, block by block or compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import blocks, is_large
from .compile import TOGETHER, TRACED, compiled
from .formulas import DecayTerm, Factors, Mask, Rate, apply_block_, apply_from_block_, factor, folded
from .joined import copied, is_worth_writing_joined, joined, spread_
from .stochastic import LOW, RandomBits, Span, spans_of, write_
from .tally import Tally
from .workspace import Workspace


def apply_(
    params: list[Tensor],
    terms: Sequence[DecayTerm],
    updates: list[Tensor] | None = None,
    scale: Rate = 1.0,
    mask: Mask | None = None,
    *,
    workspace: Workspace,
    random_bits: RandomBits | None = None,
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
    tally = tally if terms else None
    factors = Factors.of(terms, scale, params)
    if factors.is_one_product and updates is None and tally is None and params[0].dtype not in LOW:
        # Memory is read once and no temporary is made: blocks would gain nothing.
        torch._foreach_mul_(params, factor(factors.keep, range(len(params)), params))
        return
    roles = _roles(lists, mask, terms, second=None if updates is None else "updates", clear=clear)
    _write_(lists, factors, roles, workspace, random_bits, tally)


def apply_from_(
    targets: list[Tensor],
    params: list[Tensor],
    terms: Sequence[DecayTerm],
    mask: Mask | None = None,
    *,
    workspace: Workspace,
    random_bits: RandomBits | None = None,
    tally: Tally | None = None,
) -> None:
    """t ← t − Σ pull(p), in place: the pulls of one list of tensors, written to another of the same shapes."""
    if terms:
        lists = [targets, params]
        roles = _roles(lists, mask, terms, second="params")
        _write_(lists, Factors.apart(terms, params), roles, workspace, random_bits, tally)


def count(params: list[Tensor], terms: Sequence[DecayTerm], tally: Tally | None, workspace: Workspace) -> None:
    """What linear pulls leave unchanged if they are written alone; nothing is."""
    factors = Factors.of(terms, 1.0, params)
    for places, (ps,) in blocks(params) if tally is not None else ():
        copies = [p.clone() for p in ps]
        (wide,) = _widened(workspace, copies)
        apply_block_(wide, places, factors, None, None, workspace)
        if wide is not copies:
            torch._foreach_copy_(copies, wide)
        if tally is not None:
            tally.add(copies, ps)


def add_terms(
    updates: list[Tensor],
    params: list[Tensor],
    terms: Sequence[DecayTerm],
    scale: Rate,
    out: list[Tensor],
    mask: Mask | None = None,
    *,
    workspace: Workspace,
) -> None:
    """out ← scale·u + Σ sign·pull(p): what is pending becomes part of the update. `out` may be `updates` itself."""
    lists = [params, out, updates]
    roles = _roles(lists, mask, terms, second=None)
    for places, (ps, outs, *rest) in blocks(*lists):
        ps_wide, us_wide, *more = _widened(workspace, ps, *rest)
        block_mask = roles.mask([ps_wide, us_wide, us_wide, *more])
        torch._foreach_copy_(outs, folded(us_wide, ps_wide, places, terms, scale, block_mask, workspace))


def differences(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """new − old as new tensors; of bf16 and fp16 in float32, where it is not rounded to 8 or 11 bits again."""
    out = [torch.empty_like(one, dtype=torch.float32 if one.dtype in LOW else None) for one in new]
    for _, (outs, news, olds) in blocks(out, new, old):
        torch._foreach_copy_(outs, news)
        torch._foreach_sub_(outs, olds)
    return out


@dataclass(frozen=True, slots=True)
class Roles:
    """What the lists of a block are for. The first is written.

    second: "updates" that are subtracted, the "params" that pulls are of where the first are not, or None. clear: whether to leave
    zeros in it. us, minus, sign: the places of what a mask is taken of, and its sign; us None: there is no mask.
    """

    second: str | None
    clear: bool = False
    us: int | None = None
    minus: int | None = None
    sign: int = 1

    def mask(self, lists: Sequence[list[Tensor]]) -> Mask | None:
        """The mask of a block."""
        if self.us is None:
            return None
        return Mask(lists[self.us], self.sign, None if self.minus is None else lists[self.minus])


def _roles(
    lists: list[list[Tensor]], mask: Mask | None, terms: Sequence[DecayTerm], second: str | None, clear: bool = False
) -> Roles:
    """Adds to `lists` what a mask is taken of, if a pull looks at it and it is not among them."""
    if mask is None or not any(term.cautious for term in terms):
        return Roles(second, clear)
    minus = None if mask.minus is None else _place_in(lists, mask.minus)
    return Roles(second, clear, _place_in(lists, mask.us), minus, mask.sign)


def _place_in(lists: list[list[Tensor]], one: list[Tensor]) -> int:
    for place, other in enumerate(lists):
        if one is other:
            return place
    lists.append(one)
    return len(lists) - 1


def _write_(
    lists: list[list[Tensor]],
    factors: Factors,
    roles: Roles,
    workspace: Workspace,
    random_bits: RandomBits | None,
    tally: Tally | None,
) -> None:
    """Write the first of `lists`, block by block."""
    # Noise and tallies go by the tensor; what is not exact may depend on how many elements are worked on together.
    is_exact = factors.is_exact(is_last=roles.clear or roles.second != "updates")
    is_free = is_exact and random_bits is None and tally is None
    compiles, is_low = is_free and workspace.compiles, lists[0][0].dtype in LOW
    # Only these take so many operations that joining makes up for itself.
    joins = is_free and factors.has_common_numbers and (is_low or any(term.cautious for term in factors.bent))
    few_operations = not (compiles or is_low or factors.bent)
    for places, pieces in blocks(*lists, together=TOGETHER if compiles else 0, few_operations=few_operations):
        if compiles and is_large(pieces[0]):
            run = compiled(_traced, factors.form(), roles, len(places))
            run(factors.numbers(places, pieces[0][0]), *pieces)
            continue
        if joins and is_worth_writing_joined(pieces):
            _write_joined_(factors, roles, pieces, places, workspace)
            continue
        spans = () if random_bits is None else spans_of(pieces[0], places, lists[0])
        without = (
            None if tally is None else _without_pulls(factors, roles, pieces, places, workspace, random_bits, spans)
        )
        _write_block_(factors, roles, pieces, places, workspace, random_bits, spans)
        if tally is not None and without is not None:
            tally.add(pieces[0], without)


def _traced(form: Factors, roles: Roles, num: int, numbers: list[Tensor], *pieces: list[Tensor]) -> None:
    """form: what is alike in every step; numbers: the rest of the factors. num: tensors in each list."""
    _write_block_(form.filled(numbers), roles, pieces, range(num), TRACED)


def _write_joined_(
    factors: Factors, roles: Roles, pieces: Sequence[list[Tensor]], places: Sequence[int], workspace: Workspace
) -> None:
    """The same of many small tensors, as one."""
    # What is written is a copy, and written back, so that each tensor knows of it (its version counts for autograd).
    written = copied(pieces[0], "joined", workspace, pieces[0][0].dtype)
    others = [joined(some, f"joined {n}", workspace, some[0].dtype) for n, some in enumerate(pieces[1:])]
    clears_all = roles.clear and not others[0][1]
    # All numbers are common, so any place stands for the others.
    _write_block_(factors, roles, [[written], *([flat] for flat, _ in others)], places[:1], workspace)
    spread_(pieces[0], written)
    if clears_all:
        workspace.clear_(pieces[1])


def _write_block_(
    factors: Factors,
    roles: Roles,
    pieces: Sequence[list[Tensor]],
    places: Sequence[int],
    workspace: Workspace,
    random_bits: RandomBits | None = None,
    spans: Sequence[Span] = (),
) -> None:
    wide = _widened(workspace, *pieces)
    mask = roles.mask(wide)
    if roles.second == "params":
        apply_from_block_(wide[0], wide[1], places, factors, mask, workspace)
    else:
        apply_block_(wide[0], places, factors, wide[1] if roles.second else None, mask, workspace, roles.clear)
    _narrow(pieces[0], wide[0], workspace, random_bits, spans)
    if roles.clear:
        workspace.clear_(pieces[1])


def _widened(workspace: Workspace, *lists: list[Tensor]) -> list[list[Tensor]]:
    """The lists in float32 if they are narrower, else themselves."""
    if lists[0][0].dtype not in LOW:
        return list(lists)
    return [workspace.copies(f"wide {number}", tensors, torch.float32) for number, tensors in enumerate(lists)]


def _narrow(
    targets: list[Tensor],
    wide: list[Tensor],
    workspace: Workspace,
    random_bits: RandomBits | None,
    spans: Sequence[Span],
) -> None:
    """Write what was computed in float32 to bf16 or fp16; nothing where it was computed in place."""
    if wide is targets:
        return
    if random_bits is None:
        workspace.apply_("copy", targets, wide)
    else:
        write_(targets, wide, random_bits, spans, workspace)


def _without_pulls(
    factors: Factors,
    roles: Roles,
    pieces: Sequence[list[Tensor]],
    places: Sequence[int],
    workspace: Workspace,
    random_bits: RandomBits | None,
    spans: Sequence[Span],
) -> list[Tensor]:
    """What would be written to a block without any pull, as new tensors."""
    copies = [[one.clone() for one in some] for some in pieces[: 1 if roles.second is None else 2]]
    unpulled = Factors(None, (), factors.scale)
    _write_block_(unpulled, Roles(roles.second, roles.clear), copies, places, workspace, random_bits, spans)
    return copies[0]
