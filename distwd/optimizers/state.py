"""The state of wrapped optimizers: kept in the chain, by parameter, with shards as DTensors; borrowed as local tensors."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import _torch
from ..sharding.local import local_like, local_tensor
from ..step.state import is_kept_key

State = dict[str, Any]

# What torch's optimizers keep as plain tensors without dimensions, whatever the parameter is.
_COUNTERS = ("step", "mu_product")

# The state key of an optimizer that has no parameters on this rank; never saved.
NO_PARAMS_KEY = "no parameters on this rank"


def has_state(state: Mapping[str, Any], suffix: str) -> bool:
    """Whether a parameter's state has keys of the optimizer with this suffix."""
    return any(key.endswith(suffix) and not is_kept_key(key) for key in state)


def borrow_state(states: dict[Tensor, State], param: Tensor, suffix: str, as_local: bool) -> State:
    """The state of one optimizer for `param`, under its own keys.

    suffix: what ends its keys in the chain.
    as_local: DTensors as the local tensors that they hold.
    """
    state = states.get(param, {})
    # Many optimizers begin their state while it is empty, so numbers that rules keep must not lie in it.
    has_kept = any(map(is_kept_key, state))
    if not suffix and not has_kept and not (as_local and isinstance(param, DTensor)):
        return state
    return {
        key.removesuffix(suffix): local_like(value, param) if as_local and isinstance(value, DTensor) else value
        for key, value in state.items()
        if key.endswith(suffix) and not is_kept_key(key)
    }


def commit_state(states: dict[Tensor, State], param: Tensor, borrowed: State, suffix: str) -> None:
    """Keep what an optimizer has added or replaced in `borrowed`. What it changed in place is shared storage already."""
    state = states.get(param)
    if state is borrowed or not borrowed:
        return
    if state is None:
        state = states[param] = {}
    for key, value in borrowed.items():
        kept = state.get(key + suffix)
        if kept is value or (isinstance(kept, Tensor) and local_tensor(kept) is value):
            continue
        # A tensor of the local shard's shape is a shard of the whole state: as a DTensor, checkpoints see it whole.
        is_shard = (
            key not in _COUNTERS
            and isinstance(param, DTensor)
            and isinstance(value, Tensor)
            and not isinstance(value, DTensor)
            and value.shape == local_tensor(param).shape
        )
        state[key + suffix] = like_whole(value, param) if is_shard else value


def like_whole(local: Tensor, param: Tensor) -> Tensor:
    """`local` as the same kind of tensor that `param` is: a DTensor with its placements, or itself."""
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def initial_state(inner: torch.optim.Optimizer, group: dict[str, Any], example: Tensor) -> State:
    """The state that one of torch's optimizers begins with for a parameter like `example`.

    {} for other optimizers: they begin at their first step.
    """
    if not type(inner).__module__.startswith("torch.optim") or not _torch.can_init_group(inner):
        return {}
    if isinstance(inner, torch.optim.SGD):
        # SGD's buffer begins as the first gradient. Zeros become that at the first step too, but for dampening.
        is_eager = group["momentum"] != 0 and group["dampening"] == 0
        return {"momentum_buffer": torch.zeros_like(example)} if is_eager else {}
    if isinstance(inner, torch.optim.Adagrad):
        # Before torch 2.13 its constructor makes the state, and `_init_group` expects it there.
        known = inspect.signature(torch.optim.Adagrad).parameters
        made = torch.optim.Adagrad([example], **{key: group[key] for key in known if key != "params" and key in group})
        state: State = made.state[example]
        if state:
            return state
    inner.state = defaultdict(dict)
    example.grad = example.detach()  # it only asks whether there is one
    _torch.init_group(inner, group)
    example.grad = None
    begun: State = inner.state.pop(example, {})
    return begun


def mark_initialized(states: dict[Any, State], params: Sequence[Tensor]) -> None:
    """Give parameters for which no optimizer keeps anything a constant as state, and a rank without parameters a key.

    torch.distributed.checkpoint takes an optimizer without state for one that has not begun, and steps it whenever it
    saves: a rank that is stepped alone would wait for the others for ever. Nor can it load full state dicts of such an
    optimizer.
    """
    for param in params:
        if param.requires_grad and not states.get(param):
            # Of one dimension, and where the parameter is: torch asks states for their device, but no scalar.
            states[param] = {"stateless": torch.ones(1, device=local_tensor(param).device)}
    if not params:
        states[NO_PARAMS_KEY] = {}


def without_mark(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict as it is saved: without the key of a rank that has no parameters."""
    return {**state_dict, "state": {key: value for key, value in state_dict["state"].items() if key != NO_PARAMS_KEY}}
