"""param_groups: which parameters decay, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..checks import check_nonnegative, check_spelling, plain_number
from ..sharding.collectives import gather_objects
from ..sharding.tables import AuditRow, audit_table
from ..sharding.world import World
from .model_params import ModelParam, params_of

Selector = str | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, Tensor], bool]

NO_RULE = -1  # in the place of a rule's number, for a parameter that no rule matches


def param_groups(
    model: nn.Module | Sequence[nn.Module],
    weight_decay: float | Tensor,
    rules: Sequence[tuple[Selector, Mapping[str, Any]]] = (),
    *,
    attached: bool = False,
    keep_empty: bool = True,
    group: dist.ProcessGroup | None = None,
) -> ParamGroups:
    """Make param groups:  λ = weight_decay, and λ = 0 for parameters whose whole tensor has fewer than 2 dimensions.

    model: a module or a list of them (pipeline stages), before or after it is wrapped with DDP, FSDP1
        (use_orig_params=True), fully_shard, torch.compile or activation checkpointing. fully_shard replaces the
        parameters, so make groups and optimizer after it.
    weight_decay: λ ≥ 0, a float or a 0-d tensor.
    rules: pairs (selector, hyperparameters). The first rule that matches a parameter wins. A selector is a glob of names
        ("*.embed*"), a module type or a tuple of them (every parameter anywhere inside such a module), or a
        predicate(name, param). Hyperparameters are any keys of a param group, such as {"lr": 1e-4}; without
        "weight_decay" among them, λ is the default above.
    attached: older calls pass True where `attach` does the decay; the optimizer's own `weight_decay` is 0 then. It is not
        needed any more.
    keep_empty: True keeps groups of which this rank holds no parameter (pipeline stages), so that all ranks have the same
        groups. False drops them; torch's flattened optimizer state cannot be loaded into such groups.
    group: the ranks that together hold the model; default all ranks. Every rank of it must make this call: it is a
        collective.

    Returns a list of group dicts with (name, tensor) pairs, for any torch optimizer or `Chain`. λ stands in two keys:
    `weight_decay`, for the optimizer itself or a `Chain`, and `distwd_weight_decay`, for `attach`, which sets the other to
    0 until it is removed. Names are those of the bare
    model. A tied parameter comes once. Only parameters that require a gradient are in the groups. Parameters with equal
    hyperparameters share a group, and the order of groups is the same on all ranks. `print` shows the audit.
    Raises ValueError on all ranks alike for a rule that matches no parameter of the whole model, for λ < 0, and for a model
    that FSDP1 has flattened (use_orig_params=False).
    Source: the rule of thumb is that of GPT-2 and timm.

    >>> import torch
    >>> from distwd import param_groups
    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2))
    >>> groups = param_groups(model, 0.1, rules=[(torch.nn.Embedding, {"weight_decay": 0.0})])
    >>> print(groups)
    group  weight_decay  parameters  whole  tensors  elements  also  rule
    0      0.1           1.weight    2×4    1        8         -     default
    1      0             0.weight    10×4   1        40        -     rules[0]: Embedding
    1      0             1.bias      2      1        2         -     default, < 2 dimensions
    decayed: 1 tensors, 8 elements; not decayed: 2 tensors, 42 elements
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    world = World.of(group)
    matches, error = Matches(), None
    try:
        check_nonnegative("weight_decay", weight_decay)
        matches = Matches.of(model, [GroupRule.of(index, rule) for index, rule in enumerate(rules)])
    except Exception as refused:
        # A rank that raised here alone would leave the others waiting in the exchange. It is raised after it.
        error = refused
    keys = _agree_on_keys(matches, error, world)

    # Two rules may set the same hyperparameters. Their parameters then share one group, which keeps foreach lists long.
    settings: list[dict[str, Any]] = []
    index_of: dict[GroupKey, int] = {}
    for key in keys:
        rule, is_vector = key
        own = {"weight_decay": 0.0 if is_vector else weight_decay}
        own.update({} if rule == NO_RULE else matches.rules[rule].settings)
        own = {name: plain_number(value) for name, value in own.items()}
        same = [index for index, other in enumerate(settings) if _are_equal(own, other)]
        index_of[key] = same[0] if same else len(settings)
        settings += [] if same else [own]

    members: list[list[tuple[str, Tensor]]] = [[] for _ in settings]
    for key, found in matches.params:
        members[index_of[key]].append((found.name, found.param))
    kept = [index for index, pairs in enumerate(members) if pairs or keep_empty]
    groups = []
    for index in kept:
        # Each group gets a copy of a tensor, so that a scheduler can fill one group's λ without changing another's.
        own = {key: value.clone() if isinstance(value, Tensor) else value for key, value in settings[index].items()}
        # The same object in both: `attach` knows by it that it is to take the decay over from the optimizer.
        own.setdefault("distwd_weight_decay", own["weight_decay"])
        if attached:
            own["weight_decay"] = 0.0
        # torch reads names from the pairs. For a group without pairs it needs the key, or it refuses to mix named and
        # unnamed groups.
        names: dict[str, Any] = {} if members[index] else {"param_names": []}
        groups.append({"params": members[index], **names, **own})
    # The table counts groups as the returned list does: without those that were dropped.
    numbers = {key: kept.index(index_of[key]) for key, _ in matches.params}
    rows = [
        _audit_row(matches.rules, key, found, numbers[key], settings[index_of[key]]) for key, found in matches.params
    ]
    return ParamGroups(groups, rows, _notes(matches, world))


class ParamGroups(list[dict[str, Any]]):
    """A list of param groups with a table of which parameters decay, by how much, and why.

    groups: the group dicts.
    rows: a row of the table for each parameter that this rank holds.
    notes: lines that follow the table.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], rows: Sequence[AuditRow], notes: Sequence[str]) -> None:
        super().__init__(groups)
        self._rows, self._notes = tuple(rows), tuple(notes)

    def audit(self) -> str:
        """A table of the groups as they were made: of every kind of parameter that this rank holds, the decay and the rule."""
        return "\n".join([audit_table(self._rows), *self._notes])

    __str__ = audit


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class GroupRule:
    """A rule of `param_groups`.

    selector: which parameters; see `param_groups`.
    settings: their hyperparameters, by group key.
    summary: the rule in words for tables and errors, such as "rules[0]: '*.bias'". It is compared between ranks, so it
        must not depend on the process.
    """

    selector: Selector
    settings: dict[str, Any]
    summary: str

    @classmethod
    def of(cls, index: int, rule: Any) -> GroupRule:
        """Check rule number `index` as the user gave it. Raises ValueError for what is not a rule."""
        if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not isinstance(rule[1], Mapping):
            raise ValueError(f'rules[{index}] must be a pair such as ("*.bias", {{"weight_decay": 0.0}}), not {rule!r}')
        selector, settings = rule
        taken = {"params", "param_names"} & set(settings)
        # torch.optim would take these for the group's own lists of parameters and names.
        if taken:
            raise ValueError(f"rules[{index}] sets {sorted(taken)[0]!r}, which is no hyperparameter; leave it out")
        check_spelling(f"rules[{index}]", settings, ["weight_decay"])
        if "weight_decay" in settings:
            check_nonnegative(f"weight_decay of rules[{index}]", settings["weight_decay"])
        types = selector if isinstance(selector, tuple) else (selector,)
        if isinstance(selector, str):
            text = repr(selector)
        elif types and all(isinstance(one, type) and issubclass(one, nn.Module) for one in types):
            text = " | ".join(one.__name__ for one in types)
        elif callable(selector) and not isinstance(selector, type):
            # Not repr: it holds an address, which differs between ranks.
            text = str(getattr(selector, "__name__", type(selector).__name__))
        else:
            raise ValueError(
                f"rules[{index}]: {selector!r} selects no parameters; use a glob of names, a torch.nn.Module type (or a tuple of "
                "them), or a predicate(name, param)"
            )
        return cls(selector, dict(settings), f"rules[{index}]: {text}")

    def matches(self, found: ModelParam) -> bool:
        """Whether the selector matches any name of the parameter. Raises ValueError if a predicate raises."""
        if isinstance(self.selector, str):
            # Not fnmatch: it ignores case on some systems.
            return any(fnmatchcase(alias.name, self.selector) for alias in found.aliases)
        if isinstance(self.selector, (type, tuple)):
            return any(isinstance(module, self.selector) for alias in found.aliases for module in alias.within)
        for alias in found.aliases:
            try:
                if self.selector(alias.name, found.param):
                    return True
            except Exception as error:
                raise ValueError(f"{self.summary} raised {type(error).__name__} for {alias.name}: {error}") from error
        return False


# --- what this rank finds, and what all ranks agree on ----------------------------------------------------------------

GroupKey = tuple[int, bool]  # number of the rule that won (or NO_RULE); whether the whole tensor has < 2 dimensions


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """The parameters of this rank's model, each with the rule that wins it.

    rules: all rules, in order.
    params: the parameters that require a gradient, each with the key that decides its group.
    matched: the numbers of the rules that match any parameter, frozen ones and those that an earlier rule has won too.
    num_frozen: how many parameters require no gradient.
    """

    rules: tuple[GroupRule, ...] = ()
    params: list[tuple[GroupKey, ModelParam]] = field(default_factory=list)
    matched: set[int] = field(default_factory=set)
    num_frozen: int = 0

    @classmethod
    def of(cls, model: nn.Module | Sequence[nn.Module], rules: Sequence[GroupRule]) -> Matches:
        """Try every rule on every parameter of a model. Raises ValueError as `params_of` and `GroupRule.matches`."""
        params: list[tuple[GroupKey, ModelParam]] = []
        matched: set[int] = set()
        num_frozen = 0
        for found in params_of(model):
            # All rules are tried, not only up to the first that matches: a rule counts as a mistake if nothing matches
            # it, but not if an earlier rule or requires_grad=False has left it without parameters.
            numbers = [number for number, rule in enumerate(rules) if rule.matches(found)]
            matched.update(numbers)
            if found.param.requires_grad:
                params.append(((numbers[0] if numbers else NO_RULE, len(found.shape) < 2), found))
            else:
                num_frozen += 1
        return cls(tuple(rules), params, matched, num_frozen)


def _agree_on_keys(matches: Matches, error: Exception | None, world: World) -> list[GroupKey]:
    """Exchange what each rank has found; a collective.

    matches: what this rank has found; empty if it has met an error.
    error: the error of this rank, if it has met one.
    world: the ranks that together hold the model.
    Returns the keys of all parameters of the whole model, sorted, the same on every rank.
    Raises on every rank if any rank has an error, if rules differ between ranks, or if a rule matches nothing anywhere.
    """
    summaries = tuple(rule.summary for rule in matches.rules)
    own = (str(error or ""), summaries, matches.matched, {key for key, _ in matches.params})
    world.meet("make param_groups")
    gathered = gather_objects(own, world)
    if error is not None:
        raise error
    for rank, (text, *_) in enumerate(gathered):
        if text:
            raise ValueError(f"rank {rank} has found: {text}")
    for _, theirs, *_ in gathered:
        if theirs != summaries:
            raise ValueError(f"ranks have different rules, such as {theirs} and {summaries}")
    for number, summary in enumerate(summaries):
        # A pipeline stage need not hold what the rule matches; some stage must, or the rule has a typing error.
        if not any(number in matched for _, _, matched, _ in gathered):
            example = repr(matches.params[0][1].name) if matches.params else "'layers.0.weight'"
            raise ValueError(
                f"{summary} matches no parameter of the model; names are as in the bare model, such as "
                f"{example}: correct the rule or take it out"
            )
    # Sorted, since state dicts are loaded by the order of groups: it must be the same on every rank.
    keys = sorted(set().union(*(theirs for *_, theirs in gathered)))
    if not keys:
        raise ValueError("model has no parameter that requires a gradient; there is nothing to make groups of")
    return keys


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of hyperparameters are the same. A tensor equals only itself: comparing values would read it."""
    if set(one) != set(other):
        return False
    tensors = [key for key in one if isinstance(one[key], Tensor) or isinstance(other[key], Tensor)]
    return all(one[key] is other[key] if key in tensors else one[key] == other[key] for key in one)


# --- the audit --------------------------------------------------------------------------------------------------------


def _audit_row(
    rules: Sequence[GroupRule], key: GroupKey, found: ModelParam, group: int, settings: Mapping[str, Any]
) -> AuditRow:
    """The row of one parameter: its λ, its other hyperparameters, and the rule that decides them."""
    number, is_vector = key
    by_default = "default, < 2 dimensions" if is_vector else "default"
    reason = by_default if number == NO_RULE else rules[number].summary
    # A rule that sets another hyperparameter, such as lr, leaves λ to the default.
    if number != NO_RULE and "weight_decay" not in rules[number].settings:
        reason += f" (weight_decay by {by_default})"
    also = " ".join(f"{name}={value}" for name, value in settings.items() if name != "weight_decay")
    return AuditRow(found.name, found.shape, group, (float(settings["weight_decay"]),), also, reason)


def _notes(matches: Matches, world: World) -> list[str]:
    """The lines below the table: rules that won nothing here, frozen parameters, and which rank this is."""
    won = {number for (number, _), _ in matches.params}
    others = " or on other ranks" if world.size > 1 else ""
    notes = [
        f"nothing by {rule.summary}: its parameters are taken by earlier rules, frozen{others}"
        for number, rule in enumerate(matches.rules)
        if number not in won
    ]
    if matches.num_frozen:
        notes.append(f"not trained: {matches.num_frozen} tensors without requires_grad")
    if world.size > 1:
        notes.append(f"these are the parameters that rank {world.rank} of {world.size} holds")
    return notes
