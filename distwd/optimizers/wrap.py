"""Any torch optimizer as a transform of a chain."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..step.step import Step
from ..step.transform import BoundTransform, Transform
from .base import GradientOptimizer, InnerOptimizer
from .elementwise import ELEMENTWISE, ElementwiseOptimizer
from .full_params import ClosureOptimizer, FullParamOptimizer, needs_closure
from .state import lacks_second_moment


class Wrap(Transform):
    """A torch optimizer as a transform:  u ← what the optimizer would subtract from p for the gradient u, at lr 1.

    optimizer_class: a subclass of torch.optim.Optimizer.
    kwargs: its arguments, except `lr` (that is `LR`'s) and `weight_decay` (a rule's, at its own place in the chain). Each
        becomes a key of the chain's param groups.

    u, p: any float dtype and sharding that the class itself can step.
    Elementwise optimizers of torch (Adam, AdamW, SGD, RMSprop, NAdam, RAdam, Adagrad, Adadelta, Adamax) run on the
    local shards, whatever the meshes; any other runs on the parameters themselves, as it would alone, one inner group
    for each mesh. Where nothing later in the chain needs the update, an elementwise optimizer steps the parameters
    directly. Optimizers that need a closure (LBFGS) come first in a chain; only rules with target="closure" may stand
    before them. State lives in the chain's `state`, under the optimizer's own keys ("exp_avg"; a second optimizer's:
    "exp_avg_1"); what it notes in its param groups (a count of steps, Prodigy's d) in the chain's groups.
    Raises ValueError for `lr`, for a non-zero `weight_decay`, and for arguments that the class does not accept.
    Source: torch.optim; the form is torchzero's `Wrap`.

    >>> import torch
    >>> from distwd import LR, Chain, Wrap
    >>> w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)
    >>> Chain([w], Wrap(torch.optim.SGD, momentum=0.9), LR(0.5)).step()
    >>> w.detach()
    tensor([0.5000, 0.5000])
    """

    is_linear = False
    changes = frozenset({"update", "second_moment"})

    def __init__(self, optimizer_class: type[torch.optim.Optimizer], **kwargs: Any) -> None:
        given: Any = optimizer_class
        if not (isinstance(given, type) and issubclass(given, torch.optim.Optimizer)):
            # Of an optimizer its class alone: it prints all of its groups.
            what = f"one {type(given).__name__}" if isinstance(given, torch.optim.Optimizer) else repr(given)
            raise ValueError(
                f"Wrap takes a class of torch.optim.Optimizer, not {what}; pass the class, and its arguments as keywords"
            )
        name = optimizer_class.__name__
        if "lr" in kwargs:
            raise ValueError(f"{name} inside a chain has lr 1; remove lr= here and put LR({kwargs['lr']!r}) behind it")
        decay = kwargs.get("weight_decay", 0)
        if isinstance(decay, Tensor) or decay != 0:
            raise ValueError(
                f"{name} inside a chain has weight_decay 0; put WeightDecay({decay!r}) before it (coupled) or behind it (decoupled)"
            )
        self.optimizer_class, self.optimizer_name, self.kwargs = optimizer_class, name, kwargs
        # LBFGS and its like evaluate the closure themselves, before a step is assembled.
        self.evaluates_closure = needs_closure(optimizer_class)
        # What the chain decides, as far as the class knows it.
        known = inspect.signature(optimizer_class).parameters
        self._fixed = {key: value for key, value in (("lr", 1.0), ("weight_decay", 0.0)) if key in known}
        # Some find their step size themselves, or evaluate a closure: their own default is 1.
        self.needs_lr = "lr" in known and known["lr"].default != 1 and not self.evaluates_closure
        # The class itself knows what its hyperparameters are, and refuses bad ones. (A matrix, since Muon takes no
        # other.)
        example = optimizer_class([torch.zeros(1, 1, requires_grad=True)], **{**kwargs, **self._fixed})
        self.lacks_second_moment = name if lacks_second_moment(example) else ""
        # AdamW's flag goes with its weight_decay: the chain sets both where it lets the optimizer do a decay.
        hidden = {*self._fixed, "decoupled_weight_decay"}
        self.defaults = {key: value for key, value in example.defaults.items() if key not in hidden}
        self.check(self.defaults)

    def check(self, settings: Mapping[str, Any]) -> None:
        if settings.get("differentiable"):
            raise ValueError(
                f"{self.optimizer_name}: differentiable=True is not possible inside a chain, since no derivative goes through "
                "a decay of distwd; leave it out"
            )

    def inner_optimizer(self, bound: BoundTransform, chain: torch.optim.Optimizer, suffix: str) -> InnerOptimizer:
        """The optimizer that does the work for one chain.

        bound: this transform, bound to the chain's group keys.
        chain: the optimizer that owns groups and state.
        suffix: what ends its state keys there.
        """
        kind: type[InnerOptimizer] = FullParamOptimizer
        if self.optimizer_class in ELEMENTWISE:
            kind = ElementwiseOptimizer
        elif self.evaluates_closure:
            kind = ClosureOptimizer
        return kind(self.optimizer_class, {**self.kwargs, **self._fixed}, bound, chain, suffix)

    def apply(self, step: Step, bound: BoundTransform) -> None:
        if self.evaluates_closure:
            return  # its update was found together with the closure, before the step began
        # It is not run yet. What stands behind it decides: if nothing needs its update, it steps the parameters
        # directly.
        step.materialize(exact=True)
        step.waiting = inner = step.inner_optimizers[bound.index]
        step.second_moments = inner.second_moments if isinstance(inner, GradientOptimizer) else None

    def __repr__(self) -> str:
        words = [] if type(self) is not Wrap else [self.optimizer_name]
        words += [f"{key}={value!r}" for key, value in self.kwargs.items()]
        return f"{type(self).__name__}({', '.join(words)})"


class Adam(Wrap):
    """torch.optim.Adam as a transform:  u ← m̂ / (√v̂ + eps), with m, v running means of u and u².

    betas: decay rates of m and v, each in [0, 1), per step.
    eps: added to √v̂, in units of u.
    amsgrad: whether to divide by the largest v̂ so far.
    foreach, fused, capturable, differentiable: how torch runs it, as in torch.optim.Adam.
    maximize: whether to ascend u.

    others: `lr` and `weight_decay` raise a ValueError that says where they go: those are `LR` and a rule.

    State and arithmetic are torch's own:
    `Chain(params, Adam(), WeightDecay(w), LR(lr))` equals `torch.optim.AdamW(params, lr, weight_decay=w)` bit for bit.
    Raises ValueError as torch.optim.Adam does.
    Source: Kingma & Ba, arXiv 1412.6980.

    >>> import torch
    >>> from distwd import LR, Adam, Chain
    >>> w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([1.0, -2.0])
    >>> Chain([w], Adam(eps=0.0), LR(0.5)).step()
    >>> w.detach()
    tensor([-0.5000,  0.5000])
    """

    def __init__(
        self,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **others: Any,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__", "others")}
        if isinstance(betas, (int, float)):
            raise ValueError(
                f"Adam inside a chain has lr 1, and betas={betas!r} are not two numbers; put LR({betas!r}) behind it"
            )
        super().__init__(torch.optim.Adam, **given, **others)
        # `repr` shows what the user has given, and no more.
        standard = inspect.signature(Adam).parameters
        self.kwargs = {key: value for key, value in given.items() if value != standard[key].default}
