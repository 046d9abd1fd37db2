"""The parameters that a user passes, and that optimizers have now, as one flat list with names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from ..checks import plain_number
from .world import World

Groups = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class NamedParam:
    """One parameter of an optimizer.

    name: its name, or "param 3" (its position) if it has none.
    tensor: the parameter itself, a DTensor or a plain tensor.
    group: the index of its param group.
    named: whether the user has given the name.
    decay: the weight decays of its group as text, for the plan's table.
    """

    name: str
    tensor: Tensor
    group: int = 0
    named: bool = False
    decay: str = ""


def is_frozen(param: Tensor) -> bool:
    """Whether a parameter of an optimizer is not trained now: it requires no gradient, and has none.

    A tensor that requires none may still be given one, and then every optimizer steps it: the fp32 copies of Megatron.
    """
    return param.grad is None and not param.requires_grad


def frozen_in(entries: Sequence[NamedParam]) -> frozenset[int]:
    """The positions of an optimizer's parameters that are not trained now."""
    return frozenset(position for position, entry in enumerate(entries) if is_frozen(entry.tensor))


def entries_of(params: Iterable[Any]) -> tuple[NamedParam, ...]:
    """What torch.optim takes as `params`, as a flat list in the same order.

    params: tensors, (name, tensor) pairs, or group dicts of them.
    Raises ValueError for a lone tensor, TypeError for members that are neither tensors nor pairs.
    """
    if isinstance(params, Tensor):
        raise ValueError("params must be an iterable of tensors, not one tensor; pass [tensor]")
    items = listed(params)
    if any(isinstance(item, Mapping) for item in items):
        return entries_of_groups(items)
    return entries_of_groups([{"params": items}])


_ATTACHED = "distwd_weight_decay"


def is_for_both(group: Mapping[str, Any]) -> bool:
    """Whether the decay of a param group stands in it twice, as `param_groups` writes it: for a Chain, and for `attach`."""
    own, attached = group.get("weight_decay"), group.get(_ATTACHED)
    if own is None or attached is None:
        return False
    # Tensors by identity: comparing them would read them.
    return own is attached or (not isinstance(own, Tensor) and not isinstance(attached, Tensor) and own == attached)


def entries_of_groups(groups: Sequence[Mapping[str, Any]]) -> tuple[NamedParam, ...]:
    """The parameters of param groups, as a user writes them or torch.optim keeps them (`param_names` beside `params`)."""
    entries: list[NamedParam] = []
    for index, group in enumerate(groups):
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        decays = [
            plain_number(value)
            for key, value in group.items()
            if key.startswith(("weight_decay", "distwd_weight_decay")) and not (key == _ATTACHED and is_for_both(group))
        ]
        # A decay that is a tensor is not read: that would wait for the device.
        decay = " ".join(f"{d:g}" if isinstance(d, (int, float)) else type(d).__name__.lower() for d in decays)
        names = group.get("param_names") or [None] * len(members)
        for name, member in zip(names, members, strict=True):
            if isinstance(member, tuple):
                name, member = member
            if not isinstance(member, Tensor):
                raise TypeError(f"params must hold tensors or (name, tensor) pairs, not {type(member).__name__}")
            # Without a name the position among all parameters stands for it: ranks match by that.
            entries.append(NamedParam(name or f"param {len(entries)}", member, index, name is not None, decay))
    return tuple(entries)


def normalised_groups(params: Iterable[Any], group: dist.ProcessGroup | None) -> list[Any]:
    """`params` in a form that torch.optim.Optimizer accepts, also where a rank or a param group holds nothing.

    params: what a user passes to an optimizer; group dicts are copied.
    group: the ranks that hold the model.
    Returns [one empty group] for a rank of several that has no parameters (a pipeline stage, say), else the same
    members.
    Raises ValueError for no parameters in a world of one and for parameters of lazy modules, TypeError for a lone tensor
        or a set, as torch does.
    """
    if isinstance(params, Tensor):
        raise TypeError(
            "params must be an iterable of tensors, (name, tensor) pairs or group dicts, not one tensor; pass [tensor]"
        )
    items = listed(params)
    # torch refuses an empty list. One process without parameters is a mistake; one rank of several may be a stage
    # without any.
    if not items:
        if World.of(group).size == 1:
            raise ValueError("optimizer got an empty parameter list; pass model.named_parameters()")
        return [{"params": []}]
    if not isinstance(items[0], dict):
        _check_not_lazy(items)
        return items
    groups = []
    for item in items:
        members = item["params"]
        # torch refuses sets too, but would not see one that has been copied into a list.
        if isinstance(members, set):
            raise TypeError(
                "params of a group must be an ordered collection, not a set: ranks would disagree on the order; pass a list"
            )
        groups.append({**item, "params": [members] if isinstance(members, Tensor) else list(members)})
        _check_not_lazy(groups[-1]["params"])
    # torch refuses a group without names beside groups with names, and an empty group has none to look at.
    if any("param_names" in item or any(isinstance(member, tuple) for member in item["params"]) for item in groups):
        for item in groups:
            if not item["params"]:
                item["param_names"] = []
    return groups


def listed(params: Iterable[Any]) -> list[Any]:
    """`params` as a list. Raises ValueError for what holds parameters, and is no list of them."""
    # Iterated over, the one would fail with torch's words, or give its layers; the other its names.
    if isinstance(params, Module):
        raise ValueError(f"params is a {type(params).__name__}, which is a module; pass model.named_parameters()")
    if isinstance(params, Mapping):
        raise ValueError(f"params is a {type(params).__name__} by name; pass its .items()")
    if not isinstance(params, Iterable):
        raise ValueError(f"params is {params!r}, which holds no parameters; pass model.named_parameters() first")
    return list(params)  # a generator, such as model.parameters(), can be read once only


def check_has_shape(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a parameter of a lazy module that has not seen a batch: it has no shape yet."""
    if is_lazy(tensor):
        raise ValueError(
            f"{name} is of a lazy module and has no shape yet; run one forward pass first, then make groups and optimizer"
        )


def _check_not_lazy(members: Sequence[Any]) -> None:
    for position, member in enumerate(members):
        name, tensor = member if isinstance(member, tuple) and len(member) == 2 else (f"param {position}", member)
        check_has_shape(name, tensor)


@dataclass(frozen=True, slots=True, eq=False)
class Params:
    """The parameters of one or several optimizers at one moment.

    groups: all param groups, also those that are hidden now; an index means the same group in every step.
    entries: all parameters, in the order of the groups. The same tuple as long as the groups hold the same tensors.
    active: the indices of the groups that the optimizers show now: all of them, but for DeepSpeed's.
    """

    groups: Groups
    entries: tuple[NamedParam, ...]
    active: frozenset[int]


class ParamList:
    """The parameters of one or several optimizers, followed from step to step.

    Other libraries change what an optimizer holds between steps, and during one. DeepSpeed's ZeRO-1 and 2 step one
    group at a time and hide the others meanwhile. accelerate's `prepare` puts other tensors into the places of the old
    ones.

    shown: returns the param groups that the optimizers have now.
    named_parameters: (name, tensor) pairs, for optimizers that were made without names; None for one that is being made.
        A tensor that another has taken the place of is not kept alive by them.
    """

    def __init__(
        self, shown: Callable[[], Groups], named_parameters: Iterable[tuple[str, Tensor]] | None = None
    ) -> None:
        self._shown = shown
        self._all: Groups = ()
        self._ids: tuple[list[int], list[int]] = [], []
        self._entries: tuple[NamedParam, ...] = ()
        # By identity, since `==` of tensors compares elements; the tensor stands beside its name, so that its id cannot
        # come to mean another. Not weakly: torch refuses to move or cast a parameter that has a weak reference.
        self._given = {id(tensor): (name, tensor) for name, tensor in named_parameters or ()}
        # By group and member, the names that were seen first.
        self._places: list[list[str | None]] = []
        # The names of tensors in the groups, beside them; see `_given`.
        self._known: dict[int, tuple[str, Tensor]] = {}
        # An optimizer that is there already has the names of this run now: before the first step a checkpoint may bring
        # others, and other tensors may take the places.
        if named_parameters is not None:
            self._with_names(shown())

    @property
    def groups(self) -> Groups:
        """All param groups, as in `read`, without a look at the parameters."""
        shown = self._shown()
        known = set(map(id, self._all))
        # Fewer groups than before, all of them known, are a part of the whole. Anything else is a new whole.
        if not shown or len(shown) >= len(self._all) or any(id(group) not in known for group in shown):
            self._all = list(shown)
        return self._all

    def read(self) -> Params:
        """The parameters as they are now. Reads no values and copies nothing."""
        groups = self.groups
        shown = set(map(id, self._shown()))
        active = frozenset(index for index, group in enumerate(groups) if id(group) in shown)
        # The entries keep their tensors alive, so the id of one cannot come to mean another.
        ids = [len(group["params"]) for group in groups], [id(param) for group in groups for param in group["params"]]
        if ids != self._ids:
            self._ids, self._entries = ids, entries_of_groups(self._with_names(groups))
        return Params(groups, self._entries, active)

    def forget(self) -> None:
        """Read everything anew next time. After a change was refused, the user may undo it; keys of groups may be new."""
        self._all, self._ids = (), ([], [])

    def _with_names(self, groups: Groups) -> Groups:
        """The groups, with `param_names` where the names of all members are known, and without where not.

        A tensor keeps the name that it was first seen with. So the names of this run are kept when a checkpoint is
        loaded, which brings those of the run that saved it (`_orig_mod.weight`, say).
        """
        named, known = [], {}
        for index, group in enumerate(groups):
            params, own = group["params"], group.get("param_names") or []
            # DeepSpeed puts one flat tensor in the place of many and leaves their names.
            if len(own) != len(params):
                own = [None] * len(params)
            # A group that has lost or gained a member has no known order. That of a new group is known from now on.
            places = self._places[index] if index < len(self._places) else own
            if len(places) != len(params):
                places = own
            names = [
                self._known.get(id(param), (None,))[0] or name or self._given.get(id(param), (None,))[0] or place
                for param, name, place in zip(params, own, places, strict=True)
            ]
            if index == len(self._places):
                self._places.append(names)
            known.update({id(param): (name, param) for param, name in zip(params, names, strict=True) if name})
            # A group that is named in part would mix names and positions.
            named.append({**group, "param_names": [] if None in names else names})
        # What has left the groups may be gigabytes that another library has replaced, so it is let go. What has not been
        # in them may still come, by add_param_group.
        self._known = known
        self._given = {key: one for key, one in self._given.items() if key not in known}
        return named
