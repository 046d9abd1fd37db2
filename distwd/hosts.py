"""How a wrapped optimizer is run: on local shards, or on the parameters themselves."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .kernels.pull import pull_
from .lending import initial_states, lend, take_back
from .local import local_tensor
from .step import Batch
from .transform import Place

# Elementwise, linear in lr, and blind to the parameters' values: these can run on any shard, and on zeros in the
# parameters' stead. Exactly these classes: a subclass may do anything.
_ELEMENTWISE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
)
_KNOWS_DECOUPLED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


def host_for(cls: type[torch.optim.Optimizer], kwargs: dict[str, Any], place: Place, chain: torch.optim.Optimizer, suffix: str) -> Host:
    """The right kind of host for an optimizer class."""
    kind = ElementwiseHost if cls in _ELEMENTWISE else SearchHost if needs_closure(cls) else WholeHost
    return kind(cls, kwargs, place, chain, suffix)


def needs_closure(cls: type[torch.optim.Optimizer]) -> bool:
    """Whether `cls.step` cannot be called without a closure, as LBFGS's."""
    closure = inspect.signature(cls.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


class Host:
    """An inner optimizer that has no groups and no state of its own: both live in the chain and are lent for the length of a call.

    suffix: "" or "_1", "_2", ...: what stands behind the state keys of a second optimizer in one chain.
    """

    def __init__(self, cls: type[torch.optim.Optimizer], kwargs: dict[str, Any], place: Place, chain: torch.optim.Optimizer, suffix: str) -> None:
        self.cls, self.kwargs, self.place, self.chain, self.suffix = cls, kwargs, place, chain, suffix
        self.inner = cls([torch.zeros(1, 1, requires_grad=True)], **kwargs)
        self._raw_step: Callable[..., Any] = _unhooked(cls)

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

    def _stand_in(self, param: Tensor) -> Tensor:
        raise NotImplementedError

    def _group(self, group: dict[str, Any], params: list[Tensor], **extra: Any) -> dict[str, Any]:
        """A group of the inner optimizer: its own defaults, the chain group's settings, `extra`."""
        return {**self.inner.defaults, **self.place.settings(group), **extra, "params": params}

    def _run(self, groups: list[dict[str, Any]], steps_on: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Run the inner step; steps_on: (tensor that is stepped, parameter whose state is used)."""
        lent = [(stepped, param, lend(self.chain.state, param, self.suffix, not self.reads_params)) for stepped, param in steps_on]
        self.inner.param_groups = groups
        self.inner.state = defaultdict(dict, ((stepped, state) for stepped, _, state in lent))
        try:
            self._raw_step(self.inner)
        finally:
            states, self.inner.param_groups, self.inner.state = self.inner.state, [], defaultdict(dict)
        for stepped, param, _ in lent:
            take_back(self.chain.state, param, states[stepped], self.suffix)


class ElementwiseHost(Host):
    """Runs on local tensors: on the parameters' own storage, or on zeros, which it leaves at −lr·update."""

    reads_params = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._zeros: dict[int, Tensor] = {}

    def _stand_in(self, param: Tensor) -> Tensor:
        return local_tensor(param).detach()

    def can_step(self, batches: Sequence[Batch]) -> bool:
        """Unless a mask has to see the update first, or torch would refuse the learning rate."""
        return all(not any(pull.cautious for pull in batch.pulls) and self._takes(batch) for batch in batches)

    def step(self, batches: Sequence[Batch]) -> None:
        """p ← p − pulls, then p ← p − scale·update, by the optimizer itself. It may do a decay that it knows, in its own kernel."""
        decays = []
        for batch in batches:
            handed = self._handed(batch)
            decays.append(handed or 0.0)
            if handed is None and batch.pulls:
                pull_(batch.params, batch.pulls)
        targets = [batch.whole if _is_as_given(batch) else [local.detach() for local in batch.params] for batch in batches]
        self._step_on(targets, batches, [batch.scale for batch in batches], decays)

    def update(self, batches: Sequence[Batch]) -> None:
        """batch.update ← what zeros become: −scale·update."""
        targets = [self._zeros_for(batch) for batch in batches]
        scales = [batch.scale if self._takes(batch) else 1.0 for batch in batches]
        self._step_on(targets, batches, scales, [0.0] * len(batches))
        for batch, target, scale in zip(batches, targets, scales, strict=True):
            batch.scale = batch.scale if scale is not batch.scale else 1.0
            batch.update, batch.owns_update, batch.flipped = target, True, True

    def _takes(self, batch: Batch) -> bool:
        """Whether the scale may be given to the optimizer as its lr; torch's foreach kernels refuse most tensors."""
        settings = self.place.settings(batch.group)
        return not isinstance(batch.scale, Tensor) or bool(settings.get("fused") or settings.get("capturable"))

    def _handed(self, batch: Batch) -> float | None:
        """The rate of the pull that equals the optimizer's own decoupled decay p ← p·(1 − lr·λ): absolute, linear, scaled by the same lr."""
        if self.cls not in _KNOWS_DECOUPLED or len(batch.pulls) != 1 or isinstance(batch.scale, Tensor):
            return None
        (pull,) = batch.pulls
        return pull.before_lr if pull.is_linear and isinstance(pull.before_lr, (int, float)) else None

    def _step_on(self, targets: list[list[Tensor]], batches: Sequence[Batch], scales: Sequence[Any], decays: Sequence[Any]) -> None:
        groups, steps_on = [], []
        for batch, tensors, scale, decay in zip(batches, targets, scales, decays, strict=True):
            extra = {"lr": scale, "weight_decay": decay}
            if self.cls in _KNOWS_DECOUPLED:
                extra["decoupled_weight_decay"] = True
            groups.append(self._group(batch.group, tensors, **extra))
            steps_on += zip(tensors, batch.whole, strict=True)
            if tensors is not batch.whole:
                for tensor, update in zip(tensors, batch.update, strict=True):
                    tensor.grad = update
        self._run(groups, steps_on)
        for batch, tensors in zip(batches, targets, strict=True):
            if tensors is not batch.whole:
                for tensor in tensors:
                    tensor.grad = None

    def _zeros_for(self, batch: Batch) -> list[Tensor]:
        """Zeros in the shape of the local parameters; kept, since a buffer made anew costs more than clearing one."""
        zeros = []
        for position, local in zip(batch.index, batch.params, strict=True):
            kept = self._zeros.get(position)
            if kept is None or kept.shape != local.shape or kept.dtype != local.dtype or kept.device != local.device:
                kept = self._zeros[position] = torch.empty_like(local, requires_grad=False)
            zeros.append(kept)
        torch._foreach_zero_(zeros)
        return zeros


def _is_as_given(batch: Batch) -> bool:
    """Whether the parameters are plain tensors with the very gradients that the optimizer is to see."""
    return batch.update is batch.grads and batch.params[0] is batch.whole[0] and batch.grads[0] is batch.whole[0].grad


class WholeHost(Host):
    """Runs on the parameters themselves, as the optimizer would alone (DTensors included); the update is the difference that makes."""

    reads_params = True

    def _stand_in(self, param: Tensor) -> Tensor:
        return param.detach()

    def can_step(self, batches: Sequence[Batch]) -> bool:
        """Only at lr 1 and without decay: whether the step is linear in lr, or reads the parameters, is not known."""
        return all(batch.is_plain and not batch.flipped for batch in batches)

    def step(self, batches: Sequence[Batch]) -> None:
        """Step the parameters with `batch.update` as their gradients."""
        groups = [self._group(batch.group, params) for batch in batches for params in _by_mesh(batch.whole)]
        kept = [param.grad for batch in batches for param in batch.whole]
        for batch in batches:
            if batch.update is not batch.grads:
                for param, update in zip(batch.whole, batch.update, strict=True):
                    param.grad = _like_whole(update, param)
        self._run(groups, ((param, param) for batch in batches for param in batch.whole))
        for param, grad in zip((param for batch in batches for param in batch.whole), kept, strict=True):
            param.grad = grad

    def update(self, batches: Sequence[Batch]) -> None:
        """batch.update ← p after − p before; the parameters stay as they are."""
        before = [[param.clone() for param in batch.params] for batch in batches]
        self.step(batches)
        for batch, old in zip(batches, before, strict=True):
            batch.update, batch.owns_update, batch.flipped = _moved_back(batch.params, old), True, True


def _moved_back(params: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    moved = list(torch._foreach_sub(params, old))
    torch._foreach_copy_(params, old)
    return moved


def _by_mesh(params: Sequence[Tensor]) -> list[list[Tensor]]:
    # torch's foreach kernels refuse a list of DTensors on two meshes, or of DTensors and plain tensors.
    found: dict[Any, list[Tensor]] = {}
    for param in params:
        found.setdefault(param.device_mesh if isinstance(param, DTensor) else None, []).append(param)
    return list(found.values())


def _like_whole(local: Tensor, param: Tensor) -> Tensor:
    """`local` as the same kind of tensor that `param` is."""
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride())


class SearchHost(Host):
    """An optimizer that evaluates the closure itself, such as LBFGS; it runs before the step is assembled."""

    reads_params = True

    def initialize(self, params: Iterable[tuple[dict[str, Any], Tensor]]) -> None:
        """Its state belongs to no single parameter; it begins with the first search."""

    def search(self, closure: Callable[[], Any]) -> tuple[Any, dict[Tensor, Tensor]]:
        """Run it on the parameters; returns the loss and how far each local parameter was moved. The parameters stay."""
        groups = self.chain.param_groups
        params = [param for group in groups for param in group["params"]]
        if getattr(self.inner, "_params", None) is not groups[0]["params"]:
            self.inner = self.cls([{"params": group["params"]} for group in groups], **self.kwargs)
            self.inner.param_groups[0]["params"] = groups[0]["params"]
            if hasattr(self.inner, "_params"):
                self.inner._params = groups[0]["params"]
        for inner, group in zip(self.inner.param_groups, groups, strict=True):
            inner.update(self.place.settings(group))
        self.inner.state = self.chain.state
        old = [local_tensor(param).clone() for param in params]
        loss = self._raw_step(self.inner, closure)
        return loss, dict(zip(params, _moved_back([local_tensor(param) for param in params], old), strict=True))


def _unhooked(cls: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """`cls.step` without the wrapper that calls step hooks: those are the chain's."""
    step = cls.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
