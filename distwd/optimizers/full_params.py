"""Optimizers that must see the parameters themselves: stepped with gradients, or, such as LBFGS, with a closure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._torch import is_dtensor, local_tensor
from ..kernels.apply import differences
from ..step.step import Batch, PendingUpdate
from .base import GradientOptimizer, InnerOptimizer
from .state import like_whole, own_key, stored_key

# Where an optimizer that finds its own learning rate, beginning with the 1 of a chain, keeps it: "lr" is that of `LR`.
_OWN_LR = "own_lr"


class FullParamOptimizer(GradientOptimizer):
    """Runs on the parameters as it would alone, DTensors included. The update is how far it moves them."""

    reads_params = True

    def can_step(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Only at lr 1 and without decay: whether its step is linear in lr, or reads the parameters, is not known."""
        # All or none: an optimizer may combine parameters (a trust ratio, a clipped norm), so it is run once.
        is_bare = all(
            batch.is_materialized and not batch.pending.is_negated and not batch.shrinks_at_once for batch in batches
        )
        return batches if is_bare else []

    def step(self, batches: Sequence[Batch]) -> None:
        """Step the parameters with the pending update as their gradients."""
        groups: list[dict[str, Any]] = []
        lent: list[tuple[dict[str, Any], dict[str, Any]]] = []  # (group of the chain, what it gave), by inner group
        for batch in batches:
            # torch's foreach kernels refuse a list of DTensors on two meshes, or of DTensors and plain tensors.
            by_mesh: dict[Any, list[Tensor]] = {}
            for param in batch.whole:
                by_mesh.setdefault(param.device_mesh if is_dtensor(param) else None, []).append(param)
            for params in by_mesh.values():
                groups.append(self._group(batch.group, params, **self._noted(batch.group)))
                lent.append((batch.group, dict(groups[-1])))
        params = [param for batch in batches for param in batch.whole]
        own_grads = [param.grad for param in params]
        for batch in batches:
            # While nothing has acted on them, the gradients are the update: the optimizer finds them in place.
            if batch.pending.tensors is not batch.grads:
                for param, update in zip(batch.whole, batch.pending.tensors, strict=True):
                    param.grad = like_whole(update.to(param.dtype), param)
        self._run(groups, ((param, param) for param in params))
        for (group, given), inner in zip(lent, groups, strict=True):
            self._note(group, given, inner)
        # Users see the gradients that backward() has left. Some optimizers clear `p.grad` in their step, so all are
        # set.
        for param, grad in zip(params, own_grads, strict=True):
            param.grad = grad

    def _noted(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the optimizer has noted in a group of the chain in earlier steps, under its own keys."""
        found: dict[str, Any] = {}
        for key, value in group.items():
            # A key of the user's own goes along, as it would without a chain.
            if key not in self.chain.defaults and key not in ("params", "param_names", "lr", "weight_decay"):
                own = own_key(key, self.suffix)
                found |= {} if own is None else {"lr" if own == _OWN_LR else own: value}
        return found

    def _note(self, group: dict[str, Any], given: dict[str, Any], inner: dict[str, Any]) -> None:
        """Keep what the optimizer has changed in its group: many count their steps there, and Prodigy keeps its `d`.

        group: the chain's. given, inner: the inner group before the step, and after it.
        """
        for key, value in inner.items():
            if key != "params" and value is not given.get(key, given):
                own = self.bound.keys.get(key) or stored_key(_OWN_LR if key == "lr" else key, self.suffix)
                group[own] = value

    def update(self, batches: Sequence[Batch]) -> None:
        """−scale·u ← scale·(p after the step − p before it); the parameters stay as they are."""
        before = [[param.clone() for param in batch.params] for batch in batches]
        self.step(batches)
        for batch, old in zip(batches, before, strict=True):
            # The learning rates that the chain has come to while the optimizer waited: it steps at lr 1.
            scale = batch.pending.scale
            batch.pending = PendingUpdate(_move_back(batch.params, old), is_owned=True, is_negated=True, scale=scale)


class ClosureOptimizer(InnerOptimizer):
    """Runs before the step is assembled, since it evaluates the model as often as it likes (LBFGS)."""

    def search(self, closure: Callable[[], Any]) -> tuple[Any, dict[Tensor, Tensor]]:
        """Run the optimizer on the parameters, and put them back.

        closure: evaluates the model and its gradients, and returns the loss.
        Returns the loss, and by parameter how far its local tensor was moved (new − old).
        """
        groups = self.chain.param_groups
        params = [param for group in groups for param in group["params"]]
        # LBFGS keeps a list of its parameters beside its groups: it is made anew where the chain holds others now.
        known = _torch.own_param_list(self.inner)
        if known is None or list(map(id, known)) != list(map(id, groups[0]["params"])):
            self.inner = self.cls([{"params": group["params"]} for group in groups], **self.kwargs)
        self.inner.param_groups = [
            {**inner, **self.bound.settings(group)}
            for inner, group in zip(self.inner.param_groups, groups, strict=True)
        ]
        # LBFGS keeps one state for all parameters, under the first of them.
        self.inner.state = self.chain.state
        old = [local_tensor(param).clone() for param in params]
        loss = self._raw_step(self.inner, closure)
        return loss, dict(zip(params, _move_back([local_tensor(param) for param in params], old), strict=True))


def _move_back(params: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """How far `params` have come from `old`; they are put back there."""
    moved = differences(params, old)
    torch._foreach_copy_(params, old)
    return moved


def needs_closure(cls: type[torch.optim.Optimizer]) -> bool:
    """Whether `cls.step` cannot be called without a closure, as LBFGS's."""
    closure = inspect.signature(cls.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
