"""What an optimizer does besides reading `p.grad` and writing p: found out at its first steps, by looking."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import local_tensor
from ..checks import warn_user
from ..kernels.apply import apply_from_
from ..kernels.formulas import Mask
from ..kernels.stochastic import LOW
from ..sharding.params import NamedParam
from ..step.state import is_kept_key
from ..step.step import Batch

Optimizer = torch.optim.Optimizer

# What nothing has been seen of in so many steps will not be looked for any more: looking reads tensors.
_NUM_STEPS = 10
# Prodigy and D-Adaptation step with d·lr, DoG with a distance over a norm of gradients.
_FINDS_STEP = re.compile(r"prodigy|d_?adapt|^l?dog$|mechanic", re.IGNORECASE)
# How much of what has a gradient must move, for its movement to tell the update.
_MOVED = 0.5


class Watch:
    """Looks at the first steps of one optimizer of somebody else's.

    It finds copies of the parameters that the optimizer steps from: fp32 masters of bf16 parameters, schedule-free's z. A
    decay that is written to the parameter alone would not last, so the copies are decayed too. And it warns where the
    parameters do not show what the optimizer did.

    measures_update: whether a rule looks at the update.
    """

    def __init__(self, measures_update: bool) -> None:
        self._measures_update = measures_update
        self._num_steps = 0
        self._is_over = False
        self._has_moved = self._has_told = False
        self._num_to_move: dict[int, Tensor] = {}  # by position, of bf16 and fp16 parameters
        # By position of the parameter and place of the copy: True, or None where both have not moved yet.
        self._copies: dict[tuple[int, tuple[Any, ...]], bool | None] = {}
        self._no_copies: set[tuple[int, tuple[Any, ...]]] = set()

    def warn_of_hidden_step(self, optimizer: Optimizer) -> None:
        """Warn, once, of an optimizer whose name says that it finds its step size itself, and that shows none."""
        name = type(optimizer).__name__
        if _FINDS_STEP.search(name) and not self._has_told:
            self._has_told = True
            warn_user(
                f"{name} finds its step size itself, and shows no 'd' in its param groups: coupling='lr' decays by group['lr'] alone, "
                "and an update is taken over that; use coupling='none' and a λ per step"
            )

    def note_gradients(self, batches: Sequence[Batch]) -> None:
        """The optimizer is about to step with these gradients, which it may clear: note how much it should move."""
        if self._is_over or not self._measures_update:
            return
        # Rows of an embedding that the batch has not used have zeros, and stay where they are for that.
        low = [batch for batch in batches if batch.is_low]
        pairs = [pair for batch in low for pair in zip(batch.index, batch.grads, strict=True)]
        self._num_to_move = {position: grad.count_nonzero() for position, grad in pairs}

    def look(
        self,
        optimizer: Optimizer,
        params: Sequence[tuple[int, NamedParam]],
        old: Mapping[int, Tensor],
        updated: Sequence[int],
        has_lr: bool,
    ) -> bool:
        """The optimizer has stepped, and no decay has been written yet.

        params: its parameters, with their positions.
        old: local parameters as they were before the step, by position.
        updated: the positions of those that had a gradient.
        has_lr: whether its learning rates are not 0.
        Returns whether it has moved parameters without a gradient, and has been warned of.
        """
        if self._is_over:
            return False
        self._num_steps += 1
        tests: list[Tensor] = []
        places: list[tuple[int, tuple[Any, ...]]] = []
        own, has_gradient = dict(params), set(updated)
        for position, entry in params:
            if position not in old:
                continue
            now, before = local_tensor(entry.tensor), old[position]
            moved = (now != before).sum()
            to_move = self._num_to_move.get(position, torch.zeros_like(moved)).to(moved.device)
            tests.append(torch.stack([moved, to_move, torch.zeros_like(moved), moved]))
            places.append((position, ()))
            for place, tensor in _kept_beside(optimizer, entry.tensor, now):
                key = position, place
                if key in self._no_copies or self._copies.get(key):
                    continue
                is_equal = (tensor.to(now.dtype) == now).all() & now.any()
                # On its way from where it was to the copy: an average of the two.
                gone, left = now.float() - before.float(), tensor.float() - now.float()
                is_between = (gone * left >= 0).all()
                tests.append(torch.stack([moved, is_equal.to(moved), is_between.to(moved), now.any().to(moved)]))
                places.append(key)
        if not tests:
            return False
        # One read for all.
        found = [tuple(row) for row in torch.stack([test.to("cpu") for test in tests]).tolist()]
        strangers, num_moved, num_all = [], 0, 0
        for (position, place), (moved, count, is_between, is_nonzero) in zip(places, found, strict=True):
            if not place:
                if moved and position not in has_gradient:
                    strangers.append(own[position].name)
                elif position in has_gradient and old[position].dtype in LOW:
                    num_moved, num_all = num_moved + moved, num_all + count
                self._has_moved = self._has_moved or bool(moved)
                continue
            key, has_same_bits = (position, place), bool(count)
            is_suspect = key in self._copies
            if moved and (has_same_bits or (is_suspect and is_between)):
                self._copies[key] = True
            elif not moved and (has_same_bits or not is_nonzero):
                self._copies[key] = None
            else:
                self._copies.pop(key, None)
                self._no_copies.add(key)
        name = type(optimizer).__name__
        if strangers:
            warn_user(
                f"{name} has moved {strangers[0]}{' and others' if len(strangers) > 1 else ''}, which had no .grad when the step "
                "began, so no rule has decayed it; let .grad hold the gradient, or use the optimizer's own weight_decay"
            )
        if self._measures_update and has_lr and num_all > 0 and num_moved < _MOVED * num_all:
            self._measures_update = False  # once
            warn_user(
                f"{name} has moved {num_moved} of {num_all} elements of bf16 or fp16 parameters that have a gradient: the rest of its "
                "update was rounded away, and a metric or mask of the update does not see it; use fp32 parameters, a Chain, or "
                "norm_input='params' or 'grad'"
            )
        is_decided = self._has_moved and all(self._copies.values())
        self._is_over = bool(strangers) or is_decided or self._num_steps >= _NUM_STEPS
        return bool(strangers)

    def copies_of(self, optimizer: Optimizer, position: int, param: Tensor) -> list[Tensor]:
        """The local tensors that the optimizer steps from in the place of a parameter."""
        if not any(self._copies.values()):
            return []
        local = local_tensor(param)
        return [
            tensor for place, tensor in _kept_beside(optimizer, param, local) if self._copies.get((position, place))
        ]


def decay_copies_(batch: Batch, copies: Sequence[Sequence[Tensor]]) -> None:
    """c ← prox(c − Σ rate·mask·d(p−a)) for the copies c of each parameter p of a batch; p is what the batch holds."""
    mask = batch.pending.mask
    counts, first = batch.num_cells or [1] * len(batch.params), 0
    for number, (param, own) in enumerate(zip(batch.params, copies, strict=True)):
        # One by one: not every parameter need have a copy, and copies have dtypes of their own.
        own_rates = slice(first, first := first + counts[number])
        terms = [term.only(number, own_rates) for term in batch.all_terms]
        minus = None if mask.minus is None else [mask.minus[number]]
        for copy in own:
            own_mask = Mask([mask.us[number]], mask.sign, minus)
            values, own_counts = [param.to(copy.dtype)], counts[number : number + 1]
            apply_from_([copy], values, terms, own_mask, workspace=batch.workspace, num_cells=own_counts)


def _kept_beside(optimizer: Optimizer, param: Tensor, local: Tensor) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Tensors shaped like a parameter that the optimizer keeps: in its state, its groups or its attributes, with their places."""
    found = [(("state", key), value) for key, value in dict(optimizer.state.get(param, {})).items()]
    own = {key: value for key, value in vars(optimizer).items() if key not in ("param_groups", "state", "defaults")}
    for index, group in enumerate(optimizer.param_groups):
        own |= {f"group {index} {key}": value for key, value in group.items() if key != "params"}
    for key, value in own.items():
        if isinstance(value, (dict, list, tuple, Tensor)):
            found += _tensors_in(("attribute", key), value, depth=3)
    for place, value in found:
        # What rules keep there (anchors) is nobody's copy.
        if not isinstance(value, Tensor) or not value.is_floating_point() or is_kept_key(str(place[-1])):
            continue
        tensor = local_tensor(value.detach())
        if tensor.shape == local.shape and tensor.numel() and tensor.data_ptr() != local.data_ptr():
            yield place, tensor


def _tensors_in(place: tuple[Any, ...], value: Any, depth: int) -> list[tuple[tuple[Any, ...], Tensor]]:
    """All tensors in nested lists and dicts."""
    if isinstance(value, Tensor):
        return [(place, value)]
    if depth == 0 or not isinstance(value, (dict, list, tuple)):
        return []
    members = value.items() if isinstance(value, dict) else enumerate(value)
    # By identity: `==` of tensors compares their elements.
    return [
        found
        for key, member in members
        for found in _tensors_in((*place, id(key) if isinstance(key, Tensor) else key), member, depth - 1)
    ]
