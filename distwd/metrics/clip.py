"""clip_grad_norm_: torch's, by a plan, so that each element of the model counts once on any sharding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import local_tensor
from ..checks import plain_number
from ..kernels.apply import scale_
from ..kernels.blocks import number_on
from ..sharding.collectives import gather_objects, local_like
from ..sharding.explain import SHOWN
from ..sharding.layout import Layout
from ..sharding.params import entries_of, frozen_in, listed
from .measure import Request, Slots, measure, sources_of
from .metric import parse_metric
from .plan import Plan, build_plan
from .replica_check import check_gradients


@torch.no_grad()
def clip_grad_norm_(
    params: Tensor | Iterable[Any],
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    *,
    plan: Plan | None = None,
    group: dist.ProcessGroup | None = None,
    layout: Layout | None = None,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale gradients down to a norm over the whole model, in place:  g ← g·min(1, max_norm / (‖g‖ + 10⁻⁶)).

    params: the parameters whose gradients are clipped: tensors, (name, tensor) pairs, group dicts, or one tensor; any
        meshes, float dtypes and shapes. With a plan they are the plan's, in its order. Those without a gradient are left
        alone and count for nothing, on each rank by itself.
    max_norm: ≥ 0, a number, or a 0-d tensor, which is not read; `math.inf` measures and writes nothing.
    norm_type: p of the p-norm, any number or `math.inf`; 0 counts the non-zeros.
    plan: of `Plan.build`, or the `plan` of a Chain or an Attachment. None: one is built in this call, from `group` and
        `layout` as in `Plan.build`; where ranks hold copies, their gradients are compared, too.
    error_if_nonfinite: raise an error where the norm is NaN or infinite. This reads the norm on the host; nothing else does.
    Returns the norm before clipping, a 0-d float32 tensor (float64 if every parameter is float64), on the device of the
    first gradient. Summed in float64: the same bits on every rank and, as float32, on any sharding.

    A collective call, on every rank of the group; one all-reduce if the plan is given. A gradient that is sharded otherwise
    than its parameter, `Partial` too, is redistributed to be measured, and scaled where it lies.
    Raises ValueError for numbers that cannot be used, and for parameters that are not the plan's; PlanError as `Plan.build`;
    RuntimeError on every rank for a norm that is not finite. Nothing is changed then.
    Source: torch.nn.utils.clip_grad_norm_.

    >>> import torch
    >>> from distwd import clip_grad_norm_
    >>> w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, -4.0])
    >>> clip_grad_norm_([w], 1.0)
    tensor(5.)
    >>> w.grad
    tensor([ 0.6000, -0.8000])
    """
    # Wrong words are errors of the call, the same on every rank, and come before any exchange.
    max_norm = plain_number(max_norm)
    is_number = isinstance(max_norm, (int, float)) and not isinstance(max_norm, bool) and max_norm >= 0
    if not is_number and not (isinstance(max_norm, Tensor) and max_norm.numel() == 1):
        raise ValueError(
            f"max_norm={max_norm!r} is not usable: it must be a number >= 0, or a 0-d tensor; math.inf measures and clips nothing"
        )
    try:
        order = float(norm_type)  # torch takes "inf", too
    except (TypeError, ValueError):
        order = math.nan
    if math.isnan(order):
        raise ValueError(
            f"norm_type={norm_type!r} is not usable: it must be a number p or math.inf; 2 is the usual norm"
        )
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(f"plan must be a Plan, not {type(plan).__name__}; of a Chain or an Attachment pass its .plan")
    if plan is not None and (group is not None or layout is not None):
        raise ValueError(
            "clip_grad_norm_ got a plan and group= or layout=; leave those out: the plan was built with its own"
        )

    members = [params] if isinstance(params, Tensor) else listed(params)
    if any(isinstance(member, Mapping) for member in members):
        members = [(entry.name if entry.named else None, entry.tensor) for entry in entries_of(members)]
    if plan is None:
        entries = entries_of(members)
        plan = build_plan(
            entries, group, layout, rules=f"clip_grad_norm_ of order {order:g}", frozen=frozen_in(entries)
        )
        # As in a first step that builds the plan: experts that were seeded alike look like copies until they are trained.
        check_gradients(plan)
    if not plan.num_names:
        warnings.warn(
            "clip_grad_norm_ got no parameters on any rank, so nothing is clipped; model.parameters() can be read once only, "
            "pass a list where it is kept",
            UserWarning,
            stacklevel=3,
        )

    try:
        tensors = _in_order(members, plan)
        grads = [tensor.grad for tensor in tensors]
        # All of them before the first check: `local_like` may talk to other ranks, which do not see what is wrong here.
        measured = [
            None if grad is None else local_like(grad, tensor) for grad, tensor in zip(grads, tensors, strict=True)
        ]
        for local, piece in zip(measured, plan.pieces, strict=True):
            if local is None:
                continue
            if local.layout is not torch.strided:
                raise ValueError(f"{piece.name} has a sparse gradient; make it dense (for an embedding: sparse=False)")
            if tuple(local.shape) != piece.local_shape:
                raise ValueError(
                    f"{piece.name}: its local gradient has shape {tuple(local.shape)}, the plan has {piece.local_shape}; "
                    "give it a gradient that is sharded as the parameter is"
                )
    except (TypeError, ValueError) as error:
        # The other ranks may find nothing wrong, and wait for this one: when they have given up, they read why.
        if (store := plan.world.error_store) is not None:
            store.publish(f"clip_grad_norm_: {error}")
        raise
    # Without a gradient a parameter counts as frozen here and not as zeros, which would be the smallest |x|.
    slots = Slots(plan, [position for position, grad in enumerate(grads) if grad is None])
    (found,) = measure(
        plan, [Request(parse_metric(order), sources_of(measured))], slots=slots, workspace=plan.workspace
    )
    total = found[0].to(plan.result_dtype)

    if error_if_nonfinite and not total.isfinite():
        # The norm has the same bits on every rank, so all come here, and may exchange who is to blame.
        blamed = [
            piece.name
            for local, piece in zip(measured, plan.pieces, strict=True)
            if local is not None and not local.isfinite().all()
        ]
        by_rank = [
            f"rank {rank}: {', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)}"
            for rank, names in enumerate(gather_objects(blamed, plan.world))
            if names
        ]
        raise RuntimeError(
            f"clip_grad_norm_: the norm of order {order:g} is not finite ({'; '.join(by_rank) or 'all gradients are'}), so "
            "nothing was clipped; skip this step on every rank, or pass error_if_nonfinite=False to clip by it anyway"
        )
    if is_number and max_norm == math.inf:
        return total
    # torch's own formula and dtype. It is never asked whether the norm is too large: a product with 1 changes nothing, and
    # the question would wait for the device.
    limit = number_on(total.device, max_norm.reshape(()), max_norm.dtype) if isinstance(max_norm, Tensor) else max_norm
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    batches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        if grad is not None:
            # What lies in p.grad itself: of pending sums (`Partial`) the parts may be scaled as well.
            local = local_tensor(grad)
            batches.setdefault((local.device, local.dtype), []).append(local)
    for locals_ in batches.values():
        scale_(locals_, factor, workspace=plan.workspace)
    return total


def _in_order(members: list[Any], plan: Plan) -> list[Tensor]:
    """The tensors of `members`, once they are known to be the plan's parameters, in its order. Local.

    members: tensors, or (name, tensor) pairs.
    Raises ValueError, with the name, where they are not; TypeError for anything else.
    """
    if len(members) != len(plan.entries):
        raise ValueError(
            f"clip_grad_norm_ got {len(members)} parameters for a plan of {len(plan.entries)}; pass those that it was built "
            "of, in their order (of an optimizer: optimizer.param_groups)"
        )
    tensors: list[Tensor] = []
    places: dict[int, str] | None = None
    for member, entry in zip(members, plan.entries, strict=True):
        name, tensor = member if isinstance(member, tuple) else (None, member)
        tensors.append(tensor)
        # The usual case, whatever wrappers have done to its name since.
        if tensor is entry.tensor:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params must hold tensors or (name, tensor) pairs, not {type(tensor).__name__}")
        # Tensors may have been replaced by others of the same layout. One of another place, or of another name, would be
        # counted, or not, as that one is: copies twice, and pieces not at all.
        places = places or {id(known.tensor): known.name for known in plan.entries}
        other = places.get(id(tensor)) or (name if name is not None and entry.named and name != entry.name else None)
        if other is not None:
            raise ValueError(
                f"clip_grad_norm_ got {other} where the plan has {entry.name}; pass the parameters in the order of the plan "
                "(of an optimizer: optimizer.param_groups)"
            )
    now = plan.entries
    if places is not None:
        now = tuple(replace(entry, tensor=tensor) for entry, tensor in zip(plan.entries, tensors, strict=True))
    if not plan.fits(now):
        raise ValueError(
            "clip_grad_norm_: shapes, dtypes or placements of the parameters are not those of the plan any more; build it "
            "anew on every rank, with Plan.build or by the .plan of the optimizer"
        )
    return tensors
