"""The optimizers of one attachment: what is changed on them, and whose steps belong together, also under a GradScaler."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..checks import check_number, check_spelling, is_zero
from ..rules.base import Rule
from ..sharding.collectives import local_like
from ..step.runner import StepRunner
from ..step.step import Step

Optimizer = torch.optim.Optimizer

KEY = "distwd_weight_decay"
# A second rule's, which a checkpoint may bring after that rule has been left out.
DECAYS = re.compile(r"(distwd_)?weight_decay(_\d+)?")

# --- keys of their groups --------------------------------------------------------------------------------------------


def attachments_on(optimizer: Optimizer) -> list[Any]:
    """The attachments that live in the step hooks of `optimizer`."""
    # Nothing of ours is written on the optimizer: a copy or a pickle of it has no hooks, and then no attachment either.
    owners = (getattr(hook, "__self__", None) for hook in _torch.step_pre_hooks(optimizer))
    return [owner for owner in owners if isinstance(getattr(owner, "overrides", None), Overrides)]


def unused_keys(optimizers: Sequence[Optimizer], count: int, key: str = KEY) -> list[str]:
    """`count` group keys, called `key`, `key`_1, ..., that no other attachment of these optimizers uses.

    The same in every run that attaches the same rules in the same order, since checkpoints hold them.
    """
    taken = {key for optimizer in optimizers for other in attachments_on(optimizer) for key in other.keys}
    names = (key if not number else f"{key}_{number}" for number in range(count + len(taken)))
    return [name for name in names if name not in taken][:count]


def write_keys(
    groups: Sequence[dict[str, Any]],
    defaults: Mapping[str, Any],
    others: Mapping[str, Any] | None = None,
    off: Mapping[str, Any] | None = None,
) -> None:
    """Give every group its own value of each key, where it has none yet.

    groups: the param groups.
    defaults: the values for groups without the key, by key.
    others: the same of other attachments.
    off: of settings that switch norm rules off, the value that does it, by key.
    Raises ValueError for values that would not decay.
    """
    # In every step, since others add groups, and replace them by those of a checkpoint.
    for index, group in enumerate(groups):
        if any(key not in group for key in defaults):
            # A key that was misspelt is not the only one in its group: the right one is missing.
            ours = {key: group[key] for key in group if not DECAYS.fullmatch(key)}
            check_spelling(f"param_groups[{index}]", ours, {KEY})
        # Who excludes a group from one rule's decay excludes it from all: 0 where that rule decays elsewhere.
        decays = {key: value for key, value in {**(others or {}), **defaults}.items() if key.startswith(KEY)}
        is_excluded = any(is_zero(group.get(key)) and not is_zero(value) for key, value in decays.items())
        for key, default in defaults.items():
            if off and key in off:  # the rule itself checks what it means
                group.setdefault(key, off[key] if is_excluded else default)
            else:
                check_number(key, group.setdefault(key, 0.0 if is_excluded and key in decays else default))


# --- what is changed for the length of a step ------------------------------------------------------------------------


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

    def set_decay(self, group: dict[str, Any], weight_decay: float, lr: Any = None) -> None:
        """Let the optimizer do a decoupled decay of its own in this group.

        group: a param group of Adam or one of its relatives.
        weight_decay: λ, which the optimizer multiplies by the group's lr.
        lr: what it is to step with instead of that; None: the group's own.
        """
        # Batches of several dtypes share a group; what the second found is not the group's own setting.
        if id(group) not in self.groups:
            own = {key: group[key] for key in ("weight_decay", "decoupled_weight_decay")}
            changed = {"weight_decay": weight_decay, "decoupled_weight_decay": True}
            if lr is not None:
                own["lr"], changed["lr"] = group["lr"], lr
            self.groups[id(group)] = GroupOverride(group, own)
            group.update(changed)

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


# --- several optimizers of one model ---------------------------------------------------------------------------------


class JointStep:
    """The steps of optimizers that share their metrics: each steps once, in any order, and the first measures for all.

    A joint step ends when all have stepped. A new one begins before that where an optimizer steps again, or a
    GradScaler has been updated since: then the others were skipped, by the scaler or by the training loop, which is
    legal. They were skipped, too, where an optimizer has other gradients than when the last one stepped; but decay that
    waits for all updates can wait for those, whatever gradients they come from.

    runner: runs the transforms.
    optimizers: all of the attachment.
    each_alone: whether they share nothing; then every step is a joint step of its own.
    needs_updates: whether the decay waits until all have stepped.
    shared: the Step that the first optimizer has measured for all, where rules act before the optimizers; None: the
        next optimizer measures.
    """

    def __init__(
        self, runner: StepRunner, optimizers: Sequence[Optimizer], each_alone: bool, needs_updates: bool
    ) -> None:
        self.each_alone, self.optimizers = each_alone, optimizers
        self.shared: Step | None = None
        self._runner, self.needs_updates = runner, needs_updates
        self._found_inf: dict[int, Tensor | None] = {}  # of those that have stepped
        self._grads: dict[int, list[Tensor | None]] = {}  # all gradients, when the last one stepped
        self._scaler_states: Any = None

    # --- which steps belong together -------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """Whether all optimizers have stepped."""
        return self.each_alone or len(self._found_inf) == len(self.optimizers)

    def join(self, optimizer: Optimizer, has_raised: bool) -> bool:
        """Count a step of `optimizer` to the joint step that is open, or begin a new one.

        has_raised: whether the last joint step was broken off by an error.
        Returns whether a new one has begun.
        Raises ValueError if the decay of the last one still waits for updates.
        """
        is_open = not self.each_alone and bool(self._found_inf)  # some have stepped, and others have not
        scaler = None if self.each_alone else _scaler_of_this_step()
        # A scaler has these only until its next update: the same object as long as that has not come.
        scaler_states = None if scaler is None else _torch.scaler_states(scaler)
        is_same = is_open and id(optimizer) not in self._found_inf and scaler_states is self._scaler_states
        if is_same and not self.needs_updates:
            # New gradients: the training loop has left out the optimizers that have not stepped, and has gone on.
            then = self._grads.get(id(optimizer), [])
            is_same = all(new is old for new, old in zip(_grads_of(optimizer), then, strict=False))
        if is_same:
            return False
        is_waiting = is_open and self.needs_updates and not has_raised
        self.end()
        if is_waiting:
            raise ValueError(
                f"{type(optimizer).__name__} steps a second time before the others have stepped, but their decay depends on the "
                "updates of all; step each once, or attach to each on its own"
            )
        self._scaler_states = scaler_states
        return True

    def enter(self, optimizer: Optimizer) -> None:
        """`optimizer` steps, and nothing has been refused."""
        # A GradScaler unscales and judges one optimizer after the other. Its verdict on this one is known now.
        self._found_inf[id(optimizer)] = getattr(optimizer, "found_inf", None)

    def note_gradients(self, optimizer: Optimizer) -> None:
        """The gradients of `optimizer`, which steps next, are there now: a closure may have just made them."""
        if not (self.each_alone or self.needs_updates):
            # The tensors, and not only their ids: a new gradient may come to lie where an old one was.
            self._grads = {id(each): _grads_of(each) for each in self.optimizers}

    def end(self) -> None:
        """The joint step is over: let go of its gradients."""
        self._found_inf, self._grads, self._scaler_states = {}, {}, None
        self.shared = None

    # --- what a step of them is ------------------------------------------------------------------

    def new_step(self, optimizer: Optimizer, decays_gradients: bool = False, of_all: bool = True) -> Step:
        """A Step of the gradients as they are now.

        decays_gradients: whether its terms are added to gradients.
        of_all: whether it has the gradients of all optimizers that step together, or of this one alone.
        """
        groups = self._runner.now.groups
        owner_of = {id(group): id(each) for each in self.optimizers for group in each.param_groups}
        # Groups that are hidden now (DeepSpeed) belong to no optimizer, and those of optimizers that have not stepped
        # yet have no verdict. Each optimizer applies its own when it steps.
        found_inf = {i: self._found_inf.get(owner_of.get(id(group), 0)) for i, group in enumerate(groups)}
        own = {index for index, group in enumerate(groups) if owner_of.get(id(group)) == id(optimizer)}
        grad_scale = getattr(optimizer, "grad_scale", None) if self.each_alone else None
        step = self._runner.new_step(
            {},
            only=own if self.each_alone or not of_all else None,
            grad_scale=grad_scale,
            found_inf=found_inf,
            decays_gradients=decays_gradients,
        )
        # Metrics of gradients are of the optimizer's own, where another attachment shows it others. (What is pending stays.)
        if any(other.overrides.grads for each in self.optimizers for other in attachments_on(each)):
            own_grads = {id(param): grad for each in self.optimizers for param, grad in _own_grads(each)}
            for batch in step.batches:
                grads = [(own_grads[id(param)], param) for param in batch.whole]
                batch.grads = [local_like(grad, param) for grad, param in grads if grad is not None]
        return step


def refuse_under_scaler(
    optimizers: Sequence[Optimizer], rules: Sequence[Rule], coupling: str, needs_updates: bool
) -> None:
    """Raise ValueError where a GradScaler that skips one of several optimizers would leave shared metrics undefined.

    It unscales and judges them one after the other. So metrics of gradients are not to be had together; nor is the
    update of an optimizer that it may pass over without a word. On every rank alike: all use a scaler, or none.
    """
    # Fused optimizers carry the scale themselves, also where something else than a GradScaler's `step` has called them.
    uses_scaler = _scaler_of_this_step() is not None
    if not uses_scaler and not any(getattr(each, "grad_scale", None) is not None for each in optimizers):
        return
    sources = {of for rule in rules for of in rule.sources()}
    # Before the optimizer, "update" is the gradient, and so is what a mask compares with.
    of_gradients = "grad" in sources or (coupling == "gradient" and "update" in sources)
    of_gradients |= coupling == "gradient" and any(rule.is_cautious(rule.defaults) for rule in rules)
    # Written for all optimizers when the first one steps, before the verdict on the others is known.
    at_once = any(rule.target != "update" for rule in rules)
    # A scaler calls the step of an optimizer that skips by itself, and passes over all others: no hook runs then.
    is_unheard = needs_updates and not all(_torch.applies_grad_scaler(each) for each in optimizers)
    if of_gradients or at_once or is_unheard:
        what = (
            "a metric of the gradients" if of_gradients else "a decay at once" if at_once else "a number of the updates"
        )
        way_out = " (or use fused optimizers)" if is_unheard and not of_gradients and not at_once else ""
        raise ValueError(
            f"a GradScaler unscales and may skip one of several optimizers and not the others, so {what} over all of them is not "
            f"defined; attach to each on its own, or use norm_input='params'{way_out}"
        )


def _scaler_of_this_step() -> torch.amp.GradScaler | None:
    """The GradScaler whose `step` has called the present step, if one has."""
    # It leaves no trace on optimizers that are not fused, so the stack is searched; only where several share a metric.
    frame: FrameType | None = _torch.calling_frame()
    while frame is not None:
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler: torch.amp.GradScaler = frame.f_locals["self"]
            return scaler
        frame = frame.f_back
    return None


def _grads_of(optimizer: Optimizer) -> list[Tensor | None]:
    return [grad for _, grad in _own_grads(optimizer)]


def _own_grads(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The optimizer's parameters and their own gradients, also where attachments show it others."""
    own = {id(each.shown): each.own for other in attachments_on(optimizer) for each in other.overrides.grads}
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        grad = param.grad
        # What the second of two shows stands in the place of what the first shows.
        while id(grad) in own:
            grad = own[id(grad)]
        yield param, grad
