"""The proof of the pudding: the whole model in one process, decayed beside the sharded one, compared bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distwd.cli.verify import difference


@dataclass
class Verdict:
    """How far the sharded parameters are from the replica's, over all ranks."""

    parameters: int = 0
    elements: int = 0
    parameters_differ: int = 0
    elements_differ: int = 0
    largest_difference: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.parameters_differ} of {self.parameters} parameters ({self.elements_differ} of {self.elements} "
            f"elements) differ from the one-process replica; largest difference {self.largest_difference:g}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on every rank. A collective for a sharded one, so every rank must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any) -> Any:
    """`state` with every sharded tensor in it made whole. Every rank must ask, for the same keys in the same order."""
    if isinstance(state, torch.Tensor):
        return whole(state).clone()
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole_state(value) for value in state)
    return state


class Replica:
    """All parameters and an optimizer of their own on rank 0; the other ranks only help to gather.

    It starts from where the sharded model stands, resumed or new, and takes each step with the same gradients.
    Its optimizer is over a group of rank 0 alone: it never talks to other ranks, so what it computes is what one
    device would.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        make_optimizer: Callable[[Iterable[tuple[str, torch.Tensor]], Any], Optimizer],
    ) -> None:
        self.model = model
        self.source = optimizer
        self.params = {name: nn.Parameter(whole(param).clone()) for name, param in model.named_parameters()}
        state = whole_state(optimizer.state_dict())
        group = dist.new_group([0]) if dist.is_initialized() else None  # every rank must call new_group
        self.optimizer: Optimizer | None = None
        if group is None or dist.get_rank() == 0:
            self.optimizer = make_optimizer(self.params.items(), group)
            self.optimizer.load_state_dict(state)
        else:
            self.params = {}

    def step(self) -> None:
        """Take the step that the sharded model is about to take. Call it on every rank, before the optimizer."""
        for name, param in self.model.named_parameters():
            grad = None if param.grad is None else whole(param.grad)
            if self.optimizer is not None:
                self.params[name].grad = None if grad is None else grad.clone()
        if self.optimizer is not None:
            for mine, its in zip(self.optimizer.param_groups, self.source.param_groups, strict=True):
                mine.update({key: value for key, value in its.items() if not key.startswith("param")})
            self.optimizer.step()

    def compare(self) -> Verdict:
        """Count what differs. Every rank looks at the parameters as it has gathered them, so copies are judged too."""
        verdict = Verdict()
        for name, param in self.model.named_parameters():
            mine = whole(param)
            expected = self.params[name].detach() if self.optimizer is not None else torch.empty_like(mine)
            if dist.is_initialized():
                dist.broadcast(expected, src=0)
            count, largest = worst_of_all_ranks(*difference(mine, expected))
            verdict.parameters += 1
            verdict.elements += mine.numel()
            verdict.parameters_differ += count > 0
            verdict.elements_differ += int(count)
            verdict.largest_difference = max(verdict.largest_difference, largest)
        return verdict


def worst_of_all_ranks(count: int, largest: float) -> tuple[int, float]:
    if not dist.is_initialized():
        return count, largest
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (count, largest))
    return max(count for count, _ in everyone), max(largest for _, largest in everyone)
