"""From metrics to rates: measured phase by phase, turned into coefficients by the rules, kept for `stats()`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._torch import local_tensor
from ..checks import plain_number
from ..kernels.blocks import number_on
from ..kernels.formulas import Rate
from ..kernels.sums import COUNT as COUNT_NONZERO
from ..kernels.sums import wide_dtype
from ..metrics.measure import OWN, Request, Slots, Taken, measure, take
from ..metrics.metric import Ask, Measure, StepProducts, parse_metric
from ..metrics.plan import Plan
from ..sharding.params import Params, is_frozen
from ..sharding.pieces import describe
from .norms import Factors, NormRules
from .phases import Phase
from .state import COUNT, KeptNumbers
from .step import Batch, Step
from .transform import BoundTransform, GroupSettings

_MAX_KEPT = 16  # sets of frozen parameters


@dataclass(frozen=True, slots=True)
class Coefficient:
    """What one rule was told, and what it answered, for one param group.

    scope: of all its numbers; each is a tensor [slots]: one slot for "all", one for each group, parameter or matrix.
    numbers: measured and kept ones by name, float64: as the rule was given them, and kept ones as they are after the step.
    value: the coefficient, or the gain of a norm rule, float32.
    old, new: kept numbers before the step, and those that the rule answered; stored when the step has been written.
    has_gradient: [slots] bool, where numbers of single parameters or matrices are kept; None: they all move.
    dtype: of the numbers that users are shown.
    plan: whose slots the numbers of single parameters have; the plan of today may number them otherwise. None for others.
    is_gain: whether the rule is a norm rule.
    """

    scope: str
    numbers: Mapping[str, Tensor]
    value: Tensor
    old: Mapping[str, Tensor]
    new: Mapping[str, Tensor]
    has_gradient: Tensor | None
    dtype: torch.dtype
    plan: Plan | None
    is_gain: bool = False


class Coefficients:
    """Measures what rules ask for, once per phase, and lets each rule make its coefficient of it.

    A coefficient is computed in float64 and rounded once, to float32. That makes it the same number on any sharding:
    float64 sums differ between shardings, if at all, far below the last bit of float32.

    plan: who holds what; asked for only where something is measured.
    kept: the numbers that rules carry from step to step.
    """

    def __init__(self, plan: Callable[[], Plan], kept: KeptNumbers) -> None:
        self._plan, self._kept = plan, kept
        self._measured: dict[tuple[int, Ask], Tensor] = {}
        self._products: dict[StepProducts, tuple[Tensor, int]] = {}  # with the index before which they were measured
        self._last: dict[str, dict[int, Coefficient]] = {}
        self._taken: dict[tuple[int, Ask], Taken] = {}  # by the position of the phase that will reduce them
        # By scope [slots] bool, where a rule keeps numbers of single parameters.
        self._has_gradient: dict[str, Tensor] = {}
        self._slots_of_plan: dict[tuple[int, ...], Slots] = {}  # by what is frozen

    def _slots(self, frozen: tuple[int, ...] = ()) -> Slots:
        """In which slot each parameter counts; kept as long as the plan is the same."""
        plan, known = self._plan(), self._slots_of_plan
        # A GAN freezes its parts in turn, so what was frozen once comes back. But it might be other parameters each time.
        if known and (next(iter(known.values())).plan is not plan or len(known) >= _MAX_KEPT):
            known.clear()
        if frozen not in known:
            known[frozen] = Slots(plan, frozen)
        return known[frozen]

    # --- in a step -------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget what was measured in the last step."""
        self._measured.clear()
        self._products.clear()
        self._taken.clear()
        self._has_gradient.clear()

    def take(self, phases: Sequence[Phase], position: int, step: Step) -> None:
        """Take the local sums that the transform at `position` may spoil for a later phase. May be called for parts of a step."""
        for phase in phases:
            for at, ask in phase.taken_at:
                if at == position:
                    request = Request(ask.parsed, step.tensors_for(ask.of), ask.scope)
                    into = self._taken.setdefault((phase.position, ask), Taken())
                    take(request, self._slots(step.frozen), step.workspace, into)

    def measure(self, phase: Phase, step: Step, norms: NormRules, at: int) -> None:
        """Take all metrics of a phase, with one reduction. at: the index of the transform that acts next."""
        slots = self._slots(step.frozen)
        # Several rules may ask for the same; it is measured once. Tensors are asked for once, too: an update that a rule
        # asks for makes a waiting optimizer run.
        asks = list(dict.fromkeys(ask for _, ask in phase.asks))
        implied = norms.implied(asks) if norms.rules else {}
        asks = [ask for ask in asks if ask not in implied]
        taken = {ask: self._taken.pop((phase.position, ask), None) for ask in asks}
        sources = {
            of: step.tensors_for(of)
            for of in dict.fromkeys(ask.of for ask in asks if taken[ask] is None and ask.of != "step")
        }
        requests = [
            Request(
                ask.parsed,
                norms.sources(step, ask) if isinstance(ask, StepProducts) else sources.get(ask.of, ()),
                ask.scope,
                taken[ask],
            )
            for ask in asks
        ]
        counted = dict.fromkeys(
            ask.scope
            for index, ask in phase.asks
            if ask.scope in OWN and (norms.keeps_any if ask.of == "step" else step.keeps_numbers(index))
        )
        for scope in counted:
            # A kept number of one parameter moves if the parameter has a gradient anywhere. Ranks whose shard is empty
            # may have none (FSDP1), so that is counted in the same reduction: a 1 for each gradient of an owner, for
            # each matrix that it owns a part of.
            ones = Taken()
            for batch in step.batches:
                owned, device = list(slots.owned_among(batch.index, scope)), batch.params[0].device
                num = sum(slots.num_cells[position] for position in owned) if scope == "matrix" else len(owned)
                ones.device = ones.device or device
                ones.parts.append(
                    (owned, {COUNT_NONZERO: torch.ones(num, dtype=wide_dtype(device), device=device)}, 1.0)
                )
            requests.append(Request(parse_metric("l0"), (), scope, ones))
        numbers_of = measure(slots.plan, requests, slots=slots, workspace=step.workspace)
        self._has_gradient.update({scope: numbers_of.pop() > 0 for scope in reversed(counted)})
        numbers: dict[Ask, Tensor] = dict(zip(asks, numbers_of, strict=True))
        numbers |= {ask: norm(numbers[products]) for ask, (products, norm) in implied.items()}
        for index, ask in phase.asks:
            self._measured[index, ask] = numbers[ask]
            if isinstance(ask, StepProducts):
                self._products[ask] = numbers[ask], at

    def evaluate(self, bound: BoundTransform, step: Step) -> None:
        """Let a rule make its coefficients, one for each active group. An absolute rule has none: its rate is λ."""
        found: dict[int, Coefficient] = {}
        shared: dict[Any, Coefficient] = {}
        # In order: on every rank the rule's functions see the groups alike.
        for index in sorted(step.active_groups):
            settings = step.settings[bound.index, index]
            if settings.is_absolute or bound.transform.is_norm_rule:
                continue
            key = _sharing_key(bound, settings)
            if key is None or key not in shared:
                found[index] = self._evaluate_group(bound, step, index, settings)
                if key is not None:
                    shared[key] = found[index]
            else:
                found[index] = shared[key]  # groups with equal settings share one
        if bound.transform.is_norm_rule:
            return  # when the whole step is known
        if not found:
            self._last.pop(bound.label, None)
            return
        # Groups that this step is not of keep the numbers of their own last step (DeepSpeed steps one at a time).
        kept = self._last.get(bound.label, {}) if len(step.active_groups) < len(step.groups) else {}
        self._last[bound.label] = {i: old for i, old in kept.items() if i not in step.active_groups} | found

    def _evaluate_group(self, bound: BoundTransform, step: Step, index: int, settings: GroupSettings) -> Coefficient:
        """Give a rule its numbers for one group, and check what it answers."""
        asks = settings.asks
        # All numbers come at the finest scope that the rule asks for.
        scope = settings.scope
        measured: dict[str, Tensor] = {}
        for name, ask in asks.items():
            values = self._measured[bound.index, ask]
            # Of a coarser scope: the number of all, of this group, or of the matrix's parameter, for each slot.
            if ask.scope != scope:
                slots = self._slots()
                if ask.scope == "tensor":
                    values = slots.by_matrix(values)
                else:
                    values = values[index if ask.scope == "group" else 0].expand(slots.num_slots(scope))
            measured[name] = values
        if measured:
            like = next(iter(measured.values()))
        else:
            # It only keeps: its numbers are computed where the group's parameters are.
            some = _trainable(step, index)[:1]
            device = local_tensor(step.entries[some[0]].tensor).device if some else torch.device("cpu")
            like = torch.zeros(1, dtype=wide_dtype(device), device=device)

        dtype = self._plan().result_dtype if asks else torch.float32
        kept, old, has_begun = self._kept_of(bound, step, index, settings, scope, measured, like)
        value, new = _answer(bound, settings, "coefficient", (measured, kept), kept, like)
        # λ = 0 is off, also where the metric is not finite. By selection, since 0·inf is NaN.
        if settings.is_off:
            value = torch.zeros_like(value)
        elif isinstance(decay := settings.values.get("weight_decay"), Tensor):
            value = torch.where(number_on(value.device, decay, decay.dtype) == 0, 0.0, value)
        return self._noted(scope, {**measured, **kept}, value, old, new, has_begun, dtype)

    def _kept_of(
        self,
        bound: BoundTransform,
        step: Step,
        index: int,
        settings: GroupSettings,
        scope: str,
        measured: dict[str, Tensor],
        like: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
        """The kept numbers of a rule for one group, [slots]: as the rule is given them, as they are stored, and their count.

        What they begin as is taken out of `measured`.
        """
        begins = settings.keeps
        kept: dict[str, Tensor] = {}
        positions = _holders(step, index, scope) if begins else []
        entries = [step.entries[position] for position in positions]
        is_shared = scope not in OWN
        nums = self.num_own(positions, scope)
        stored = self._kept.read(bound, begins, entries, index, like.device, nums) if begins else {}
        for name, values in stored.items():
            if not is_shared:
                # Slots of parameters that other ranks hold stay NaN: nobody here asks for them.
                own_slots = self._slots().index(positions, scope, like.device)
                kept[name] = torch.full_like(like, torch.nan).index_copy(0, own_slots, values)
            else:
                kept[name] = values.expand(len(like))
        old = dict(kept)
        has_begun = kept.get(COUNT)
        # By selection and not by reading the count: a number that begins as a metric is measured in every step.
        for name, begin in begins.items():
            if isinstance(begin, Measure) and has_begun is not None:
                kept[name] = torch.where(has_begun > 0, kept[name], measured.pop(name))
        return {name: kept[name] for name in begins}, old, has_begun

    def _noted(
        self,
        scope: str,
        numbers: Mapping[str, Tensor],
        value: Tensor,
        old: Mapping[str, Tensor],
        new: dict[str, Tensor],
        has_begun: Tensor | None,
        dtype: torch.dtype,
        is_gain: bool = False,
    ) -> Coefficient:
        """What `keep` and `stats` go by."""
        if has_begun is not None:
            new[COUNT] = has_begun + 1
        # A rule in a closure acts before the others of the step measure, so this belongs to its answer.
        has_gradient = self._has_gradient.get(scope)
        own_plan = self._plan() if scope in OWN else None
        value = value.to(torch.float32)
        return Coefficient(scope, numbers, value, old, new, has_gradient, dtype, own_plan, is_gain)

    def evaluate_norms(self, step: Step, norms: NormRules) -> None:
        """Let norm rules make their factors, now that the whole step is known, and give them to the batches."""
        found: dict[str, dict[int, Coefficient]] = {bound.label: {} for bound in norms.rules}
        for group in sorted(step.active_groups & norms.groups):
            products, measured_at = self._products[norms.ask_of(group)]
            scope, like = norms.ask_of(group).scope, products[0]

            def value_of(pull: BoundTransform, group: int = group, scope: str = scope) -> Rate:
                own = step.settings[pull.index, group]
                if own.is_absolute:
                    decay: Rate = own.values["weight_decay"]
                    return decay
                value = self._value(pull, group)
                return self._slots().by_matrix(value) if (own.scope, scope) == ("tensor", "matrix") else value

            now = norms.begin(step, group, products, measured_at, value_of)
            factors: dict[int, Factors] = {}
            found_inf = step.found_inf.get(group)
            for bound in norms.rules_in(group):
                settings: GroupSettings = step.settings[bound.index, group]
                measured = {name: self._measured[bound.index, ask] for name, ask in settings.asks.items()}
                if any(ask.scope != scope for ask in settings.asks.values()):
                    raise ValueError(
                        f"{bound.label}.keeps: a norm rule keeps numbers of its own scope, {scope!r}, only"
                    )
                kept, old, has_begun = self._kept_of(bound, step, group, settings, scope, measured, like)
                now.come_to(bound)
                is_rms = bound.transform.norm_metric == "rms"
                before = now.before(is_rms)
                # At a learning rate of 0, and in a step that is skipped, nothing acts. By selection.
                has_lr = True if bound.transform.acts_at_lr_zero else now.lr != 0
                acts = has_lr if isinstance(has_lr, Tensor) else torch.full_like(like, has_lr, dtype=torch.bool)
                if found_inf is not None:
                    acts = acts & (found_inf.to(like.device, non_blocking=True) == 0)
                scale, _ = _answer(bound, settings, "scale", (before, now.update(bound, is_rms), kept), {}, like)
                scale = torch.where(acts, scale, 1.0).float().to(like.dtype)
                now.act(Factors(scale, torch.ones_like(scale)))
                gain, new = _answer(bound, settings, "gain", (before, now.after(is_rms), kept), kept, like)
                gain = torch.where(acts, gain, 1.0).float().to(like.dtype)
                now.act(Factors(torch.ones_like(gain), gain))
                factors[bound.index] = Factors(scale, gain)
                dtype = self._plan().result_dtype
                numbers = {**measured, **kept}
                found[bound.label][group] = self._noted(scope, numbers, gain, old, new, has_begun, dtype, True)
            for batch in step.batches:
                if batch.group_index == group:
                    own_factors = {
                        index: Factors(*(self._of_batch(one, batch, scope) for one in (both.scale, both.gain)))
                        for index, both in factors.items()
                    }
                    norms.write_numbers(batch, own_factors)
        for label, by_group in found.items():
            known = self._last.get(label, {}) if len(step.active_groups) < len(step.groups) else {}
            self._last[label] = {i: old for i, old in known.items() if i not in step.active_groups} | by_group

    def _value(self, bound: BoundTransform, group: int) -> Tensor:
        """The coefficient of a rule in a group, float64: one number, or [parameters of the model]."""
        known = self._last[bound.label][group]
        # Rates are float64 until they meet the parameter's dtype: λ·lr·M is rounded once.
        value = known.value.to(wide_dtype(known.value.device))
        return value if known.scope in OWN else value[group if known.scope == "group" else 0]

    def num_own(self, positions: Sequence[int], scope: str) -> list[int] | None:
        """How many numbers of a scope each of these parameters has of its own on this rank; None where they share one."""
        if scope not in OWN:
            return None
        num_cells = self._slots().num_cells
        return [num_cells[position] if scope == "matrix" else 1 for position in positions]

    def rate(self, bound: BoundTransform, batch: Batch) -> Rate:
        """The coefficient of a rule, as a float64 tensor: one number, or one for each parameter (or matrix) of the batch."""
        return self._of_batch(
            self._value(bound, batch.group_index), batch, self._last[bound.label][batch.group_index].scope
        )

    def _of_batch(self, values: Tensor, batch: Batch, scope: str) -> Tensor:
        """The numbers of a batch among those of all slots of a scope: one, or one for each parameter (or matrix)."""
        if scope not in OWN:
            return values[batch.group_index if scope == "group" else 0] if values.dim() else values
        slots = self._slots()
        # Beside numbers of single matrices, those of parameters come as one for each matrix, too.
        if scope == "tensor" and batch.num_cells is not None and any(num != 1 for num in batch.num_cells):
            values, scope = slots.by_matrix(values), "matrix"
        return values[slots.index(batch.index, scope, values.device)]

    def keep(self, bound: BoundTransform, step: Step, groups: frozenset[int]) -> None:
        """The step has been written, for these groups: their kept numbers move, but where the step is skipped."""
        for index, known in list(self._last.get(bound.label, {}).items()):
            if index not in groups or not known.new:
                continue
            device, is_shared = known.value.device, known.scope not in OWN
            # A parameter without a gradient rests, and so do numbers of its own. Shared ones move in every step.
            rests = None if known.has_gradient is None else known.has_gradient == 0
            found_inf = step.found_inf.get(index)
            if found_inf is not None:
                is_skipped = found_inf.to(device, non_blocking=True) != 0
                rests = is_skipped if rests is None else rests | is_skipped
            now = known.new
            if rests is not None:
                now = {name: torch.where(rests, known.old[name], value) for name, value in known.new.items()}
            shown = {name: now.get(name, value) for name, value in known.numbers.items()}
            self._last[bound.label][index] = replace(known, numbers=shown)

            positions = _holders(step, index, known.scope)
            entries = [step.entries[position] for position in positions]
            if is_shared:
                slot = index if known.scope == "group" else 0
                values = {name: value[slot].reshape(1) for name, value in now.items()}
            else:
                slots = self._slots().index(positions, known.scope, device)
                values = {name: value[slots] for name, value in now.items()}
            nums = self.num_own(positions, known.scope)
            self._kept.write(bound, values, entries, index, nums, known.scope == "matrix")

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is measured within leaves no trace in `stats`."""
        last = dict(self._last)
        yield
        self._last = last

    # --- for users -------------------------------------------------------------------------------

    def stats(
        self, transforms: Sequence[BoundTransform], params: Params, settings: Mapping[tuple[int, int], GroupSettings]
    ) -> dict[str, dict[str, Any]]:
        """By rule: the last measured and kept numbers by name, and the coefficient; NaN before the first step.

        transforms: all of the optimizer's. params, settings: its parameters, and its settings by transform and group.
        See `Chain.stats`.
        """
        found: dict[str, dict[str, Any]] = {}
        for bound in transforms:
            every = {index: settings[bound.index, index] for index in range(len(params.groups))}
            own = {index: each for index, each in every.items() if not each.is_absolute}
            if not own:
                continue
            # What the last step was of. A group that has come since then has no numbers yet.
            by_group = self._last.get(bound.label) or _unmeasured(bound, own, params)
            names = dict.fromkeys(name for each in by_group.values() for name in each.numbers)
            table = {name: _table(by_group, name, params) for name in names}
            coefficient = _table(by_group, None, params)
            coefficients: dict[str, Any] = {}
            # One form for the whole run: a schedule may part the groups' λ, or make them equal, at any step.
            if _coefficient_settings(bound) is not None and all(each.scope == "all" for each in by_group.values()):
                if isinstance(coefficient, dict):
                    # Groups may have a metric of their own, too: that of the largest coefficient, so that λ·M is it.
                    coefficient, largest = torch.stack(list(coefficient.values())).max(dim=0)
                    for name, numbers in table.items():
                        if isinstance(numbers, dict) and len(numbers) == len(by_group):
                            # By `take` and not by an index, which would be read on the host.
                            table[name] = torch.stack(list(numbers.values())).take(largest)
                coefficients["coefficients"] = {index: each.value[0] for index, each in by_group.items()}
            what = "gain" if bound.transform.is_norm_rule else "coefficient"
            found[bound.label] = {**table, what: coefficient, **coefficients}
        return found


def _table(by_group: Mapping[int, Coefficient], name: str | None, params: Params) -> Any:
    """0-d where one number serves all groups; else by group index, or by the names of the parameters held here.

    name: of the number; None: the coefficient.
    """
    shown: dict[Any, Tensor] = {}
    for index, each in by_group.items():
        original = each.value if name is None else each.numbers.get(name)
        if original is None:
            continue
        values = original if name is None else original.to(each.dtype)
        if each.scope in OWN:
            plan = each.plan
            for position, entry in enumerate(params.entries if plan is None else plan.entries):
                if entry.group == index:
                    slots = [0] if plan is None else plan.slots_of(position, each.scope)
                    # Of a stack one for each matrix that lies here, in the shape of the stack; else one number.
                    shape: tuple[int, ...] = ()
                    if each.scope == "matrix" and not (plan is None and is_frozen(entry.tensor)):
                        piece = describe(entry.name, entry.tensor) if plan is None else plan.pieces[position]
                        shape = piece.local_stack
                    own = values[torch.tensor(slots, dtype=torch.int64).to(values.device)]
                    shown[entry.name] = own.expand(math.prod(shape)).reshape(shape)
        else:
            shown[index] = values[index if each.scope == "group" else 0]
    # Groups of equal settings share their numbers, and then there is one for all of them.
    originals = {
        id(each.value if name is None else each.numbers[name])
        for each in by_group.values()
        if name in (None, *each.numbers)
    }
    is_one = len(originals) == 1 and all(each.scope == "all" for each in by_group.values())
    return next(iter(shown.values())) if is_one else shown


def _unmeasured(bound: BoundTransform, settings: Mapping[int, GroupSettings], params: Params) -> dict[int, Coefficient]:
    """What stands in a rule's place, by group, before its first step: NaN, shared by groups as they will share numbers."""
    shared: dict[Any, Tensor] = {}

    def nan_of(key: Any) -> Tensor:
        return shared.setdefault(key, torch.full((len(params.groups),), torch.nan, device="cpu"))

    found = {}
    for index, own in settings.items():
        key = _sharing_key(bound, own)
        numbers = {name: nan_of(ask) for name, ask in own.asks.items() if name not in own.keeps}
        numbers |= {name: nan_of((index, name)) for name in own.keeps}
        value = nan_of(index if key is None else key)
        found[index] = Coefficient(own.scope, numbers, value, {}, {}, None, torch.float32, None)
    return found


def _coefficient_settings(bound: BoundTransform) -> frozenset[str] | None:
    """The settings that a rule's coefficient depends on, where its class has named them."""
    # A subclass that computes its coefficient anew may read other settings than those that its base has named.
    cls = next(cls for cls in type(bound.transform).__mro__ if "coefficient" in vars(cls))
    names: frozenset[str] | None = vars(cls).get("coefficient_settings")
    return names


def _sharing_key(bound: BoundTransform, settings: GroupSettings) -> Any:
    """What two groups must have in common to share a coefficient; None if that cannot be told."""
    names = _coefficient_settings(bound)
    # Kept numbers are a group's own.
    if settings.keeps or (
        names is None and not all(isinstance(v, (int, float, str, Tensor)) for v in settings.values.values())
    ):
        return None
    read = sorted(settings.values) if names is None else sorted(names)
    values = [settings.values[name] for name in read]
    return tuple(settings.asks.items()), tuple(id(value) if isinstance(value, Tensor) else value for value in values)


def _trainable(step: Step, group: int) -> list[int]:
    """The positions of a group's parameters that require a gradient: only these have numbers of their own."""
    return [i for i, entry in enumerate(step.entries) if entry.group == group and entry.tensor.requires_grad]


def _holders(step: Step, group: int, scope: str) -> list[int]:
    """The positions of a group's parameters in whose state numbers of a scope lie."""
    # A shared number goes on while a parameter is frozen, and that shall not have an old one when it is thawed.
    if scope in OWN:
        return _trainable(step, group)
    return [i for i, entry in enumerate(step.entries) if entry.group == group]


def check_coefficient(bound: BoundTransform, settings: GroupSettings) -> None:
    """Raise ValueError, naming rule and method, if a rule's `coefficient` returns what is none. Tries it on ones.

    In a step it would be too late: an optimizer before the rule may have moved its state by then.
    """
    if settings.is_absolute or (bound.transform.is_norm_rule and settings.is_off):
        return
    like = torch.ones(2, dtype=torch.float64)
    measured = {name: like.clone() for name in settings.asks if name not in settings.keeps}
    kept = {name: like.clone() for name in settings.keeps}
    # A rule may hold tensors of another device; in a step its numbers are on that.
    with suppress(RuntimeError):
        if bound.transform.is_norm_rule:
            _answer(bound, settings, "scale", (like, like.clone(), kept), {}, like)
            _answer(bound, settings, "gain", (like, like.clone(), kept), kept, like)
        else:
            _answer(bound, settings, "coefficient", (measured, kept), kept, like)


def _answer(
    bound: BoundTransform,
    settings: GroupSettings,
    method: str,
    numbers: Sequence[Any],
    kept: Mapping[str, Tensor],
    like: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a rule answers to some numbers, and its new kept numbers, float64 like `like`. Raises ValueError for anything else.

    method: "coefficient", "gain" or "scale".
    kept: the numbers that it has to answer anew; empty: none.
    """
    # Tensors among the settings as the numbers are: on their device, in float64.
    given = {
        name: number_on(like.device, value, like.dtype) if isinstance(value, Tensor) else value
        for name, value in settings.values.items()
    }
    answer, what = getattr(bound.transform, method)(given, *numbers), f"{bound.label}.{method}"
    # What a rule of one's own returns is checked before it can go wrong in silence: a missing name would keep its old
    # value for ever, a wrong shape would broadcast.
    new: dict[str, Tensor] = {}
    if kept:
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)):
            raise ValueError(
                f"{what} must return a pair ({method}, new kept numbers), since `keeps` names {sorted(kept)}; it returned "
                f"{type(answer).__name__}"
            )
        answer, updated = answer
        if set(updated) != set(kept):
            raise ValueError(f"{what} returned kept numbers {sorted(updated)}; `keeps` names {sorted(kept)}")
        new = {name: _as_slots(what, f"kept number {name!r}", value, like) for name, value in updated.items()}
    return _as_slots(what, method, answer, like), new


def _as_slots(method: str, what: str, value: Any, like: Tensor) -> Tensor:
    """A rule's answer as one float64 number for each slot. Raises ValueError for anything else."""
    if isinstance(value, Tensor):
        if value.shape not in ((), like.shape) or value.is_complex():
            raise ValueError(
                f"{method}: the {what} has shape {tuple(value.shape)}; it must be one number, or one for "
                f"each of the {len(like)} numbers that it was given"
            )
        return number_on(like.device, value, like.dtype).expand(len(like))
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{method}: the {what} is {value!r}; it must be a number or a tensor")
    return torch.full_like(like, value)
