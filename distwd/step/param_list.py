"""Temporary: until sharding/params.py has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..sharding.ledger import Ledger
from ..sharding.naming import Naming
from ..sharding.params import NamedParam, Roster


@dataclass(frozen=True, slots=True)
class Params:
    groups: Sequence[dict[str, Any]]
    entries: tuple[NamedParam, ...]
    active: frozenset[int]


class ParamList:
    def __init__(
        self, shown: Callable[[], Sequence[dict[str, Any]]], named_parameters: Iterable[tuple[str, Tensor]] = ()
    ) -> None:
        self._ledger, self._roster = Ledger(shown), Roster()
        named = list(named_parameters)
        self._naming = Naming(named, shown() if named else ())

    def read(self) -> Params:
        groups = self._ledger.read()
        return Params(groups, self._roster.read(self._naming.named(groups)), self._ledger.in_play())

    def forget(self) -> None:
        self._ledger.forget()
