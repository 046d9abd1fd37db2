"""The state of wrapped optimizers: kept in the chain, by parameter, with shards as DTensors; lent as local tensors."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._torch import can_init_group, init_group
from ..sharding.local import local_like, local_tensor

State = dict[str, Any]


def borrow_state(states: dict[Tensor, State], param: Tensor, suffix: str, as_local: bool) -> State:
    """The state of one optimizer for `param`, keys without `suffix`; as_local: DTensors as the local tensors they hold."""
    state = states.get(param, {})
    if not suffix and not (as_local and isinstance(param, DTensor)):
        return state
    own = ((key, value) for key, value in state.items() if key.endswith(suffix))
    return {
        key.removesuffix(suffix): local_like(v, param) if as_local and isinstance(v, DTensor) else v for key, v in own
    }


def take_back(states: dict[Tensor, State], param: Tensor, lent: State, suffix: str) -> None:
    """Keep what an optimizer has added or replaced. What it changed in place is shared storage and needs nothing."""
    state = states.get(param)
    if state is lent or not lent:
        return
    if state is None:
        state = states[param] = {}
    for key, value in lent.items():
        kept = state.get(key + suffix)
        if kept is not value and (not isinstance(kept, Tensor) or local_tensor(kept) is not value):
            state[key + suffix] = value if key in _COUNTERS else _as_shard(value, param)


# What torch's optimizers keep as ordinary tensors without dimensions, whatever the parameter is.
_COUNTERS = ("step", "mu_product")


def _as_shard(value: Any, param: Tensor) -> Any:
    """A tensor of the local shard's shape is a shard of the whole state, and a DTensor, so that checkpoints see it whole."""
    if not isinstance(param, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    return like_whole(value, param) if value.shape == local_tensor(param).shape else value


def like_whole(local: Tensor, param: Tensor) -> Tensor:
    """`local` as the same kind of tensor that `param` is."""
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def initial_states(inner: torch.optim.Optimizer, group: dict[str, Any], stand_in: Tensor) -> State:
    """The state that one of torch's optimizers begins with for a parameter; {} for others, which begin at their first step."""
    if not type(inner).__module__.startswith("torch.optim") or not can_init_group(inner):
        return {}
    if isinstance(inner, torch.optim.SGD):
        # SGD's buffer begins as the first gradient, which is what zeros become at the first step, but for dampening.
        eager = group["momentum"] != 0 and group["dampening"] == 0
        return {"momentum_buffer": torch.zeros_like(stand_in)} if eager else {}
    if isinstance(inner, torch.optim.Adagrad):
        # Before torch 2.13 its constructor makes the state, and `_init_group` expects it there.
        known = inspect.signature(torch.optim.Adagrad).parameters
        made = torch.optim.Adagrad([stand_in], **{key: group[key] for key in known if key != "params" and key in group})
        state: State = made.state[stand_in]
        if state:
            return state
    inner.state = defaultdict(dict)
    stand_in.grad = stand_in.detach()  # only asked whether there is one
    init_group(inner, group)
    stand_in.grad = None
    begun: State = inner.state.pop(stand_in, {})
    return begun


# The key of a rank's optimizer that has no parameters to key its state by; never saved.
NO_PARAMS_KEY = "no parameters on this rank"


def mark_initialized(states: dict[Any, State], params: Sequence[Tensor]) -> None:
    """Give parameters for which no optimizer keeps anything a constant as their state, and a rank without parameters a mark.

    torch.distributed.checkpoint takes an optimizer without state for one that has not begun, and steps it whenever it saves:
    a rank that is stepped alone would wait for the others for ever. It also cannot load full state dicts of such an optimizer.
    """
    for param in params:
        if param.requires_grad and not states.get(param):
            # Of one dimension, and where the parameter is: torch asks states for their device, but no scalar.
            states[param] = {"stateless": torch.ones(1, device=local_tensor(param).device)}
    if not params:
        states[NO_PARAMS_KEY] = {}


def without_mark(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict as it is saved."""
    return {**state_dict, "state": {key: value for key, value in state_dict["state"].items() if key != NO_PARAMS_KEY}}
