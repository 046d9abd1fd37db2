"""The plan of an optimizer over time: built when it is first needed, and built anew when it does not fit any more."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch.distributed as dist

from ..errors import CollectiveError, PlanError
from ..sharding.layout import Layout, check_layout
from ..sharding.params import NamedParam
from ..sharding.world import World, check_group
from .plan import Plan, build_plan


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Which ranks hold the model, and how: the arguments `group`, `layout` and `check_replicas`, checked."""

    group: dist.ProcessGroup | None = None
    layout: Layout = field(default_factory=dict)
    check_replicas: bool = True

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, layout: Layout | None, check_replicas: bool) -> PlanOptions:
        """Raises ValueError for what is not a group or a layout."""
        if group is not None:
            check_group(group)
        check_layout(layout or {})
        return cls(group, layout or {}, check_replicas)


class PlanCache:
    """Keeps one plan. All ranks build it together, and build it anew together.

    options: which ranks hold the model, and how.
    with_offsets: whether the plan must know where pieces that are only counted begin in their whole.
    """

    def __init__(self, options: PlanOptions, with_offsets: bool = False) -> None:
        self.options = options
        self.plan: Plan | None = None
        self._with_offsets = with_offsets
        self._key: Hashable = None
        self._has_published = False

    @property
    def world(self) -> World:
        """The ranks as they are now."""
        return World.of(self.options.group)

    def fits(self, entries: tuple[NamedParam, ...], key: Hashable = None) -> bool:
        """Whether the plan is there, and is of these parameters; key: what else it must have been built for."""
        return self.plan is not None and self.plan.fits(entries) and (key is None or self._key == key)

    def build(self, entries: tuple[NamedParam, ...], rules: str, key: Hashable) -> Plan:
        """Build the plan together with the other ranks.

        rules: a text that must be the same on every rank.
        key: what makes the plan fit, besides the parameters.
        """
        if self.plan is not None:
            # The others go on with the old plan unless they come here too: an exchange that they do not expect would
            # pair up with whatever collective they are in.
            self.plan.meet_to_rebuild(entries, rules)
            self.plan = None
        options = self.options
        self.plan = build_plan(
            entries, options.group, options.layout, options.check_replicas, rules, self._with_offsets
        )
        self._key = key
        return self.plan

    def publish(self, error: Exception) -> None:
        """Leave the reason for ranks that will wait for this one in vain."""
        # All ranks know of a PlanError already, and a CollectiveError comes of waiting for another rank.
        store = None if self.plan is None else self.plan.world.error_store
        if store is not None and not isinstance(error, (PlanError, CollectiveError)):
            store.publish(f"{type(error).__name__}: {error}")
            self._has_published = True

    def clear_published(self) -> None:
        """A step is tried again: what was published about the last one is past."""
        store = None if self.plan is None else self.plan.world.error_store
        if self._has_published and store is not None:
            store.clear()
        self._has_published = False
