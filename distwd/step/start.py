"""What is found out once, as the first real step begins: numbers that a rule keeps, and could not begin with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from .._torch import local_tensor
from ..errors import PlanError
from ..metrics.measure import OWN, Request, Slots, measure, sources_of
from ..metrics.metric import Measure, parse_metric
from ..metrics.plan import Plan
from ..sharding.collectives import gather_objects
from ..sharding.params import Params, frozen_in
from .state import COUNT, KeptNumbers, is_empty_piece
from .transform import BoundTransform, GroupSettings

# By position of the parameter: the rule that would keep a number of it, and the number's name.
Zeros = dict[int, tuple[BoundTransform, str]]


def check_start(
    plan: Plan, kept: KeptNumbers, params: Params, rules: Sequence[tuple[BoundTransform, int, GroupSettings]]
) -> Zeros:
    """Raise PlanError, on every rank alike, where a kept number that must not be 0 would begin as 0. It reads and talks.

    plan: of `params`.
    kept: the numbers that have begun.
    rules: rules with such numbers, with the index and the settings of a group each.
    Returns frozen parameters that are all zeros, for `check_unfrozen`.
    """
    numbers = [
        (bound, group, own, name, begin.scope)
        for bound, group, own in rules
        for name in bound.transform.nonzero
        if isinstance(begin := own.keeps.get(name), Measure)
    ]
    slots, scopes = Slots(plan), dict.fromkeys(scope for *_, scope in numbers)
    frozen = set(frozen_in(params.entries))
    # Frozen parameters may have numbers of their own later, and are no part of numbers of more than one parameter.
    locals_ = [local_tensor(entry.tensor) if entry.group in params.active else None for entry in params.entries]
    trained = [None if position in frozen else local for position, local in enumerate(locals_)]
    requests = [
        Request(parse_metric("l0"), sources_of(locals_ if scope in OWN else trained), scope) for scope in scopes
    ]
    counts = measure(plan, requests, slots=slots)
    is_zero = {scope: (count == 0).cpu() for scope, count in zip(scopes, counts, strict=True)}
    # The same on all ranks, so all of them come to the exchange of names, or none.
    if not any(flags.any() for flags in is_zero.values()):
        return {}
    cpu, found = torch.device("cpu"), []
    resting: Zeros = {}
    for bound, group, own, name, scope in numbers:
        positions = [
            place
            for place, entry in enumerate(params.entries)
            if entry.group == group and not is_empty_piece(entry.tensor)
        ]
        entries = [params.entries[position] for position in positions]
        nums = [slots.num_cells[place] if scope == "matrix" else 1 for place in positions] if scope in OWN else None
        begun = kept.read(bound, own.keeps, entries, group, cpu, nums)[COUNT] > 0
        if nums is not None:
            flags = is_zero[scope][slots.index(positions, scope, cpu)] & ~begun
            zeros = [place for place, some in zip(positions, flags.split(nums), strict=True) if some.any()]
            names = [params.entries[place].name for place in zeros if place not in frozen]
            resting |= {place: (bound, name) for place in zeros if place in frozen}
        else:
            is_wrong = is_zero[scope][group if scope == "group" else 0] and not begun[0]
            names = [f"param_groups[{group}]"] if is_wrong else []
        found += [(bound.label, name, what) for what in names]
    # Only those who hold a parameter know its name, and whether its number has begun.
    wrong = sorted({one for of_rank in gather_objects(found, plan.world) for one in of_rank})
    if wrong:
        label, number, _ = wrong[0]
        raise _all_zeros(dict.fromkeys(what for _, _, what in wrong), label, number)
    return resting


def check_unfrozen(zeros: Zeros, params: Params, settings: Mapping[tuple[int, int], GroupSettings]) -> Zeros:
    """Raise PlanError where a parameter is trained now that was frozen as the first step began, all zeros, and still is. It reads.

    Nothing is exchanged: ranks that hold no piece of the parameter do not know that it is trained now.
    Returns those that are still frozen.
    """
    for position, (bound, number) in zeros.items():
        entry = params.entries[position]
        own, local = settings[bound.index, entry.group], local_tensor(entry.tensor)
        begins = not own.is_off and isinstance(own.keeps.get(number), Measure)
        if begins and entry.tensor.requires_grad and local.numel() and not local.any():
            raise _all_zeros([entry.name], bound.label, number)
    return {place: zero for place, zero in zeros.items() if not params.entries[place].tensor.requires_grad}


def _all_zeros(names: Iterable[str], label: str, number: str) -> PlanError:
    return PlanError(
        f"{', '.join(names)}: all zeros as the first step begins, so {label} would keep a {number} of 0, and they would stay zeros; "
        f"pass {number}= a number, or {number}=None (off) in a group of their own"
    )
