"""What a chain is made of: transforms, and how each is bound to the param groups of one optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..checks import is_zero, plain_number
from ..kernels.formulas import DecayTerm, Rate
from ..metrics.metric import SCOPES, Measure
from .step import Step


class Transform(ABC):
    """One step of a chain:  u ← t(u).  It holds its defaults only; whatever changes lives in the optimizer.

    defaults: hyperparameters by name; each becomes a key of the optimizer's param groups.
    target: what a rule writes to, "update" for everything else.
    changes: what it may change of the sources of metrics before the step is written.
    is_linear: whether scaling the update before it is the same as scaling it afterwards.
    coefficient_settings: the names of all hyperparameters that its coefficient depends on; None: on any.
    optimizer_name: the name of the optimizer that it runs; "" for what is no optimizer.
    given: somebody's own tensors that it pulls to, by the name of the parameter; None if there are none.
    lacks_second_moment: the class of an optimizer of it that surely keeps no `exp_avg_sq`; "" if it may keep one.

    Of norm rules:
    norm_metric: in what norms they are given: "l2", or "rms" (‖x‖/√N).
    acts_at_lr_zero: whether they act where the learning rate is 0, too.
    needs_lr_behind: whether the learning rate has to stand behind them.
    nonzero: the kept numbers that begin as a metric and must not begin as 0.
    off: the settings that switch them off, as a λ of 0 does it to others.
    """

    defaults: dict[str, Any]
    target: str = "update"
    changes: ClassVar[frozenset[str]] = frozenset({"update"})
    is_linear: ClassVar[bool] = True
    coefficient_settings: ClassVar[frozenset[str] | None] = None
    optimizer_name: str = ""
    given: Mapping[str, Tensor] | None = None
    lacks_second_moment: str = ""
    norm_metric: ClassVar[str] = "l2"
    acts_at_lr_zero: ClassVar[bool] = False
    needs_lr_behind: ClassVar[bool] = False
    nonzero: ClassVar[tuple[str, ...]] = ()
    off: ClassVar[Mapping[str, Any]] = {}

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError if these settings (of a param group) are not usable."""

    def check_place(self, settings: Mapping[str, Any], optimizer_behind: str) -> None:
        """Raise ValueError if a rule with these settings cannot stand where it does.

        optimizer_behind: what the nearest optimizer behind it is called; "" if there is none.
        """

    def measures(self, settings: Mapping[str, Any]) -> Mapping[str, Measure]:
        """The metrics that it needs, by names of its own choice; {} if none."""
        return {}

    def keeps(self, settings: Mapping[str, Any]) -> Mapping[str, float | Measure]:
        """The numbers that it carries from step to step, with the value that each begins with; {} if none."""
        return {}

    def toward(self, settings: Mapping[str, Any]) -> float | str:
        """What it pulls parameters to: a number; "initial": what they were as the first real step began; or "given"."""
        return 0.0

    def is_absolute(self, settings: Mapping[str, Any]) -> bool:
        """Whether its rate is the number λ as it stands: nothing is measured, kept or computed."""
        return True

    def is_off(self, settings: Mapping[str, Any]) -> bool:
        """Whether it does nothing with these settings. A tensor is not read to find out: where it is 0, so is the rate."""
        return is_zero(settings.get("weight_decay"))

    def term(
        self,
        settings: Mapping[str, Any],
        rate: Rate,
        sign: int = 1,
        before_lr: Rate | None = None,
        index: int = 0,
        anchors: list[Tensor] | None = None,
    ) -> DecayTerm | None:
        """What it adds to a step as a pull; None if it is none."""
        return None

    @property
    def is_norm_rule(self) -> bool:
        """Whether it acts on the step as a whole, by the norms before and after it."""
        return False

    @abstractmethod
    def apply(self, step: Step, bound: BoundTransform) -> None:
        """Do to the step being assembled what this transform does."""

    def describe(self, settings: Mapping[str, Any]) -> str | None:
        """Its details for the table that `print(optimizer)` shows; None for what decays nothing."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.defaults.items())})"


def finest_scope(asks: Mapping[str, Measure]) -> str:
    """The scope in which a rule that asks for these is given all of its numbers."""
    return max((ask.scope for ask in asks.values()), key=SCOPES.index, default="all")


# Settings that are no numbers of another library.
_AS_THEY_ARE = (float, int, bool, str, tuple, type(None), Tensor)


@dataclass(frozen=True, slots=True, eq=False)
class GroupSettings:
    """A transform's hyperparameters in one param group, and what follows from them.

    values: the hyperparameters by name.
    asks: all metrics that it needs, by name.
    keeps: what its kept numbers begin with, by name.
    is_absolute: whether its rate is λ as it stands.
    is_off: whether it does nothing: λ is the number 0, say.
    scope: the finest that it asks for, of which all of its numbers are.
    """

    values: dict[str, Any]
    asks: Mapping[str, Measure]
    keeps: Mapping[str, float | Measure]
    is_absolute: bool
    is_off: bool
    scope: str


@dataclass(frozen=True, slots=True, eq=False)
class BoundTransform:
    """A transform of one optimizer: where it stands, and which group keys hold its hyperparameters.

    index: its position among the transforms.
    label: its name in `repr` and `stats()`, unique: "WeightDecay", "WeightDecay_1".
    keys: hyperparameter -> group key. What has no key keeps the transform's default.
    coupling: in words, what scales its decay ("× lr", "before Adam", ...).
    maximize_keys: group keys that tell whether the optimizers behind it maximize.
    lr_key: the group key of the learning rate that scales the update behind it, before another optimizer does.
    state_prefix: what the keys of its kept numbers in the optimizer's state begin with.
    optimizer: the nearest optimizer before it, whose second moment it may ask for; None if there is none.
    """

    transform: Transform
    index: int
    label: str
    keys: Mapping[str, str]
    coupling: str = ""
    maximize_keys: tuple[str, ...] = ()
    lr_key: str | None = None
    state_prefix: str = ""
    optimizer: Transform | None = None

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The transform's hyperparameters as this param group has them now."""
        # A group may lack a key: the checkpoint of an optimizer that had no decay yet replaces the attached one's groups.
        values = {**self.transform.defaults, **{name: group[key] for name, key in self.keys.items() if key in group}}
        # By type, since this runs for every setting in every step: numpy's numbers are subclasses of Python's.
        return {name: v if type(v) in _AS_THEY_ARE else plain_number(v) for name, v in values.items()}

    def read(self, group: Mapping[str, Any], known: GroupSettings | None = None) -> GroupSettings:
        """The hyperparameters of a param group, checked, and what follows from them.

        known: what was read in the last step; returned as it is if nothing has changed.
        Raises ValueError, naming transform and method, for what the transform cannot work with.
        """
        values = self.settings(group)
        # By identity first: two tensors cannot be compared without reading them.
        if known is not None and all(
            value is known.values[name] or (not isinstance(value, Tensor) and value == known.values[name])
            for name, value in values.items()
        ):
            return known
        # The first time also the values of tensors: at construction, or with a group that is added.
        if known is None:
            self.transform.check(values)
        else:
            # Tensors were checked when they came with the constructor or their group; reading one in a step would wait.
            self.transform.check({name: 0.0 if isinstance(v, Tensor) else v for name, v in values.items()})
        _, is_before, name = self.coupling.rpartition("before ")
        self.transform.check_place(values, name if is_before else "")
        asks, keeps = self.asks(values)
        is_absolute, is_off = self.transform.is_absolute(values), self.transform.is_off(values)
        return GroupSettings(values, asks, keeps, is_absolute, is_off, self.scope(values, asks))

    def scope(self, values: Mapping[str, Any], asks: Mapping[str, Measure]) -> str:
        """The scope of all of its numbers: of a norm rule that of its norms, else the finest that it asks for."""
        return str(values.get("scope", "tensor")) if self.transform.is_norm_rule else finest_scope(asks)

    def sign(self, group: Mapping[str, Any]) -> int:
        """−1 if an optimizer behind it maximizes: that ascends the update, so decay must be subtracted from it."""
        return math.prod(-1 if group.get(key, False) else 1 for key in self.maximize_keys)

    def asks(self, values: Mapping[str, Any]) -> tuple[dict[str, Measure], Mapping[str, float | Measure]]:
        """All metrics that it needs, those that kept numbers begin with included; and what it keeps. Checked."""
        found: dict[str, Mapping[str, Any]] = {}
        # By the methods' names here: those of the functions may be others, of a lambda or a decorator.
        for method in ("measures", "keeps"):
            try:
                found[method] = getattr(self.transform, method)(values)
            except ValueError as error:  # of Measure, which does not know who asks
                raise ValueError(f"{self.label}.{method}: {error}") from error
            if not isinstance(found[method], Mapping):
                raise ValueError(f"{self.label}.{method} must return a dict by name, not {found[method]!r}")
            if "coefficient" in found[method]:  # in `stats`, one of the two would hide the other
                raise ValueError(f"{self.label}.{method}: 'coefficient' is what stats() calls c; use another name")
        measures, keeps = found["measures"], found["keeps"]
        for name, measure in measures.items():
            if not isinstance(measure, Measure):
                raise ValueError(
                    f"{self.label}.measures: {name!r} is {measure!r}; it must be a Measure, e.g. Measure('params', 'l2')"
                )
        for name, begins in keeps.items():
            begins = plain_number(begins)
            is_number = isinstance(begins, (int, float)) and not isinstance(begins, bool)
            # Checkpoints cut state keys at dots; "num_steps" counts the steps of numbers that begin as a metric.
            is_free = isinstance(name, str) and "." not in name and name not in ("num_steps", *measures)
            # The keys of anchors end so.
            is_free = is_free and not f"_{name}".endswith(("_anchor", "_anchor_begun"))
            if not (is_number or isinstance(begins, Measure)) or not is_free:
                raise ValueError(
                    f"{self.label}.keeps: {name!r} begins as {begins!r}; it must be a number or a Measure, under a name "
                    "without dots that `measures` does not use, and not 'num_steps' or 'anchor'"
                )
        asks = {**measures, **{name: begins for name, begins in keeps.items() if isinstance(begins, Measure)}}
        if any(ask.of == "second_moment" for ask in asks.values()):
            if self.optimizer is None:
                raise ValueError(
                    f"{self.label} asks for 'second_moment', which an optimizer makes of this step's gradient, and none stands "
                    "before the rule; put it behind one that keeps exp_avg_sq (Adam, AdamW, NAdam, RAdam)"
                )
            if lacking := self.optimizer.lacks_second_moment:
                raise ValueError(
                    f"{self.label} asks for 'second_moment', and {lacking} keeps no exp_avg_sq; use an optimizer that does (Adam, "
                    "AdamW, NAdam, RAdam), or measure something else"
                )
        return asks, keeps


def bind(
    transforms: Sequence[Transform], keys: Sequence[Mapping[str, str]] | None = None, state_suffix: str = ""
) -> tuple[BoundTransform, ...]:
    """Bind transforms to one optimizer. Where a key or a label is taken, the second gets `_1`, and so on.

    keys: the group keys of each, where the optimizer's groups are not ours to lay out (`attach`).
    state_suffix: what keeps the state keys of two attachments apart.
    """
    # All keys first: what stands behind a transform decides how it is bound.
    keys_taken: set[str] = set()
    labels_taken: set[str] = set()
    bound_keys: list[Mapping[str, str]] = []
    labels: list[str] = []
    for index, transform in enumerate(transforms):
        own = keys[index] if keys is not None else {name: _free(name, keys_taken) for name in transform.defaults}
        keys_taken.update(own.values())
        bound_keys.append(own)
        labels.append(_free(type(transform).__name__, labels_taken))
        labels_taken.add(labels[-1])

    bound = []
    for index, transform in enumerate(transforms):
        # A rule with target="closure" acts before all optimizers, wherever it stands.
        first_behind = 0 if transform.target == "closure" else index + 1
        # Each optimizer that maximizes ascends what it is given: two of them descend again.
        maximize = [own["maximize"] for own in bound_keys[first_behind:] if "maximize" in own]
        # The learning rate behind it that scales exactly what is pending here; another optimizer in between would not.
        lr_key = None
        for other, own in zip(transforms[index + 1 :], bound_keys[index + 1 :], strict=True):
            if not other.is_linear or "lr" in own:
                lr_key = own.get("lr") if other.is_linear else None
                break
        coupling = _coupling(transform, transforms[index + 1 :], bound_keys[index + 1 :])
        # The suffix comes before the label: at the end, keys of a second attachment would begin like those of the first.
        prefix = f"distwd{state_suffix}_{labels[index]}"
        before = () if transform.target == "closure" else transforms[:index]
        optimizer = next((other for other in reversed(before) if other.optimizer_name), None)
        bound.append(
            BoundTransform(
                transform, index, labels[index], bound_keys[index], coupling, tuple(maximize), lr_key, prefix, optimizer
            )
        )
    return tuple(bound)


def _coupling(transform: Transform, behind: Sequence[Transform], keys: Sequence[Mapping[str, str]]) -> str:
    """In words, what scales the decay of a rule."""
    by_target = {
        "grad": "in the gradient",
        "closure": "in the closure's gradient",
        "params_direct": "at once, not × lr",
    }
    if transform.target in by_target:
        return by_target[transform.target]
    # The nearest optimizer behind a rule sees its decay as a gradient, whatever scales the update later.
    for other in behind:
        if other.optimizer_name:
            return f"before {other.optimizer_name}"
    return "× lr" if any("lr" in own for own in keys) else "not × lr"


def _free(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    return next(candidate for number in range(1, len(taken) + 2) if (candidate := f"{name}_{number}") not in taken)


def with_current_values(
    state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> dict[str, Any]:
    """A state dict whose groups lack some of `keys`, with the values that the optimizer's groups have now."""
    saved = state_dict["param_groups"]
    # Groups that the optimizer does not have are left as they are: torch refuses them, with its own words.
    filled = [
        {**group, **{key: now[key] for key in keys if key in now and key not in group}}
        for now, group in zip(groups, saved, strict=False)
    ]
    return {**state_dict, "param_groups": filled + saved[len(filled) :]}


def with_exclusions(group: dict[str, Any], transforms: Sequence[BoundTransform]) -> dict[str, Any]:
    """A param group in which what is excluded from decay is excluded for every rule.

    A `weight_decay` of 0, the first rule's, is 0 for the others too, where the group says nothing of them; and norm rules are
    switched off.
    """
    if not is_zero(group.get("weight_decay")):
        return group
    others: dict[str, Any] = {}
    for bound in transforms:
        off = {"weight_decay": 0.0, **bound.transform.off}
        others |= {bound.keys[name]: value for name, value in off.items() if name in bound.keys}
    return {**others, **group}
