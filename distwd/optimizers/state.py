"""The state of wrapped optimizers: the chain keeps it by parameter, shards as DTensors; they borrow local tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._torch import is_dtensor, local_tensor
from ..kernels.sums import wide_dtype
from ..metrics.measure import Source
from ..sharding.collectives import local_like
from ..step.state import is_kept_key
from ..step.step import Step

State = dict[str, Any]

# What torch's optimizers keep as plain tensors without dimensions, whatever the parameter is.
_COUNTERS = ("step", "mu_product")

# The state key of an optimizer that has no parameters on this rank; never saved.
NO_PARAMS_KEY = "no parameters on this rank"


# What ends the keys of the first of several optimizers in a chain, if they end like those of another; the second's all
# end in "_1", the third's in "_2". A lone optimizer has "".
FIRST = "_0"
_NUMBERED = re.compile(r"_\d+$")


def stored_key(key: str, suffix: str) -> str:
    """The key in the chain of an optimizer's own `key`."""
    return key if suffix == FIRST and not _NUMBERED.search(key) else key + suffix


def own_key(key: str, suffix: str) -> str | None:
    """The optimizer's own key of what the chain keeps under `key`; None if that is another's, or a rule's."""
    if is_kept_key(key):
        return None
    if suffix == FIRST and not _NUMBERED.search(key):
        return key
    return key.removesuffix(suffix) if key.endswith(suffix) else None


def notes_of(states: Mapping[Any, Any]) -> State:
    """What an optimizer keeps in its state under no parameter."""
    return {key: value for key, value in states.items() if isinstance(key, str) and key != NO_PARAMS_KEY}


def borrow_state(states: dict[Tensor, State], param: Tensor, suffix: str, as_local: bool) -> State:
    """The state of one optimizer for `param`, under its own keys.

    states: the state of the chain, or of the optimizer itself, by parameter.
    suffix: what ends its keys there; "" for a lone optimizer, `FIRST` for the first of several.
    as_local: whether DTensors are lent as the local tensors that they hold.
    Returns the very dict in `states` if it can serve as it is, else a new one with the same tensors.
    """
    state = states.get(param, {})
    if not suffix and not (as_local and is_dtensor(param)):
        # Many optimizers begin their state while it is empty, so numbers that rules keep must not lie in it.
        own_state = {key: value for key, value in state.items() if not is_kept_key(key)}
        return own_state if len(own_state) < len(state) else state
    return {
        own: local_like(value, param) if as_local and is_dtensor(value) else value
        for key, value in state.items()
        if (own := own_key(key, suffix)) is not None
    }


def commit_state(states: dict[Tensor, State], param: Tensor, borrowed: State, suffix: str) -> None:
    """Keep what an optimizer has added or replaced in `borrowed`. What it changed in place is shared storage already.

    states, suffix: as in `borrow_state`.
    borrowed: what that has returned, after the step.
    """
    state = states.get(param)
    # An optimizer that keeps nothing leaves no empty dict behind, as it would leave none alone.
    if state is borrowed or not borrowed:
        return
    if state is None:
        state = states[param] = {}
    for key, value in borrowed.items():
        stored = stored_key(key, suffix)
        kept = state.get(stored)
        # Still the tensor that was borrowed: the DTensor around it stays, since others may hold it.
        if kept is value or (isinstance(kept, Tensor) and local_tensor(kept) is value):
            continue
        # A tensor of the local shard's shape is a shard of the whole state: as a DTensor, checkpoints see it whole.
        is_shard = (
            key not in _COUNTERS
            and is_dtensor(param)
            and isinstance(value, Tensor)
            and not is_dtensor(value)
            and value.shape == local_tensor(param).shape
        )
        state[stored] = like_whole(value, param) if is_shard else value


def like_whole(local: Tensor, param: Tensor) -> Tensor:
    """`local` as the same kind of tensor that `param` is: a DTensor with its placements, or itself."""
    if not is_dtensor(param):
        return local
    return _torch.dtensor_of(local, param.device_mesh, param.placements, param.shape, param.stride())


def initial_state(inner: torch.optim.Optimizer, group: dict[str, Any], example: Tensor) -> State:
    """The state that one of torch's optimizers begins with.

    inner: the optimizer. Its own state is replaced.
    group: the settings to begin with; it holds `example` only.
    example: a tensor like the parameter.
    Returns the state, {} for optimizers that are not torch's: they begin at their first step.
    """
    # Only of torch's own is it known that making the state early changes nothing.
    if not type(inner).__module__.startswith("torch.optim") or not _torch.can_init_group(inner):
        return {}
    if isinstance(inner, torch.optim.SGD):
        # SGD's buffer begins as the first gradient g. From zeros it becomes (1 − dampening)·g at the first step.
        is_eager = group["momentum"] != 0 and group["dampening"] == 0
        return {"momentum_buffer": torch.zeros_like(example)} if is_eager else {}
    if made := _torch.state_of_constructor(inner, group, example):
        return made
    inner.state = defaultdict(dict)
    # The method passes over parameters without a gradient; it does not look at its values.
    example.grad = example.detach()
    _torch.init_group(inner, group)
    example.grad = None
    begun: State = inner.state.pop(example, {})
    return begun


def lacks_second_moment(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer surely keeps no `exp_avg_sq`. False also where only its first step will tell."""
    # Under other keys than parameters some keep notes of their own.
    of_params = [state for key, state in optimizer.state.items() if isinstance(key, Tensor)]
    begun = [state for state in of_params if not all(map(is_kept_key, state))]
    if begun:
        return not any("exp_avg_sq" in state for state in begun)
    cls = type(optimizer)
    if not cls.__module__.startswith("torch.optim"):
        return False
    # Another one of its class, since making the state replaces what there is. A matrix, because Muon takes no other.
    example = torch.zeros(1, 1, requires_grad=True)
    twin = cls([example])  # type: ignore[call-arg]
    return "exp_avg_sq" not in initial_state(twin, {**twin.defaults, "params": [example]}, example)


def second_moments(
    step: Step,
    host_of: Callable[[int], tuple[str, Mapping[str, Any]]],
    state_of: Callable[[int, Tensor], State],
) -> list[Source]:
    """v̂ = exp_avg_sq/(1 − β₂ᵗ) of all trained parameters, under amsgrad of the largest exp_avg_sq so far.

    A parameter that is not updated in this step has it from an earlier one; without state it counts as zeros.

    step: whose optimizer has stepped.
    host_of: the optimizer of a param group, by its index: its class's name, and its settings.
    state_of: its state for a parameter of a group, shards as local tensors.
    Raises ValueError for an updated parameter whose state does not tell v̂.
    """
    frozen, updated = set(step.frozen), {position for batch in step.batches for position in batch.index}
    # By device of v, device of t and β₂: what is computed together.
    alike: dict[Any, tuple[list[int], list[Tensor], list[Tensor], Any]] = {}
    for position, entry in enumerate(step.entries):
        if entry.group not in step.active_groups or position in frozen:
            continue
        (name, settings), state = host_of(entry.group), state_of(entry.group, entry.tensor)
        # torch keeps the largest where its groups say so; others may have another word for it.
        is_largest = settings.get("amsgrad", "max_exp_avg_sq" in state)
        key = "max_exp_avg_sq" if is_largest else "exp_avg_sq"
        value: Any = state.get(key)
        if value is None and position not in updated:
            continue
        num_steps, betas = state.get("step", settings.get("step")), settings.get("betas")
        # Quantised states are tensors of other kinds, or of other shapes.
        is_plain = type(value) in _torch.ORDINARY and value.is_floating_point()
        if num_steps is None or betas is None or not is_plain or value.shape != local_tensor(entry.tensor).shape:
            raise ValueError(
                f"{name} does not tell the second moment of {entry.name}: it needs {key!r} of the parameter's shape and 'step' in "
                "its state, and 'betas' in its groups; use another norm_input, or Adam, AdamW, NAdam or RAdam"
            )
        num_steps = num_steps if isinstance(num_steps, Tensor) else torch.tensor(float(num_steps))
        beta = betas[1]
        by = value.device, num_steps.device, id(beta) if isinstance(beta, Tensor) else beta
        positions, values, counts, _ = alike.setdefault(by, ([], [], [], beta))
        positions.append(position)
        values.append(value)
        counts.append(num_steps.reshape(()))
    found = []
    for (device, *_), (positions, values, counts, beta) in alike.items():
        # On the device: to find out which parameters have stepped equally often would be to read the counters.
        wide = wide_dtype(device)
        t = torch.stack(counts).to(device, wide, non_blocking=True)
        beta = beta.to(device, wide, non_blocking=True) if isinstance(beta, Tensor) else beta
        # Before its first step v is 0, and so is v̂.
        found.append(Source(positions, values, (), torch.where(t > 0, 1 / (1 - beta**t), 0.0)))
    return found


def mark_initialized(states: dict[Any, State], params: Sequence[Tensor]) -> None:
    """Give parameters for which no optimizer keeps anything a constant as state, and a rank without parameters a key.

    states: the optimizer's `state`, which is changed.
    params: its parameters; empty for a rank that has none.

    torch.distributed.checkpoint takes an optimizer without state for one that has not begun, and steps it whenever it
    saves: a rank that is stepped alone would wait for the others for ever. Nor can it load full state dicts of such an
    optimizer.
    """
    for param in params:
        if param.requires_grad and all(map(is_kept_key, states.get(param, ()))):
            # Of one dimension, and where the parameter is: torch asks states for their device, but no scalar, so numbers
            # that rules keep are not enough. FSDP1 asks no state, but takes all that are no scalars for shards.
            shape = () if _torch.is_in_fsdp1(param) else (1,)
            states.setdefault(param, {})["stateless"] = torch.ones(shape, device=local_tensor(param).device)
    if not params:
        states[NO_PARAMS_KEY] = {}


def without_mark(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict as it is saved: without the key of a rank that has no parameters."""
    # Checkpoint code looks for a parameter behind each key, and finds none for this one.
    return {**state_dict, "state": {key: value for key, value in state_dict["state"].items() if key != NO_PARAMS_KEY}}
