"""When to measure: the fewest reductions that give every rule its metrics at its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..metrics.measure import num_collectives
from ..metrics.metric import SOURCES, Ask
from ..sharding.world import World
from .transform import BoundTransform


@dataclass(frozen=True, slots=True)
class Phase:
    """Metrics that one reduction brings, before the transform at `position` acts.

    asks: pairs (index of the transform, what it asks for).
    taken_at: pairs (position, what is asked for): what an optimizer may change before the phase. Its local sums are taken
        before the transform at that position acts, and reduced with the phase.
    """

    position: int
    asks: tuple[tuple[int, Ask], ...]
    taken_at: tuple[tuple[int, Ask], ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """The phases of a list of transforms, in order. It depends on their settings alone, never on gradients.

    So every rank makes the same collectives, whatever gradients it has.
    """

    phases: tuple[Phase, ...]

    @classmethod
    def of(
        cls, transforms: Sequence[BoundTransform], asks: Mapping[int, Iterable[Ask]], step_since: int = 0
    ) -> Schedule:
        """The schedule of these transforms.

        asks: what each asks for over all groups, by its index.
        step_since: the position from which on the directions of pulls are known, where norm rules ask for them.

        A metric may be measured from the moment its tensors are final until its rule acts.

        So a phase is opened as late as its first rule allows, and whatever can be measured by then joins it: the fewest
        points that stab all intervals.
        """
        # "update" is the gradient itself until a transform makes it something else.
        final_since = {**dict.fromkeys(SOURCES, 0), "step": step_since}
        update_is_gradient = True
        # (position, asks). Looking at the last one is enough: its position is the largest, and asks only ever join it.
        opened: list[tuple[int, list[tuple[int, Ask]], dict[Ask, int]]] = []
        optimizer: int | None = None  # the first that may have written to the gradients since they were final
        for position, bound in enumerate(transforms):
            for ask in dict.fromkeys(asks[bound.index]):  # each once
                if not opened or opened[-1][0] < final_since[ask.of]:
                    opened.append((position, [], {}))
                opened[-1][1].append((bound.index, ask))
                if ask.of == "grad" and optimizer is not None and optimizer < opened[-1][0]:
                    opened[-1][2][ask] = optimizer
            # From here on it is another tensor, or has other values.
            changes = bound.transform.changes
            # While the update still is the gradient, a write to the gradient changes both.
            if "grad" in changes and update_is_gradient:
                final_since["update"] = position + 1
            # Norm rules look at the update apart from pulls, and learning rates scale it as it is.
            if not bound.transform.is_linear or "params" in changes or ("grad" in changes and update_is_gradient):
                final_since["step"] = max(final_since["step"], position + 1)
            update_is_gradient = update_is_gradient and "update" not in changes
            final_since.update(dict.fromkeys(changes, position + 1))
            # torch's SGD adds its momentum to `p.grad` in place, others scale or clear it.
            if "grad" in changes:
                optimizer = None
            elif optimizer is None and not bound.transform.is_linear:
                optimizer = position
        return cls(
            tuple(
                Phase(position, tuple(asks), tuple((at, ask) for ask, at in taken.items()))
                for position, asks, taken in opened
            )
        )

    def num_collectives(self, world: World) -> int:
        """All-reduces per step: one for each phase, two where sums and extrema meet in one, none in a world of one."""
        return sum(
            num_collectives([statistic for _, ask in phase.asks for statistic in ask.parsed.statistics], world)
            for phase in self.phases
        )

    @property
    def asks(self) -> list[tuple[int, Ask]]:
        """All asks, phase by phase."""
        return [ask for phase in self.phases for ask in phase.asks]

    def __str__(self) -> str:
        """The asks as a text that is equal on two ranks if and only if they will make the same reductions."""
        return ", ".join(f"{ask.parsed.name} of {ask.of} ({ask.scope})" for _, ask in self.asks)
