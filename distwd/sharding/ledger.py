"""All param groups of the optimizers, also in a step that is shown only some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Groups = Sequence[dict[str, Any]]


class Ledger:
    """The groups as they were when all were last shown: DeepSpeed's ZeRO-1 and 2 step one at a time, and hide the others meanwhile.

    shown: the groups that the optimizers have now. Fewer groups, all of them known, are a part; anything else is the new whole.
    """

    def __init__(self, shown: Callable[[], Groups]) -> None:
        self._shown = shown
        self._known: Groups = ()

    def read(self) -> Groups:
        """All groups; an index means the same group in every step."""
        shown = self._shown()
        known = set(map(id, self._known))
        if not shown or len(shown) >= len(self._known) or any(id(group) not in known for group in shown):
            self._known = list(shown)
        return self._known

    def forget(self) -> None:
        """Take what is shown next for the whole: a change that was refused may be taken back."""
        self._known = ()

    def in_play(self) -> frozenset[int]:
        """The indices of the groups that are shown now."""
        shown = set(map(id, self._shown()))
        return frozenset(index for index, group in enumerate(self.read()) if id(group) in shown)
