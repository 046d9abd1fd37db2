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
from ..kernels.formulas import Rate
from ..kernels.sums import wide_dtype
from ..metrics.measure import OWN, Request, Slots, Source, Taken, measure, take
from ..metrics.metric import Measure, parse_metric
from ..metrics.plan import Plan
from ..sharding.params import Params, is_frozen
from ..sharding.pieces import describe
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
    value: the coefficient, float32.
    old, new: kept numbers before the step, and those that the rule answered; stored when the step has been written.
    has_gradient: [slots] bool, where numbers of single parameters or matrices are kept; None: they all move.
    dtype: of the numbers that users are shown.
    plan: whose slots the numbers of single parameters have; the plan of today may number them otherwise. None for others.
    """

    scope: str
    numbers: Mapping[str, Tensor]
    value: Tensor
    old: Mapping[str, Tensor]
    new: Mapping[str, Tensor]
    has_gradient: Tensor | None
    dtype: torch.dtype
    plan: Plan | None


class Coefficients:
    """Measures what rules ask for, once per phase, and lets each rule make its coefficient of it.

    A coefficient is computed in float64 and rounded once, to float32. That makes it the same number on any sharding:
    float64 sums differ between shardings, if at all, far below the last bit of float32.

    plan: who holds what; asked for only where something is measured.
    kept: the numbers that rules carry from step to step.
    """

    def __init__(self, plan: Callable[[], Plan], kept: KeptNumbers) -> None:
        self._plan, self._kept = plan, kept
        self._measured: dict[tuple[int, Measure], Tensor] = {}
        self._last: dict[str, dict[int, Coefficient]] = {}
        self._taken: dict[tuple[int, Measure], Taken] = {}  # by the position of the phase that will reduce them
        self._has_gradient: dict[
            str, Tensor
        ] = {}  # by scope [slots] bool, where a rule keeps numbers of single parameters
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

    def measure(self, phase: Phase, step: Step) -> None:
        """Take all metrics of a phase, with one reduction."""
        slots = self._slots(step.frozen)
        # Several rules may ask for the same; it is measured once. Tensors are asked for once, too: an update that a rule
        # asks for makes a waiting optimizer run.
        asks = list(dict.fromkeys(ask for _, ask in phase.asks))
        taken = {ask: self._taken.pop((phase.position, ask), None) for ask in asks}
        sources = {of: step.tensors_for(of) for of in dict.fromkeys(ask.of for ask in asks if taken[ask] is None)}
        requests = [Request(ask.parsed, sources.get(ask.of, ()), ask.scope, taken[ask]) for ask in asks]
        counted = dict.fromkeys(
            ask.scope for index, ask in phase.asks if ask.scope in OWN and step.keeps_numbers(index)
        )
        for scope in counted:
            # A kept number of one parameter moves if the parameter has a gradient anywhere. Ranks whose shard is empty
            # may have none (FSDP1), so that is counted in the same reduction: a 1 for each gradient of an owner, for
            # each matrix that it owns a part of.
            found = []
            for batch in step.batches:
                one = torch.ones(1, device=batch.params[0].device)
                nums = [slots.num_cells[position] if scope == "matrix" else 1 for position in batch.index]
                found.append(Source(batch.index, [one if num == 1 else one.expand(num) for num in nums]))
            requests.append(Request(parse_metric("l0"), found, scope))
        numbers_of = measure(slots.plan, requests, slots=slots, workspace=step.workspace)
        self._has_gradient.update({scope: numbers_of.pop() > 0 for scope in reversed(counted)})
        numbers = dict(zip(asks, numbers_of, strict=True))
        for index, ask in phase.asks:
            self._measured[index, ask] = numbers[ask]

    def evaluate(self, bound: BoundTransform, step: Step) -> None:
        """Let a rule make its coefficients, one for each active group. An absolute rule has none: its rate is λ."""
        found: dict[int, Coefficient] = {}
        shared: dict[Any, Coefficient] = {}
        # In order: on every rank the rule's functions see the groups alike.
        for index in sorted(step.active_groups):
            settings = step.settings[bound.index, index]
            if settings.is_absolute:
                continue
            key = _sharing_key(bound, settings)
            if key is None or key not in shared:
                found[index] = self._evaluate_group(bound, step, index, settings)
                if key is not None:
                    shared[key] = found[index]
            else:
                found[index] = shared[key]  # groups with equal settings share one
        if not found:
            self._last.pop(bound.label, None)
            return
        # Groups that this step is not of keep the numbers of their own last step (DeepSpeed steps one at a time).
        kept = self._last.get(bound.label, {}) if len(step.active_groups) < len(step.groups) else {}
        self._last[bound.label] = {i: old for i, old in kept.items() if i not in step.active_groups} | found

    def _evaluate_group(self, bound: BoundTransform, step: Step, index: int, settings: GroupSettings) -> Coefficient:
        """Give a rule its numbers for one group, and check what it answers."""
        asks, begins = settings.asks, settings.keeps
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

        kept: dict[str, Tensor] = {}
        positions = _trainable(step, index) if begins else []
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

        own = {name: kept[name] for name in begins}
        value, new = _answer(bound, settings, measured, own, like)
        if has_begun is not None:
            new[COUNT] = has_begun + 1
        # λ = 0 is off, also where the metric is not finite. By selection, since 0·inf is NaN.
        if settings.is_off:
            value = torch.zeros_like(value)
        elif isinstance(decay := settings.values.get("weight_decay"), Tensor):
            value = torch.where(decay.to(value.device) == 0, 0.0, value)
        dtype = self._plan().result_dtype if asks else torch.float32
        # A rule in a closure acts before the others of the step measure, so this belongs to its answer.
        has_gradient = self._has_gradient.get(scope)
        own_plan = None if is_shared else self._plan()
        return Coefficient(scope, {**measured, **own}, value.to(torch.float32), old, new, has_gradient, dtype, own_plan)

    def num_own(self, positions: Sequence[int], scope: str) -> list[int] | None:
        """How many numbers of a scope each of these parameters has of its own on this rank; None where they share one."""
        if scope not in OWN:
            return None
        return [self._slots().num_cells[position] if scope == "matrix" else 1 for position in positions]

    def rate(self, bound: BoundTransform, batch: Batch) -> Rate:
        """The coefficient of a rule, as a float64 tensor: one number, or one for each parameter (or matrix) of the batch."""
        known = self._last[bound.label][batch.group_index]
        # Rates are float64 until they meet the parameter's dtype: λ·lr·M is rounded once.
        value = known.value.to(wide_dtype(known.value.device))
        if known.scope in OWN:
            slots, scope = self._slots(), known.scope
            # Beside numbers of single matrices, those of parameters come as one for each matrix, too.
            if scope == "tensor" and batch.num_cells is not None and any(num != 1 for num in batch.num_cells):
                value, scope = slots.by_matrix(value), "matrix"
            return value[slots.index(batch.index, scope, value.device)]
        return value[batch.group_index if known.scope == "group" else 0]

    def keep(self, bound: BoundTransform, step: Step, groups: frozenset[int]) -> None:
        """The step has been written, for these groups: their kept numbers move, but where the step is skipped."""
        for index, known in list(self._last.get(bound.label, {}).items()):
            if index not in groups or not known.new:
                continue
            device, is_shared = known.value.device, known.scope not in OWN
            # A parameter without a gradient rests, and so do numbers of its own. Shared ones move in every step.
            rests = None if known.has_gradient is None else ~known.has_gradient
            found_inf = step.found_inf.get(index)
            if found_inf is not None:
                is_skipped = found_inf.to(device, non_blocking=True) != 0
                rests = is_skipped if rests is None else rests | is_skipped
            now = known.new
            if rests is not None:
                now = {name: torch.where(rests, known.old[name], value) for name, value in known.new.items()}
            shown = {name: now.get(name, value) for name, value in known.numbers.items()}
            self._last[bound.label][index] = replace(known, numbers=shown)

            positions = _trainable(step, index)
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
            found[bound.label] = {**table, "coefficient": coefficient, **coefficients}
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


def check_coefficient(bound: BoundTransform, settings: GroupSettings) -> None:
    """Raise ValueError, naming rule and method, if a rule's `coefficient` returns what is none. Tries it on ones.

    In a step it would be too late: an optimizer before the rule may have moved its state by then.
    """
    if settings.is_absolute:
        return
    like = torch.ones(2, dtype=torch.float64)
    measured = {name: like.clone() for name in settings.asks if name not in settings.keeps}
    # A rule may hold tensors of another device; in a step its numbers are on that.
    with suppress(RuntimeError):
        _answer(bound, settings, measured, {name: like.clone() for name in settings.keeps}, like)


def _answer(
    bound: BoundTransform,
    settings: GroupSettings,
    measured: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    like: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a rule answers: c, and the new kept numbers, float64 like `like`. Raises ValueError for anything else."""
    # Tensors among the settings as the numbers are: on their device, in float64.
    given = {
        name: value.to(like.device, like.dtype) if isinstance(value, Tensor) else value
        for name, value in settings.values.items()
    }
    answer = bound.transform.coefficient(given, measured, kept)  # type: ignore[attr-defined]
    # What a rule of one's own returns is checked before it can go wrong in silence: a missing name would keep its old
    # value for ever, a wrong shape would broadcast.
    new: dict[str, Tensor] = {}
    if kept:
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)):
            raise ValueError(
                f"{bound.label}.coefficient must return a pair (coefficient, new kept numbers), since `keeps` names "
                f"{sorted(kept)}; it returned {type(answer).__name__}"
            )
        answer, updated = answer
        if set(updated) != set(kept):
            raise ValueError(
                f"{bound.label}.coefficient returned kept numbers {sorted(updated)}; `keeps` names {sorted(kept)}"
            )
        new = {name: _as_slots(bound, f"kept number {name!r}", value, like) for name, value in updated.items()}
    return _as_slots(bound, "coefficient", answer, like), new


def _as_slots(bound: BoundTransform, what: str, value: Any, like: Tensor) -> Tensor:
    """A rule's answer as one float64 number for each slot. Raises ValueError for anything else."""
    if isinstance(value, Tensor):
        if value.shape not in ((), like.shape) or value.is_complex():
            raise ValueError(
                f"{bound.label}.coefficient: the {what} has shape {tuple(value.shape)}; it must be one number, or one for "
                f"each of the {len(like)} numbers that it was given"
            )
        return value.to(like.device, like.dtype).expand(len(like))
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{bound.label}.coefficient: the {what} is {value!r}; it must be a number or a tensor")
    return torch.full_like(like, value)
