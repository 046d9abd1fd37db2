"""What a chain or an attachment does to each parameter, as lines of an audit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..attach.before import ExternalLR, ExternalOptimizer
from ..optimizers.lr import LR
from ..optimizers.wrap import Wrap
from ..rules.base import Rule
from ..sharding.layout import Layout, Sharded, find_mark
from ..sharding.params import NamedParam
from ..sharding.tables import AuditRow, audit_table
from ..sharding.world import World
from .transform import BoundTransform

_LR = re.compile(r"lr(_\d+)?")
_TARGETS = {"grad": "in the gradient", "closure": "in the closure's gradient", "params_direct": "at once, not × lr"}


def audit(
    entries: Sequence[NamedParam],
    groups: Sequence[Mapping[str, Any]],
    bound_transforms: Sequence[BoundTransform],
    layout: Layout,
    world: World,
) -> str:
    """A table of the parameters that this rank holds: what decays them, and by how much now. No communication.

    Decays and learning rates that are tensors are read.
    """
    by_group = [_decays(bound_transforms, group) for group in groups]
    lines = [_line(entry, groups[entry.group], *by_group[entry.group], layout) for entry in entries]
    held = f"these are the parameters that rank {world.rank} of {world.size} holds"
    return "\n".join([audit_table(lines), *([held] if world.size > 1 else [])])


def _decays(bound_transforms: Sequence[BoundTransform], group: Mapping[str, Any]) -> tuple[tuple[float, ...], str]:
    """λ of every rule in a group, and the rules in words."""
    rules = [bound for bound in bound_transforms if isinstance(bound.transform, Rule)]
    settings = [bound.settings(group) for bound in rules]
    words = [
        f"{bound.label} ({', '.join([*_details(bound.transform, own), _coupling(bound, bound_transforms)])})"
        for bound, own in zip(rules, settings, strict=True)
        if isinstance(bound.transform, Rule)
    ]
    return tuple(float(own["weight_decay"]) for own in settings), "; ".join(words) or "no rule"


def _details(decay: Rule, settings: Mapping[str, Any]) -> Iterator[str]:
    need = decay.need(settings)
    if need is not None:
        yield f"× {need.metric.name} of {need.of}" + ("" if need.scope == "all" else f" by {need.scope}")
    if settings["ord"] != 2:
        yield f"ord {settings['ord']:g}"
    if decay.is_cautious(settings):
        yield "cautious"


def _coupling(bound: BoundTransform, bound_transforms: Sequence[BoundTransform]) -> str:
    target = getattr(bound.transform, "target", "update")
    if target != "update":
        return _TARGETS[target]
    behind = [other.transform for other in bound_transforms if other.index > bound.index]
    for transform in behind:
        if isinstance(transform, Wrap):
            return f"before {transform.optimizer_class.__name__}"
        if isinstance(transform, ExternalOptimizer):
            return "before the optimizer"
    return "× lr" if any(isinstance(transform, (LR, ExternalLR)) for transform in behind) else "not × lr"


def _line(
    entry: NamedParam, group: Mapping[str, Any], decays: tuple[float, ...], words: str, layout: Layout
) -> AuditRow:
    rates = [key for key in group if _LR.fullmatch(key) and isinstance(group[key], (int, float, Tensor))]
    also = " ".join(f"{key}={float(group[key]):g}" for key in rates)
    if not entry.tensor.requires_grad:
        decays, words = (0.0,), "never stepped: it requires no gradient"
    found = find_mark(entry.name, entry.tensor, layout)
    name = entry.name
    if found is not None and isinstance(found[1], Sharded):
        pieces = World.of(found[1].group)
        name = f"{name} (piece {pieces.rank} of {pieces.size})"
    return AuditRow(name, tuple(entry.tensor.shape), entry.group, decays, also, words)
