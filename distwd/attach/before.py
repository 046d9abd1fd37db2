"""A host's step as a sentence: what stands before and after the optimizer that `attach` was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._torch import write_count
from ..kernels.apply import count
from ..optimizers.elementwise import ELEMENTWISE, KNOWS_DECOUPLED
from ..optimizers.state import like_whole
from ..rules.base import Rule
from ..step.step import Batch, Step, unless
from ..step.transform import BoundTransform, Transform

COUPLINGS = ("lr", "gradient", "none")


@dataclass(frozen=True, slots=True, eq=False)
class AttachedPlace(BoundTransform):
    """A rule beside a host: of its hyperparameters only `weight_decay` is a key of the host's groups."""

    ascends: bool = False

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The rule's own settings, with the group's decay if it has one (a checkpoint from before has none)."""
        defaults = self.transform.defaults
        return {**defaults, "weight_decay": group.get(self.keys["weight_decay"], defaults["weight_decay"])}

    def sign(self, group: Mapping[str, Any]) -> int:
        """−1 before a host that maximizes."""
        return -1 if self.ascends and group.get("maximize", False) else 1


class ExternalOptimizer(Transform):
    """The host itself, as a word: what stands behind it sees the update."""

    def __init__(self) -> None:
        self.defaults: dict[str, Any] = {}

    def apply(self, step: Step, bound: BoundTransform) -> None:
        """The host steps by itself, between the hooks."""


class ExternalLR(Transform):
    """The host's own learning rate: scales the pulls before it. (The update is scaled by the host already.)"""

    def __init__(self) -> None:
        self.defaults: dict[str, Any] = {}

    def apply(self, step: Step, bound: BoundTransform) -> None:
        for batch in step.batches:
            batch.scale_by(batch.group["lr"])


def sentence(
    decays: Sequence[Rule], coupling: str, keys: Sequence[str], labels: Sequence[str]
) -> tuple[BoundTransform, ...]:
    """The places around the host: rules before it ("gradient"), between it and its lr ("lr"), or behind both ("none")."""
    ascends = coupling == "gradient"
    rules = [(decay, {"weight_decay": key}, label) for decay, key, label in zip(decays, keys, labels, strict=True)]
    host: list[Any] = [(ExternalOptimizer(), {}, "host")]
    words = rules + host if ascends else host + rules + ([(ExternalLR(), {}, "lr")] if coupling == "lr" else [])
    return tuple(
        AttachedPlace(transform, index, label, own, ascends=ascends or getattr(transform, "target", "") == "closure")
        for index, (transform, own, label) in enumerate(words)
    )


def needs_update(decays: Sequence[Rule], hosts: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether decays behind the host have to wait until it has stepped: they look at its update, or it looks at the parameters."""
    reads_params = any(type(host) not in ELEMENTWISE for host in hosts)
    return reads_params or any(
        decay.is_cautious(decay.defaults) or decay.target == "grad" or decay.defaults.get("norm_input") == "update"
        for decay in decays
    )


PutBack = dict[int, tuple[dict[str, Any], dict[str, Any]]]


def write_before(batches: Sequence[Batch], host: torch.optim.Optimizer, coupling: str) -> PutBack:
    """Write the pulls, before the host steps; or hand them to it. Returns what to put back into which groups, by identity."""
    put_back: PutBack = {}
    # The host's kernels know no noise; and what a group is handed decays all of its parameters.
    with_noise = {id(batch.group) for batch in batches if batch.random_stream is not None}
    for batch in batches:
        may_hand = coupling == "lr" and id(batch.group) not in with_noise
        handed = _handed(batch, host, put_back) if may_hand else None
        if handed is None:
            batch.apply_(batch.terms)
            continue
        count(batch.params, batch.terms, batch.tally, batch.workspace)
        if id(batch.group) not in put_back:
            kept = {key: batch.group[key] for key in ("weight_decay", "decoupled_weight_decay")}
            put_back[id(batch.group)] = (batch.group, kept)
            batch.group.update(weight_decay=handed, decoupled_weight_decay=True)
    return put_back


def _handed(batch: Batch, host: torch.optim.Optimizer, put_back: PutBack) -> float | None:
    """λ, where the host knows the pending decay itself: its kernels round it in their own way, and skip it with the step."""
    if type(host) not in KNOWS_DECOUPLED or len(batch.terms) != 1:
        return None
    # Another attachment may have handed its own decay already; then this one is written.
    if id(batch.group) not in put_back and batch.group["weight_decay"] != 0:
        return None
    (term,) = batch.terms
    return term.before_lr if term.is_linear and isinstance(term.before_lr, (int, float)) else None


PutBackGrads = list[tuple[Tensor, Tensor | None, Tensor, int]]


def write_gradients(batches: Sequence[Batch]) -> PutBackGrads:
    """Let the host see the pending update as its gradients; returns parameters with their own gradients and what stands in."""
    put_back: PutBackGrads = []
    for batch in batches:
        if not batch.is_plain:
            batch.fold()
        if batch.update is not batch.grads:
            for param, update in zip(batch.whole, batch.update, strict=True):
                stand_in = like_whole(update, param)
                put_back.append((param, param.grad, stand_in, write_count(stand_in)))
                param.grad = stand_in
    return put_back


@dataclass(slots=True)
class Overrides:
    """What hosts have been lent for the length of a step: decay in their groups, and other gradients."""

    groups: PutBack = field(default_factory=dict)
    grads: PutBackGrads = field(default_factory=list)

    def take_back(self, stepped: bool) -> None:
        """Put all as it was, unless others than the host (which has `stepped`) have written there since."""
        for group, values in self.groups.values():
            group.update(values)
        for param, grad, stand_in, version in self.grads:
            if param.grad is stand_in and (stepped or write_count(stand_in) == version):
                param.grad = grad
        self.groups, self.grads = {}, []


def batches_of(host: torch.optim.Optimizer, step: Step) -> list[Batch]:
    """What a step holds of one host."""
    own = set(map(id, host.param_groups))
    return [batch for batch in step.batches if id(batch.group) in own]


def apply_grad_scaler(batches: Sequence[Batch], host: torch.optim.Optimizer, scales: bool) -> None:
    """Let no pending pull act in a step that a GradScaler will skip; scales: let it be as scaled as the host's gradients."""
    grad_scale, found_inf = getattr(host, "grad_scale", None), getattr(host, "found_inf", None)
    for batch in batches:
        if scales and grad_scale is not None:
            batch.terms = [term.scaled(grad_scale) for term in batch.terms]
        if found_inf is not None:
            batch.terms = [replace(term, rate=unless(found_inf, term.rate)) for term in batch.terms]


def with_closure(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]) -> tuple[Any, Any]:
    """The arguments of `step` with another closure, where the caller had put it."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs
