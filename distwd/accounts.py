"""What a chain or an attachment does to each parameter, as lines of an audit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .attached import HostLR, HostStep
from .audit import Line, format_audit
from .decays.rule import Decay
from .layout import Layout, Sharded, find_mark
from .lr import LR
from .plan.entries import Entry
from .transform import Place
from .world import World
from .wrap import Wrap

_LR = re.compile(r"lr(_\d+)?")
_TARGETS = {"grad": "in the gradient", "closure": "in the closure's gradient", "params_direct": "at once, not × lr"}


def audit_of(
    entries: Sequence[Entry],
    groups: Sequence[Mapping[str, Any]],
    places: Sequence[Place],
    layout: Layout,
    world: World,
) -> str:
    """A table of the parameters that this rank holds: what decays them, and by how much now. No communication.

    Decays and learning rates that are tensors are read.
    """
    by_group = [_decays(places, group) for group in groups]
    lines = [_line(entry, groups[entry.group], *by_group[entry.group], layout) for entry in entries]
    held = f"these are the parameters that rank {world.rank} of {world.size} holds"
    return "\n".join([format_audit(lines), *([held] if world.size > 1 else [])])


def _decays(places: Sequence[Place], group: Mapping[str, Any]) -> tuple[tuple[float, ...], str]:
    """λ of every rule in a group, and the rules in words."""
    rules = [place for place in places if isinstance(place.transform, Decay)]
    settings = [place.settings(group) for place in rules]
    words = [
        f"{place.label} ({', '.join([*_details(place.transform, own), _coupling(place, places)])})"
        for place, own in zip(rules, settings, strict=True)
        if isinstance(place.transform, Decay)
    ]
    return tuple(float(own["weight_decay"]) for own in settings), "; ".join(words) or "no rule"


def _details(decay: Decay, settings: Mapping[str, Any]) -> Iterator[str]:
    need = decay.need(settings)
    if need is not None:
        yield f"× {need.metric.name} of {need.of}" + ("" if need.scope == "all" else f" by {need.scope}")
    if settings["ord"] != 2:
        yield f"ord {settings['ord']:g}"
    if decay.is_cautious(settings):
        yield "cautious"


def _coupling(place: Place, places: Sequence[Place]) -> str:
    target = getattr(place.transform, "target", "update")
    if target != "update":
        return _TARGETS[target]
    behind = [other.transform for other in places if other.index > place.index]
    for transform in behind:
        if isinstance(transform, Wrap):
            return f"before {transform.optimizer_class.__name__}"
        if isinstance(transform, HostStep):
            return "before the optimizer"
    return "× lr" if any(isinstance(transform, (LR, HostLR)) for transform in behind) else "not × lr"


def _line(entry: Entry, group: Mapping[str, Any], decays: tuple[float, ...], words: str, layout: Layout) -> Line:
    rates = [key for key in group if _LR.fullmatch(key) and isinstance(group[key], (int, float, Tensor))]
    also = " ".join(f"{key}={float(group[key]):g}" for key in rates)
    if not entry.tensor.requires_grad:
        decays, words = (0.0,), "never stepped: it requires no gradient"
    found = find_mark(entry.name, entry.tensor, layout)
    name = entry.name
    if found is not None and isinstance(found[1], Sharded):
        pieces = World.of(found[1].group)
        name = f"{name} (piece {pieces.rank} of {pieces.size})"
    return Line(name, tuple(entry.tensor.shape), entry.group, decays, also, words)
