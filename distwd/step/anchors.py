"""Anchors: the tensors that rules pull parameters to, where that is no number."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._torch import local_tensor
from ..sharding.params import NamedParam, Params
from .state import ANCHOR, State, is_empty_piece
from .step import Batch
from .transform import BoundTransform, GroupSettings, Transform

# (rule, index of the group, "initial" or "given")
Wanted = tuple[tuple[BoundTransform, int, str], ...]

BEGUN = f"{ANCHOR}_begun"


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
            warnings.warn(
                f"the loaded state has no anchors of {', '.join(sorted(missing))}; they begin anew, as the parameters are when "
                "the next step begins",
                UserWarning,
                stacklevel=3,
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
                        return f"{bound.label}: toward[{entry.name!r}] {found}"
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
        anchor = param.detach().clone()
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
    if isinstance(param, DTensor):
        if not isinstance(given, DTensor):
            return (
                f"is a plain tensor, and the parameter is cut as {param.placements}; cut it alike, with "
                "torch.distributed.tensor.distribute_tensor(tensor, param.device_mesh, param.placements)"
            )
        if given.device_mesh != param.device_mesh or given.placements != param.placements:
            return f"is cut as {given.placements}, and the parameter as {param.placements}; redistribute it"
    elif isinstance(given, DTensor):
        return "is a DTensor, and the parameter a plain tensor; pass its local tensor"
    if local_tensor(given).device != local_tensor(param).device:
        return f"lies on {local_tensor(given).device}, and the parameter on {local_tensor(param).device}; move it there"
    return None
