"""Numbers that rules carry from step to step: where they lie in the optimizer's state, and when they move."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .._torch import StridedShard, local_tensor
from ..kernels.sums import wide_dtype
from ..metrics.metric import Measure
from ..sharding.params import NamedParam
from ..sharding.pieces import stack_here
from .transform import BoundTransform, Transform, finest_scope

State = dict[str, Any]

SHARDS = (Shard, StridedShard)  # the second is no subclass of the first in every release

PREFIX = "distwd_"  # of the keys of kept numbers in an optimizer's state
# Counts the steps of numbers that begin as a metric. It tells that they have begun; no value of theirs could.
COUNT = "num_steps"
ANCHOR = "anchor"  # what ends the key of a parameter's anchor


def is_kept_key(key: str) -> bool:
    """Whether a key of an optimizer's state is ours and not the optimizer's."""
    return key.startswith(PREFIX)


class KeptNumbers:
    """Kept numbers of the rules of one optimizer, as float32 tensors in `optimizer.state[p]`: 0-d, or [E] for a stack [E, m, n].

    There they travel in every state dict and checkpoint, and a parameter takes its numbers along to any sharding. A number
    over all parameters, or over a group, is one tensor that the parameters of a group share. Numbers of stacked matrices
    are cut as these are.

    transforms: the bound transforms.
    state_of: the `state` of the optimizer that holds a parameter, by parameter.
    may_keep: whether numbers may lie in the state of a parameter now.
    """

    def __init__(
        self,
        transforms: Sequence[BoundTransform],
        state_of: Callable[[Tensor], dict[Any, State]],
        may_keep: Callable[[Tensor], bool],
    ) -> None:
        # Those that may keep numbers; whether they do is up to their settings.
        self._transforms = [bound for bound in transforms if type(bound.transform).keeps is not Transform.keeps]
        self._all = transforms
        self.keeps_any = bool(self._transforms)
        self._state_of = state_of
        # FSDP1 saves no state of a piece without elements, and refuses to save numbers that differ between ranks: what
        # such a piece began anew after loading would.
        self._may_keep: Callable[[Tensor], bool] = lambda param: not is_empty_piece(param) and may_keep(param)
        self._has_warned = self._is_loaded = False
        # Numbers that have moved while they may not lie in the state yet, by key and parameter: many optimizers begin a
        # parameter's state with its first gradient. And by key and group, of groups without parameters on this rank.
        self._unplaced: dict[tuple[str, Tensor | int], Tensor] = {}

    @staticmethod
    def names(keeps: Mapping[str, float | Measure]) -> dict[str, float]:
        """The numbers that a rule keeps, with what each begins with (of a metric: 0 until then)."""
        found = {name: 0.0 if isinstance(begins, Measure) else float(begins) for name, begins in keeps.items()}
        return found | ({COUNT: 0.0} if any(isinstance(begins, Measure) for begins in keeps.values()) else {})

    def create(
        self, entries: Sequence[NamedParam], groups: Sequence[Mapping[str, Any]], is_loaded: bool = False
    ) -> None:
        """Make what is missing, so that every rank has every key before a checkpoint is saved or loaded.

        is_loaded: whether a checkpoint has just been loaded. What that did not bring begins anew, with a warning.
        """
        if is_loaded:
            # What has moved until now belongs to the run before. What was loaded lies in the state.
            self._unplaced.clear()
            self._is_loaded = True
        missing: set[str] = set()
        for bound in self._transforms:
            for index, group in enumerate(groups):
                asks, keeps = bound.asks(bound.settings(group))
                names, by_matrix = self.names(keeps), finest_scope(asks) == "matrix"
                for entry in entries if names else ():
                    param = entry.tensor
                    if entry.group != index or not param.requires_grad or param.is_meta or not self._may_keep(param):
                        continue
                    state = self._state_of(param).setdefault(param, {})
                    for name, begins in names.items():
                        key = f"{bound.state_prefix}_{name}"
                        # A rule that had another scope when it was saved has kept other numbers.
                        shape = param.shape[:-2] if by_matrix else ()
                        if key not in state or (is_loaded and state[key].shape != shape):
                            new = numbers_like(param, begins, by_matrix)
                            if (moved := self._unplaced.pop((key, param), None)) is not None:
                                local_tensor(new).copy_(moved.view_as(local_tensor(new)))
                            state[key] = new
                            missing.add(bound.label)
        # A run that adds such a rule to an old checkpoint is legal, but nobody shall take the numbers for resumed ones.
        if is_loaded and missing and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the loaded state has no kept numbers of {', '.join(sorted(missing))}; they begin anew with the next step",
                UserWarning,
                stacklevel=3,
            )

    def read(
        self,
        bound: BoundTransform,
        keeps: Mapping[str, float | Measure],
        entries: Sequence[NamedParam],
        group: int,
        device: torch.device,
        nums: Sequence[int] | None,
    ) -> dict[str, Tensor]:
        """The kept numbers of one rule for the parameters of one group, float64, in one row.

        nums: how many numbers each entry has of its own; None: all entries share one.

        Of a group without elements on this rank: NaN once a checkpoint has been loaded, since none was loaded here.
        """
        wide, is_shared = wide_dtype(device), nums is None
        found: dict[str, Tensor] = {}
        for name, begins in self.names(keeps).items():
            key = f"{bound.state_prefix}_{name}"
            # Without making an entry: an optimizer begins its state only where there is none.
            values = [self._state_of(entry.tensor).get(entry.tensor, {}).get(key) for entry in entries]
            if self._unplaced:
                values = [
                    self._unplaced.get((key, entry.tensor)) if value is None else value
                    for value, entry in zip(values, entries, strict=True)
                ]
            # Under `attach` some parameters may have no state yet; any that has it tells the shared number.
            if is_shared:
                values = [next((value for value in values if value is not None), self._unplaced.get((key, group)))]
                if self._is_loaded and all(is_empty_piece(entry.tensor) for entry in entries):
                    begins = torch.nan
            known = [
                torch.full((num,), begins, dtype=wide, device=device)
                if value is None
                else local_tensor(value).reshape(-1).to(device, wide)
                for value, num in zip(values, [1] if nums is None else nums, strict=True)
            ]
            found[name] = torch.cat(known) if known else torch.zeros(0, dtype=wide, device=device)
        return found

    def write(
        self,
        bound: BoundTransform,
        values: Mapping[str, Tensor],
        entries: Sequence[NamedParam],
        group: int,
        nums: Sequence[int] | None,
        by_matrix: bool,
    ) -> None:
        """Store the numbers of a step that counts, as `read` returns them; by_matrix: whether a stack has one for each matrix."""
        is_shared = nums is None
        for name, value in values.items():
            key = f"{bound.state_prefix}_{name}"
            own = [value] * len(entries) if nums is None else value.split(list(nums))
            targets: list[Tensor] = []
            parts: list[Tensor] = []
            shared: dict[torch.device, Tensor] = {}
            if is_shared and not entries:
                self._unplaced[key, group] = value.to(torch.float32)
            for place, entry in enumerate(entries):
                param = entry.tensor
                if not self._may_keep(param):
                    self._unplaced[key, param] = own[place].to(torch.float32)
                    continue
                self._unplaced.pop((key, param), None)
                state, device = self._state_of(param).setdefault(param, {}), local_tensor(param).device
                target = state.get(key)
                # A parameter that had no room for it in earlier steps gets it now, with the value that the others have.
                if target is None:
                    target = state[key] = numbers_like(param, 0.0, by_matrix)
                if is_shared:
                    # One tensor on each device, so that one write reaches all. Loading a checkpoint parts them.
                    known = shared.setdefault(device, target)
                    if known is not target:
                        state[key] = known
                        continue
                targets.append(local_tensor(target))
                parts.append(own[place].to(device, torch.float32).view(targets[-1].shape))
            # foreach raises on empty lists.
            if targets:
                torch._foreach_copy_(targets, parts)

    def remove(self, entries: Sequence[NamedParam]) -> None:
        """Take what these rules keep, anchors too, out of the state of the parameters."""
        for bound in self._all:
            for entry in entries:
                states = self._state_of(entry.tensor)
                state = states.get(entry.tensor, {})
                for key in [key for key in state if str(key).startswith(f"{bound.state_prefix}_")]:
                    del state[key]
                # An entry that was there for our numbers alone: an optimizer without state had none.
                if entry.tensor in states and not state:
                    del states[entry.tensor]


def numbers_like(param: Tensor, begins: float, by_matrix: bool) -> Tensor:
    """New kept numbers of a parameter, float32: one, or, by matrix, one for each matrix of a stack, cut as the stack is."""
    device, num_stacked = local_tensor(param).device, max(param.dim() - 2, 0)
    if not by_matrix or not num_stacked:
        return torch.full((), begins, dtype=torch.float32, device=device)
    local = torch.full(stack_here(param), begins, dtype=torch.float32, device=device)
    if not isinstance(param, DTensor):
        return local
    # Where the matrices themselves are cut, the ranks that hold parts of them have copies of their numbers.
    placements = [p if isinstance(p, SHARDS) and p.dim < num_stacked else Replicate() for p in param.placements]
    shape = param.shape[:num_stacked]
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(num_stacked))
    return DTensor.from_local(local, param.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def is_empty_piece(param: Tensor) -> bool:
    """Whether a plain tensor holds nothing, as FSDP1's pieces do on some ranks. (A DTensor's size is that of the whole.)"""
    return param.numel() == 0


def kept_in(state_dict: Mapping[str, Any]) -> dict[int, State]:
    """The kept numbers in a state dict, by the position of the parameter among all of its groups.

    Anchors are not among them: they have the dtype of their parameter, which torch leaves them.
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    found = {}
    for position, index in enumerate(saved):
        state = state_dict["state"].get(index, {})
        own = {key: value for key, value in state.items() if is_kept_key(key) and not key.endswith(f"_{ANCHOR}")}
        if own:
            found[position] = own
    return found


def restore_kept(optimizer: torch.optim.Optimizer, kept: Mapping[int, State]) -> None:
    """Give kept numbers back the bits that they were saved with.

    torch casts what it loads to the dtype of the parameter: bf16 would keep 8 bits of them.
    """
    if not kept:
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for position, own in kept.items():
        for key, value in own.items():
            if isinstance(value, Tensor):
                device = local_tensor(params[position]).device
                optimizer.state[params[position]][key] = value.detach().to(device, torch.float32, copy=True)
