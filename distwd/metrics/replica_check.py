"""Copies that are none: tensors of one name with the same bits, whose gradients tell that they are different parameters.

    s = Σᵢ ±gᵢ, signs by place;  Σ over holders of s  =  number of holders · s of the owner,  if all are copies

Stages of a pipeline, or experts, that were initialised from one seed and have the same names everywhere look like copies until
they are trained. So gradients are compared once, in a first step that builds the plan: equal up to what kernels round differently,
or not at all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import PlanError
from ..kernels.sums import wide_dtype
from ..sharding.collectives import gather_objects
from ..sharding.explain import SHOWN, Clue, explain_gradients
from ..sharding.local import local_tensor
from ..sharding.reduce import sum_over_ranks
from .plan import Plan

# Of different gradients s differs by about their norm, of equal ones by roundings: far below this part of it even in bf16.
_TOLERANCE = 0.01
_BLOCK = 1 << 20


def check_gradients(plan: Plan) -> None:
    """Raise PlanError, on every rank alike, where copies of a piece have different gradients. One all-reduce if there are copies.

    A name of which some rank has no gradient, or one that is not finite, or placed otherwise than the parameter, is not judged.
    """
    if not plan.has_copies:
        return
    excess, size, unknown = sum_over_ranks(_testimony(plan), plan.world)
    wrong = ((unknown == 0) & (excess.abs() > _TOLERANCE * size)).nonzero().flatten().tolist()
    if wrong:
        clues = [
            Clue(cell, piece, entry.named, entry.group, _in_words(_gradient(entry.tensor, piece.numel)))
            for cell, piece, entry in zip(plan.cells, plan.pieces, plan.entries, strict=True)
            if cell in wrong[:SHOWN]
        ]
        raise PlanError(explain_gradients(wrong, gather_objects(clues, plan.world)))


def _testimony(plan: Plan) -> Tensor:
    """[3, names] float64: what this rank's s exceed what its copies should have, their norms, and gradients that cannot be judged."""
    told = torch.zeros(3, plan.num_names, dtype=torch.float64)
    copied = [index for index, holders in enumerate(plan.num_holders) if holders > 1 and plan.pieces[index].numel]
    grads = {index: _gradient(plan.entries[index].tensor, plan.pieces[index].numel) for index in copied}
    seen = [torch.stack(_signed_sum_and_norm(grad)).cpu() for grad in grads.values() if grad is not None]
    numbers = iter(torch.stack(seen).double().tolist() if seen else [])
    for index, grad in grads.items():
        cell, holders = plan.cells[index], plan.num_holders[index] if plan.owned[index] else 0
        signed, norm = next(numbers) if grad is not None else (torch.nan, torch.nan)
        if norm - norm == 0:  # finite
            told[:, cell] += torch.tensor([signed * (1 - holders), norm, 0.0])
        else:
            told[2, cell] += 1
    return told


def _gradient(param: Tensor, numel: int) -> Tensor | None:
    grad = param.grad
    if grad is None or (
        isinstance(grad, DTensor) and isinstance(param, DTensor) and grad.placements != param.placements
    ):
        return None
    local = local_tensor(grad)
    return local.reshape(-1)[:numel] if local.layout is torch.strided else None


def _in_words(grad: Tensor | None) -> str:
    return "no gradient" if grad is None else f"gradient norm {_signed_sum_and_norm(grad)[1].item():.3g}"


def _signed_sum_and_norm(flat: Tensor) -> list[Tensor]:
    wide = wide_dtype(flat.device)
    total = torch.zeros((), dtype=wide, device=flat.device)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK].to(wide)
        places = torch.arange(start, start + block.numel(), device=flat.device)
        signs = (places * 0x9E3779B1 >> 16 & 1) * 2 - 1
        total += (block * signs).sum()
    return [total, torch.linalg.vector_norm(flat, dtype=wide)]
