"""Names for the parameters of optimizers that were built without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Naming:
    """Names by tensor, and by the tensor's place in its group: accelerate's `prepare` puts other tensors into the places.

    named: (name, tensor) pairs. groups: the groups as they are now. Keeps no tensor alive.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], groups: Sequence[Mapping[str, Any]]) -> None:
        self._by_tensor = WeakTensorKeyDictionary({tensor: name for name, tensor in named})
        self._by_place = [self._known(group) for group in groups] if self._by_tensor else []

    def _known(self, group: Mapping[str, Any]) -> list[str | None]:
        return [self._by_tensor.get(param) for param in group["params"]]

    def named(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups with `param_names`, as far as all names of a group are known."""
        if not self._by_tensor and not self._by_place:
            return list(groups)
        return [self._named(group, index) for index, group in enumerate(groups)]

    def _named(self, group: dict[str, Any], index: int) -> dict[str, Any]:
        if "param_names" in group:
            return group
        names = self._known(group)
        places = self._by_place[index] if index < len(self._by_place) else []
        if len(places) == len(names):
            names = [name or place for name, place in zip(names, places, strict=True)]
        return group if None in names else {**group, "param_names": names}
