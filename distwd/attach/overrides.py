"""What an attachment changes on an optimizer: keys of its groups, and for the length of a step settings and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..checks import check_number, is_zero

KEY = "distwd_weight_decay"


def attachments_on(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The attachments that live in the step hooks of `optimizer`."""
    # Nothing of ours is written on the optimizer: a copy or a pickle of it has no hooks, and then no attachment either.
    owners = (getattr(hook, "__self__", None) for hook in _torch.step_pre_hooks(optimizer))
    return [owner for owner in owners if isinstance(getattr(owner, "overrides", None), Overrides)]


def unused_keys(optimizers: Sequence[torch.optim.Optimizer], count: int, key: str = KEY) -> list[str]:
    """`count` group keys, called `key`, `key`_1, ..., that no other attachment of these optimizers uses.

    The same in every run that attaches the same rules in the same order, since checkpoints hold them.
    """
    taken = {key for optimizer in optimizers for other in attachments_on(optimizer) for key in other.keys}
    names = (key if not number else f"{key}_{number}" for number in range(count + len(taken)))
    return [name for name in names if name not in taken][:count]


def write_keys(
    groups: Sequence[dict[str, Any]], defaults: Mapping[str, Any], others: Mapping[str, Any] | None = None
) -> None:
    """Give every group its own value of each key, where it has none yet.

    groups: the param groups.
    defaults: the values for groups without the key, by key.
    others: the same of other attachments.
    Raises ValueError for values that would not decay.
    """
    # In every step, since others add groups, and replace them by those of a checkpoint.
    for group in groups:
        # Who excludes a group from one rule's decay excludes it from all: 0 where that rule decays elsewhere.
        decays = {key: value for key, value in {**(others or {}), **defaults}.items() if key.startswith(KEY)}
        is_excluded = any(is_zero(group.get(key)) and not is_zero(value) for key, value in decays.items())
        for key, default in defaults.items():
            check_number(key, group.setdefault(key, 0.0 if is_excluded and key in decays else default))


@dataclass(frozen=True, slots=True)
class GroupOverride:
    """A param group whose own decay does a rule's work during a step, and the settings that it had."""

    group: dict[str, Any]
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class GradOverride:
    """A parameter that shows its optimizer another gradient during a step.

    own: the gradient that it had.
    shown: what the optimizer sees; written_at: its version when it was put there.
    """

    param: Tensor
    own: Tensor | None
    shown: Tensor
    written_at: int


@dataclass(slots=True)
class Overrides:
    """Everything that is changed for the length of a step, and has to be put back.

    groups: changed settings, by identity of the group.
    grads: changed gradients, in the order of the changes.
    """

    groups: dict[int, GroupOverride] = field(default_factory=dict)
    grads: list[GradOverride] = field(default_factory=list)

    def set_decay(self, group: dict[str, Any], weight_decay: float) -> None:
        """Let the optimizer do a decoupled decay of its own in this group.

        group: a param group of Adam or one of its relatives.
        weight_decay: λ, which the optimizer multiplies by the group's lr.
        """
        # Batches of several dtypes share a group; what the second found is not the group's own setting.
        if id(group) not in self.groups:
            own = {key: group[key] for key in ("weight_decay", "decoupled_weight_decay")}
            self.groups[id(group)] = GroupOverride(group, own)
            group.update(weight_decay=weight_decay, decoupled_weight_decay=True)

    def set_grad(self, param: Tensor, grad: Tensor) -> None:
        """Show the optimizer `grad` as the gradient of `param`."""
        self.grads.append(GradOverride(param, param.grad, grad, _torch.write_count(grad)))
        param.grad = grad

    def restore(self, has_stepped: bool) -> None:
        """Put everything back, unless somebody else than the optimizer has written there since.

        has_stepped: whether the optimizer has stepped, and so may have written to the gradients itself.
        """
        for override in self.groups.values():
            override.group.update(override.settings)
        for each in self.grads:
            # Before the step a new value there is somebody's own gradient (a second backward(), a clipping): it stays.
            is_untouched = has_stepped or _torch.write_count(each.shown) == each.written_at
            if each.param.grad is each.shown and is_untouched:
                each.param.grad = each.own
        self.groups, self.grads = {}, []
