"""When to measure: the fewest reductions that give every rule the number at its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..metrics.measure import num_collectives
from ..rules.base import Measure, Rule
from ..sharding.world import World
from .transform import BoundTransform


@dataclass(frozen=True, slots=True)
class Phase:
    """Numbers that are measured together, before the transform at `position` acts; asks: (index of the rule, its need)."""

    position: int
    asks: tuple[tuple[int, Measure], ...]


def schedule(bound_transforms: Sequence[BoundTransform], groups: Sequence[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """The phases of a chain, in order. Depends on the rules and the groups' settings, never on gradients.

    A number may be measured from the moment its tensors are final until its rule acts. So a phase is opened as late as its first
    rule allows, and whatever is measurable by then joins it: the fewest points that stab all intervals.
    """
    # "update" is the gradient itself until a transform makes it something else.
    since = {"update": 0, "grad": 0, "params": 0}
    is_gradient = True
    opened: list[tuple[int, list[tuple[int, Measure]]]] = []
    for position, bound in enumerate(bound_transforms):
        for need in _needs(bound, groups):
            if not opened or opened[-1][0] < since[need.of]:
                opened.append((position, []))
            opened[-1][1].append((bound.index, need))
        changes = bound.transform.changes
        if "grad" in changes and is_gradient:
            since["update"] = position + 1
        is_gradient = is_gradient and "update" not in changes
        since.update(dict.fromkeys(changes, position + 1))
    return tuple(Phase(position, tuple(asks)) for position, asks in opened)


def _needs(bound: BoundTransform, groups: Sequence[Mapping[str, Any]]) -> Iterable[Measure]:
    """What the rule needs, over all groups; each once, in the order of the groups."""
    if not isinstance(bound.transform, Rule):
        return ()
    needs = (bound.transform.need(bound.settings(group)) for group in groups)
    return dict.fromkeys(need for need in needs if need is not None)


def num_phases(phases: Sequence[Phase], world: World) -> int:
    """All-reduces per step: one for each phase, two where sums and extrema meet in one, none in a world of one."""
    return sum(
        num_collectives([m for _, need in phase.asks for m in need.metric.statistics], world) for phase in phases
    )


def describe_phases(phases: Sequence[Phase]) -> str:
    """The asks as a text that is equal on two ranks if and only if they will make the same reductions."""
    asks = [f"{need.metric.name} of {need.of} ({need.scope})" for phase in phases for _, need in phase.asks]
    return ", ".join(asks)
