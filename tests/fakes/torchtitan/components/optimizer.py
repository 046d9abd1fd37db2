"""What torchtitan 0.3's optimizers container does, in so far as decay meets it: written anew, for the tests.

torchtitan itself needs pyarrow, tensorboard, wandb and more. `launch/recipes/torchtitan_container.py` was run with both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(kw_only=True)
class ParamGroupConfig:
    """Parameters whose names match `pattern`, and the optimizer that is theirs."""

    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


class OptimizersContainer(torch.optim.Optimizer):
    """One optimizer for each kind and each part of the model, behind the face of a single one."""

    @dataclass(kw_only=True)
    class Config:
        param_groups: list[ParamGroupConfig] = field(default_factory=list)
        implementation: str = "fused"

    def __init__(self, config: Config, *, model_parts: list[torch.nn.Module]) -> None:
        self.optimizers = [
            getattr(torch.optim, name)(groups)
            for part in model_parts
            for name, groups in groups_by_kind(part, config).items()
        ]
        super().__init__([p for each in self.optimizers for group in each.param_groups for p in group["params"]], {})

    def __iter__(self):
        return iter(self.optimizers)

    def __len__(self):
        return len(self.optimizers)

    def step(self, closure=None):
        for each in self.optimizers:
            each.step()

    def zero_grad(self, set_to_none: bool = True):
        for each in self.optimizers:
            each.zero_grad(set_to_none=set_to_none)

    def state_dict(self):
        saved = {}
        for each in self.optimizers:
            make_state(each)
            saved.update(flattened(each))
        return saved

    def load_state_dict(self, saved):
        for each in self.optimizers:
            make_state(each)
            each.load_state_dict(unflattened(each, saved))


def groups_by_kind(part: torch.nn.Module, config: OptimizersContainer.Config) -> dict[str, list[dict[str, Any]]]:
    how = {"fused": config.implementation == "fused", "foreach": config.implementation == "foreach"}
    left = dict(part.named_parameters())
    found: dict[str, list[dict[str, Any]]] = {}
    for each in config.param_groups:
        names = [name for name in left if re.search(each.pattern, name)]
        group = {"params": [left.pop(name) for name in names], "param_names": names}
        found.setdefault(each.optimizer_name, []).append({**group, **how, **each.optimizer_kwargs})
    return found


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """torchtitan's own hidden step: of this optimizer alone, while the others keep their learning rates."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer.state or any(p.grad is not None for p in params):
        return
    for param in params:
        param.grad = torch.zeros_like(param)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = torch.tensor(0.0) if isinstance(rate, torch.Tensor) else 0.0
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


def flattened(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """By name: `state.NAME.KEY`, and every setting of its group as `param_groups.NAME.KEY`."""
    saved = optimizer.state_dict()
    flat: dict[str, Any] = {}
    for group in saved["param_groups"]:
        for number, name in zip(group["params"], group["param_names"], strict=True):
            flat |= {f"state.{name}.{key}": value for key, value in saved["state"].get(number, {}).items()}
            settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            flat |= {f"param_groups.{name}.{key}": value for key, value in settings.items()}
    return flat


def unflattened(optimizer: torch.optim.Optimizer, flat: dict[str, Any]) -> dict[str, Any]:
    """Back again. A setting that the checkpoint does not have is a KeyError."""
    state, groups, number = {}, [], 0
    for group in optimizer.param_groups:
        numbers = []
        for name, param in zip(group["param_names"], group["params"], strict=True):
            numbers.append(number)
            keys = optimizer.state.get(param, {})
            state[number] = {key: flat[f"state.{name}.{key}"] for key in keys}
            number += 1
        names = [key for key in group if key not in ("params", "param_names")]
        missing = [key for key in names if f"param_groups.{group['param_names'][0]}.{key}" not in flat]
        if missing:
            raise KeyError(f"Optimizer param group key {missing[0]!r} not found in checkpoint")
        settings = {key: flat[f"param_groups.{group['param_names'][0]}.{key}"] for key in names}
        groups.append({"params": numbers, **settings})
    return {"state": state, "param_groups": groups}
