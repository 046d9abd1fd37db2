"""What rules carry from step to step, numbers and anchors: where it lies in the optimizer's state, and when it changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import dtensor_of, is_dtensor, is_strided_shard, local_tensor
from ..checks import warn_user
from ..kernels.sums import wide_dtype
from ..metrics.measure import OWN
from ..metrics.metric import Measure
from ..sharding.params import NamedParam, Params
from ..sharding.pieces import stack_here
from .step import Batch
from .transform import BoundTransform, GroupSettings, Transform

State = dict[str, Any]

PREFIX = "distwd_"  # of the keys of kept numbers in an optimizer's state
# Counts the steps of numbers that begin as a metric. It tells that they have begun; no value of theirs could.
COUNT = "num_steps"
ANCHOR = "anchor"  # what ends the key of a parameter's anchor
BEGUN = f"{ANCHOR}_begun"  # ... and the key of what tells whether that has begun

# What is pulled to tensors: (rule, index of the group, "initial" or "given").
Wanted = tuple[tuple[BoundTransform, int, str], ...]


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
                settings = bound.settings(group)
                asks, keeps = bound.asks(settings)
                names, scope = self.names(keeps), bound.scope(settings, asks)
                by_matrix, made = scope == "matrix", False
                states: list[State] = []
                for entry in entries if names else ():
                    param = entry.tensor
                    if entry.group != index or not param.requires_grad or param.is_meta or not self._may_keep(param):
                        continue
                    state = self._state_of(param).setdefault(param, {})
                    states.append(state)
                    for name, begins in names.items():
                        key = f"{bound.state_prefix}_{name}"
                        # A rule that had another scope when it was saved has kept other numbers.
                        shape = param.shape[:-2] if by_matrix else ()
                        if key not in state or (is_loaded and state[key].shape != shape):
                            new = numbers_like(param, begins, by_matrix)
                            if (moved := self._unplaced.pop((key, param), None)) is not None:
                                local_tensor(new).copy_(moved.view_as(local_tensor(new)))
                            state[key] = new
                            made = True
                # A parameter of which the checkpoint has none (it was frozen) goes on with what the others of its group share.
                if is_loaded and scope not in OWN and _spread(states, bound.state_prefix, names):
                    made = False
                if made:
                    missing.add(bound.label)
        # A run that adds such a rule to an old checkpoint is legal, but nobody shall take the numbers for resumed ones.
        if is_loaded and missing and not self._has_warned:
            self._has_warned = True
            warn_user(
                f"the loaded state has no kept numbers of {', '.join(sorted(missing))}; they begin anew with the next step"
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
        entries = self._holders(bound, self.names(keeps), entries) if nums is None else entries
        # Without making an entry: an optimizer begins its state only where there is none.
        states = [self._state_of(entry.tensor).get(entry.tensor, {}) for entry in entries]
        for name, begins in self.names(keeps).items():
            key = f"{bound.state_prefix}_{name}"
            values = [state.get(key) for state in states]
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
                torch.full((num,), begins, dtype=wide, device=device) if value is None else local_tensor(value)
                for value, num in zip(values, [1] if nums is None else nums, strict=True)
            ]
            # They are joined before they are converted, and without a view of each: of many small tensors either costs
            # more than all the rest.
            if len({one.device for one in known}) > 1:
                known = [one.to(device) for one in known]
            if any(one.dim() for one in known):
                joined = torch.cat([one.reshape(-1) for one in known])
            else:
                joined = torch.stack(known) if known else torch.zeros(0)
            found[name] = joined.to(device, wide)
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
        entries = self._holders(bound, values, entries) if nums is None else entries
        states = [self._state_of(entry.tensor).get(entry.tensor, {}) for entry in entries]
        for name, value in values.items():
            key, value = f"{bound.state_prefix}_{name}", value.to(torch.float32)
            targets = [state.get(key) for state in states]
            if nums is None and not entries:
                self._unplaced[key, group] = value
            for place, target in enumerate(targets) if self._unplaced or any(one is None for one in targets) else ():
                param = entries[place].tensor
                if target is None and not self._may_keep(param):
                    self._unplaced[key, param] = value if nums is None else value.split(list(nums))[place]
                    continue
                self._unplaced.pop((key, param), None)
                # A parameter that had no room for it in earlier steps gets it now, with the value that the others have.
                if target is None:
                    states[place] = self._state_of(param).setdefault(param, {})
                    targets[place] = states[place][key] = numbers_like(param, 0.0, by_matrix)
            if nums is None:
                # One tensor on each device, so that one write reaches all. Loading a checkpoint parts them.
                shared: dict[torch.device, Tensor] = {}
                for place, target in enumerate(targets):
                    if target is not None:
                        first = shared.setdefault(local_tensor(entries[place].tensor).device, target)
                        if first is not target:
                            states[place][key] = first
                targets = list(shared.values())
            # One copy to each device, and one write there.
            locals_ = [None if target is None else local_tensor(target) for target in targets]
            for device in dict.fromkeys(one.device for one in locals_ if one is not None):
                there = value.to(device)
                if nums is None:
                    own: Sequence[Tensor] = [there] * len(locals_)
                else:
                    own = there.unbind() if set(nums) == {1} else there.split(list(nums))
                pairs = [
                    (one, part)
                    for one, part in zip(locals_, own, strict=True)
                    if one is not None and one.device == device
                ]
                torch._foreach_copy_(
                    [one for one, _ in pairs],
                    [part if part.shape == one.shape else part.view(one.shape) for one, part in pairs],
                )

    def _holders(
        self, bound: BoundTransform, names: Collection[str], entries: Sequence[NamedParam]
    ) -> Sequence[NamedParam]:
        """Those of a group's parameters that share its numbers: that are trained, or frozen but have them from before."""
        keys = [f"{bound.state_prefix}_{name}" for name in names]

        def has_any(param: Tensor) -> bool:
            state = self._state_of(param).get(param, {})
            return any(key in state or (key, param) in self._unplaced for key in keys)

        return [entry for entry in entries if entry.tensor.requires_grad or has_any(entry.tensor)]

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


def _spread(states: Sequence[State], prefix: str, names: Mapping[str, float]) -> bool:
    """Give parameters whose shared numbers are as they begin those that others have; whether any are not so. Reads them."""
    keys = [f"{prefix}_{name}" for name in names]
    numbers = [[float(state[key]) for key in keys] for state in states]
    moved = next((own for own in numbers if own != list(names.values())), None)
    if moved is None:
        return False
    for state, own in zip(states, numbers, strict=True):
        if own == list(names.values()):
            state.update({key: torch.full_like(state[key], value) for key, value in zip(keys, moved, strict=True)})
    return True


def numbers_like(param: Tensor, begins: float, by_matrix: bool) -> Tensor:
    """New kept numbers of a parameter, float32: one, or, by matrix, one for each matrix of a stack, cut as the stack is."""
    device, num_stacked = local_tensor(param).device, max(param.dim() - 2, 0)
    if not by_matrix or not num_stacked:
        return torch.full((), begins, dtype=torch.float32, device=device)
    local = torch.full(stack_here(param), begins, dtype=torch.float32, device=device)
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import Replicate

    # Where the matrices themselves are cut, the ranks that hold parts of them have copies of their numbers.
    cuts: Sequence[Any] = param.placements
    placements = [p if (p.is_shard() or is_strided_shard(p)) and p.dim < num_stacked else Replicate() for p in cuts]
    shape = param.shape[:num_stacked]
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(num_stacked))
    return dtensor_of(local, param.device_mesh, placements, shape, stride)


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


# --- anchors ---------------------------------------------------------------------------------------------------------


class Anchors:
    """What the rules of one optimizer pull to: "initial", the parameters as the first real step began, or "given" tensors.

    Initial anchors lie in `optimizer.state[p]`, under `<prefix>_anchor`: tensors with shape, placements and dtype of p, so
    checkpoints save and reshard them like any other state. Beside each lies a 0-d float32, `<prefix>_anchor_begun`: 1 once
    it has begun. Until then it holds whatever p was when it was made.

    transforms: the bound transforms.
    state_of, may_keep: as in `KeptNumbers`.
    """

    def __init__(
        self,
        transforms: Sequence[BoundTransform],
        state_of: Callable[[Tensor], dict[Any, State]],
        may_keep: Callable[[Tensor], bool],
    ) -> None:
        # Most optimizers have no such rule, and then a step shall not even ask.
        self._transforms = [bound for bound in transforms if type(bound.transform).toward is not Transform.toward]
        self._state_of, self._may_keep = state_of, may_keep
        self._has_warned = self._rests = False  # _rests: whether the step under way will be skipped
        # Anchors that have begun while they may not lie in the state yet, by key and parameter.
        self._unplaced: dict[tuple[str, Tensor], Tensor] = {}
        # Those that are known to have begun: the state tells, but reading it would wait for the device in every step.
        self._begun: set[tuple[str, Tensor]] = set()
        self._ready: tuple[Any, ...] = ()  # parameters and settings of which all have begun
        self._fitting: tuple[Any, ...] = ()  # parameters and settings whose given tensors fit

    def wanted(self, settings: Mapping[tuple[int, int], GroupSettings]) -> Wanted:
        """Each rule and group with tensors to pull to, and which."""
        return tuple(
            (bound, index, toward)
            for bound in self._transforms
            for (number, index), own in settings.items()
            if number == bound.index and isinstance(toward := bound.transform.toward(own.values), str)
        )

    # --- outside of a step -----------------------------------------------------------------------

    def keeps_any(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether any parameter of these groups has an initial anchor."""
        return any(
            bound.transform.toward(bound.settings(group)) == "initial" for bound in self._transforms for group in groups
        )

    def create(
        self, entries: Sequence[NamedParam], groups: Sequence[Mapping[str, Any]], is_loaded: bool = False
    ) -> None:
        """Make what is missing, so that every rank has every key before a checkpoint is saved or loaded.

        is_loaded: whether a checkpoint has just been loaded. What that did not bring begins with the next real step.
        """
        if is_loaded:
            # What has begun until now belongs to the run before. What was loaded tells itself whether it has.
            self._unplaced.clear()
            self._begun.clear()
            self._ready = ()
        missing = set()
        for bound in self._transforms:
            towards = [bound.transform.toward(bound.settings(group)) for group in groups]
            for entry in entries if "initial" in towards else ():
                param, key = entry.tensor, f"{bound.state_prefix}_{ANCHOR}"
                if towards[entry.group] == "initial" and self._holds(param) and self._may_keep(param):
                    state = self._state_of(param).setdefault(param, {})
                    if key not in state:
                        self._place(bound, param, self._unplaced.pop((key, param), None))
                        missing.add(bound.label)
        # Legal for a run that adds such a rule to an old checkpoint, but nobody shall take them for those of the first run.
        if is_loaded and missing and not self._has_warned:
            self._has_warned = True
            warn_user(
                f"the loaded state has no anchors of {', '.join(sorted(missing))}; they begin anew, as the parameters are when "
                "the next step begins"
            )

    def with_current_words(self, state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A state dict in which groups that pull to "initial" or "given" tensors go on so, if they were saved without any.

        All other settings come from the checkpoint, as in torch; but whoever adds anchors to a run that resumes would lose
        them without a word.
        """
        found = []
        for now, saved in zip(groups, state_dict["param_groups"], strict=False):
            own = {}
            for bound in self._transforms:
                key, anchor = bound.keys.get("toward", ""), f"{bound.state_prefix}_{ANCHOR}"
                had_any = any(anchor in state_dict["state"].get(index, {}) for index in saved["params"])
                if isinstance(now.get(key), str) and not isinstance(saved.get(key), str) and not had_any:
                    own[key] = now[key]
            found.append({**saved, **own})
        return {**state_dict, "param_groups": found + state_dict["param_groups"][len(found) :]}

    def forget(self) -> None:
        """Let go of all memory."""
        self._unplaced, self._begun, self._ready, self._fitting = {}, set(), (), ()

    # --- in a step -------------------------------------------------------------------------------

    def fault(self, params: Params, wanted: Wanted) -> str | None:
        """Why tensors that were given do not fit the parameters, as a text; None if they do."""
        if self._fitting and self._fitting[0] is params.entries and self._fitting[1] == wanted:
            return None
        for bound, index, toward in wanted:
            given = bound.transform.given or {}
            for entry in params.entries if toward == "given" else ():
                if entry.group == index and self._holds(entry.tensor):
                    found = _misfit(entry.tensor, given.get(entry.name))
                    if found is not None:
                        hint = (
                            "" if entry.named else "; parameters without names are called so: pass named_parameters()"
                        )
                        return f"{bound.label}: toward[{entry.name!r}] {found}{hint}"
        self._fitting = (params.entries, wanted)
        return None

    def begin(
        self, params: Params, wanted: Wanted, found_inf: Tensor | None = None, groups: Collection[int] | None = None
    ) -> None:
        """A real step begins: initial anchors that have not begun are now the parameters.

        wanted: as `wanted` returns it.
        found_inf: not 0 where the step will be skipped; then nothing begins.
        groups: indices of the groups that the step is of; None: all.
        Reads state and `found_inf`, but only while there is something to begin.
        """
        self._rests = False
        if self._ready and self._ready[0] is params.entries and self._ready[1] == wanted:
            return
        waiting = [
            (bound, entry.tensor)
            for bound, index, toward in wanted
            for entry in (params.entries if toward == "initial" and (groups is None or index in groups) else ())
            if entry.group == index
            and self._holds(entry.tensor)
            and (f"{bound.state_prefix}_{ANCHOR}", entry.tensor) not in self._begun
        ]
        if waiting and found_inf is not None and bool(found_inf != 0):
            self._rests = True
            return
        # What a checkpoint has brought is never taken anew.
        states = [(bound, param, self._state_of(param).get(param, {})) for bound, param in waiting]
        told = [state.get(f"{bound.state_prefix}_{BEGUN}") for bound, _, state in states]
        # One read for all.
        known = [flag.to("cpu", torch.float32) for flag in told if flag is not None]
        flags = iter(torch.stack(known).tolist() if known else [])
        for (bound, param, _), flag in zip(states, told, strict=True):
            if flag is None or not next(flags):
                self._begin_one(bound, param, local_tensor(param))
            self._begun.add((f"{bound.state_prefix}_{ANCHOR}", param))
        # A step of some groups says nothing of the others.
        if groups is None or all(index in groups for _, index, toward in wanted if toward == "initial"):
            held = {entry.tensor for entry in params.entries}
            self._begun = {(key, param) for key, param in self._begun if param in held}
            self._ready = (params.entries, wanted)

    def of(self, bound: BoundTransform, toward: str, batch: Batch, entries: Sequence[NamedParam]) -> list[Tensor]:
        """The local anchors of a batch."""
        if toward == "given":
            assert bound.transform.given is not None, "checked with the settings"
            return [local_tensor(bound.transform.given[entries[position].name]) for position in batch.index]
        key = f"{bound.state_prefix}_{ANCHOR}"
        found = []
        for param, local in zip(batch.whole, batch.params, strict=True):
            # Of nothing, or in a step that writes nothing, before it has begun: any tensor will do.
            if not self._holds(param) or (self._rests and (key, param) not in self._begun):
                found.append(local)
                continue
            # What was frozen when the step began, and has a gradient now, begins late. (The batch still has the parameters
            # as they were before the step.)
            if (key, param) not in self._begun:
                state = self._state_of(param).get(param, {})
                if (flag := state.get(f"{bound.state_prefix}_{BEGUN}")) is None or not bool(flag):
                    self._begin_one(bound, param, local)
                self._begun.add((key, param))
            anchor = self._unplaced.get((key, param)) if self._unplaced else None
            anchor = local_tensor(self._state_of(param)[param][key] if anchor is None else anchor)
            if anchor.shape != local.shape:
                raise ValueError(
                    f"{bound.label}: the anchor of a parameter that is cut to {tuple(local.shape)} here is cut to "
                    f"{tuple(anchor.shape)}: it was sharded otherwise after the optimizer was made; make the optimizer anew"
                )
            found.append(anchor)
        return found

    # --- its parts -------------------------------------------------------------------------------

    @staticmethod
    def _holds(param: Tensor) -> bool:
        """Whether a parameter has an anchor here."""
        return param.requires_grad and not param.is_meta and not is_empty_piece(param)

    def _begin_one(self, bound: BoundTransform, param: Tensor, now: Tensor) -> None:
        """The anchor of `param` is its local value `now`."""
        made = self._state_of(param).get(param, {}).get(f"{bound.state_prefix}_{ANCHOR}")
        kinds = [
            (local_tensor(one).shape, one.dtype, one.device, getattr(one, "placements", None))
            for one in (param, param if made is None else made)
        ]
        # In the tensor that was made for it, but where the parameter has been moved or sharded since.
        anchor = param.detach().clone() if made is None or kinds[0] != kinds[1] else made
        local_tensor(anchor).copy_(now)
        if self._may_keep(param):
            self._place(bound, param, anchor)
        else:
            self._unplaced[f"{bound.state_prefix}_{ANCHOR}", param] = anchor

    def _place(self, bound: BoundTransform, param: Tensor, anchor: Tensor | None) -> None:
        """Put an anchor that has begun into the state of `param`; None: one that has not."""
        state = self._state_of(param).setdefault(param, {})
        begun, device = float(anchor is not None), local_tensor(param).device
        state[f"{bound.state_prefix}_{ANCHOR}"] = param.detach().clone() if anchor is None else anchor
        state[f"{bound.state_prefix}_{BEGUN}"] = torch.full((), begun, dtype=torch.float32, device=device)


def _misfit(param: Tensor, given: Any) -> str | None:
    """Why a given tensor cannot be the anchor of a parameter; None if it can."""
    if given is None:
        return "is missing; give a tensor for every parameter, or toward=0.0 to the group of those that have none"
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.layout is not torch.strided:
        what = f"a {given.dtype} tensor" if isinstance(given, Tensor) else repr(type(given).__name__)
        return f"is {what}; pass a dense tensor of floating point numbers"
    if given.shape != param.shape:
        return f"has shape {tuple(given.shape)}, and the parameter {tuple(param.shape)}; pass a tensor of that shape"
    if is_dtensor(param):
        if not is_dtensor(given):
            return (
                f"is a plain tensor, and the parameter is cut as {param.placements}; cut it alike, with "
                "torch.distributed.tensor.distribute_tensor(tensor, param.device_mesh, param.placements)"
            )
        if given.device_mesh != param.device_mesh or given.placements != param.placements:
            return f"is cut as {given.placements}, and the parameter as {param.placements}; redistribute it"
    elif is_dtensor(given):
        return "is a DTensor, and the parameter a plain tensor; pass its local tensor"
    if local_tensor(given).device != local_tensor(param).device:
        return f"lies on {local_tensor(given).device}, and the parameter on {local_tensor(param).device}; move it there"
    return None
