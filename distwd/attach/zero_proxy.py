"""Zeros in the parameters' stead, which a double of a host steps: what they become is the host's update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._torch import overrides_init_group
from ..kernels.ordinary import ORDINARY
from ..kernels.stochastic import LOW
from ..kernels.zeros import ZeroPool
from ..optimizers import state as optimizer_state
from ..optimizers.elementwise import ELEMENTWISE
from ..sharding.local import local_like
from ..step.group_keys import attachments_on
from ..step.step import Batch

InnerOptimizer = torch.optim.Optimizer


@dataclass(slots=True)
class ProxyOptimizer:
    """What is stepped instead of a host, what the host was made of then, and the parameters with what is stepped for them."""

    host: InnerOptimizer
    attributes: dict[str, Any] = field(default_factory=dict)
    stepped: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def become(self, host: InnerOptimizer) -> None:
        """Have all that `host` has."""
        self.attributes = dict(vars(host))
        vars(self.host).clear()
        vars(self.host).update(self.attributes)

    def let_go(self) -> None:
        """Keep no gradient and no state alive."""
        for param, zero in self.stepped:
            if zero is not param:
                _take_gradient(zero)
        self.attributes, self.stepped = {}, []
        vars(self.host).update(param_groups=[], state={})


class ZeroProxyCapture:
    """Steps doubles of hosts on zeros; the parameters stay as they are, and so does the host until its double has stepped.

    Next to copying the parameters and taking the difference, that saves memory traffic, and −lr·u is not rounded to what p has room for.
    Zeros are local, so that a host of DTensors is spared their dispatch.
    """

    def __init__(self) -> None:
        self._zeros = ZeroPool()
        self._doubles: dict[int, ProxyOptimizer] = {}
        self.positions: set[int] = set()

    def begin(self) -> None:
        """No host has stepped yet. A step that was broken off has left nothing but doubles, which are let go."""
        for double in self._doubles.values():
            double.let_go()
        self.positions = set()

    def double_of(self, host: InnerOptimizer) -> InnerOptimizer:
        """The double, which for now steps what the host would. The same in every step, for those who compile steps."""
        if id(host) not in self._doubles:
            self._doubles[id(host)] = ProxyOptimizer(object.__new__(type(host)))
        self._doubles[id(host)].become(host)
        return self._doubles[id(host)].host

    def show(self, host: InnerOptimizer, moving: Sequence[tuple[int, Tensor, Tensor]]) -> None:
        """Put zeros into the groups of the host's double, for these (position, parameter, local parameter) with a gradient."""
        double, zero_of = self._doubles[id(host)], dict[int, Tensor]()
        positions = [position for position, *_ in moving]
        self.positions.update(positions)
        zeros = self._zeros.take(positions, [local for *_, local in moving])
        for (_, param, _), zero in zip(moving, zeros, strict=True):
            assert param.grad is not None
            zero_of[id(param)] = zero
            _give_gradient(zero, local_like(param.grad, param))
        groups: list[dict[str, Any]] = []
        for group in host.param_groups:
            aside = [(param, zero_of[id(param)]) for param in group["params"] if id(param) in zero_of]
            rest = [(param, param) for param in group["params"] if id(param) not in zero_of and param.grad is not None]
            # Apart, since DTensors and ordinary tensors do not go together in one list.
            groups += [{**group, "params": [one for _, one in some]} for some in (aside, rest) if some]
            double.stepped += aside + rest
        lent = (
            (one, optimizer_state.borrow_state(host.state, param, "", as_local=one is not param))
            for param, one in double.stepped
        )
        double.host.param_groups, double.host.state = groups, defaultdict(dict, lent)

    def take_back(self, host: InnerOptimizer, stepped: InnerOptimizer) -> None:
        """Let the host have the state that its double, which has stepped, has kept; and what else it has noted.

        Raises ValueError where something else has `stepped`, or the double was not asked to show gradients.
        """
        double = self._doubles[id(host)]
        if stepped is not double.host or vars(double.host).get("param_groups") is host.param_groups:
            raise ValueError(
                f"a hook before the step of {type(host).__name__} has changed the arguments that attach has given it; register such "
                "hooks before attach, or change only what comes after them"
            )
        for param, one in double.stepped:
            optimizer_state.take_back(host.state, param, double.host.state[one], "")
        for key, value in vars(double.host).items():
            if key not in ("param_groups", "state") and double.attributes.get(key, double) is not value:
                setattr(host, key, value)
        double.let_go()
        double.host.param_groups = host.param_groups  # for hooks that take it for the host

    @contextmanager
    def adopted(self, batches: Sequence[Batch], per_lr: bool) -> Iterator[None]:
        """What the zeros have become (over lr, if asked) is the pending update of `batches`; written when the block has ended."""
        for batch in batches:
            batch.update, batch.owns_update, batch.flipped = self._zeros.taken(batch.index), True, True
            batch.ahead = batch.group["lr"] if per_lr else None
        yield
        for batch in batches:
            batch.apply_(batch.terms, batch.update, batch.signed_scale, clear=True)
            self._zeros.cleared(batch.index, batch.update)


def can_be_doubled(host: InnerOptimizer) -> bool:
    """Whether `host` does to zeros what it would do to the parameters.

    Of two attachments one may have changed its groups; and a function of its own, bound to it, would know nothing of the double.
    """
    if type(host) not in ELEMENTWISE or overrides_init_group(host) or len(attachments_on(host)) != 1:
        return False
    return not any(group["differentiable"] for group in host.param_groups)


def can_stand_aside(local: Tensor) -> bool:
    """Whether zeros can be shown in the stead of a local parameter: an ordinary tensor, in a dtype that holds −lr·u well."""
    return type(local) in ORDINARY and local.dtype not in LOW


def _give_gradient(zero: Tensor, grad: Tensor) -> None:
    if grad.dtype != zero.dtype:  # as the parameter's own `grad_dtype` allows
        zero.grad_dtype = grad.dtype
    zero.grad = grad


def _take_gradient(zero: Tensor) -> None:
    grad, zero.grad = zero.grad, None
    if grad is not None and grad.dtype != zero.dtype:
        zero.grad_dtype = zero.dtype
