"""What all wrapped optimizers share: param groups and state are the chain's, and are borrowed for a step."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..step.step import WaitingOptimizer
from ..step.transform import BoundTransform
from .state import borrow_state, commit_state, has_state, initial_state


class InnerOptimizer:
    """A wrapped optimizer. It has no groups and no state of its own: both live in the chain.

    cls, kwargs: its class and arguments.
    bound: the transform that it works for.
    chain: the optimizer that owns groups and state.
    suffix: "" or "_1", "_2", ...: ends the state keys of a second optimizer in one chain.
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
        self.inner = cls([torch.zeros(1, 1, requires_grad=True)], **kwargs)
        # Without the wrapper that calls step hooks: those are the chain's.
        step: Any = cls.step
        self._raw_step: Callable[..., Any] = step.__wrapped__ if getattr(step, "hooked", False) else step

    def _group(self, group: dict[str, Any], params: list[Tensor], **extra: Any) -> dict[str, Any]:
        """A group of the inner optimizer: its own defaults, the chain group's settings, `extra`."""
        return {**self.inner.defaults, **self.bound.settings(group), **extra, "params": params}


class GradientOptimizer(InnerOptimizer, WaitingOptimizer):
    """A wrapped optimizer that is stepped with gradients."""

    def has_state(self, param: Tensor) -> bool:
        """Whether the chain holds state of this optimizer for `param`."""
        return has_state(self.chain.state.get(param, {}), self.suffix)

    def initialize(self, params: Iterable[tuple[dict[str, Any], Tensor]]) -> None:
        """Create the optimizer's state now, if it is one of torch's, so that every rank has every key from the start."""
        for group, param in params:
            if param.requires_grad and not param.is_meta and not self.has_state(param):
                example = self._example(param)
                state = initial_state(self.inner, self._group(group, [example]), example)
                commit_state(self.chain.state, param, state, self.suffix)

    def keeps_no_more(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether `initialize` has made all the state that there will ever be."""
        return False

    @abstractmethod
    def _example(self, param: Tensor) -> Tensor:
        """A tensor like what the optimizer will step on for `param`."""

    def _run(self, groups: list[dict[str, Any]], steps_on: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Run the inner step on groups of its own; steps_on: (tensor that is stepped, parameter whose state is used)."""
        as_local = not self.reads_params
        borrowed = [
            (stepped, param, borrow_state(self.chain.state, param, self.suffix, as_local))
            for stepped, param in steps_on
        ]
        states = self._run_with(defaultdict(dict, ((stepped, state) for stepped, _, state in borrowed)), groups)
        for stepped, param, _ in borrowed:
            commit_state(self.chain.state, param, states[stepped], self.suffix)

    def _run_with(self, states: defaultdict[Tensor, Any], groups: list[dict[str, Any]]) -> defaultdict[Tensor, Any]:
        """Run the inner step; returns the states that it leaves."""
        self.inner.param_groups, self.inner.state = groups, states
        try:
            self._raw_step(self.inner)
            return self.inner.state
        finally:
            # Nothing of the chain's stays alive here.
            self.inner.param_groups, self.inner.state = [], defaultdict(dict)
