"""Norm rules: what they have to know before anything is written, and the numbers with which the step is written then.

    θ ← γ·(θ₋ − Σ rate·d(θ₋) − s·η·u)

s and γ are numbers that a rule makes of norms. The norms of θ₋ and u, and of every step that is a combination of θ₋, u and
directions d(θ₋), follow from the inner products of these tensors:  ‖Σ aᵢ·xᵢ‖² = Σ aᵢ·aⱼ·⟨xᵢ, xⱼ⟩. So one reduction before the
write is enough, and the write is the usual one with other factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._torch import local_tensor
from ..kernels.apply import place_terms
from ..kernels.blocks import number_on
from ..kernels.formulas import DecayTerm, Rate, Write
from ..kernels.sums import Vectors, wide_dtype
from ..metrics.measure import Source, sources_of
from ..metrics.metric import SCOPES, Measure, StepProducts
from .step import Batch, Step
from .transform import BoundTransform, GroupSettings

Settings = Mapping[tuple[int, int], GroupSettings]
# Row 0 of the products is ⟨θ, θ⟩, and the last two are Σθ² of what rests, and N.
_OF_THETA = {
    "l2": lambda products: (products[0] + products[-2]).sqrt(),
    "rms": lambda products: ((products[0] + products[-2]) / products[-1].clamp(min=1)).sqrt(),
}


@dataclass(frozen=True, slots=True)
class Factors:
    """What one norm rule has answered for one param group, each rounded to float32, as float64 tensors.

    scale, gain: s and γ, one number for each slot, or for each parameter of a batch.
    """

    scale: Tensor
    gain: Tensor


class NormRules:
    """The norm rules of one optimizer with the settings of now, and the pulls in front of them.

    It depends on settings alone, so it is alike on all ranks.

    rules: the norm rules that are on in some group, in order.
    groups: the indices of the groups in which one is on. Their batches keep pulls and update apart until they are written.
    begins: the position from which on nothing is coupled any more: behind the last optimizer.
    since: the position from which on every direction is known.
    keeps_any: whether a norm rule keeps numbers.
    """

    def __init__(
        self, transforms: Sequence[BoundTransform], settings: Settings, num_groups: int, shows_bare_update: bool
    ) -> None:
        """shows_bare_update: whether masks are of the optimizer's own update, whatever pulls there are."""
        self._settings = settings
        optimizers = [place for place, bound in enumerate(transforms) if not bound.transform.is_linear]
        self.begins = optimizers[-1] + 1 if optimizers else 0
        behind = transforms[self.begins :]
        self._lrs = [bound for bound in behind if bound.transform.is_linear and "lr" in bound.keys]

        def groups_on(bound: BoundTransform) -> frozenset[int]:
            return frozenset(index for index in range(num_groups) if not settings[bound.index, index].is_off)

        norm_rules = [bound for bound in behind if bound.transform.is_norm_rule]
        self.rules = [bound for bound in norm_rules if groups_on(bound)]
        self.groups = frozenset[int]().union(*map(groups_on, self.rules))
        last = self.rules[-1].index if self.rules else -1
        # One group may pull after the step, and another in it.
        self.pulls = [
            bound for bound in behind if any(self._term(bound, index) is not None for index in groups_on(bound))
        ]
        in_front = [bound for bound in self.pulls if bound.index < last]
        # L2 decay is a multiple of θ; any other direction is a vector of its own, in every group if it is so in one.
        bent = [bound for bound in in_front if any(self._is_bent(bound, index) for index in groups_on(bound))]
        self._numbers = {bound.index: number for number, bound in enumerate(bent, start=2)}
        # A mask behind another pull is of the update with that pull, whose rate is known when it has acted. So is one that
        # lets an update of 0 pass, if a learning rate stands in front, which may be 0.
        masked = []
        for bound in bent:
            masks = [term for index in groups_on(bound) if (term := self._term(bound, index)) and term.cautious]
            is_scaled = any(lr.index < bound.index for lr in self._lrs)
            if any(bound.index != self.pulls[0].index or (term.inclusive and is_scaled) for term in masks):
                masked.append(bound.index)
        self.shows_bare_update = shows_bare_update
        places = {bound.index: place for place, bound in enumerate(transforms)}
        self.since = places[masked[-1]] + 1 if masked and not shows_bare_update else 0
        self.keeps_any = any(settings[bound.index, index].keeps for bound in self.rules for index in groups_on(bound))
        self._scopes = {index: self._scope_of(index) for index in self.groups}
        labels = tuple(bound.label for bound in bent)
        self._asks = [
            StepProducts(labels, scope) for scope in dict.fromkeys(self._scopes[i] for i in sorted(self.groups))
        ]
        # The first that is on asks; where its place comes too early for a direction, the last.
        self._asked_by = next((bound.index for bound in self.rules if places[bound.index] >= self.since), last)
        # Norms of parameters that other rules ask for need no sums of their own.
        asked: dict[Measure, set[int]] = {}
        for (_, group), own in settings.items():
            for ask in own.asks.values():
                asked.setdefault(ask, set()).add(group)
        self._implied = {
            ask
            for ask, groups in asked.items()
            if ask.of == "params"
            and ask.parsed.name in _OF_THETA
            and all(self._scopes.get(group) == ask.scope for group in groups)
        }

    # --- what is measured ------------------------------------------------------------------------

    def asks_of(self, index: int) -> list[StepProducts]:
        """What is asked for at the place of the rule with this index; one rule asks for all of them."""
        return self._asks if index == self._asked_by else []

    def ask_of(self, group: int) -> StepProducts:
        """What the norms of a group are made of."""
        return next(ask for ask in self._asks if ask.scope == self._scopes[group])

    def implied(self, asks: Sequence[Any]) -> dict[Measure, tuple[StepProducts, Callable[[Tensor], Tensor]]]:
        """Which of these asks follow from products that are among them, and how."""
        products = {ask.scope: ask for ask in asks if isinstance(ask, StepProducts)}
        return {
            ask: (products[ask.scope], _OF_THETA[ask.parsed.name])
            for ask in asks
            if isinstance(ask, Measure) and ask in self._implied and ask.scope in products
        }

    def sources(self, step: Step, ask: StepProducts) -> list[Source]:
        """θ, u and directions of the groups that this is asked for. Makes a waiting optimizer run."""
        step.run_waiting()
        found, stepped = [], set[int]()
        for batch in step.batches:
            if self._scopes.get(batch.group_index) != ask.scope:
                continue
            stepped.update(batch.index)
            update, acted = batch.pending, {term.index: term for term in batch.terms}
            terms, numbers = [], []
            for bound in self.pulls:
                own = self._settings[bound.index, batch.group_index]
                if bound.index not in self._numbers or own.is_off:
                    continue
                # By its settings: as it has acted, its mask may be known to let everything pass.
                term = self._term(bound, batch.group_index, step, batch)
                if term is not None and not term.is_l2:
                    terms.append(acted.get(bound.index, term))
                    numbers.append(self._numbers[bound.index])
            lists = [batch.params, update.tensors]
            write, lists = place_terms(Write((), False, None, us=1), lists, terms, update.mask)
            minus = None
            if update.minus is not None:
                minus = next((place for place, one in enumerate(lists) if one is update.minus), len(lists))
                lists += [update.minus] if minus == len(lists) else []
            vectors = Vectors(write, minus, tuple(numbers))
            found.append(Source(batch.index, batch.params, (), update.factor, vectors, lists[1:]))
        # Parameters that have no gradient here stay as they are: no factor is theirs, but they are part of the norm.
        locals_: list[Tensor | None] = [None] * len(step.entries)
        for position, entry in enumerate(step.entries):
            is_asked = entry.group in step.active_groups and self._scopes.get(entry.group) == ask.scope
            if is_asked and position not in stepped and entry.tensor.requires_grad:
                locals_[position] = step.old.get(position, local_tensor(entry.tensor))
        alone = Vectors(Write((), False, None), rests=True)
        return found + [replace(source, vectors=alone) for source in sources_of(locals_)]

    # --- what is written -------------------------------------------------------------------------

    def rules_in(self, group: int) -> list[BoundTransform]:
        """The norm rules that are on in a group, in order."""
        return [bound for bound in self.rules if not self._settings[bound.index, group].is_off]

    def lr(self, step: Step, group: int, after: int = -1, before: int | None = None) -> Rate:
        """The product of the learning rates of a group that stand behind one index and in front of another."""
        product: Rate = 1.0
        own = next((batch.group for batch in step.batches if batch.group_index == group), step.groups[group])
        for bound in self._lrs:
            if bound.index > after and (before is None or bound.index < before):
                lr = own[bound.keys["lr"]]
                product = product * (lr.to(wide_dtype(lr.device)) if isinstance(lr, Tensor) else lr)
        return product

    def begin(
        self, step: Step, group: int, products: Tensor, measured_at: int, value_of: Callable[[BoundTransform], Rate]
    ) -> StepNorms:
        """The norms of a group's step, in which nothing has acted yet.

        products: as measured, [products + 2, slots].
        measured_at: the index of the transform before which they were measured.
        value_of: the coefficient of a pull in this group, one number or [slots].
        """
        return StepNorms(self, step, group, products, measured_at, value_of)

    @staticmethod
    def write_numbers(batch: Batch, factors: Mapping[int, Factors]) -> None:
        """Give a batch the numbers with which it is written.

        factors: by index of the norm rule; of this batch, 0-d or one for each parameter.
        """
        device = batch.params[0].device
        by_index = {term.index: term for term in batch.terms if not term.proximal}
        whole: Rate = 1.0
        shrunk: list[Rate] = []  # L2 rates since the last gain, added as they come
        gain_of_update: Rate = 1.0
        bent: dict[int, Rate] = {}
        for index in sorted({*by_index, *factors}):
            if index in factors:
                scale, gain = factors[index].scale.to(device), factors[index].gain.to(device)
                whole = gain * (whole - sum(shrunk[1:], start=shrunk[0]) if shrunk else whole)
                shrunk = []
                gain_of_update = gain_of_update * scale * gain
                bent = {one: rate * gain for one, rate in bent.items()}
            elif by_index[index].is_l2:
                shrunk.append(by_index[index].rate)
            else:
                bent[index] = by_index[index].rate
        batch.keep = whole - sum(shrunk[1:], start=shrunk[0]) if shrunk else whole
        batch.update_factor = gain_of_update
        batch.terms = [replace(term, rate=bent.get(term.index, term.rate)) for term in batch.terms]

    # --- its parts -------------------------------------------------------------------------------

    def _term(
        self, bound: BoundTransform, group: int, step: Step | None = None, batch: Batch | None = None
    ) -> DecayTerm | None:
        """What a transform would pull with in a group, at rate 1; None if it is no pull, or writes at once.

        step, batch: where it pulls to tensors, what these are of; None: the term is without them.
        """
        transform, values = bound.transform, self._settings[bound.index, group].values
        if transform.target != "update" or transform.is_norm_rule:
            return None
        anchors = None
        if step is not None and batch is not None and isinstance(toward := transform.toward(values), str):
            anchors = step.anchors_of(bound, toward, batch)
        term = transform.term(values, 1.0, index=bound.index, anchors=anchors)
        # Proximal pulls act at the very end, on what norm rules have made of the step.
        return None if term is None or term.proximal else term

    def _is_bent(self, bound: BoundTransform, group: int) -> bool:
        term = self._term(bound, group)
        return term is not None and not term.is_l2

    def _scope_of(self, group: int) -> str:
        """The scope of the norm rules of a group. Raises ValueError if they differ, or a pull has finer numbers."""
        rules = self.rules_in(group)
        scopes = [self._settings[bound.index, group].scope for bound in rules]
        if len(set(scopes)) > 1:
            raise ValueError(
                f"param_groups[{group}]: {' and '.join(bound.label for bound in rules)} have different scopes ({', '.join(scopes)}), "
                "and each acts on what the other has made of the norms; give them one scope"
            )
        last = rules[-1]
        for bound in self.pulls:
            own = self._settings[bound.index, group]
            if bound.index < last.index and not own.is_off and SCOPES.index(own.scope) > SCOPES.index(scopes[0]):
                raise ValueError(
                    f"param_groups[{group}]: {bound.label} has scope={own.scope!r}, and {last.label} behind it scope={scopes[0]!r}, "
                    f"which is coarser than the pulls that it has to see; give {last.label} scope={own.scope!r}, or put it in front"
                )
        return scopes[0]


class StepNorms:
    """Norms of one group's step as it is assembled, rule by rule, in float64.

    A step is a combination of θ, u and directions, one factor for each: a number, or [slots].
    """

    def __init__(
        self,
        norms: NormRules,
        step: Step,
        group: int,
        products: Tensor,
        measured_at: int,
        value_of: Callable[[BoundTransform], Rate],
    ) -> None:
        self._norms, self._step, self._group, self._products = norms, step, group, products
        self._measured_at, self._value_of = measured_at, value_of
        self._pulls = [bound for bound in norms.pulls if not step.settings[bound.index, group].is_off]
        self.lr = self._number(norms.lr(step, group))
        self._scale: Any = 1.0  # of the update, by the rules that have acted
        self._sees_bare = True  # whether a mask at this place is of the update without any pull
        self._before: dict[int, Any] = {0: 1.0}
        self._after: dict[int, Any] = {0: 1.0, 1: -1.0 * self._number(norms.lr(step, group, measured_at - 1))}

    def come_to(self, bound: BoundTransform) -> None:
        """Let the pulls act that stand before a norm rule and have not acted yet."""
        norms, step, group = self._norms, self._step, self._group
        while self._pulls and self._pulls[0].index < bound.index:
            pull = self._pulls.pop(0)
            term = norms._term(pull, group)
            if term is None:
                continue
            rate = self._number(self._value_of(pull)) * self._number(norms.lr(step, group, pull.index))
            # Its mask was taken of the update before a learning rate has made it 0.
            if term.cautious and not term.inclusive and self._sees_bare:
                rate = zero_where_zero(self._number(norms.lr(step, group, before=pull.index)), rate)
            self._sees_bare = norms.shows_bare_update
            number = 0 if term.is_l2 else norms._numbers[pull.index]
            for factors in (self._before, self._after):
                factors[number] = factors.get(number, 0.0) - rate

    def before(self, is_rms: bool) -> Tensor:
        """‖θ₋ less the pulls‖, [slots]; is_rms: over √N."""
        return self._norm(self._before, is_rms, self._products[-2])

    def after(self, is_rms: bool) -> Tensor:
        """‖the step as assembled‖, [slots]."""
        return self._norm(self._after, is_rms, self._products[-2])

    def update(self, bound: BoundTransform, is_rms: bool) -> Tensor:
        """‖u‖ at the place of a rule, [slots]: with the scales of the rules in front. (Their gains are the step's, not u's.)"""
        norms, step, group, at = self._norms, self._step, self._group, self._measured_at
        if bound.index >= at:
            return self._norm({1: self._number(norms.lr(step, group, at - 1, bound.index)) * self._scale}, is_rms)
        between = self._number(norms.lr(step, group, bound.index, at))
        size = self._norm({1: self._scale}, is_rms)
        # Of a number it is known without a tensor; one made of it on the CPU would be copied to the device, which waits.
        if not isinstance(between, Tensor):
            return size / between if between else torch.zeros_like(size)
        return torch.where(between == 0, 0.0, size / between)

    def act(self, factors: Factors) -> None:
        """Scale the update, and then the step."""
        self._scale = self._scale * factors.scale
        self._after[1] = self._after[1] * factors.scale
        self._after = {number: factor * factors.gain for number, factor in self._after.items()}

    def _norm(self, factors: Mapping[int, Any], is_rms: bool, resting: Tensor | None = None) -> Tensor:
        total = torch.zeros_like(self._products[0])
        for two, b in factors.items():
            for one, a in factors.items():
                if one <= two:
                    product = self._products[two * (two + 1) // 2 + one]
                    total = total + (a * b if one == two else 2 * a * b) * product
        # What a step cancels may come out below 0. A NaN stays one.
        total = total.clamp(min=0.0)
        total = total if resting is None else total + resting
        # 0 over no elements.
        return (total / self._products[-1].clamp(min=1) if is_rms else total).sqrt()

    def _number(self, value: Rate) -> Any:
        """A number as Python's, or as float64 where the products are."""
        return number_on(self._products.device, value, self._products.dtype) if isinstance(value, Tensor) else value


def check_places(transforms: Sequence[BoundTransform]) -> None:
    """Raise ValueError, naming the rule, where norm rules and what stands around them do not fit together."""
    rules = [bound for bound in transforms if bound.transform.is_norm_rule]
    if not rules:
        return
    begins = max((bound.index for bound in transforms if bound.transform.optimizer_name), default=-1)
    for bound in rules:
        lrs = [other.index for other in transforms if other.transform.is_linear and "lr" in other.keys]
        if bound.index < begins:
            raise ValueError(
                f"{bound.label} acts on the step as a whole, and stands {bound.coupling}: put it behind the last optimizer (with "
                "attach, use coupling='lr')"
            )
        if bound.transform.needs_lr_behind and (
            any(begins < index < bound.index for index in lrs) or not any(index > bound.index for index in lrs)
        ):
            raise ValueError(
                f"{bound.label} turns by the learning rate behind it, and has none there, or one in front of it: put it between the "
                "optimizer and LR (with attach, use coupling='lr')"
            )
    behind = [bound for bound in transforms if bound.index > begins]
    pending = [bound.index for bound in behind if bound.transform.target == "update" and "lr" not in bound.keys]
    for bound in behind:
        if bound.transform.target in ("grad", "params_direct") and pending[0] < bound.index:
            raise ValueError(
                f"{bound.label} has target={bound.transform.target!r}, which changes tensors that {rules[-1].label} has to see as "
                "they were: put it right behind the optimizer, or give it target='update'"
            )


def zero_where_zero(flag: Any, rate: Any) -> Any:
    """`rate`, or 0 where `flag` is 0. By selection, since 0 · inf is NaN."""
    if isinstance(flag, Tensor):
        return torch.where(flag == 0, 0.0, rate)
    return rate if flag else 0.0
