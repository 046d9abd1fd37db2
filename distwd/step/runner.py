"""What `Chain` and `attach` share: the transforms of one optimizer, run through a step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .. import _torch
from ..checks import warn_user
from ..errors import PlanError
from ..kernels.blocks import Workspace
from ..kernels.compile import check_compiler
from ..metrics.metric import Ask, Measure
from ..metrics.plan import Plan, PlanCache, PlanOptions
from ..sharding.params import ParamList, Params, frozen_in
from ..sharding.pieces import check_params
from .audit import audit
from .coefficients import Coefficients, check_coefficient
from .norms import NormRules, check_places
from .phases import Schedule
from .rounding import Rounding
from .start import Zeros, check_start, check_unfrozen
from .state import Anchors, KeptNumbers, Wanted
from .step import Step, Tally
from .transform import BoundTransform, GroupSettings


class StepRunner:
    """Runs the transforms of one optimizer, or of several that step one model, through a step.

    transforms: the bound transforms, in order. Those with target="closure" act in every evaluation of the closure.
    params: the parameters and their groups, as they are now.
    options: which ranks hold the model, and how.
    rounding: how parameters of low precision are written.
    state_of, may_keep: where kept numbers lie, see `KeptNumbers`.
    track_unchanged: whether to count what the decay leaves unchanged.
    compiles: whether formulas go through torch.compile.
    shows_bare_update: whether rules see the update as the optimizer has made it, and not the decay of others.
    """

    def __init__(
        self,
        transforms: Sequence[BoundTransform],
        params: ParamList,
        options: PlanOptions,
        rounding: Rounding,
        state_of: Callable[[Tensor], Any],
        may_keep: Callable[[Tensor], bool] = lambda param: True,
        track_unchanged: bool = False,
        compiles: bool = False,
        shows_bare_update: bool = False,
    ) -> None:
        self.in_closure = tuple(bound for bound in transforms if bound.transform.target == "closure")
        self.in_step = tuple(bound for bound in transforms if bound.transform.target != "closure")
        self.params = params
        # Where the pieces of a layout begin in their wholes is known from the exchange alone, and noise depends on it.
        self.plans = PlanCache(options, with_offsets=rounding.is_stochastic)
        self.kept = KeptNumbers(transforms, state_of, may_keep)
        self.anchors = Anchors(transforms, state_of, may_keep)
        self._rounding, self._tracks, self._compiles = rounding, track_unchanged, compiles
        self._workspace = Workspace(compiles)
        # In a step, `prepare` has seen to it that the plan fits.
        self._coefficients = Coefficients(lambda: self.plans.plan or self.plan, self.kept)
        self._tallies: dict[int, Tally] = {}
        self._ddp_models: list[Any] = []  # weak references
        self._checked: tuple[Any, ...] | None = None  # the parameters that were looked at, where no plan is needed
        # What the step under way goes by.
        self.now = Params((), (), frozenset())
        self._settings: dict[tuple[int, int], GroupSettings] = {}  # by (index of the transform, index of the group)
        self._schedules: tuple[Schedule, Schedule] = (Schedule(()), Schedule(()))
        self._scheduled: Any = None  # the settings that the schedules are of
        self._anchored: Wanted = ()
        self._measures_matrices = False
        self._shows_bare_update = shows_bare_update
        self._started_with: Plan | None = None  # of which plan a real step has begun
        self._started_settings: Mapping[tuple[int, int], GroupSettings] = {}  # with which settings it has
        self._started: frozenset[tuple[int, int]] = frozenset()  # rules and groups whose kept numbers can begin
        self._frozen_zeros: Zeros = {}  # parameters whose kept numbers could not begin if they were trained
        self._norms = NormRules((), {}, 0, shows_bare_update)  # of the same settings
        self._computing: set[int] = set()  # indices of transforms that compute a coefficient
        self.keeps_state = False  # whether any rule keeps numbers or anchors, by the settings of this step
        self.has_looked = False  # whether it is known if any parameter had a gradient in the first step
        self.has_built_plan = False  # whether a step has built the plan, and with it something may be compared once

    # --- outside of a step -----------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Who holds what; built together with the other ranks when first asked for, and when it does not fit any more."""
        params = self.params.read()
        if self.plans.fits(params.entries):
            assert self.plans.plan is not None
            return self.plans.plan
        settings = self._read_settings(params)
        fault = self.anchors.fault(params, self.anchors.wanted(settings))
        return self._build(params, self._schedule(params, settings), fault)

    @property
    def phases(self) -> int:
        """All-reduces per step, and per evaluation of a closure."""
        world, params = self.plans.world, self.params.read()
        schedules = self._schedule(params, self._read_settings(params))
        return sum(schedule.num_collectives(world) for schedule in schedules)

    def check(self) -> None:
        """Raise ValueError for what can be known to fail before a step: what rules ask for and return, and torch.compile."""
        for bound in (*self.in_closure, *self.in_step):
            for group in ({}, *self.params.groups):
                check_coefficient(bound, bound.read(group))
        check_places(self.in_step)
        params = self.params.read()
        self._norms_of(params, self._read_settings(params))
        if self._compiles:
            # Found out now, and not in the first step, after the model has been sharded and loaded.
            for device in {entry.tensor.device.type for entry in self.params.read().entries} - {"meta"}:
                if reason := check_compiler(device):
                    warn_user(
                        f"compile=True: {reason}; on {device} distwd steps operation by operation, with the same results but "
                        "slower. Install triton beside torch, or leave compile out"
                    )

    def audit(self) -> str:
        """What is decayed, by how much, and by which rule."""
        params, transforms = self.params.read(), (*self.in_closure, *self.in_step)
        return audit(params.entries, params.groups, transforms, self.plans.options.layout, self.plans.world)

    def stats(self) -> dict[str, dict[str, Any]]:
        """The last numbers of every rule that is not absolute, and what the decay left unchanged, by group."""
        params = self.params.read()
        shown: dict[str, Any] = self._coefficients.stats(
            (*self.in_closure, *self.in_step), params, self._read_settings(params)
        )
        if self._tracks:
            written = sorted((index, tally) for index, tally in self._tallies.items() if tally.num_written)
            shown["unchanged_here"] = {index: tally.share() for index, tally in written}
        return shown

    # --- a step ----------------------------------------------------------------------------------

    def prepare(self) -> Params:
        """Begin a step: read parameters and groups, decide when to measure, and refuse what no rule can work on.

        This is the only place of a step that reads groups and settles the schedule. Where metrics are needed it is done
        together with the other ranks.
        """
        # This rank raised in its last step and tries again: ranks that read its reason now would give up for nothing.
        if self.plans.has_published:
            self.plans.clear_published()
        params = self.read()
        # By identity: `read` returns the same settings as long as nothing has changed.
        if self._scheduled is not self._settings:
            self._schedules, self._scheduled = self._schedule(params, self._settings), self._settings
            self._norms = self._norms_of(params, self._settings)
            self._computing = {index for (index, _), own in self._settings.items() if not own.is_absolute}
            self._anchored = self.anchors.wanted(self._settings)
            self._measures_matrices = _measures_matrices(self._schedules)
            self.keeps_state = bool(self._anchored) or any(own.keeps for own in self._settings.values())
        schedules = self._schedules
        fault = self.anchors.fault(params, self._anchored) if self._anchored else None
        measures = any(schedule.phases for schedule in schedules)
        if measures:
            self._check_asks(params)
        # A layout tells stochastic rounding only that there are pieces; where each begins comes with the plan.
        if measures or (self._rounding.is_stochastic and self.plans.options.layout):
            # A step that builds the plan talks and reads anyway; one that finds it built costs no more than those after it.
            if not self.plans.is_current and measures and self.plans.options.check_replicas:
                self.has_built_plan = True
            # Other metrics than before are other collectives: that, too, all ranks have to do together.
            if not self.plans.fits(params.entries, schedules):
                self._build(params, schedules, fault)
        # Absolute rules need no plan: each rank looks at its own tensors, and only at those that are new.
        elif self._checked is not params.entries:
            check_params(params.entries, frozen_in(params.entries))
            self._checked = params.entries
        # Where no plan was built, ranks have not met, and each looks at its own tensors.
        if fault is not None:
            raise ValueError(fault)
        return params

    def begin_real(self, found_inf: Tensor | None = None, groups: Sequence[dict[str, Any]] | None = None) -> None:
        """The step is no hidden one of checkpoint code: what is pulled to begins as the parameters are now.

        Of a new plan, and of a rule that a group has switched on, it is found out with the other ranks whether what the rule
        keeps can begin.

        found_inf: not 0 where the step will be skipped.
        groups: the groups that it is of; None: all.
        """
        if self._anchored:
            # By identity: two groups may be equal.
            ids = None if groups is None else set(map(id, groups))
            own = None if ids is None else [i for i, group in enumerate(self.now.groups) if id(group) in ids]
            self.anchors.begin(self.now, self._anchored, found_inf, own)
        plan, settings = self.plans.plan, self._settings
        is_known = plan is self._started_with
        if is_known and self._frozen_zeros:
            self._frozen_zeros = check_unfrozen(self._frozen_zeros, self.now, settings)
        if plan is None or (is_known and settings is self._started_settings):
            return
        # A group may switch a rule on in any step; all ranks see that alike.
        started = self._started if is_known else frozenset[tuple[int, int]]()
        rules = [
            (bound, index, now)
            for bound in self.in_step
            for index in range(len(self.now.groups))
            if (bound.index, index) not in started
            and not (now := settings[bound.index, index]).is_off
            and any(isinstance(now.keeps.get(name), Measure) for name in bound.transform.nonzero)
        ]
        zeros = dict(self._frozen_zeros) if is_known else {}
        if rules:
            zeros |= check_start(plan, self.kept, self.now, rules)
        self._started = started | {(bound.index, index) for bound, index, _ in rules}
        self._started_with, self._started_settings, self._frozen_zeros = plan, settings, zeros

    def read(self) -> Params:
        """The parameters, groups and settings as they are now; what a step goes by until they are read again."""
        self.now = self.params.read()
        settings = self._read_settings(self.now)
        # The same object as before, if it says the same: then nothing that was made of it has to be made anew.
        is_known = len(settings) == len(self._settings) and all(
            self._settings.get(key) is value for key, value in settings.items()
        )
        if not is_known:
            self._settings = settings
        return self.now

    def new_step(self, inner_optimizers: Mapping[int, Any], **settings: Any) -> Step:
        """A step of the gradients as they are now; settings: what only a Step for an external optimizer has."""
        params = self.now
        step = Step(
            params.entries,
            params.groups,
            params.active,
            self._settings,
            self._coefficients.rate,
            self.anchors.of,
            inner_optimizers,
            self._workspace,
            **settings,
        )
        if self._rounding.is_stochastic:
            self._rounding.begin(step.entries, step.batches, lambda: self.plan)
        if self._measures_matrices:
            # A number of a matrix is written to that matrix alone. All 1-d rates of a batch have one number for each.
            for batch in step.batches:
                batch.num_cells = self._coefficients.num_own(batch.index, "matrix")
        if self._tracks:
            # One for each group, though a group may have several batches.
            tallies = {batch.group_index: Tally() for batch in step.batches}
            for batch in step.batches:
                batch.tally = tallies[batch.group_index]
        return step

    def begin(self, step: Step, is_first: bool = True) -> None:
        """Take what has to be taken before an external optimizer steps, which is the first transform; `run` follows.

        step: the step, or a part of it.
        is_first: whether no part has been taken yet.
        """
        if self._computing:
            if is_first:
                self._coefficients.begin()
            self._coefficients.take(self._schedules[0].phases, 0, step)

    def run(self, step: Step, is_closure: bool = False, has_begun: bool = False) -> None:
        """Let every transform act on the step, measuring before the first that needs it.

        is_closure: whether it is an evaluation of a closure, in which the rules with target="closure" act.
        has_begun: whether `begin` has been called for this step.
        """
        transforms, schedule = (self.in_closure if is_closure else self.in_step), self._schedules[is_closure]
        # What is asked for was settled by `prepare`, so all ranks make the same collectives in the same order.
        phases = {phase.position: phase for phase in schedule.phases}
        if self._computing and not has_begun:
            self._coefficients.begin()
        for position, bound in enumerate(transforms):
            if phases and not (has_begun and position == 0):
                self._coefficients.take(schedule.phases, position, step)
            if position == self._norms.begins and not is_closure:
                for batch in step.batches:
                    batch.keeps_apart = batch.group_index in self._norms.groups
            if position in phases:
                self._coefficients.measure(phases[position], step, self._norms, bound.index)
            if bound.index in self._computing:
                self._coefficients.evaluate(bound, step)
            bound.transform.apply(step, bound)
        if self._norms.rules and not is_closure:
            self._coefficients.evaluate_norms(step, self._norms)
        # Only bf16 and fp16 lose a small decay to rounding.
        if any(batch.is_low for batch in step.batches):
            self._rounding.warn(step.batches, on_gradients=step.decays_gradients)

    def finish(self, step: Step, groups: Sequence[dict[str, Any]]) -> None:
        """The step has been written, for these groups: counters and kept numbers move on."""
        if not self.has_looked:
            self.has_looked = True
            trained = any(entry.tensor.requires_grad and entry.tensor.numel() for entry in step.entries)
            if trained and not step.batches:
                warn_user(_NO_GRADIENT)
        if self._rounding.is_stochastic:
            self._rounding.count(groups)
        # By identity: two groups may be equal.
        ids = set(map(id, groups))
        indices = frozenset(index for index, group in enumerate(step.groups) if id(group) in ids)
        for bound in (*self.in_closure, *self.in_step):
            if bound.index in self._computing:
                self._coefficients.keep(bound, step, indices)
        if self._tracks:
            self._tallies |= {batch.group_index: batch.tally for batch in step.batches if batch.tally is not None}

    def measure_only(self, step: Step) -> None:
        """Only what other ranks may wait for: measure, write nothing, and forget."""
        with self._coefficients.unchanged():
            self._coefficients.begin()
            for phase in self._schedules[0].phases:
                self._coefficients.measure(phase, step, self._norms, self.in_step[phase.position].index)

    def decaying(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with the decays of target="closure" added to the gradients after every evaluation."""

        def evaluate() -> Any:
            try:
                # We are inside of no_grad, and the closure calls backward.
                with torch.enable_grad():
                    loss = closure()
            except Exception as error:
                self.plans.publish(error)  # an optimizer may call it, and then no hook of ours sees the error
                raise
            if self.in_closure:
                with torch.no_grad():
                    self.run(self.new_step({}), is_closure=True)
            return loss

        return evaluate

    # --- its parts -------------------------------------------------------------------------------

    def _read_settings(self, params: Params) -> dict[tuple[int, int], GroupSettings]:
        """The settings of every transform in every group; those that have not changed are the same objects as before."""
        return {
            (bound.index, index): bound.read(group, self._settings.get((bound.index, index)))
            for bound in (*self.in_closure, *self.in_step)
            for index, group in enumerate(params.groups)
        }

    def _norms_of(self, params: Params, settings: Mapping[tuple[int, int], GroupSettings]) -> NormRules:
        return NormRules(self.in_step, settings, len(params.groups), self._shows_bare_update)

    def _schedule(self, params: Params, settings: Mapping[tuple[int, int], GroupSettings]) -> tuple[Schedule, Schedule]:
        """The phases of a step, and of an evaluation of a closure."""
        norms = self._norms_of(params, settings)
        asks: dict[int, list[Ask]] = {
            bound.index: [
                *(ask for index in range(len(params.groups)) for ask in settings[bound.index, index].asks.values()),
                *norms.asks_of(bound.index),
            ]
            for bound in (*self.in_closure, *self.in_step)
        }
        return Schedule.of(self.in_step, asks, norms.since), Schedule.of(self.in_closure, asks)

    def _build(self, params: Params, schedules: tuple[Schedule, Schedule], fault: str | None) -> Plan:
        rules = " | ".join(map(str, schedules)) + self._rounding.words
        # All ranks must mean the same metrics and the same noise, so this text is part of the exchange.
        had_plan = self.plans.plan is not None
        try:
            return self.plans.build(params.entries, rules, schedules, _measures_matrices(schedules), fault)
        except PlanError:
            if had_plan and self.plans.plan is not None:
                self.params.forget()  # the others have not come: a change of the groups may be taken back
            raise

    def _check_asks(self, params: Params) -> None:
        """Raise ValueError where a rule asks for a metric that this step cannot have; on every rank, since all step alike."""
        labels = {bound.index: bound.label for bound in (*self.in_closure, *self.in_step)}
        is_in_backward = _torch.is_in_backward()
        # DeepSpeed's ZeRO-3 numbers its tensors. It shows one at a time, so the first of a group is all.
        is_piecewise = any(hasattr(param, "ds_id") for group in params.groups for param in group["params"][:1])
        # DeepSpeed's ZeRO-1 and 2 show one group at a time.
        is_partial = len(params.active) < len(params.groups)
        # A rank that has no more batches stands in for DDP's collectives, and not for ours: they would be paired. DDP
        # is looked for once, before there is a plan, since it must be there by then and the search takes a moment.
        if not self.plans.is_current:
            is_alone = self.plans.world.size == 1
            self._ddp_models = [] if is_alone else _torch.ddp_models_of(entry.tensor for entry in params.entries)
        is_joining = any(_torch.is_joining(model()) for model in self._ddp_models)
        if not (is_in_backward or is_partial or is_piecewise or is_joining):
            return
        for index, ask in (ask for schedule in self._schedules for ask in schedule.asks):
            if is_joining:
                raise ValueError(_JOINING.format(label=labels[index]))
            if is_in_backward and (ask.scope == "all" or self.plans.world.size > 1):
                raise ValueError(IN_BACKWARD.format(label=labels[index]))
            if is_partial and ask.scope == "all":
                shown, of = len(params.active), len(params.groups)
                raise ValueError(_IN_PARTS.format(label=labels[index], shown=shown, all=of))
            if is_piecewise:
                raise ValueError(_PIECE_BY_PIECE.format(label=labels[index]))


def _measures_matrices(schedules: tuple[Schedule, Schedule]) -> bool:
    """Whether any number of a step is of single matrices."""
    return any(ask.scope == "matrix" for schedule in schedules for _, ask in schedule.asks)


_NO_GRADIENT = (
    "no parameter of the optimizer has a gradient in its first step, so nothing is trained or decayed; if the model was sharded "
    "(fully_shard), moved or replaced after the optimizer was made, make the optimizer after that; else call backward() before step()"
)
IN_BACKWARD = (
    "{label} needs a metric over all parameters, but the optimizer steps inside backward(), one parameter at a time: the others' "
    "gradients are not there yet, and ranks need not come to it in one order; step after backward(), or use an absolute rule"
)
_IN_PARTS = (
    "this step is of {shown} of the optimizer's {all} param groups (DeepSpeed's ZeRO-1 and 2 step one group at a time), so {label} "
    "never sees the whole model: give it scope='group' (or 'tensor'), or put all parameters into one group"
)
_JOINING = (
    "{label} needs a metric over all ranks, and inside DDP's join() a rank without batches takes part in DDP's collectives only: "
    "use join(throw_on_early_termination=True), stop all ranks after the same number of steps, or use an absolute rule"
)
_PIECE_BY_PIECE = (
    "{label} needs a metric over all parameters, but DeepSpeed's ZeRO-3 shows the optimizer one piece after the other; use ZeRO-1 or 2, "
    "FSDP2, or an absolute rule"
)


class ShowsRunner:
    """What an optimizer that steps through a `StepRunner` shows of it; `Chain` and `Attachment` are such."""

    _runner: StepRunner

    @property
    def plan(self) -> Plan:
        """Who holds what. Built when first asked for, together with the other ranks: then every rank must ask."""
        return self._runner.plan

    @property
    def phases(self) -> int:
        """Collectives per step (closure targets: per evaluation of the closure); 0 for absolute rules and on one rank."""
        return self._runner.phases

    def stats(self) -> dict[str, dict[str, Any]]:
        """The last `metric` and `coefficient` (λ·metric, without lr) of every relative rule, by its label in `repr`.

        0-d tensors, not synchronised, made anew by every step; NaN before the first. Their form is that of the rule's
        `scope`, in the whole run:
        "all": `metric` and `coefficient` are one tensor each, and `coefficients` has one for each param group, by its
            index. Where groups have a λ or a metric of their own, the two are those of the group that decays most.
        "group": both are dicts by the index of the group.
        "tensor": both are dicts by the names of the parameters that this rank holds.
        Groups that differ in scope: both are dicts, each group as its own scope says.
        A rule of one's own has each measured and kept number under its name, and its `coefficient`: one tensor where one
        number serves all groups, else such a dict.
        With track_unchanged=True also "unchanged_here", by group index: the share of the elements that *this rank* wrote
        in the last step which have the bits that they would have without the decay.

        >>> import torch
        >>> from distwd import LR, Chain, RelativeWeightDecay
        >>> chain = Chain([torch.nn.Parameter(torch.ones(2))], RelativeWeightDecay(0.1), LR(0.5))
        >>> chain.stats()["RelativeWeightDecay"]
        {'metric': tensor(nan), 'coefficient': tensor(nan), 'coefficients': {0: tensor(nan)}}
        """
        return self._runner.stats()


Method = TypeVar("Method", bound=Callable[..., Any])


def step_method(method: Method) -> Method:
    """A method that acts in a step of what has a `_runner`. Autograd records nothing, and ranks that wait learn of an error.

    Inference mode is left: tensors made in it could not be written to in the next step outside of it. A compiled caller
    breaks its graph here: collectives, hooks and groups of tensors are not for compilers.
    """

    @_torch.disable_compiler
    @functools.wraps(method)
    def acting(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                self._runner.plans.publish(error)
                raise

    return cast(Method, acting)
