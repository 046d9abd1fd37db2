"""What all wrapped optimizers share: param groups and state are the chain's, and are borrowed for a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import local_tensor
from ..metrics.measure import Source
from ..step.state import PREFIX
from ..step.step import Step, WaitingOptimizer
from ..step.transform import BoundTransform
from .state import borrow_state, commit_state, initial_state, notes_of, own_key, second_moments, stored_key


class InnerOptimizer:
    """A wrapped optimizer. It has no groups and no state of its own: both live in the chain.

    So checkpoints, schedulers and `add_param_group` meet one optimizer, however many a chain wraps.

    cls: its class.
    kwargs: the arguments that it is made with.
    bound: the transform that it works for.
    chain: the optimizer that owns groups and state.
    suffix: what ends its state keys in the chain: "" for a lone optimizer, else `FIRST`, "_1", "_2", ...
    """

    def __init__(
        self,
        cls: type[torch.optim.Optimizer],
        kwargs: dict[str, Any],
        bound: BoundTransform,
        chain: torch.optim.Optimizer,
        suffix: str,
    ) -> None:
        self.cls, self.kwargs, self.bound, self.chain, self.suffix = cls, kwargs, bound, chain, suffix
        # torch refuses an empty list of parameters, and Muon refuses all but matrices.
        self.inner = cls([torch.zeros(1, 1, requires_grad=True)], **kwargs)
        # What it keeps for itself and under no parameter: MADGRAD counts its steps there.
        self._notes = notes_of(self.inner.state)
        # Without torch's wrapper around `step`, which calls hooks and the profiler: the chain's own step has done so.
        step: Any = cls.step
        self._raw_step: Callable[..., Any] = step.__wrapped__ if getattr(step, "hooked", False) else step

    def _group(self, group: dict[str, Any], params: list[Tensor], **extra: Any) -> dict[str, Any]:
        """A group of the inner optimizer: its own defaults, the chain group's settings, `extra`."""
        return {**self.inner.defaults, **self.bound.settings(group), **extra, "params": params}


class GradientOptimizer(InnerOptimizer, WaitingOptimizer):
    """A wrapped optimizer that is stepped with gradients."""

    def has_state(self, param: Tensor) -> bool:
        """Whether the chain holds state of this optimizer for `param`."""
        state = self.chain.state.get(param, {})
        return any(own_key(key, self.suffix) is not None for key in state)

    def second_moments(self, step: Step) -> list[Source]:
        """v̂ of all trained parameters, once it has stepped. Raises ValueError if its state does not tell."""
        settings = [{**self.inner.defaults, **self.bound.settings(group)} for group in step.groups]
        return second_moments(
            step,
            lambda group: (self.cls.__name__, settings[group]),
            lambda group, param: borrow_state(self.chain.state, param, self.suffix, as_local=True),
        )

    def initialize(self, params: Iterable[tuple[dict[str, Any], Tensor]]) -> None:
        """Create the optimizer's state now, if it is one of torch's, so that every rank has every key from the start.

        params: (group of the chain, parameter) pairs.
        """
        for group, param in params:
            # A meta tensor has no storage yet; the tensor that takes its place is seen before the first step.
            if param.requires_grad and not param.is_meta and not self.has_state(param):
                # Made like what the optimizer will step on: the whole parameter, or its local shard.
                example = (param if self.reads_params else local_tensor(param)).detach()
                state = initial_state(self.inner, self._group(group, [example]), example)
                commit_state(self.chain.state, param, state, self.suffix)

    def keeps_no_more(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether `initialize` has made all the state that there will ever be."""
        # Of an optimizer that is not elementwise nothing is known.
        if self.reads_params:
            return False
        # SGD with dampening is the one of torch's that begins later: its buffer begins as the first gradient.
        settings = [self.bound.settings(group) for group in groups]
        return not any(own.get("momentum") and own.get("dampening") for own in settings)

    def _run(
        self, groups: list[dict[str, Any]], steps_on: Iterable[tuple[Tensor, Tensor]], on_params: bool = False
    ) -> None:
        """Run the inner step.

        groups: the inner optimizer's groups for this step.
        steps_on: (tensor that is stepped, parameter whose state is used) pairs.
        on_params: whether every tensor that is stepped is the parameter itself.
        """
        states: Any = self.chain.state
        # Under the parameters' own keys the chain's state serves as it is. A suffix, shards kept as DTensors or kept
        # numbers need a copy of the dict: many optimizers begin their state only while the dict is empty.
        borrowed = list(steps_on)
        is_shared = on_params and not self.suffix and isinstance(states, defaultdict)
        # A parameter that was frozen has kept numbers before the optimizer begins its state there, and lets it find nothing.
        is_shared = is_shared and not any(
            next(iter(states.get(param, ())), "").startswith(PREFIX) for _, param in borrowed
        )
        if is_shared:
            borrowed = []
        else:
            as_local = not self.reads_params
            states = defaultdict(dict)
            for stepped, param in borrowed:
                states[stepped] = borrow_state(self.chain.state, param, self.suffix, as_local)
            if not as_local:
                notes = notes_of(self.chain.state)
                own = {name: value for key, value in notes.items() if (name := own_key(key, self.suffix)) is not None}
                states.update(self._notes | own)
        self.inner.param_groups, self.inner.state = groups, states
        try:
            self._raw_step(self.inner)
            states = self.inner.state  # an optimizer may replace the dict itself
        finally:
            # Nothing of the chain's stays alive here.
            self.inner.param_groups, self.inner.state = [], defaultdict(dict)
        for stepped, param in borrowed:
            commit_state(self.chain.state, param, states[stepped], self.suffix)
        if self.reads_params:
            kept: dict[Any, Any] = self.chain.state
            kept.update({stored_key(key, self.suffix): value for key, value in notes_of(states).items()})
