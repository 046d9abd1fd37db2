"""Rule: what every decay rule is made of, those of the library and those of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from ..checks import check_choice, check_nonnegative, check_ord
from ..kernels.apply import add_terms
from ..kernels.formulas import DecayTerm, Rate
from ..metrics.metric import SCOPES, Measure
from ..step.step import Batch, Step, zero_where
from ..step.transform import BoundTransform, Transform

Target = Literal["update", "grad", "params_direct", "closure"]
TARGETS: tuple[str, ...] = get_args(Target)
# Keys that torch and transforms take for the group's own, whoever has brought them.
_KEYS_OF_OPTIMIZERS = frozenset({"params", "param_names", "lr", "maximize"})
_GROWTH = ("params_difference", "update_difference")


class Rule(Transform):
    """A decay rule:  u ← u + c·m·d(p),  d(p) = sign(p)·|p|^(ord−1).

    c is what `coefficient` returns, λ (the setting `weight_decay`) unless a subclass says otherwise.
    m is [u·p > 0] for a cautious rule, else 1.

    A rule of one's own overrides some of these methods; nothing in it knows of ranks or shards:
        measures(settings): the metrics that it needs, {name: Measure}.
        keeps(settings): the numbers that it carries from step to step, {name: what it begins with}: a number, or a
            Measure, whose value as the first real step begins is taken.
        coefficient(settings, measured, kept): c; with `keeps`, a pair of c and the new kept numbers.
        toward(settings): what p is pulled to, as in `WeightDecay`: a number, or "initial"; then p − a stands for p above.
    Or, for a norm rule, which acts on the step as a whole, θ ← γ·(θ₋ − pulls − η·s·u):
        gain(settings, before, after, kept): γ; with `keeps`, a pair of γ and the new kept numbers.
        scale(settings, before, update, kept): s.

    settings: the hyperparameters, each a key of the param groups of a `Chain`. Under `attach` the groups hold
        `weight_decay` alone (as `distwd_weight_decay`), and the others stay as they are here. "ord" (default 2) and
        "cautious" (default False) are read by this class.
    target: as in `WeightDecay`.
    Raises ValueError for λ < 0 or ord < 1. What a method returns is checked where the rule meets an optimizer and in
    its first step, by ValueErrors that name rule and method.

    A rule is absolute (no plan, no collective; AdamW may do it in its own kernel) if it measures nothing, keeps nothing
    and leaves `coefficient` as it is.
    Source: the form is that of optax's transformations with declared state.

    >>> import torch
    >>> from distwd import LR, Chain, Measure, Rule
    >>> class NormDecay(Rule):
    ...     def measures(self, settings):
    ...         return {"norm": Measure("params", "l2", scope="all")}
    ...     def coefficient(self, settings, measured, kept):
    ...         return settings["weight_decay"] * measured["norm"]
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -4.0])); w.grad = torch.zeros(2)
    >>> Chain([w], NormDecay(weight_decay=0.1), LR(1.0)).step()
    >>> w.detach()
    tensor([ 1.5000, -2.0000])
    """

    measured_as: ClassVar[str] = "by"  # what `print(optimizer)` says before each metric
    silent: ClassVar[Mapping[str, Any]] = {}  # settings that `repr` leaves out where they have these values

    def __init__(self, *, target: Target = "update", **settings: Any) -> None:
        if target in _GROWTH:
            raise ValueError(
                f"target={target!r} would subtract the decay from the update, so weights would grow; "
                "use target='update', or 'params_direct' to decay the parameters at once"
            )
        check_choice("target", target, TARGETS)
        for name in _KEYS_OF_OPTIMIZERS & settings.keys():
            raise ValueError(
                f"{type(self).__name__}: {name!r} is a key that optimizers read from their param groups; give the setting "
                "another name"
            )
        if self.is_norm_rule:
            name = type(self).__name__
            if target != "update":
                raise ValueError(
                    f"{name} acts on the step as a whole, so it has no target={target!r}; leave target out"
                )
            for method in ("coefficient", "measures"):
                if getattr(type(self), method) is not getattr(Rule, method):
                    raise ValueError(
                        f"{name} overrides `{method}`, and `gain` or `scale`: a rule is a pull or a norm rule, which is given the "
                        "norms of the step and nothing else; make it two rules"
                    )
        self.target = target
        self.defaults = settings
        self.check(settings)

    # --- what a rule of one's own overrides ------------------------------------------------------

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError for settings that the rule cannot work with."""
        # A rule of one's own may compute its coefficient from anything, but then it has to.
        if "weight_decay" in settings:
            check_nonnegative("weight_decay", settings["weight_decay"])
        elif type(self).coefficient is Rule.coefficient and not self.is_norm_rule:
            raise ValueError(
                f"{type(self).__name__} has no weight_decay and no `coefficient` of its own; pass weight_decay=, or "
                "override coefficient"
            )
        check_ord(settings.get("ord", 2))
        if self.is_norm_rule:
            scope = settings.get("scope", "tensor")
            if scope == "all":
                raise ValueError(
                    f"{type(self).__name__}: scope='all' has no meaning for a rule that scales the step, since param groups have "
                    "learning rates, and rules that are off, of their own; use scope='group', and one group"
                )
            check_choice("scope", scope, SCOPES[1:])

    def coefficient(
        self, settings: Mapping[str, Any], measured: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> Any:
        """c, from numbers as float64 tensors: one element for each number at the finest scope that is asked for.

        It must be elementwise, must read no tensor on the host, and runs alike on every rank. With `keeps` it returns a
        pair: c, and the new kept numbers by name.
        """
        return settings["weight_decay"]

    def is_cautious(self, settings: Mapping[str, Any]) -> bool:
        """Whether to decay only where u·p > 0."""
        return bool(settings.get("cautious", False))

    # --- how it acts -----------------------------------------------------------------------------

    @property
    def changes(self) -> frozenset[str]:  # type: ignore[override]
        # A norm rule changes the step as a whole. What stands behind it sees the update without its factors.
        if self.is_norm_rule:
            return frozenset()
        # By what phases know: a closure target changes the gradient of each evaluation.
        return frozenset({{"params_direct": "params", "closure": "grad"}.get(self.target, self.target)})

    def sources(self) -> set[str]:
        """What its metrics may be taken of in any group: some of "params", "grad", "update", "second_moment"."""
        # Under `attach` groups differ in λ alone. A rule may measure nothing at λ = 0, and a group may switch it on.
        found = set()
        for settings in (self.defaults, {**self.defaults, "weight_decay": 1.0}):
            begins = [begin for begin in self.keeps(settings).values() if isinstance(begin, Measure)]
            found |= {ask.of for ask in (*self.measures(settings).values(), *begins)}
        # The norms of a step are those of its parts.
        return found | ({"params", "update"} if self.is_norm_rule else set())

    def is_absolute(self, settings: Mapping[str, Any]) -> bool:
        # Whatever a subclass computes, nobody else may assume that it is λ.
        if type(self).coefficient is not Rule.coefficient or self.is_norm_rule:
            return False
        return not self.measures(settings) and not self.keeps(settings)

    @property
    def is_norm_rule(self) -> bool:
        return type(self).gain is not Rule.gain or type(self).scale is not Rule.scale

    def gain(self, settings: Mapping[str, Any], before: Tensor, after: Tensor, kept: Mapping[str, Tensor]) -> Any:
        """γ, from the norms of θ₋ less the pulls in front of the rule, and of the step as assembled; as `coefficient`."""
        # A rule that has `scale` alone changes nothing here.
        return (1.0, dict(kept)) if kept else 1.0

    def scale(self, settings: Mapping[str, Any], before: Tensor, update: Tensor, kept: Mapping[str, Tensor]) -> Any:
        """s, the factor of the update, from the norms of θ₋ less the pulls and of the update at the rule's place. No pair."""
        return 1.0

    def apply(self, step: Step, bound: BoundTransform) -> None:
        """Add a decay term to every batch; for another target than "update", write it now."""
        if self.is_norm_rule:
            return  # it acts on the step as a whole, when that is known
        settings = [step.settings[bound.index, batch.group_index] for batch in step.batches]
        # What is off leaves even the rounding of the others as it is.
        if all(own.is_off for own in settings):
            return
        cautious = [self.is_cautious(own.values) and not own.is_off for own in settings]
        sees_terms = not step.shows_bare_update and any(batch.terms for batch in step.batches)
        # A scale that is a tensor may be 0, and then so is the update, which an inclusive mask must see.
        sees_scale = any(
            isinstance(batch.pending.scale, Tensor) and own.values.get("inclusive")
            for batch, own in zip(step.batches, settings, strict=True)
        )
        if any(cautious) and (self.target != "update" or sees_terms or sees_scale):
            # A mask is taken of the update at this place, so what is pending has to be in it.
            step.materialize()
        # What is pending still has to see parameters and gradients as they were.
        if self.target != "update":
            step.read_before_write("params" if self.target == "params_direct" else "grad")

        on_gradients = self.target in ("grad", "closure") or (self.target == "update" and step.decays_gradients)
        for batch, own, is_cautious in zip(step.batches, settings, cautious, strict=True):
            # λ = 0 is off: not even a term, since 0·d(p) may be 0·inf.
            if own.is_off:
                continue
            rate = step.rate(bound, batch, on_gradients)
            # A term that comes while the update is not scaled yet will be scaled by exactly what scales the update.
            # Only a λ that the rule leaves as it is may be handed to an optimizer, in place of the term.
            before_lr = own.values["weight_decay"] if batch.pending.is_unscaled and own.is_absolute else None
            anchors = None
            if isinstance(toward := self.toward(own.values), str):
                anchors = step.anchors_of(bound, toward, batch)
            term = self.term(own.values, rate, bound.sign(batch.group), before_lr, bound.index, anchors)
            scale = batch.pending.scale
            if is_cautious and batch.keeps_apart and batch.terms and not step.shows_bare_update:
                term = replace(term, own_us=batch.update_with_terms())
            # Where the learning rate is 0 the update is 0, whatever the mask is taken of: nothing decays, and with an
            # inclusive mask everything.
            elif is_cautious and isinstance(scale, Tensor):
                term = replace(term, rate=zero_where(scale == 0, rate))
            elif is_cautious and scale == 0:
                term = replace(term, cautious=False, rate=rate if term.inclusive else 0.0)
            self._add(batch, term)

    def term(
        self,
        settings: Mapping[str, Any],
        rate: Rate,
        sign: int = 1,
        before_lr: Rate | None = None,
        index: int = 0,
        anchors: list[Tensor] | None = None,
    ) -> DecayTerm:
        """What the rule adds to a step: the only place where settings become a term.

        rate, sign, before_lr, index: as in `DecayTerm`.
        anchors: local tensors to pull to, where `toward` is no number.
        """
        ord, toward = float(settings.get("ord", 2)), self.toward(settings)
        term = DecayTerm(rate, ord, self.is_cautious(settings), sign, before_lr, index=index)
        return replace(term, toward=(anchors or []) if isinstance(toward, str) else float(toward))

    def _add(self, batch: Batch, term: DecayTerm) -> None:
        if self.target == "update":
            (batch.proximal if term.proximal else batch.terms).append(term)
        elif self.target == "params_direct":
            batch.apply_([term])
            batch.written.append(term)
        else:
            # To the gradient itself: what comes later in the chain, and `p.grad`, see it.
            pending = batch.pending.mask
            add_terms(
                batch.grads,
                batch.params,
                [term],
                1.0,
                batch.grads,
                pending,
                workspace=batch.workspace,
                num_cells=batch.num_cells,
            )

    def rate_words(self, settings: Mapping[str, Any]) -> list[str]:
        """What its coefficient depends on, in words."""
        words = []
        for ask in self.measures(settings).values():
            by = "" if ask.scope == "all" else f" by {ask.scope}"
            words.append(f"{self.measured_as} {ask.parsed.name} of {ask.of}{by}")
        return words

    def describe(self, settings: Mapping[str, Any]) -> str:
        """What it measures, and how its direction differs from p, for `print(optimizer)`."""
        words = self.rate_words(settings)
        if settings.get("ord", 2) != 2:
            words.append(f"ord {settings['ord']:g}")
        if self.is_cautious(settings):
            words.append("cautious")
        return ", ".join(words)

    def __repr__(self) -> str:
        shown = {k: v for k, v in self.defaults.items() if k not in self.silent or v != self.silent[k]}
        words = [f"{key}={value!r}" for key, value in shown.items()]
        words += [] if self.target == "update" else [f"target={self.target!r}"]
        return f"{type(self).__name__}({', '.join(words)})"
