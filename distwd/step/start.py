"""What is found out once, as the first real step begins: numbers that a rule keeps, and could not begin with."""

from __future__ import annotations

from collections.abc import Sequence

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


def check_start(
    plan: Plan, kept: KeptNumbers, params: Params, rules: Sequence[tuple[BoundTransform, int, GroupSettings]]
) -> None:
    """Raise PlanError, on every rank alike, where a kept number that must not be 0 would begin as 0. It reads and talks.

    plan: of `params`.
    kept: the numbers that have begun.
    rules: rules with such numbers, with the index and the settings of a group each.
    """
    numbers = [
        (bound, group, own, name, begin.scope)
        for bound, group, own in rules
        for name in bound.transform.nonzero
        if isinstance(begin := own.keeps.get(name), Measure)
    ]
    trained = [
        local_tensor(entry.tensor) if entry.group in params.active and entry.tensor.requires_grad else None
        for entry in params.entries
    ]
    slots, scopes = Slots(plan, tuple(frozen_in(params.entries))), dict.fromkeys(scope for *_, scope in numbers)
    requests = [Request(parse_metric("l0"), sources_of(trained), scope) for scope in scopes]
    counts = measure(plan, requests, slots=slots)
    is_zero = {scope: (count == 0).cpu() for scope, count in zip(scopes, counts, strict=True)}
    # The same on all ranks, so all of them come to the exchange of names, or none.
    if not any(flags.any() for flags in is_zero.values()):
        return
    cpu, found = torch.device("cpu"), []
    for bound, group, own, name, scope in numbers:
        positions = [
            place
            for place, entry in enumerate(params.entries)
            if entry.group == group and entry.tensor.requires_grad and not is_empty_piece(entry.tensor)
        ]
        entries = [params.entries[position] for position in positions]
        nums = [slots.num_cells[place] if scope == "matrix" else 1 for place in positions] if scope in OWN else None
        begun = kept.read(bound, own.keeps, entries, group, cpu, nums)[COUNT] > 0
        if nums is not None:
            flags = is_zero[scope][slots.index(positions, scope, cpu)] & ~begun
            by_entry = zip(entries, flags.split(nums), strict=True)
            names = [entry.name for entry, some in by_entry if some.any()]
        else:
            is_wrong = is_zero[scope][group if scope == "group" else 0] and not begun[0]
            names = [f"param_groups[{group}]"] if is_wrong else []
        found += [(bound.label, name, what) for what in names]
    # Only those who hold a parameter know its name, and whether its number has begun.
    wrong = sorted({one for of_rank in gather_objects(found, plan.world) for one in of_rank})
    if wrong:
        label, number, _ = wrong[0]
        shown = ", ".join(dict.fromkeys(what for _, _, what in wrong))
        raise PlanError(
            f"{shown}: all zeros as the first step begins, so {label} would keep a {number} of 0, and they would stay zeros; pass "
            f"{number}= a number, or {number}=None (off) in a group of their own"
        )
