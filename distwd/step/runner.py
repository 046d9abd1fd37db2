"""What `Chain` and `attach` share: a sentence led through a step, with its plan and its numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import disable_compiler
from ..attach.validate import check_numbers
from ..errors import CollectiveError, PlanError
from ..kernels.compile import check_compiler
from ..kernels.tally import Tally
from ..kernels.workspace import Workspace
from ..metrics.plan import Plan, build_plan
from ..metrics.replica_check import check_gradients
from ..sharding.collectives import is_true_on_any_rank
from ..sharding.layout import Layout, check_layout
from ..sharding.local import local_tensor
from ..sharding.params import Groups, NamedParam, ParamList
from ..sharding.pieces import check_tensor
from ..sharding.world import World, check_group
from .audit import audit
from .coefficients import Coefficients
from .phases import describe_phases, num_phases, schedule
from .rounding import Rounding
from .step import Step
from .transform import BoundTransform


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Which ranks hold the model, and how: the arguments `group`, `layout` and `check_replicas`, checked."""

    group: dist.ProcessGroup | None = None
    layout: Layout = field(default_factory=dict)
    check_replicas: bool = True

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, layout: Layout | None, check_replicas: bool) -> PlanOptions:
        """Raises ValueError for what is not a group or a layout."""
        if group is not None:
            check_group(group)
        check_layout(layout or {})
        return cls(group, layout or {}, check_replicas)


class StepRunner:
    """Leads transforms through the steps of one optimizer, or of several with one model.

    in_step, in_closure: what acts in a step, and in every evaluation of a closure. groups: the param groups as they are now.
    rounding: how parameters of low precision are written. tracks: whether to count what the decay leaves unchanged.
    compiles: whether formulas go through torch.compile.
    named_parameters: (name, tensor) pairs, for groups without names.
    """

    def __init__(
        self,
        bound_transforms: Sequence[BoundTransform],
        holders: PlanOptions,
        groups: Callable[[], Groups],
        rounding: Rounding,
        tracks: bool,
        compiles: bool,
        named_parameters: Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        self.in_closure = tuple(
            bound for bound in bound_transforms if getattr(bound.transform, "target", "") == "closure"
        )
        self.in_step = tuple(bound for bound in bound_transforms if bound not in self.in_closure)
        self._holders = holders
        self._labels = {bound.index: bound.label for bound in bound_transforms}
        self._params = ParamList(groups, named_parameters)
        self._rounding, self._tracks = rounding, tracks
        self._tallies: dict[int, Tally] = {}
        self._plan: Plan | None = None
        self._checked: tuple[NamedParam, ...] | None = None  # where no plan is needed
        self._compiles, self._workspace = compiles, Workspace(compiles)
        self._planned: tuple[Any, Any] | None = None  # the schedules that all ranks had when the plan was built
        self._agreed = self._told = False  # whether all ranks are known to train; whether this one has left word
        self._compares = False  # whether the first real step compares the gradients of copies
        self._num_asked = 0
        # In a step, `prepare` has seen to it that the plan fits.
        self._coefficients = Coefficients(lambda: self._plan or self.plan)

    @property
    def groups(self) -> Groups:
        """All param groups, also in a step that is shown only some."""
        return self._params.groups

    @property
    def entries(self) -> tuple[NamedParam, ...]:
        """All parameters, as the groups hold them now."""
        return self._params.read().entries

    def playing(self) -> list[tuple[int, NamedParam]]:
        """The parameters of the groups that are shown now, with their positions among all."""
        params = self._params.read()
        return [(position, entry) for position, entry in enumerate(params.entries) if entry.group in params.active]

    @property
    def plan(self) -> Plan:
        """Who holds what; built together with the other ranks when first asked for, and when it does not fit any more."""
        entries = self.entries
        if self._plan is None or not self._plan.fits(entries):
            self._plan = self._build(entries)
        return self._plan

    def _build(self, entries: tuple[NamedParam, ...]) -> Plan:
        holders, schedules = self._holders, self._schedules()
        rules = " | ".join(map(describe_phases, schedules)) + self._rounding.words
        if self._plan is not None:
            try:
                self._plan.meet_to_rebuild(entries, rules)
            except PlanError:
                self._params.forget()
                raise
            self._plan = None  # they all are here, whatever comes of it
        bound_transforms = self._rounding.is_stochastic
        plan = build_plan(entries, holders.group, holders.layout, holders.check_replicas, rules, bound_transforms)
        self._planned = schedules
        return plan

    @property
    def phases(self) -> int:
        """All-reduces per step, and per evaluation of a closure."""
        world = World.of(self._holders.group)
        return sum(num_phases(phases, world) for phases in self._schedules())

    def check_compiler(self) -> None:
        """Raise ValueError if torch.compile is asked for and does not work here."""
        if self._compiles:
            for device in {entry.tensor.device.type for entry in self.entries} - {"meta"}:
                check_compiler(device)

    def audit(self) -> str:
        """What is decayed, by how much, and by which rule."""
        bound_transforms, world = (*self.in_closure, *self.in_step), World.of(self._holders.group)
        return audit(self.entries, self.groups, bound_transforms, self._holders.layout, world)

    def stats(self) -> dict[str, dict[str, Any]]:
        """The last metric and coefficient of every relative rule, and what the decay left unchanged, by group."""
        told: dict[str, Any] = self._coefficients.stats()
        if self._tracks:
            written = sorted((index, tally) for index, tally in self._tallies.items() if tally.num_written)
            told["unchanged_here"] = {index: tally.share() for index, tally in written}
        return told

    def prepare(self) -> None:
        """Refuse tensors that no rule can work on: together with the other ranks where a plan is needed."""
        self.take_back()
        schedules = self._schedules()
        if any(schedules):
            asks = [ask for phases in schedules for phase in phases for ask in phase.asks]
            is_one = World.of(self._holders.group).size == 1
            check_numbers(asks, self._labels, self._params.read().active, self.groups, is_one)
        # Where the pieces of a layout begin in their wholes is known from the exchange alone, and noise depends on it.
        if any(schedules) or (self._rounding.is_stochastic and self._holders.layout):
            # A step that builds the plan talks and reads anyway; one that finds it built costs no more than those after it.
            self._compares |= self._plan is None and any(schedules) and self._holders.check_replicas
            # Other numbers than before are other collectives: that, too, all ranks have to do together.
            if self.plan is not None and self._planned != schedules:
                self._plan = self._build(self.entries)
        elif self._checked is not (entries := self.entries):
            for entry in entries:
                check_tensor(entry.name, entry.tensor)
            self._checked = entries

    def new_step(self, hosts: Mapping[int, Any]) -> Step:
        """A step of the gradients as they are now."""
        params = self._params.read()
        step = Step(params.entries, params.groups, self._coefficients, hosts, self._workspace, params.active)
        self._rounding.begin(step.entries, step.batches, lambda: self.plan)
        if self._tracks:
            tallies = {batch.group_index: Tally() for batch in step.batches}
            for batch in step.batches:
                batch.tally = tallies[batch.group_index]
        return step

    def finish(self, step: Step, groups: Groups) -> None:
        """A step has been written, for these groups."""
        self._rounding.count(groups)
        if self._tracks:
            self._tallies |= {batch.group_index: batch.tally for batch in step.batches if batch.tally is not None}

    def act(self, step: Step, bound_transforms: Sequence[BoundTransform]) -> None:
        """Let every transform have its say, measuring before the first that needs it."""
        phases = {phase.position: phase for phase in schedule(bound_transforms, self.groups)}
        for position, bound in enumerate(bound_transforms):
            if position in phases:
                self._coefficients.measure(phases[position], step, bound_transforms)
            bound.transform.apply(step, bound)
        self._rounding.warn(step.batches, on_gradients=step.pulls_gradients)

    def decaying(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with the decays of target="closure" added to the gradients after every evaluation."""

        def evaluate() -> Any:
            try:
                with torch.enable_grad():
                    loss = closure()
            except Exception as error:  # through a host's step, and no hook sees it
                self.publish_error(error)
                raise
            if self.in_closure:
                with torch.no_grad():
                    self.act(self.new_step({}), self.in_closure)
            return loss

        return evaluate

    def measure_only(self, step: Step) -> None:
        """Only what other ranks may wait for: measure, write nothing, and forget."""
        with self._coefficients.unchanged():
            for phase in schedule(self.in_step, self.groups):
                self._coefficients.measure(phase, step, self.in_step)

    def only_rehearses(self, idle: bool) -> bool:
        """Whether every rank is `idle` and has no gradient but 0: then the others are asked, if the rules ask them anyway.

        Asked in every step until one is real, and answered the same on every rank. So no rank can ask alone, whatever differs
        between them; from then on nobody is asked again, and nothing read.
        """
        if self._agreed:
            return False
        is_real = self._on_any_rank(not (idle and self.has_only_zero_grads()))
        if is_real and self._compares:
            check_gradients(self.plan)
        self._agreed = is_real
        return not is_real

    def _on_any_rank(self, flag: bool) -> bool:
        if not self.phases:
            return flag
        world = self.plan.world
        if world.error_store is None:
            return is_true_on_any_rank(flag, world)
        answer = world.error_store.is_true_on_any(flag, self._num_asked)
        self._num_asked += 1  # not before: who tries a failed step again asks the same question again
        return answer

    def has_only_zero_grads(self) -> bool:
        """Whether all gradients of this rank are 0. Reads them."""
        grads = [local_tensor(entry.tensor.grad) for entry in self.entries if entry.tensor.grad is not None]
        return not any(bool(grad.count_nonzero() > 0) for grad in grads)

    @property
    def has_agreed(self) -> bool:
        """Whether a real step has been taken, on all ranks."""
        return self._agreed

    def publish_error(self, error: Exception) -> None:
        """Leave word for ranks that will wait for this one in vain. Of the plan they all know, and of being left alone."""
        if (
            not isinstance(error, (PlanError, CollectiveError))
            and self._plan is not None
            and self._plan.world.error_store is not None
        ):
            self._plan.world.error_store.publish(f"{type(error).__name__}: {error}")
            self._told = True

    def take_back(self) -> None:
        """A step is tried again: what was told of the last one is past."""
        if self._told and self._plan is not None and self._plan.world.error_store is not None:
            self._plan.world.error_store.clear()
        self._told = False

    def _schedules(self) -> tuple[Any, Any]:
        groups = self.groups
        return schedule(self.in_step, groups), schedule(self.in_closure, groups)


Method = TypeVar("Method", bound=Callable[..., Any])


def in_step(method: Method) -> Method:
    """A method that acts in a step of what has a `_runner`: nothing is recorded for autograd, and an error is told to ranks that wait.

    Inference mode is left: tensors made in it could not be written to in the next step outside of it. A compiled caller breaks
    its graph here: collectives, hooks and groups of tensors are not for compilers.
    """

    @disable_compiler
    @functools.wraps(method)
    def acting(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                self._runner.publish_error(error)
                raise

    return cast(Method, acting)
