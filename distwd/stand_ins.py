"""Zeros in the parameters' stead, shown to a host for the length of its step: what they become is its update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import optimizer as torch_optimizer

from .hosts import ELEMENTWISE, Zeros, lending
from .kernels.rounding import LOW
from .local import local_like, local_tensor
from .plan.entries import Entry
from .step import Step


@dataclass(frozen=True, slots=True)
class Shown:
    """A parameter, what a host sees in its stead, and the gradient (of its own kind) that both have."""

    param: Tensor
    stand_in: Tensor
    grad: Tensor
    version: int


class StandIns:
    """Zeros for the parameters of one host; its groups show them, its state is lent to them, and the parameters stay as they are.

    Next to copying the parameters and taking the difference, that saves memory traffic, and −lr·u is not rounded to what p has room for.
    What is shown is local, so that a host of DTensors is spared their dispatch.
    """

    def __init__(self) -> None:
        self._zeros = Zeros()
        self._known: tuple[Entry, ...] | None = None
        self._are_plain = False
        self._host: torch.optim.Optimizer | None = None
        self._groups: list[tuple[dict[str, object], list[Tensor]]] = []
        self._shown: list[Shown] = []

    def can_serve(self, host: torch.optim.Optimizer, entries: tuple[Entry, ...]) -> bool:
        """Whether `host` does to zeros what it would do to the parameters, and nobody else looks at its groups during a step.

        bf16 and fp16 have too few bits to round −lr·u once more before it is added.
        """
        if type(host) not in ELEMENTWISE or any(group["differentiable"] for group in host.param_groups):
            return False
        if len(host._optimizer_step_pre_hooks) > 1 or torch_optimizer._global_optimizer_pre_hooks:
            return False
        if entries is not self._known:
            self._known, self._are_plain = entries, all(_is_plain(entry.tensor) for entry in entries)
        return self._are_plain

    def show(self, host: torch.optim.Optimizer, playing: Sequence[tuple[int, Entry]]) -> None:
        """Put zeros into the groups of `host`, for the (position, entry) pairs that have a gradient."""
        moving = [
            (position, entry.tensor, grad) for position, entry in playing if (grad := entry.tensor.grad) is not None
        ]
        zeros = self._zeros.take([position for position, *_ in moving], [local_tensor(param) for _, param, _ in moving])
        seen: dict[Tensor, Tensor] = {}
        self._host = host
        for (_, param, grad), zero in zip(moving, zeros, strict=True):
            seen[param] = zero
            zero.grad = local_like(grad, param)
            self._shown.append(Shown(param, zero, grad, _version(grad)))
            if state := lending.lend(host.state, param, "", as_local=True):
                host.state[zero] = state
        for group in host.param_groups:
            self._groups.append((group, group["params"]))
            group["params"] = [seen.get(param, param) for param in group["params"]]

    def take_back(self, stepped: bool) -> None:
        """Let the host have its parameters again, with the state that it has kept of them.

        Raises ValueError where the step was broken off (it has not `stepped`), the host's gradients have been cleared since, and
        others have been added to those of the parameters: by `zero_grad` on the host, which then saw the stand-ins.
        """
        host, shown = self._host, self._shown
        for group, params in self._groups:
            group["params"] = params
        self._host, self._groups, self._shown = None, [], []
        mixed = False
        for one in shown:
            assert host is not None
            lending.take_back(host.state, one.param, host.state.pop(one.stand_in, {}), "")
            if not stepped and one.stand_in.grad is None and one.param.grad is one.grad:
                mixed = mixed or _version(one.grad) != one.version
                one.param.grad = None
            one.stand_in.grad = None
        if mixed:
            raise ValueError(
                "the last step was broken off by an error, and gradients have been added to those it had; they are cleared now: "
                "evaluate and call backward() again"
            )

    @contextmanager
    def adopted(self, step: Step, per_lr: bool) -> Iterator[None]:
        """What the zeros have become (over lr, if asked) is the pending update of `step`; written when the block has ended."""
        for batch in step.batches:
            batch.update, batch.owns_update, batch.flipped = self._zeros.taken(batch.index), True, True
            batch.ahead = batch.group["lr"] if per_lr else None
        yield
        for batch in step.batches:
            batch.pull_(batch.pulls, batch.update, batch.signed_scale, clear=True)
            self._zeros.cleared(batch.index, batch.update)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_plain(param: Tensor) -> bool:
    """Whether a parameter is an ordinary tensor or a DTensor of one, in a dtype that holds −lr·u well.

    Not a DTensor without dimensions: what an optimizer keeps of it looks like a counter of steps, which is to stay an ordinary tensor.
    """
    local = param._local_tensor if isinstance(param, DTensor) else param
    if type(local) not in (Tensor, torch.nn.Parameter) or local.dtype in LOW:
        return False
    return local is param or local.dim() > 0
