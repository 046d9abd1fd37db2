"""The table that `print(optimizer)` and `print(attachment)` show: what decays each parameter, and by how much now."""

from __future__ import annotations

import math
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
    """Describe how the parameters that this rank holds decay, as a table. No communication, so one rank may print alone.

    entries: the parameters, each with its param group.
    groups: the param groups as they are now. Decays and learning rates that are tensors are read.
    transforms: the transforms of the chain, or the attached rules around their optimizer.
    layout: the argument `layout`; a parameter that it marks as sharded is shown as a piece.
    world: the ranks that together hold the model.
    """
    by_group: list[tuple[tuple[float, ...], str, str]] = []  # λ of each rule; learning rates; the rules
    for group in groups:
        decays, rules = [], []
        for bound in transforms:
            settings = bound.settings(group)
            details = bound.transform.describe(settings)
            if details is None:  # an optimizer or a learning rate
                continue
            # A rule of the user's own may compute its coefficient from something else than a λ.
            decays.append(float(settings.get("weight_decay", math.nan)))
            rules.append(f"{bound.label} ({', '.join(filter(None, (details, bound.coupling)))})")
        # The rates decide how much a decay takes off, so they stand beside λ. A chain may have several, "lr" and "lr_1".
        rates = [key for key in group if _LR.fullmatch(key) and isinstance(group[key], (int, float, Tensor))]
        also = " ".join(f"{key}={float(group[key]):g}" for key in rates)
        by_group.append((tuple(decays), also, "; ".join(rules) or "no rule"))

    rows = []
    for entry in entries:
        own, also, rule = by_group[entry.group]
        if not entry.tensor.requires_grad:
            own, rule = (0.0,), "never stepped: it requires no gradient"
        name, found = entry.name, find_mark(entry.name, entry.tensor, layout)
        if found is not None and isinstance(found[1], Sharded):
            # A plain tensor has the shape of the piece, not of the whole: the table must not pass it off as that.
            pieces = World.of(found[1].group)
            name = f"{name} (piece {pieces.rank} of {pieces.size})"
        rows.append(AuditRow(name, tuple(entry.tensor.shape), entry.group, own, also, rule))
    lines = [audit_table(rows)]
    if world.size > 1:
        lines.append(f"these are the parameters that rank {world.rank} of {world.size} holds")
    return "\n".join(lines)
