"""param_groups: which parameters decay, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..checks import check_nonnegative
from ..sharding.collectives import gather_objects
from ..sharding.tables import AuditRow, audit_table
from ..sharding.world import World
from .model_params import ModelParam, params_of

Selector = str | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, Tensor], bool]

DEFAULT = -1  # the number of no rule


def param_groups(
    model: nn.Module | Sequence[nn.Module],
    weight_decay: float | Tensor,
    rules: Sequence[tuple[Selector, Mapping[str, Any]]] = (),
    *,
    attached: bool = False,
    keep_empty: bool = True,
    group: dist.ProcessGroup | None = None,
) -> ParamGroups:
    """Param groups in which the right parameters decay:  λ = weight_decay, but 0 where the whole tensor has fewer than 2 dimensions.

    model: a module or a list of them (pipeline stages), before or after it is wrapped with DDP, FSDP1 (use_orig_params=True),
        fully_shard, torch.compile or activation checkpointing. Make optimizer and groups after fully_shard: it replaces parameters.
    weight_decay: λ ≥ 0, float or 0-d tensor.
    rules: pairs (which parameters, their hyperparameters); the first that matches wins. Which: a glob of names ("*.embed*"), a
        module type or several (parameters anywhere inside of such a module), or a predicate(name, param). Hyperparameters: any,
        as {"lr": 1e-4}; without "weight_decay" among them, λ is as by default.
    attached: whether `attach` is to decay: then λ is the key `distwd_weight_decay`, and the optimizer's own decay is 0.
    keep_empty: whether a rank keeps groups of which it holds nothing (pipeline stages), so that groups are the same on all ranks.
        False drops them: torch's flattened optimizer state cannot load them.
    group: the ranks that together hold the model; default all ranks. A collective call then: every rank must make it.
    Returns a list of group dicts, with (name, tensor) pairs, for any torch optimizer or `Chain`; equal hyperparameters are one
    group, in the same order on all ranks. `print` shows the audit. Names are those of the bare model; tied parameters come once,
    and only those that require a gradient. Raises ValueError, on all ranks alike, for a rule that matches no parameter of the
    whole model, for λ < 0, and for what flattens parameters beyond recognition (FSDP1 with use_orig_params=False).
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
    survey, error = Matches(), None
    try:
        check_nonnegative("weight_decay", weight_decay)
        survey = Matches.of(model, [GroupRule.of(index, rule) for index, rule in enumerate(rules)])
    except Exception as refused:
        error = refused  # raised after the exchange, or the other ranks would wait in it
    kinds = _agree(survey, error, world)
    return _assemble(survey, kinds, weight_decay, attached, keep_empty, world)


class ParamGroups(list[dict[str, Any]]):
    """A list of param groups that can say which parameters it decays, by how much, and why."""

    def __init__(self, groups: Iterable[dict[str, Any]], lines: Sequence[AuditRow], notes: Sequence[str]) -> None:
        super().__init__(groups)
        self._lines, self._notes = tuple(lines), tuple(notes)

    def audit(self) -> str:
        """A table of the groups as they were made: of every kind of parameter that this rank holds, the decay and the rule."""
        return "\n".join([audit_table(self._lines), *self._notes])

    def __str__(self) -> str:
        return self.audit()


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class GroupRule:
    """Which parameters, their hyperparameters, and the rule in words (the same on every rank)."""

    selector: Selector
    settings: dict[str, Any]
    words: str

    @classmethod
    def of(cls, index: int, rule: Any) -> GroupRule:
        """A checked rule. Raises ValueError for what is not one."""
        if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not isinstance(rule[1], Mapping):
            raise ValueError(f'rules[{index}] must be a pair such as ("*.bias", {{"weight_decay": 0.0}}), not {rule!r}')
        selector, settings = rule
        taken = {"params", "param_names"} & set(settings)
        if taken:
            raise ValueError(f"rules[{index}] sets {sorted(taken)[0]!r}, which is no hyperparameter; leave it out")
        if "weight_decay" in settings:
            check_nonnegative(f"weight_decay of rules[{index}]", settings["weight_decay"])
        return cls(selector, dict(settings), f"rules[{index}]: {_in_words(index, selector)}")

    def matches(self, held: ModelParam) -> bool:
        """Whether any name of the parameter is meant."""
        if isinstance(self.selector, str):
            return any(fnmatchcase(alias.name, self.selector) for alias in held.aliases)
        if isinstance(self.selector, (type, tuple)):
            return any(isinstance(module, self.selector) for alias in held.aliases for module in alias.within)
        return any(self._asks(alias.name, held.param) for alias in held.aliases)

    def _asks(self, name: str, param: Tensor) -> bool:
        assert callable(self.selector)
        try:
            return bool(self.selector(name, param))
        except Exception as error:
            raise ValueError(f"{self.words} raised {type(error).__name__} for {name}: {error}") from error


def _in_words(index: int, selector: Any) -> str:
    if isinstance(selector, str):
        return repr(selector)
    types = selector if isinstance(selector, tuple) else (selector,)
    if types and all(isinstance(one, type) and issubclass(one, nn.Module) for one in types):
        return " | ".join(one.__name__ for one in types)
    if callable(selector) and not isinstance(selector, type):
        return str(getattr(selector, "__name__", type(selector).__name__))
    raise ValueError(
        f"rules[{index}]: {selector!r} says no parameters; use a glob of names, a torch.nn.Module type (or a tuple of "
        "them), or a predicate(name, param)"
    )


# --- what this rank finds, and what all ranks agree on ----------------------------------------------------------------

GroupKey = tuple[int, bool]  # the number of the rule that won, and whether the parameter has fewer than 2 dimensions


class Matches:
    """The parameters of this rank's model, each with the rule that wins it."""

    def __init__(self, rules: Sequence[GroupRule] = (), found: Sequence[ModelParam] = ()) -> None:
        self.rules = tuple(rules)
        verdicts = [[index for index, rule in enumerate(rules) if rule.matches(held)] for held in found]
        self.matched = {index for verdict in verdicts for index in verdict}
        trained = [(held, verdict) for held, verdict in zip(found, verdicts, strict=True) if held.param.requires_grad]
        self.kinds: list[tuple[GroupKey, ModelParam]] = [
            (((verdict or [DEFAULT])[0], len(held.shape) < 2), held) for held, verdict in trained
        ]
        self.num_frozen = len(found) - len(trained)

    @classmethod
    def of(cls, model: nn.Module | Sequence[nn.Module], rules: Sequence[GroupRule]) -> Matches:
        """Look at a model with these rules."""
        return cls(rules, params_of(model))


def _agree(survey: Matches, error: Exception | None, world: World) -> list[GroupKey]:
    """The kinds of parameters that the whole model has, in order; ValueError on every rank if any rank must refuse."""
    words = tuple(rule.words for rule in survey.rules)
    mine = (str(error or ""), words, survey.matched, {kind for kind, _ in survey.kinds})
    told = gather_objects(mine, world)
    refusals = [(rank, text) for rank, (text, *_) in enumerate(told) if text]
    if error is not None:
        raise error
    if refusals:
        raise ValueError(f"rank {refusals[0][0]} refuses: {refusals[0][1]}")
    if any(theirs != words for _, theirs, *_ in told):
        raise ValueError(
            f"ranks have different rules, such as {next(w for _, w, *_ in told if w != words)} and {words}"
        )
    unmatched = [word for index, word in enumerate(words) if not any(index in matched for _, _, matched, _ in told)]
    if unmatched:
        raise ValueError(
            f"{unmatched[0]} matches no parameter of the model; names are as in the bare model, such as "
            f"{_example(survey)}: correct the rule or take it out"
        )
    kinds = sorted(set().union(*(theirs for *_, theirs in told)))
    if not kinds:
        raise ValueError("model has no parameter that requires a gradient; there is nothing to make groups of")
    return kinds


def _example(survey: Matches) -> str:
    return repr(survey.kinds[0][1].name) if survey.kinds else "'layers.0.weight'"


# --- groups -----------------------------------------------------------------------------------------------------------


def _assemble(
    survey: Matches,
    kinds: Sequence[GroupKey],
    weight_decay: float | Tensor,
    attached: bool,
    keep_empty: bool,
    world: World,
) -> ParamGroups:
    settings: list[dict[str, Any]] = []
    index_of: dict[GroupKey, int] = {}
    for kind in kinds:
        own = _settings(survey.rules, kind, weight_decay)
        same = [index for index, other in enumerate(settings) if _equal(own, other)]
        index_of[kind] = same[0] if same else len(settings)
        settings += [] if same else [own]
    members: list[list[tuple[str, Tensor]]] = [[] for _ in settings]
    for kind, held in survey.kinds:
        members[index_of[kind]].append((held.name, held.param))
    kept = [index for index, some in enumerate(members) if some or keep_empty]
    groups = [_group(settings[index], members[index], attached) for index in kept]
    lines = [
        _line(held, kept.index(index_of[kind]), settings[index_of[kind]], survey.rules, kind)
        for kind, held in survey.kinds
    ]
    return ParamGroups(groups, lines, _notes(survey, world))


def _settings(rules: Sequence[GroupRule], kind: GroupKey, weight_decay: float | Tensor) -> dict[str, Any]:
    number, is_vector = kind
    own = {} if number == DEFAULT else rules[number].settings
    return {"weight_decay": 0.0 if is_vector else weight_decay, **own}


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of hyperparameters are the same; a tensor is only equal to itself."""
    if set(one) != set(other):
        return False
    tensors = [key for key in one if isinstance(one[key], Tensor) or isinstance(other[key], Tensor)]
    return all(one[key] is other[key] if key in tensors else one[key] == other[key] for key in one)


def _group(settings: Mapping[str, Any], members: list[tuple[str, Tensor]], attached: bool) -> dict[str, Any]:
    # Each group has tensors of its own, so that a scheduler can fill one without changing another.
    own = {key: value.clone() if isinstance(value, Tensor) else value for key, value in settings.items()}
    if attached:
        own = {"distwd_weight_decay": own.pop("weight_decay"), **own, "weight_decay": 0.0}
    # torch wants to be told that a group has names when it has none.
    return {"params": members, **({} if members else {"param_names": []}), **own}


def _line(
    held: ModelParam, group: int, settings: Mapping[str, Any], rules: Sequence[GroupRule], kind: GroupKey
) -> AuditRow:
    number, is_vector = kind
    by_default = "default, < 2 dimensions" if is_vector else "default"
    words = by_default if number == DEFAULT else rules[number].words
    if number != DEFAULT and "weight_decay" not in rules[number].settings:
        words += f" (weight_decay by {by_default})"
    also = " ".join(f"{key}={value}" for key, value in settings.items() if key != "weight_decay")
    return AuditRow(held.name, held.shape, group, (float(settings["weight_decay"]),), also, words)


def _notes(survey: Matches, world: World) -> list[str]:
    won = {number for (number, _), _ in survey.kinds}
    others = " or on other ranks" if world.size > 1 else ""
    idle = [rule.words for index, rule in enumerate(survey.rules) if index not in won]
    notes = [f"nothing by {words}: its parameters are taken by earlier rules, frozen{others}" for words in idle]
    if survey.num_frozen:
        notes.append(f"not trained: {survey.num_frozen} tensors without requires_grad")
    if world.size > 1:
        notes.append(f"these are the parameters that rank {world.rank} of {world.size} holds")
    return notes
