"""What a chain is made of: transforms, and the place each has in one chain."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .step import Step


class Transform(ABC):
    """One word of the sentence. Holds its defaults only; what a chain changes lives in the chain.

    defaults: hyperparameters by name; each is a key of the chain's param groups. changes: what it may change of
    "update", "grad" and "params" before the step is written. is_linear: whether scaling what is pending before it is the same as after.
    """

    defaults: dict[str, Any]
    is_linear: ClassVar[bool] = True
    changes: ClassVar[frozenset[str]] = frozenset({"update"})

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError if these settings (of a param group) are not usable."""

    @abstractmethod
    def apply(self, step: Step, bound: BoundTransform) -> None:
        """Say what this transform does to the step being assembled."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.defaults.items())})"


@dataclass(frozen=True, slots=True, eq=False)
class BoundTransform:
    """A transform in a chain: its position, its label ("WeightDecay", "WeightDecay_1"), and the group key of each hyperparameter.

    maximize_keys: the keys `maximize` of the optimizers that come later. lr_key: the key of the learning rate that will scale what is
    pending here, if one will before another optimizer.
    """

    transform: Transform
    index: int
    label: str
    keys: dict[str, str]
    maximize_keys: tuple[str, ...] = ()
    lr_key: str | None = None

    def sign(self, group: Mapping[str, Any]) -> int:
        """−1 if an optimizer after this place maximizes: then the update here will be ascended, and decay must be subtracted from it."""
        return math.prod(-1 if group[key] else 1 for key in self.maximize_keys)

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The transform's hyperparameters as this param group has them now."""
        return {name: group[key] for name, key in self.keys.items()}


def bind(transforms: Sequence[Transform]) -> tuple[BoundTransform, ...]:
    """Give every transform its place; where a key or a label is taken, the second gets `_1`, and so on."""
    keys_taken: set[str] = set()
    labels_taken: set[str] = set()
    bound_transforms = []
    for index, transform in enumerate(transforms):
        keys = {name: _free(name, keys_taken) for name in transform.defaults}
        keys_taken.update(keys.values())
        label = _free(type(transform).__name__, labels_taken)
        labels_taken.add(label)
        bound_transforms.append(BoundTransform(transform, index, label, keys))
    maximize = [bound.keys.get("maximize") for bound in bound_transforms]
    return tuple(
        replace(
            p,
            maximize_keys=tuple(filter(None, maximize[_first_host_after(p) :])),
            lr_key=_next_lr(bound_transforms, p.index),
        )
        for p in bound_transforms
    )


def _first_host_after(bound: BoundTransform) -> int:
    # A rule with target="closure" acts before all optimizers, wherever it stands.
    return 0 if getattr(bound.transform, "target", "") == "closure" else bound.index + 1


def _next_lr(bound_transforms: Sequence[BoundTransform], index: int) -> str | None:
    for bound in bound_transforms[index + 1 :]:
        if not bound.transform.is_linear:
            return None
        if "lr" in bound.keys:
            return bound.keys["lr"]
    return None


def _free(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    return next(candidate for number in range(1, len(taken) + 2) if (candidate := f"{name}_{number}") not in taken)
