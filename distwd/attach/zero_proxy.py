"""Learn an optimizer's update by running a shadow copy of it on zero tensors: they end up holding −lr·update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..kernels.blocks import ZeroPool
from ..kernels.stochastic import LOW
from ..optimizers.elementwise import ELEMENTWISE
from ..optimizers.state import borrow_state, commit_state
from ..step.step import Batch, PendingUpdate
from .joint import attachments_on

Optimizer = torch.optim.Optimizer


@dataclass(slots=True)
class ProxyOptimizer:
    """A shadow copy of an optimizer, which steps in its place.

    optimizer: the copy. Its groups hold zero tensors, and it borrows the original's state.
    attributes: the original's attributes as the step began.
    stepped: (parameter of the original, tensor that is stepped for it).
    """

    optimizer: Optimizer
    attributes: dict[str, Any] = field(default_factory=dict)
    stepped: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def release(self) -> None:
        """Keep no gradient and no state alive."""
        for param, zero in self.stepped:
            if zero is param:
                continue
            grad, zero.grad = zero.grad, None
            # The zeros are kept for the next step, whose gradients may have the parameter's own dtype again.
            if grad is not None and grad.dtype != zero.dtype:
                zero.grad_dtype = zero.dtype
        self.attributes, self.stepped = {}, []
        vars(self.optimizer).update(param_groups=[], state={})


class ZeroProxyCapture:
    """Steps shadow copies of optimizers on zeros. Parameters stay as they are until decay and update are written together.

    Compared with copying the parameters and taking a difference this saves memory traffic, and −lr·u is not rounded to
    what p has room for. Zeros are local tensors, so an optimizer of DTensors is spared their dispatch.
    """

    def __init__(self) -> None:
        self._zeros = ZeroPool()
        self._proxies: dict[int, ProxyOptimizer] = {}

    @staticmethod
    def works_for(optimizer: Optimizer) -> bool:
        """Whether the optimizer does to zeros what it would do to the parameters."""
        # A method that somebody has bound to this one optimizer would not act on a copy of it.
        if type(optimizer) not in ELEMENTWISE or _torch.overrides_init_group(optimizer):
            return False
        # Of two attachments one may have changed gradients or settings of the optimizer for this step.
        return len(attachments_on(optimizer)) == 1

    def begin(self) -> None:
        """No optimizer has stepped yet. All that a step that was broken off has left is in the proxies."""
        for proxy in self._proxies.values():
            proxy.release()

    def proxy_of(self, optimizer: Optimizer) -> Optimizer:
        """The copy that steps in the place of `optimizer`."""
        # The same object in every step, or a compiled step would be compiled anew.
        proxy = self._proxies.get(id(optimizer))
        if proxy is None:
            proxy = self._proxies[id(optimizer)] = ProxyOptimizer(object.__new__(type(optimizer)))
        # Until its gradients are there it is the original in all but identity.
        proxy.attributes = dict(vars(optimizer))
        vars(proxy.optimizer).clear()
        vars(proxy.optimizer).update(proxy.attributes)
        return proxy.optimizer

    def show_gradients(self, optimizer: Optimizer, batches: Sequence[Batch]) -> None:
        """Let the proxy step zeros in place of parameters.

        optimizer: the original.
        batches: those of its parameters with a gradient that zeros can stand for. Its others are stepped as they are.
        """
        proxy = self._proxies[id(optimizer)]
        zero_of: dict[int, Tensor] = {}
        for batch in batches:
            zeros = self._zeros.take(batch.index, batch.params)
            for param, zero, grad in zip(batch.whole, zeros, batch.grads, strict=True):
                zero_of[id(param)] = zero
                # A parameter's own `grad_dtype` allows it; plain tensors have to be told.
                if grad.dtype != zero.dtype:
                    zero.grad_dtype = grad.dtype
                zero.grad = grad

        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            on_zeros = [(param, zero_of[id(param)]) for param in group["params"] if id(param) in zero_of]
            # bf16 and fp16 hold the update itself better than lr times it, which fp16 may not hold at all.
            low, wide = (
                [(param, zero) for param, zero in on_zeros if (zero.dtype in LOW) is is_low] for is_low in (True, False)
            )
            rest = [(param, param) for param in group["params"] if id(param) not in zero_of and param.grad is not None]
            # In groups of their own, since DTensors and plain tensors do not go together in one list.
            for some, settings in ((low, {"lr": 1.0}), (wide, {}), (rest, {})):
                if some:
                    groups.append({**group, **settings, "params": [one for _, one in some]})
            proxy.stepped += on_zeros + rest
        # By what is stepped. The tensors are the original's, so what the step changes in place needs no commit.
        states = ((one, borrow_state(optimizer.state, param, "", one is not param)) for param, one in proxy.stepped)
        proxy.optimizer.param_groups, proxy.optimizer.state = groups, defaultdict(dict, states)

    def commit(self, optimizer: Optimizer, stepped: Optimizer) -> None:
        """Give the original the state that its proxy has made, and its other attributes.

        stepped: what has stepped.
        Raises ValueError if that is not the proxy, or if the proxy has not been shown its gradients.
        """
        proxy = self._proxies[id(optimizer)]
        if stepped is not proxy.optimizer or vars(proxy.optimizer).get("param_groups") is optimizer.param_groups:
            raise ValueError(
                f"a hook before the step of {type(optimizer).__name__} has changed the arguments that attach has given it; register such "
                "hooks before attach, or change only what comes after them"
            )
        for param, one in proxy.stepped:
            commit_state(optimizer.state, param, proxy.optimizer.state[one], "")
        # What a step notes on the optimizer itself, such as that the checks of a fused kernel are done.
        for key, value in vars(proxy.optimizer).items():
            if key not in ("param_groups", "state") and proxy.attributes.get(key, proxy) is not value:
                setattr(optimizer, key, value)
        proxy.release()
        # Post hooks get it in `args`, and may take it for the original.
        proxy.optimizer.param_groups = optimizer.param_groups

    @contextmanager
    def adopted(self, batches: Sequence[Batch], over_lr: bool) -> Iterator[None]:
        """What the zeros hold now is the pending update of `batches`; it is written when the block has ended.

        If the block raises, nothing is written, so the parameters are as they were.

        batches: those whose parameters zeros have been stepped for.
        over_lr: whether the update is what the optimizer did over its learning rate.
        """
        for batch in batches:
            zeros, lr = self._zeros.taken(batch.index), batch.group["lr"]
            # See `show_gradients`: the zeros of bf16 and fp16 parameters have been stepped at lr 1.
            scale = lr if batch.is_low and not over_lr else 1.0
            applied_lr = lr if over_lr and not batch.is_low else None
            batch.pending = PendingUpdate(zeros, is_owned=True, is_negated=True, scale=scale, applied_lr=applied_lr)
        yield
        for batch in batches:
            # Decay and update in one pass over memory, which leaves the zeros clean for the next step.
            batch.apply_(batch.all_terms, with_update=True)
            self._zeros.cleared(batch.index, batch.pending.tensors)
