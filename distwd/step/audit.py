"""What an optimizer does to each parameter, as a table: the decay, by how much now, and by which rule."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..sharding.layout import Layout, Sharded, find_mark
from ..sharding.params import NamedParam
from ..sharding.tables import AuditRow, audit_table
from ..sharding.world import World
from .transform import BoundTransform

_LR = re.compile(r"lr(_\d+)?")


def audit(
    entries: Sequence[NamedParam],
    groups: Sequence[Mapping[str, Any]],
    transforms: Sequence[BoundTransform],
    layout: Layout,
    world: World,
) -> str:
    """A row for each kind of parameter that this rank holds. No communication; decays and rates that are tensors are read."""
    decays: list[tuple[float, ...]] = []
    rules: list[str] = []
    also: list[str] = []
    for group in groups:
        values, words = [], []
        for bound in transforms:
            settings = bound.settings(group)
            details = bound.transform.describe(settings)
            if details is None:
                continue  # it decays nothing
            values.append(float(settings.get("weight_decay", float("nan"))))
            words.append(f"{bound.label} ({', '.join(filter(None, [details, bound.coupling]))})")
        decays.append(tuple(values))
        rules.append("; ".join(words) or "no rule")
        rates = [key for key in group if _LR.fullmatch(key) and isinstance(group[key], (int, float, Tensor))]
        also.append(" ".join(f"{key}={float(group[key]):g}" for key in rates))

    rows = []
    for entry in entries:
        found = find_mark(entry.name, entry.tensor, layout)
        name = entry.name
        if found is not None and isinstance(found[1], Sharded):
            # Its shape is that of a piece, since nobody knows the whole's.
            pieces = World.of(found[1].group)
            name = f"{name} (piece {pieces.rank} of {pieces.size})"
        own, rule = decays[entry.group], rules[entry.group]
        if not entry.tensor.requires_grad:
            own, rule = (0.0,), "never stepped: it requires no gradient"
        rows.append(AuditRow(name, tuple(entry.tensor.shape), entry.group, own, also[entry.group], rule))
    held = f"these are the parameters that rank {world.rank} of {world.size} holds"
    return "\n".join([audit_table(rows), *([held] if world.size > 1 else [])])
