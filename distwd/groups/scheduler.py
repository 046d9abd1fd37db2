"""What every schedule of weight decay shares: which group keys it drives, their base values, a step, a saved state."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

_KEY = re.compile(r"(distwd_)?weight_decay(_\d+)?")
_BASE = "initial_"

Values = list[dict[str, Any]]  # by param group, by key


class WeightDecayScheduler(ABC):
    """What the schedulers share: which keys they drive, base values, `step`, and what is saved.

    A subclass says the value at an epoch (`_value`). Every value is made from the base value, never from the last one, so
    no rounding piles up and 0 is no trap. A group whose base value is 0 does not decay, and is left alone.
    """

    _settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, optimizer: torch.optim.Optimizer, last_epoch: int, keys: Sequence[str] | None) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"{type(optimizer).__name__} is not an optimizer: it has no param_groups")
        self.optimizer = optimizer
        self.last_epoch = last_epoch
        self._keys = None if keys is None else tuple(keys)
        self._bases: list[dict[str, float]] = []
        self._last: Values = []
        self._check_keys()
        self.step()

    def step(self) -> None:
        """Go on by one: write the next value into every group. Call it after `optimizer.step()`, and after lr schedulers."""
        self._capture()
        values = self._values(self.last_epoch + 1)
        _check_values(values)
        self.last_epoch += 1
        self._write(values)

    def get_last_wd(self, key: str | None = None) -> list[float | Tensor]:
        """The weight decay that each group has now (of a 0-d tensor a copy). key: which, if there are several; default the first."""
        key = self._driven()[0] if key is None else key
        values = [group.get(key, 0.0) for group in self.optimizer.param_groups]
        return [value.clone() if isinstance(value, Tensor) else value for value in values]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as plain numbers. Functions are not saved; give them again."""
        last = [{key: float(value) for key, value in values.items()} for values in self._last]
        own = {name: getattr(self, name) for name in self._settings}
        return {"last_epoch": self.last_epoch, "bases": [dict(bases) for bases in self._bases], "last": last, **own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, and write its values into the groups: before or after the optimizer is loaded, as you like.

        Raises ValueError, with nothing changed, for the state of another scheduler or of other groups.
        """
        missing = {"last_epoch", "bases", "last", *self._settings} - set(state_dict)
        if missing:
            raise ValueError(f"state_dict lacks {sorted(missing)[0]!r}: it is not the state of a {type(self).__name__}")
        saved, held = len(state_dict["bases"]), len(self.optimizer.param_groups)
        if saved != held:
            raise ValueError(f"state_dict is of {saved} param groups, the optimizer has {held}; build the same groups")
        for name in self._settings:
            setattr(self, name, state_dict[name])
        self.last_epoch = state_dict["last_epoch"]
        self._bases = [dict(bases) for bases in state_dict["bases"]]
        self._write([dict(values) for values in state_dict["last"]])

    @abstractmethod
    def _value(self, epoch: int, index: int, base: float) -> float | Tensor:
        """The weight decay of group `index` at `epoch`, whose base value is `base` > 0."""

    def _values(self, epoch: int) -> Values:
        return [
            {key: self._value(epoch, index, base) for key, base in bases.items() if base}
            for index, bases in enumerate(self._bases)
        ]

    # --- groups ------------------------------------------------------------------------------------------------------

    def _driven(self) -> list[str]:
        """The keys to drive, in the order in which groups have them."""
        if self._keys is not None:
            return list(self._keys)
        found = (key for group in self.optimizer.param_groups for key in group if _KEY.fullmatch(key))
        # The optimizer's own decay is 0 beside one that `attach` has added.
        return sorted(dict.fromkeys(found), key=lambda key: not key.startswith("distwd_"))

    def _check_keys(self) -> None:
        driven, groups = self._driven(), self.optimizer.param_groups
        for key in driven or ["weight_decay"]:
            if not any(key in group for group in groups):
                raise ValueError(
                    f"{type(self.optimizer).__name__} has no group with {key!r}; attach a rule, or name its key"
                )
            if self.last_epoch >= 0 and any(key in group and _BASE + key not in group for group in groups):
                raise ValueError(
                    f"param_groups lack {_BASE + key!r}: with last_epoch={self.last_epoch} the optimizer must be loaded before"
                )

    def _capture(self) -> None:
        """Note the base value of every key that is new: all at first, later those of added groups and attached rules."""
        for index, group in enumerate(self.optimizer.param_groups):
            if index == len(self._bases):
                self._bases.append({})
            for key in self._driven():
                if key in group and key not in self._bases[index]:
                    # A loaded group holds the value that was current when it was saved, and the base value beside it.
                    base = float(group.get(_BASE + key, group[key]))  # reads a tensor once, not at every step
                    self._bases[index][key] = group[_BASE + key] = base

    def _write(self, values: Values) -> None:
        self._last = values
        written: set[int] = set()
        for group, bases, new in zip(self.optimizer.param_groups, self._bases, values, strict=False):
            # Loading an optimizer may have brought groups without them.
            group.update({_BASE + key: base for key, base in bases.items() if key in group})
            for key in [key for key in new if key in group]:
                if id(group[key]) in written:  # torch gives one default tensor to all groups
                    group[key] = group[key].clone()
                group[key] = _updated(group[key], new[key])
                written.update([id(group[key])] if isinstance(group[key], Tensor) else [])


def _updated(old: float | Tensor, new: float | Tensor) -> float | Tensor:
    """`new` in place of `old`; a tensor stays the same tensor, so that a captured graph sees the change."""
    if isinstance(old, Tensor):
        return old.copy_(new) if isinstance(new, Tensor) else old.fill_(new)
    return float(new)


def _check_values(values: Values) -> None:
    for index, new in enumerate(values):
        for key, value in new.items():
            if not isinstance(value, Tensor) and not 0 <= value < math.inf:
                raise ValueError(
                    f"the schedule gives param_groups[{index}] {key}={value!r}; it must be finite and >= 0"
                )


def of_group(name: str, values: Sequence[Any], index: int) -> Any:
    """The entry of a list that has one for each param group."""
    if index >= len(values):
        raise ValueError(
            f"{name} has {len(values)} entries, and there is a param_groups[{index}]; give one for each group"
        )
    return values[index]


def check_count(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is a whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not usable: it must be a whole number >= {least}")
