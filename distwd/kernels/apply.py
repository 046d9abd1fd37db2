"""Where decay is written: the formulas of a step over whole lists of local tensors, block by block or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .blocks import Operand, Ops, Workspace, block_size, blocks, is_large, number_on, small_size
from .compile import TOGETHER, TRACED, compiled, way_of
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
    num_cells: Sequence[int] | None = None,
    keep: Rate | None = None,
) -> None:
    """p ← prox(p − Σ rate·mask·d(p−a) − scale·u), in place; every term is of p as it was before, but the proximal ones.

    params: local tensors of one dtype and device. bf16 and fp16 are computed in float32 and rounded once.
    terms: what decays them, in order. L2 terms are one multiplication by 1 − Σ rate, as in torch's AdamW, without a
        temporary; anything else needs temporaries of a block. Proximal ones act last.
    updates: u, of the shapes of `params`; None: there is nothing but the terms.
    scale: the factor of u: one number, or one for each of the params, as rates.
    mask: what cautious terms look at.
    workspace: where blocks are worked on.
    random_bits: how bf16 and fp16 are rounded; None: to the nearest.
    clear: whether `updates` are not needed any more and are to be left at zero, which costs least while a block is in the
        cache.
    num_cells: how many matrices each of the params is, where rates that are 1-d have one number for each matrix, in order;
        None: one for each of the params. A stack is all but its last two dimensions.
    keep: the factor of p, with L2 terms and gains in it; None: 1 − Σ rate of the L2 terms.
    """
    l2 = [term.rate for term in terms if term.is_l2]
    # Rates are added as they come (metrics are float64), and rounded to the dtype of the arithmetic once, as one factor.
    if keep is None and l2:
        keep = 1 - sum(l2[1:], start=l2[0])
    rest = [term for term in terms if not term.is_l2]
    # Not so for bf16 and fp16: a factor that is a tensor would be rounded to their 8 or 11 bits, at usual rates to 1.
    is_product = keep is not None and not rest and updates is None and params[0].dtype not in LOW
    # Nor on GPUs where each tensor has a factor of its own: there is no operation for lists of those.
    is_alone = isinstance(keep, Tensor) and keep.dim() > 0 and way_of(workspace, params[0].device) == "triton"
    if is_product and not is_alone and _places(num_cells, [keep]) is None:
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
    lists, numbers = [params] if updates is None else [params, updates], Numbers(keep, (), None if is_unit else scale)
    _write_(write, numbers, lists, rest, mask, workspace, random_bits, num_cells)


def scale_(tensors: list[Tensor], factor: Tensor, *, workspace: Workspace) -> None:
    """x ← factor·x, in place; of bf16 and fp16 computed in float32 and rounded once.

    tensors: local tensors of one dtype and device.
    factor: 0-d, on any device.
    workspace: where blocks are worked on.
    """
    if tensors[0].dtype not in LOW:
        torch._foreach_mul_(tensors, number_on(tensors[0].device, factor, tensors[0].dtype))
        return
    # As in `apply_`: a factor that is a tensor would be rounded to their 8 or 11 bits.
    factor = number_on(tensors[0].device, factor, torch.float32)
    for _, (pieces,) in blocks(tensors):
        workspace.begin_block()
        wide = workspace.mul_(workspace.copies(pieces, torch.float32), factor)
        torch._foreach_copy_(pieces, wide)


def apply_from_(
    targets: list[Tensor],
    params: list[Tensor],
    terms: Sequence[DecayTerm],
    mask: Mask | None = None,
    *,
    workspace: Workspace,
    random_bits: RandomBits | None = None,
    num_cells: Sequence[int] | None = None,
) -> None:
    """t ← prox(t − Σ rate·mask·d(p−a)), in place: the decay of one list of tensors, written to another of the same shapes.

    targets, params: local tensors of one dtype and device. The rest as in `apply_`.
    """
    if terms:
        # No factor `keep`: it would shrink what an optimizer has added to the targets since, and not only the old parameters.
        write = Write((), has_keep=False, unit_scale=1.0, ps=1)
        numbers = Numbers(None, (), None)
        _write_(write, numbers, [targets, params], terms, mask, workspace, random_bits, num_cells)


def add_terms(
    updates: list[Tensor],
    params: list[Tensor],
    terms: Sequence[DecayTerm],
    scale: Rate,
    out: list[Tensor],
    mask: Mask | None = None,
    *,
    workspace: Workspace,
    num_cells: Sequence[int] | None = None,
) -> None:
    """out ← scale·u + Σ sign·rate·mask·d(p−a): what is pending becomes part of the update. No term is proximal.

    updates, params: local tensors of equal shapes and one device, params of one dtype.
    out: where the result is written; may be `updates` itself.
    The rest as in `apply_`.
    """
    write = Write((), has_keep=False, unit_scale=None, us=1)
    write, lists = place_terms(write, [params, updates], terms, mask)
    lists = [*lists, out]
    places, uncut = _places(num_cells, [scale, *(term.rate for term in terms)]), set[int]()
    if places is not None:
        lists, places, _, uncut = _cut_by_cells(lists, places, block_size(params[0].device) // 2)
    # `out` is written last, a block at a time, so it may be one of the lists that are read.
    for positions, (*pieces, outs) in blocks(*lists, uncut=uncut):
        workspace.begin_block()
        # Terms of bf16 or fp16 are computed in float32, as everywhere, and rounded once: when they are copied to `out`.
        is_low = pieces[0][0].dtype in LOW
        wide: Sequence[list[Tensor]] = [workspace.copies(some, torch.float32) for some in pieces] if is_low else pieces
        ps, us = wide[:2]
        rates = [_operand(term.rate, positions, ps[0], places) for term in terms]
        factor = _operand(scale, positions, us[0], places)
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


def place_terms(
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

    kinds = []
    for term in terms:
        kind = term.kind
        if isinstance(term.toward, list):
            kind = kind._replace(toward=0.0, anchors=place_of(term.toward))
        if term.own_us is not None:
            kind = kind._replace(masked_by=place_of(term.own_us))
        kinds.append(kind)
    write = replace(
        write,
        kinds=tuple(kind for kind, term in zip(kinds, terms, strict=True) if not term.proximal),
        proximal=tuple(kind for kind, term in zip(kinds, terms, strict=True) if term.proximal),
    )
    # A list that nobody looks at would be widened all the same, and compiled into the formula.
    if mask is not None and any(kind.cautious and kind.masked_by is None for kind in kinds):
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
    num_cells: Sequence[int] | None,
) -> None:
    """Write the first of `lists`, block by block; terms: what is not in `write` and `numbers` yet."""
    write, lists = place_terms(write, lists, terms, mask)
    # Numbers apart from the formula: they change in every step, and a formula is compiled once.
    numbers = numbers._replace(
        rates=[term.rate for term in terms if not term.proximal],
        proximal=[one for term in terms if term.proximal for one in (term.rate, companion(term.ord, term.rate))],
    )
    like = lists[0][0]
    is_low = like.dtype in LOW
    computed = torch.float32 if is_low else like.dtype
    # Once for all blocks: numbers where the parameters are, and in the dtype that they are computed in.
    numbers = numbers.each(lambda rate: number_on(like.device, rate, computed) if isinstance(rate, Tensor) else rate)
    # What the compiler would round otherwise is not given to it: p + alpha·u is one rounding or two, and its pow is another.
    # Nor are random bits, which go by the place in a tensor.
    adds_once = write.us is None or write.unit_scale is not None or write.spends_us or isinstance(numbers.scale, Tensor)
    is_exact = adds_once and all(kind.ord in ELEMENTARY_ORDS for kind in (*write.kinds, *write.proximal))
    way = way_of(workspace, like.device) if workspace.compiles and is_exact else None
    compiles = way == "compiler" and random_bits is None
    # p ← keep·p − u is so little work that the calls of small operations count, and blocks hold more tensors.
    few_operations = not (compiles or is_low or write.kinds or write.proximal)
    own_numbers = [numbers.keep, *numbers.rates, numbers.scale, *numbers.proximal]
    places, uncut = _places(num_cells, own_numbers), set[int]()
    if way == "triton":
        from . import triton  # not before, since it needs this module

        rest = triton.write_(workspace, write, numbers, lists, num_cells, random_bits)
        if not rest:
            return
        if len(rest) < len(lists[0]):
            # What no kernel serves is written as if it were all there is; numbers stay where they are.
            places = [(places or [(place, 1) for place in range(len(lists[0]))])[place] for place in rest]
            random_bits = random_bits and random_bits.of_parts([(place, 0) for place in rest])
            lists = [[some[place] for place in rest] for some in lists]
    if places is not None:
        # What is compiled takes large matrices one by one, and no stacks.
        small = small_size(like.device, few_operations, compiles)
        lists, places, parts, uncut = _cut_by_cells(lists, places, small if compiles else block_size(like.device) // 2)
        random_bits = random_bits and random_bits.of_parts(parts)
    together = TOGETHER if compiles else 0
    for positions, pieces in blocks(*lists, together=together, few_operations=few_operations, uncut=uncut):
        # Small tensors are not compiled: one call of it costs more than all of their operations.
        if compiles and is_large(pieces[0]):
            dtype, device = computed, like.device
            given = numbers.each(partial(_as_tensor, positions=positions, dtype=dtype, device=device, places=places))
            compiled(_traced, write, len(positions))(*given, *pieces)
            continue
        workspace.begin_block()
        round_ = None
        if random_bits is not None:
            round_ = partial(random_bits.round_, workspace, positions, lists[0])
        write_block_(workspace, write, numbers, positions, pieces, places, round_)


def _traced(
    write: Write,
    num: int,
    keep: Tensor | None,
    rates: list[Tensor],
    scale: Tensor | None,
    proximal: list[Tensor],
    *pieces: list[Tensor],
) -> None:
    """`write_block_` of `num` large tensors, for the compiler. What comes before `num` is in the formula, the rest is given."""
    write_block_(TRACED, write, Numbers(keep, rates, scale, proximal), range(num), pieces)


def write_block_(
    ops: Ops,
    write: Write,
    numbers: Numbers,
    positions: Sequence[int],
    pieces: Sequence[list[Tensor]],
    places: Places | None = None,
    round_: Callable[[list[Tensor], list[Tensor]], None] | None = None,
) -> None:
    """Write the first list of a block. round_: `round_(targets, values)` writes float32 values to bf16 or fp16; None: nearest."""
    is_low = pieces[0][0].dtype in LOW
    wide: Sequence[list[Tensor]] = [ops.copies(some, torch.float32) for some in pieces] if is_low else pieces
    of_block = numbers.each(partial(_operand, positions=positions, like=wide[0][0], places=places))
    if write.us is not None:
        # In the dtype of u, which is not that of p where a gradient has one of its own.
        of_block = of_block._replace(scale=_operand(numbers.scale, positions, wide[write.us][0], places))
    update_(ops, write, of_block, wide)
    if is_low:
        # The only rounding to the parameter's dtype, whatever terms there are.
        (round_ or ops.copy_)(pieces[0], wide[0])
    if write.spends_us and write.us is not None:
        # The next step wants zeros there, and here the block is still in the cache.
        ops.clear_(pieces[write.us])


def _operand(rate: Any, positions: Sequence[int], like: Tensor, places: Places | None = None) -> Any:
    """A rate for the tensors at these positions, as operations take it: a number, a 0-d tensor, or a list of tensors."""
    if not isinstance(rate, Tensor):
        return rate
    # Converted here and not by the operation: one rounding, and the same one on every device.
    rate = number_on(like.device, rate, like.dtype)
    if rate.dim() == 0:
        return rate
    firsts, (_, count) = positions, (0, 1)
    if places is not None:
        firsts, count = [places[position][0] for position in positions], places[positions[0]][1]
    if count > 1:  # a stack comes alone
        return [rate[firsts[0] : firsts[0] + count].view(-1, 1, 1)]
    # One operation for all of them, not one for each. Positions ascend, and some may be left out between them.
    stretch = rate[firsts[0] : firsts[-1] + 1].unbind()
    return [stretch[first - firsts[0]] for first in firsts]


def _as_tensor(
    rate: Rate, positions: Sequence[int], dtype: torch.dtype, device: torch.device, places: Places | None
) -> Tensor:
    """A rate as a tensor, 0-d or [positions]: a float would be compiled into the formula, and every other one anew."""
    if not isinstance(rate, Tensor):
        return torch.full((), rate, dtype=dtype, device=device)
    firsts = positions if places is None else [places[position][0] for position in positions]
    return rate if rate.dim() == 0 else torch.stack([rate[first] for first in firsts])


# --- numbers by matrix ------------------------------------------------------------------------------------------------

# For each tensor of a list, which of the numbers of a 1-d rate are its own: (the first, how many).
Places = Sequence[tuple[int, int]]


def _places(num_cells: Sequence[int] | None, rates: Sequence[Operand | None]) -> Places | None:
    """Where each tensor has its numbers; None where every tensor has one, in order, or all share them."""
    if num_cells is None or all(count == 1 for count in num_cells):
        return None
    if not any(isinstance(rate, Tensor) and rate.dim() for rate in rates):
        return None
    return list(zip(accumulate(num_cells, initial=0), num_cells, strict=False))


def _cut_by_cells(
    lists: Sequence[list[Tensor]], places: Places, most: int
) -> tuple[list[list[Tensor]], Places, list[tuple[int, int]], set[int]]:
    """Cut stacks of matrices, in every list alike, so that each part has one number for all, or is a stack that fits a block.

    lists: tensors of equal shapes. places: of each of them.
    most: up to how many elements a matrix stays in a stack.
    Returns the lists of parts, all of them views; the places of the parts; of each part the position of its tensor and the
    number of its first element there; and the positions of parts that are stacks of several matrices.
    """
    cut: list[list[Tensor]] = [[] for _ in lists]
    found: list[tuple[int, int]] = []
    parts: list[tuple[int, int]] = []
    for position, ((first, count), *tensors) in enumerate(zip(places, *lists, strict=True)):
        numel = tensors[0].numel()
        if count == 1 or not numel:
            for into, tensor in zip(cut, tensors, strict=True):
                into.append(tensor)
            found.append((first, 1))
            parts.append((position, 0))
            continue
        length = numel // count
        # Thousands of small matrices are not thousands of tensors: a stack of them is one operation, with numbers that are
        # broadcast over its matrices.
        step = max(1, block_size(tensors[0].device) // length) if length <= most else 1
        is_flat = all(tensor.is_contiguous() for tensor in tensors)
        for into, tensor in zip(cut, tensors, strict=True):
            shape = tensor.shape
            stacks = [tensor.view(-1, *shape[-2:])] if is_flat else [tensor]
            # Never by `flatten`, which copies where it cannot view.
            while stacks[0].dim() > 3:
                stacks = [part for stack in stacks for part in stack.unbind()]
            into += [part for stack in stacks for part in (stack.unbind() if step == 1 else stack.split(step))]
        for part in cut[0][len(found) :]:
            num = part.numel() // length
            found.append((first, num))
            parts.append((position, (first - places[position][0]) * length))
            first += num
    return cut, found, parts, {number for number, (_, count) in enumerate(found) if count > 1}
