"""What all wrapped optimizers share: groups and state are the chain's, and are lent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..step.step import Batch
from ..step.transform import BoundTransform
from .state import borrow_state, initial_states, take_back


class Inner:
    """A wrapped optimizer that has no groups and no state of its own: both live in the chain and are lent to it.

    suffix: "" or "_1", "_2", ...: what stands behind the state keys of a second optimizer in one chain.
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
        self._raw_step: Callable[..., Any] = _unhooked(cls)

    def _group(self, group: dict[str, Any], params: list[Tensor], **extra: Any) -> dict[str, Any]:
        """A group of the inner optimizer: its own defaults, the chain group's settings, `extra`."""
        return {**self.inner.defaults, **self.bound.settings(group), **extra, "params": params}


class InnerOptimizer(Inner, ABC):
    """A wrapped optimizer that is stepped with gradients.

    reads_params: whether what it does may depend on the values of the parameters.
    """

    reads_params: ClassVar[bool]

    def has_state(self, param: Tensor) -> bool:
        """Whether the chain holds state of this optimizer for `param`."""
        return any(key.endswith(self.suffix) for key in self.chain.state.get(param, ()))

    def initialize(self, params: Iterable[tuple[dict[str, Any], Tensor]]) -> None:
        """Create the optimizer's state now, if it is one of torch's, so that every rank has every key from the start."""
        for group, param in params:
            if param.requires_grad and not param.is_meta and not self.has_state(param):
                stand_in = self._stand_in(param)
                state = initial_states(self.inner, self._group(group, [stand_in]), stand_in)
                take_back(self.chain.state, param, state, self.suffix)

    def begins_whole(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether `initialize` has made all the state that there will ever be."""
        return False

    @abstractmethod
    def _stand_in(self, param: Tensor) -> Tensor:
        """A tensor like what the optimizer will step on for `param`."""

    @abstractmethod
    def direct(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Those whose parameters themselves may be stepped, with their scales and pulls."""

    @abstractmethod
    def step(self, batches: Sequence[Batch]) -> None:
        """Write pulls and update to the parameters."""

    @abstractmethod
    def update(self, batches: Sequence[Batch]) -> None:
        """Put the optimizer's update into `batch.update`; the parameters stay."""

    def cleared(self, batches: Sequence[Batch]) -> None:
        """Learn that the updates of `batches` have been written, and are zeros now where they were ours."""

    def _run(self, groups: list[dict[str, Any]], steps_on: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Run the inner step; steps_on: (tensor that is stepped, parameter whose state is used)."""
        lent = [
            (stepped, param, borrow_state(self.chain.state, param, self.suffix, not self.reads_params))
            for stepped, param in steps_on
        ]
        states = self._run_with(defaultdict(dict, ((stepped, state) for stepped, _, state in lent)), groups)
        for stepped, param, _ in lent:
            take_back(self.chain.state, param, states[stepped], self.suffix)

    def _run_with(self, states: defaultdict[Tensor, Any], groups: list[dict[str, Any]]) -> defaultdict[Tensor, Any]:
        """Run the inner step; returns the states that it leaves."""
        self.inner.param_groups, self.inner.state = groups, states
        try:
            self._raw_step(self.inner)
            return self.inner.state
        finally:
            self.inner.param_groups, self.inner.state = [], defaultdict(dict)


def _unhooked(cls: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """`cls.step` without the wrapper that calls step hooks: those are the chain's."""
    step = cls.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
