"""Optimizers that evaluate the model themselves, such as LBFGS."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch import own_param_list
from ..sharding.local import local_tensor
from .base import Inner
from .full_params import moved_back


def needs_closure(cls: type[torch.optim.Optimizer]) -> bool:
    """Whether `cls.step` cannot be called without a closure, as LBFGS's."""
    closure = inspect.signature(cls.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


class ClosureOptimizer(Inner):
    """Runs before the step is assembled, since it calls the closure as often as it likes."""

    def search(self, closure: Callable[[], Any]) -> tuple[Any, dict[Tensor, Tensor]]:
        """Run it on the parameters; returns the loss and how far each local parameter was moved. The parameters stay."""
        groups = self.chain.param_groups
        params = [param for group in groups for param in group["params"]]
        self._meet(groups)
        old = [local_tensor(param).clone() for param in params]
        loss = self._raw_step(self.inner, closure)
        return loss, dict(zip(params, moved_back([local_tensor(param) for param in params], old), strict=True))

    def _meet(self, groups: list[dict[str, Any]]) -> None:
        """Show the inner optimizer the chain's groups and state. LBFGS keeps a list of its parameters besides."""
        kept = own_param_list(self.inner)
        if kept is None or list(map(id, kept)) != list(map(id, groups[0]["params"])):
            self.inner = self.cls([{"params": group["params"]} for group in groups], **self.kwargs)
        self.inner.param_groups = [
            {**inner, **self.bound.settings(group)}
            for inner, group in zip(self.inner.param_groups, groups, strict=True)
        ]
        self.inner.state = self.chain.state
