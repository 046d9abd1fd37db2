"""Where decay is written: the formulas of a step over whole lists of local tensors, block by block or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .blocks import Ops, Workspace, blocks, is_large
from .compile import TOGETHER, TRACED, compiled
from .formulas import ELEMENTARY_ORDS, DecayTerm, Mask, Numbers, Rate, Write, companion, update_, with_terms
from .stochastic import LOW, RandomBits


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
) -> None:
    """p ← prox(p − Σ rate·mask·d(p−a) − scale·u), in place; every term is of p as it was before, but the proximal ones.

    params: local tensors of one dtype and device. bf16 and fp16 are computed in float32 and rounded once.
    terms: what decays them, in order. L2 terms are one multiplication by 1 − Σ rate, as in torch's AdamW, without a
        temporary; anything else needs temporaries of a block. Proximal ones act last.
    updates: u, of the shapes of `params`; None: there is nothing but the terms.
    scale: the factor of u: one number, or [params].
    mask: what cautious terms look at.
    workspace: where blocks are worked on.
    random_bits: how bf16 and fp16 are rounded; None: to the nearest.
    clear: whether `updates` are not needed any more and are to be left at zero, which costs least while a block is in the
        cache.
    """
    l2 = [term.rate for term in terms if term.is_l2]
    # Rates are added as they come (metrics are float64), and rounded to the dtype of the arithmetic once, as one factor.
    keep = 1 - sum(l2[1:], start=l2[0]) if l2 else None
    rest = [term for term in terms if not term.is_l2]
    # Not so for bf16 and fp16: a factor that is a tensor would be rounded to their 8 or 11 bits, at usual rates to 1.
    if keep is not None and not rest and updates is None and params[0].dtype not in LOW:
        # Memory is read once and no temporary is made: blocks would gain nothing.
        torch._foreach_mul_(params, _operand(keep, range(len(params)), params[0]))
        return
    # A unit scale is part of the formula: u is added or subtracted as it is, with one rounding and no temporary. A tensor
    # is never known to be 1 without reading it, which would wait for the device.
    is_unit = not isinstance(scale, Tensor) and abs(scale) == 1
    write = Write(
        (),
        has_keep=keep is not None,
        unit_scale=float(scale) if is_unit else None,
        us=None if updates is None else 1,
        spends_us=clear,
    )
    lists = [params] if updates is None else [params, updates]
    _write_(write, Numbers(keep, (), None if is_unit else scale), lists, rest, mask, workspace, random_bits)


def apply_from_(
    targets: list[Tensor],
    params: list[Tensor],
    terms: Sequence[DecayTerm],
    mask: Mask | None = None,
    *,
    workspace: Workspace,
    random_bits: RandomBits | None = None,
) -> None:
    """t ← prox(t − Σ rate·mask·d(p−a)), in place: the decay of one list of tensors, written to another of the same shapes.

    targets, params: local tensors of one dtype and device. The rest as in `apply_`.
    """
    if terms:
        # No factor `keep`: it would shrink what an optimizer has added to the targets since, and not only the old parameters.
        write = Write((), has_keep=False, unit_scale=1.0, ps=1)
        _write_(write, Numbers(None, (), None), [targets, params], terms, mask, workspace, random_bits)


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
    """out ← scale·u + Σ sign·rate·mask·d(p−a): what is pending becomes part of the update. No term is proximal.

    updates, params: local tensors of equal shapes and one device, params of one dtype.
    out: where the result is written; may be `updates` itself.
    The rest as in `apply_`.
    """
    write = Write((), has_keep=False, unit_scale=None, us=1)
    write, lists = _with_terms(write, [params, updates], terms, mask)
    # `out` is written last, a block at a time, so it may be one of the lists that are read.
    for positions, (*pieces, outs) in blocks(*lists, out):
        workspace.begin_block()
        # Terms of bf16 or fp16 are computed in float32, as everywhere, and rounded once: when they are copied to `out`.
        is_low = pieces[0][0].dtype in LOW
        wide: Sequence[list[Tensor]] = [workspace.copies(some, torch.float32) for some in pieces] if is_low else pieces
        ps, us = wide[:2]
        rates = [_operand(term.rate, positions, ps[0]) for term in terms]
        factor = _operand(scale, positions, us[0])
        block_mask = write.mask_of(workspace, wide)
        torch._foreach_copy_(outs, with_terms(workspace, us, factor, ps, terms, write.kinds, rates, block_mask, wide))


def differences(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """new − old as new tensors; of bf16 and fp16 in float32, where it is not rounded to 8 or 11 bits again."""
    out = [torch.empty_like(one, dtype=torch.float32 if one.dtype in LOW else None) for one in new]
    for _, (outs, news, olds) in blocks(out, new, old):
        # Copied first: new − old as one operation would be rounded to their own dtype before it gets here.
        torch._foreach_copy_(outs, news)
        torch._foreach_sub_(outs, olds)
    return out


def _with_terms(
    write: Write, lists: list[list[Tensor]], terms: Sequence[DecayTerm], mask: Mask | None
) -> tuple[Write, list[list[Tensor]]]:
    """The write with these terms, and its lists with what they pull to, and what the mask is taken of if one looks at it."""
    lists = list(lists)

    def place_of(one: list[Tensor]) -> int:
        # By identity: the mask is most often taken of the update itself, and must see the same float32 copy of it.
        known = [place for place, other in enumerate(lists) if one is other]
        if not known:
            lists.append(one)
        return known[0] if known else len(lists) - 1

    kinds = [
        term.kind._replace(toward=0.0, anchors=place_of(term.toward)) if isinstance(term.toward, list) else term.kind
        for term in terms
    ]
    write = replace(
        write,
        kinds=tuple(kind for kind, term in zip(kinds, terms, strict=True) if not term.proximal),
        proximal=tuple(kind for kind, term in zip(kinds, terms, strict=True) if term.proximal),
    )
    # A list that nobody looks at would be widened all the same, and compiled into the formula.
    if mask is not None and any(kind.cautious for kind in kinds):
        minus = None if mask.minus is None else place_of(mask.minus)
        write = replace(write, mask_us=place_of(mask.us), mask_minus=minus, mask_sign=mask.sign)
    return write, lists


def _write_(
    write: Write,
    numbers: Numbers,
    lists: list[list[Tensor]],
    terms: Sequence[DecayTerm],
    mask: Mask | None,
    workspace: Workspace,
    random_bits: RandomBits | None,
) -> None:
    """Write the first of `lists`, block by block; terms: what is not in `write` and `numbers` yet."""
    write, lists = _with_terms(write, lists, terms, mask)
    # Numbers apart from the formula: they change in every step, and a formula is compiled once.
    numbers = numbers._replace(
        rates=[term.rate for term in terms if not term.proximal],
        proximal=[one for term in terms if term.proximal for one in (term.rate, companion(term.ord, term.rate))],
    )
    like = lists[0][0]
    is_low = like.dtype in LOW
    computed = torch.float32 if is_low else like.dtype
    # Once for all blocks: numbers where the parameters are, and in the dtype that they are computed in.
    numbers = numbers.each(lambda rate: rate.to(like.device, computed) if isinstance(rate, Tensor) else rate)
    # What the compiler would round otherwise is not given to it: p + alpha·u is one rounding or two, and its pow is another.
    # Nor are random bits, which go by the place in a tensor.
    adds_once = write.us is None or write.unit_scale is not None or write.spends_us or isinstance(numbers.scale, Tensor)
    is_exact = adds_once and all(kind.ord in ELEMENTARY_ORDS for kind in (*write.kinds, *write.proximal))
    compiles = is_exact and random_bits is None and workspace.compiles
    # p ← keep·p − u is so little work that the calls of small operations count, and blocks hold more tensors.
    few_operations = not (compiles or is_low or write.kinds or write.proximal)
    for positions, pieces in blocks(*lists, together=TOGETHER if compiles else 0, few_operations=few_operations):
        # Small tensors are not compiled: one call of it costs more than all of their operations.
        if compiles and is_large(pieces[0]):
            given = numbers.each(partial(_as_tensor, positions=positions, dtype=computed, device=like.device))
            compiled(_traced, write, len(positions))(*given, *pieces)
            continue
        workspace.begin_block()
        round_ = None
        if random_bits is not None:
            round_ = partial(random_bits.round_, workspace, positions, lists[0])
        _write_block_(workspace, write, numbers, positions, pieces, round_)


def _traced(
    write: Write,
    num: int,
    keep: Tensor | None,
    rates: list[Tensor],
    scale: Tensor | None,
    proximal: list[Tensor],
    *pieces: list[Tensor],
) -> None:
    """`_write_block_` of `num` large tensors, for the compiler. What comes before `num` is in the formula, the rest is given."""
    _write_block_(TRACED, write, Numbers(keep, rates, scale, proximal), range(num), pieces)


def _write_block_(
    ops: Ops,
    write: Write,
    numbers: Numbers,
    positions: Sequence[int],
    pieces: Sequence[list[Tensor]],
    round_: Callable[[list[Tensor], list[Tensor]], None] | None = None,
) -> None:
    """Write the first list of a block. round_: `round_(targets, values)` writes float32 values to bf16 or fp16; None: nearest."""
    is_low = pieces[0][0].dtype in LOW
    wide: Sequence[list[Tensor]] = [ops.copies(some, torch.float32) for some in pieces] if is_low else pieces
    of_block = numbers.each(partial(_operand, positions=positions, like=wide[0][0]))
    if write.us is not None:
        # In the dtype of u, which is not that of p where a gradient has one of its own.
        of_block = of_block._replace(scale=_operand(numbers.scale, positions, wide[write.us][0]))
    update_(ops, write, of_block, wide)
    if is_low:
        # The only rounding to the parameter's dtype, whatever terms there are.
        (round_ or ops.copy_)(pieces[0], wide[0])
    if write.spends_us and write.us is not None:
        # The next step wants zeros there, and here the block is still in the cache.
        if ops is TRACED:
            # Zeros that the compiler takes for something made of u: plain ones it would write in a second loop over memory.
            for u in pieces[write.us]:
                u.copy_(torch.gt(u, torch.inf))
        else:
            torch._foreach_zero_(pieces[write.us])


def _operand(rate: Any, positions: Sequence[int], like: Tensor) -> Any:
    """A rate for the tensors at these positions, as operations take it: a number, a 0-d tensor, or a list of those."""
    if not isinstance(rate, Tensor):
        return rate
    # Converted here and not by the operation: one rounding, and the same one on every device.
    rate = rate.to(like.device, like.dtype)
    if rate.dim() == 0:
        return rate
    # One operation for all of them, not one for each. Positions ascend, and some may be left out between them.
    stretch = rate[positions[0] : positions[-1] + 1].unbind()
    return [stretch[position - positions[0]] for position in positions]


def _as_tensor(rate: Rate, positions: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A rate as a tensor, 0-d or [positions]: a float would be compiled into the formula, and every other one anew."""
    if not isinstance(rate, Tensor):
        return torch.full((), rate, dtype=dtype, device=device)
    return rate if rate.dim() == 0 else torch.stack([rate[position] for position in positions])
