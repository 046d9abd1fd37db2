"""How a wrapped optimizer is run: on local shards, on the parameters themselves, or with a closure."""

from __future__ import annotations

from typing import Any

import torch

from ..transform import Place
from .base import Host
from .elementwise import ELEMENTWISE, KNOWS_DECOUPLED, ElementwiseHost
from .lending import IDLE, mark_stateless, without_mark
from .search import SearchHost, needs_closure
from .whole import WholeHost
from .zeros import Zeros

__all__ = [
    "ELEMENTWISE",
    "IDLE",
    "KNOWS_DECOUPLED",
    "Host",
    "SearchHost",
    "Zeros",
    "host_for",
    "mark_stateless",
    "needs_closure",
    "without_mark",
]


def host_for(
    cls: type[torch.optim.Optimizer], kwargs: dict[str, Any], place: Place, chain: torch.optim.Optimizer, suffix: str
) -> Host | SearchHost:
    """The right kind of host for an optimizer class."""
    kind: Any = ElementwiseHost if cls in ELEMENTWISE else SearchHost if needs_closure(cls) else WholeHost
    host: Host | SearchHost = kind(cls, kwargs, place, chain, suffix)
    return host
