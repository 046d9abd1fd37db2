"""Find tensors that look like copies and are not: same name, same bits, but different gradients.

    s = Σᵢ ±gᵢ with signs by place;   all are copies  ⟹  Σ over holders of s = (number of holders) · (s of the owner)

Pipeline stages or experts that were initialised from one seed, under the same names on every rank, look like copies
until they are trained. So the gradients of copies are compared once, in a first step that builds the plan. They need
not have equal bits, since kernels round differently; but different parameters have entirely different gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import is_dtensor, local_tensor
from ..checks import warn_user
from ..errors import PlanError
from ..kernels.sums import wide_dtype
from ..sharding.collectives import gather_objects, sum_over_ranks
from ..sharding.explain import SHOWN, PieceReport, explain_alike, explain_gradients
from .plan import Plan

# For different gradients s differs by about their norm; for equal ones by roundings, far below this part of it even in
# bf16.
_TOLERANCE = 0.01
# Gradients of a tied weight are added up over its stages before the step, and then equal in all bits.
_TIED = 1e-4
_BLOCK = 1 << 20


def check_gradients(plan: Plan) -> None:
    """Raise PlanError where copies of a piece have different gradients; warn of one weight under two names. On every rank.

    Pipeline stages that were initialised from one seed have the same bits by different names, too; but only a weight that
    is tied has the same gradients.

    One all-reduce if any piece has copies, or names have the same bits. A name is not judged if some rank has no gradient
    for it, or one that is not finite, or one that is cut otherwise than the parameter.
    """
    if not (plan.has_copies or plan.alike):
        return
    excess, size, unknown, signed = sum_over_ranks(_summary(plan), plan.world)
    wrong = ((unknown == 0) & (excess.abs() > _TOLERANCE * size)).nonzero().flatten().tolist()
    if wrong:
        reports = []
        for name_id, piece, entry in zip(plan.name_ids, plan.pieces, plan.entries, strict=True):
            if name_id in wrong[:SHOWN]:
                grad = _gradient(entry.tensor, piece.numel)
                note = "no gradient" if grad is None else f"gradient norm {_signed_sum_and_norm(grad)[1].item():.3g}"
                reports.append(PieceReport(name_id, piece, entry.named, entry.group, note))
        raise PlanError(explain_gradients(wrong, gather_objects(reports, plan.world)))
    tied = []
    for first, *others in plan.alike:
        close = _TIED * size[first]
        same = [
            other
            for other in others
            if unknown[first] == unknown[other] == 0 < size[first]
            and (size[first] - size[other]).abs() <= close
            and (signed[first] - signed[other]).abs() <= close
        ]
        if same:
            tied.append((first, *same))
    if tied:
        mine = {name_id: entry.name for name_id, entry in zip(plan.name_ids, plan.entries, strict=True)}
        names = {name_id: name for of_rank in gather_objects(mine, plan.world) for name_id, name in of_rank.items()}
        warn_user(explain_alike([[names[name_id] for name_id in alike] for alike in tied]))


def _summary(plan: Plan) -> Tensor:
    """[4, names] float64, to be summed over ranks.

    Row 0: s, minus (number of holders) · s where this rank is the owner; over all ranks 0 if all are copies.
    Row 1: the norm of the gradient. Row 2: 1 if the gradient cannot be judged. Row 3: s where
    this rank is the owner.
    """
    summary = torch.zeros(4, plan.num_names, dtype=torch.float64)
    compared = {name_id for alike in plan.alike for name_id in alike}
    copied = [
        index
        for index, holders in enumerate(plan.num_holders)
        if (holders > 1 or plan.name_ids[index] in compared) and plan.pieces[index].numel
    ]
    grads = {index: _gradient(plan.entries[index].tensor, plan.pieces[index].numel) for index in copied}
    # All numbers are computed before the first is read: each read waits for the device.
    pairs = [torch.stack(_signed_sum_and_norm(grad)).cpu() for grad in grads.values() if grad is not None]
    numbers = iter(torch.stack(pairs).double().tolist() if pairs else [])
    for index, grad in grads.items():
        name_id, holders = plan.name_ids[index], plan.num_holders[index] if plan.owned[index] else 0
        signed, norm = next(numbers) if grad is not None else (torch.nan, torch.nan)
        if norm - norm == 0:  # finite
            summary[:, name_id] += torch.tensor([signed * (1 - holders), norm, 0.0, signed * plan.owned[index]])
        else:
            summary[2, name_id] += 1
    return summary


def _gradient(param: Tensor, numel: int) -> Tensor | None:
    """The local gradient without padding, flat; None if there is none that can be compared."""
    grad = param.grad
    # To redistribute it would be a collective that only some ranks start.
    if is_dtensor(grad) and is_dtensor(param) and grad.placements != param.placements:
        return None
    local = None if grad is None else local_tensor(grad)
    return None if local is None or local.layout is not torch.strided else local.reshape(-1)[:numel]


def _signed_sum_and_norm(flat: Tensor) -> list[Tensor]:
    """Σᵢ ±gᵢ and ‖g‖, 0-d; signs by place, the same on every rank. A plain sum would not see elements change places."""
    wide = wide_dtype(flat.device)
    total, squares = torch.zeros(2, dtype=wide, device=flat.device).unbind()
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK].to(wide)
        places = torch.arange(start, start + block.numel(), device=flat.device)
        signs = (places * 0x9E3779B1 >> 16 & 1) * 2 - 1
        total += (block * signs).sum()
        # Not by a norm of the whole in float64, for which torch copies the whole, when memory is fullest.
        squares += block.square().sum()
    return [total, squares.sqrt()]
