"""Chain: an optimizer written as a list of transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist

from .checks import check_spelling, is_zero, warn_user
from .metrics.plan import PlanOptions
from .optimizers.base import GradientOptimizer
from .optimizers.full_params import ClosureOptimizer
from .optimizers.init_step import FirstStep
from .optimizers.lr import LR
from .optimizers.state import NO_PARAMS_KEY, mark_initialized, without_mark
from .optimizers.wrap import Wrap
from .sharding.layout import Layout
from .sharding.params import NamedParam, ParamList, normalised_groups
from .step.coefficients import check_coefficient
from .step.rounding import Rounding, RoundingMode
from .step.runner import ShowsRunner, StepRunner, step_method
from .step.state import kept_in, restore_kept
from .step.transform import Transform, bind, with_current_values, with_exclusions

Loss = TypeVar("Loss")


class Chain(ShowsRunner, torch.optim.Optimizer):
    """An optimizer as a list of transforms, applied in order:  u ← g;  u ← tₖ(…t₁(u));  p ← p − u.

    params: what torch.optim takes: tensors, (name, tensor) pairs, or group dicts. Names are preferred: they make errors
        readable, and pipeline stages work. DTensors on any meshes, plain tensors, or a mix; any float dtype.
    transforms: rules (`WeightDecay`, ...), optimizers (`Adam`, `Wrap`) and `LR`, in the order in which they act. A rule
        before the optimizer is coupled (L2 in the gradient), between optimizer and `LR` decoupled and scaled by the
        learning rate, after `LR` not scaled by it.
    group: the ranks that together hold the model; default all ranks if torch.distributed is initialised, else this
        process. No group is created.
    layout: who holds what, for tensors whose ownership no DTensor tells (see `Plan.build`).
    check_replicas: whether the bits of copies are compared (see `Plan.build`), and, by a first step that builds the
        plan, their gradients.
    rounding: how parameters in bf16 and fp16 are written: to the "nearest", or "stochastic": to the neighbour above
        with the probability of the distance from the one below, so that small decays are not lost: they are correct on
        average. The noise is a hash of seed, number of the step, name (or position) of the parameter and place of the
        element in the whole tensor: the same on every replica, in every run and on any sharding. Its step is a key of
        the groups.
    seed: an integer, the same on every rank.
    track_unchanged: whether `stats()` shows for how many elements the decay made no difference. That costs computing
        what is written a second time.
    compile: whether to fuse what distwd itself computes: on CPUs by torch.compile, on tensors of more than 32 K elements,
        on GPUs by kernels of Triton. The first step takes some seconds longer, all others less time; the parameters
        get the same bits as without it. ValueError where there is no C++ compiler on a CPU; where Triton is missing on
        a GPU, a warning, and steps without it.

    Every hyperparameter of a transform is a key of `param_groups`: `lr`, `betas`, `weight_decay`, ...; if two
    transforms bring the same key, the second's is `weight_decay_1`, and so on. Everything of torch.optim.Optimizer
    works: groups, schedulers, hooks, closures, state_dict, checkpoints. Absolute decay never communicates; relative
    decay costs one all-reduce per phase (`phases` is their number). `print(optimizer)` shows what is decayed, by how
    much and by which rule, without communication.

    Raises ValueError for what cannot work, naming it; PlanError at the first step if the ranks do not agree on who
    holds what.
    Source: the form is torchzero's and optax's.

    >>> import torch
    >>> from distwd import LR, Adam, Chain, RelativeWeightDecay
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = Chain(model.named_parameters(), Adam(), RelativeWeightDecay(0.1), LR(1e-3))
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step()
    >>> sorted(optimizer.stats()["RelativeWeightDecay"])
    ['coefficient', 'coefficients', 'metric']
    """

    def __init__(
        self,
        params: Iterable[Any],
        *transforms: Transform,
        group: dist.ProcessGroup | None = None,
        layout: Layout | None = None,
        check_replicas: bool = True,
        rounding: RoundingMode = "nearest",
        seed: int = 0,
        track_unchanged: bool = False,
        compile: bool = False,
    ) -> None:
        validate_transforms(transforms)
        warn_without_lr(transforms)
        self._options = PlanOptions.of(group, layout, check_replicas)
        # Kept as they were given, for copies and pickles: the runner is made anew there.
        self._settings: dict[str, Any] = {
            "rounding": rounding,
            "seed": seed,
            "track_unchanged": track_unchanged,
            "compile": compile,
        }
        self._transforms = bind(transforms)
        self._has_stepped = False
        self._make_runner()
        defaults = {key: bound.settings({})[name] for bound in self._transforms for name, key in bound.keys.items()}
        super().__init__(normalised_groups(params, group), {**defaults, **self._rounding.defaults})
        self._runner.check()
        self._initialize()

    def _make_runner(self) -> None:
        """Make what can be made again. None of it belongs into a copy or a checkpoint."""
        # Plans, process groups and workspaces are this process's; inner optimizers borrow groups and state.
        settings = self._settings
        self._rounding = Rounding(settings["rounding"], settings["seed"], self._options.layout)
        self._runner = StepRunner(
            self._transforms,
            ParamList(lambda: self.param_groups),
            self._options,
            self._rounding,
            state_of=lambda param: self.state,
            track_unchanged=settings["track_unchanged"],
            compiles=settings["compile"],
        )
        self._first_step = FirstStep(self._runner)
        self._inner_optimizers: dict[int, GradientOptimizer] = {}
        self._closure_optimizer: ClosureOptimizer | None = None
        self._known: tuple[NamedParam, ...] | None = None  # the parameters whose state has begun

    # --- what torch.optim.Optimizer asks of an optimizer -------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does. Raises ValueError, and adds nothing, for settings that a transform cannot use."""
        param_group = with_exclusions(_for_chain(param_group), self._transforms)
        where = f"param_groups[{len(self.param_groups)}]"
        check_spelling(where, param_group, {*self.defaults, "params", "param_names"})
        settings = {**self.defaults, **param_group}
        for bound in self._transforms:
            check_coefficient(bound, bound.read(settings))
        is_complete = self._known is not None  # not while the base class adds the first groups
        if is_complete:
            # First forget tensors that others have replaced: with one more group their places are not known any more.
            self._follow_params(self._runner.params.read().entries)
        super().add_param_group(param_group)
        # This rank may have parameters now; if it has none still, `_initialize` marks it again.
        self.state.pop(NO_PARAMS_KEY, None)  # type: ignore[call-overload]
        if is_complete:
            self._initialize()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load as torch does. A setting that the saved groups do not have yet stays as it is, and so does a pull to anchors.

        So decay may be added to a run that resumes from a checkpoint without it.
        """
        # The mark of a rank without parameters is never saved, so loading would drop it.
        has_mark = NO_PARAMS_KEY in self.state
        kept = kept_in(state_dict)
        groups = [_for_chain(group) for group in state_dict["param_groups"]]
        complete = with_current_values({**state_dict, "param_groups": groups}, self.param_groups, list(self.defaults))
        super().load_state_dict(self._runner.anchors.with_current_words(complete, self.param_groups))
        # With state comes having stepped: a real step at lr 0 must not pass for the hidden step of checkpoint code.
        self._has_stepped = self._has_stepped or bool(state_dict["state"])
        if has_mark:
            mark_initialized(self.state, [])
        restore_kept(self, kept)
        if self._runner.kept.keeps_any or self._runner.anchors.keeps_any(self.param_groups):
            # What the checkpoint lacks begins anew. The optimizers' state too, and first: Adam begins its own only
            # while a parameter has none, and cannot know that a kept number is not Adam's.
            self._initialize(is_loaded=True)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: groups, and state by the position of the parameter."""
        # torch refuses to save state of tensors that no group holds any more.
        self._follow_params(self._runner.params.read().entries)
        return without_mark(super().state_dict())

    def __getstate__(self) -> dict[str, Any]:
        if self._options.group is not None or self._options.layout:
            raise TypeError(
                "a Chain with group= or layout= cannot be pickled, since process groups cannot; pickle its state_dict()"
            )
        own = ("_options", "_transforms", "_has_stepped", "_settings")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch calls this in load_state_dict, too, where the runner is there already.
        if "_runner" not in self.__dict__:
            self._make_runner()
            # A copy or a pickle brings its state along.
            self._known = self._runner.params.read().entries

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        # Process groups are shared, not copied.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        options, self._options = self._options, PlanOptions()
        try:
            state = copy.deepcopy(self.__getstate__(), memo)
        finally:
            self._options = options
        twin.__setstate__({**state, "_options": options})
        return twin

    def __repr__(self) -> str:
        words = [f"  {bound.label}: {bound.transform!r}" for bound in self._transforms]
        return "\n".join(["Chain(", *words, ")", super().__repr__()])

    def __str__(self) -> str:
        words = [f"  {bound.label}: {bound.transform!r}" for bound in self._transforms]
        return "\n".join(["Chain(", *words, ")", self._runner.audit()])

    # --- what distwd adds --------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @step_method
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        closure: evaluates the model anew and returns the loss; needed for target="closure" and for LBFGS.
        Returns what the closure returns; None without one.
        """
        if not self._inner_optimizers and self._closure_optimizer is None:
            self._make_inner_optimizers()
        runner = self._runner
        if closure is None and runner.in_closure:
            label = runner.in_closure[0].label
            raise ValueError(
                f"{label} has target='closure': call step(closure) with a function that evaluates the model"
            )
        # Nothing has been changed up to here, and nothing that was refused has to be undone.
        params = runner.prepare()
        self._follow_params(params.entries)

        # Checkpoint code steps an optimizer whose state it misses, every lr and gradient 0: that must change nothing.
        # A wrapped optimizer that keeps no state, and is not known to, is stepped so again and again.
        was_real = self._first_step.is_past
        has_stepped = bool(set(self.state) - {NO_PARAMS_KEY}) if was_real else self._has_stepped
        if not (was_real and has_stepped):
            lr_keys = [bound.keys["lr"] for bound in self._transforms if isinstance(bound.transform, LR)]
            # A chain without a learning rate has no step that moves nothing.
            may_be_idle = not has_stepped and closure is None and bool(lr_keys)
            is_idle = may_be_idle and all(
                self._first_step.may_stand_still(group[key]) for group in self.param_groups for key in lr_keys
            )
            if self._first_step.is_init_step(is_idle):
                step = runner.new_step(self._inner_optimizers)
                if was_real:
                    # Others may train, and wait for this rank's part in their numbers.
                    runner.measure_only(step)
                    return None
                # Optimizers that are not torch's own begin their state in their first step: they do so now.
                for inner in self._inner_optimizers.values():
                    if not any(inner.has_state(entry.tensor) for entry in step.entries):
                        inner.update(step.batches)
                return None

        runner.begin_real()
        evaluate = None if closure is None else runner.decaying(closure)
        # Gradients may come from the closure only, so it is evaluated before the step is assembled.
        if self._closure_optimizer is None:
            loss, moved = None if evaluate is None else evaluate(), None
        elif evaluate is None:
            name = self._closure_optimizer.cls.__name__
            raise ValueError(f"{name} evaluates the model itself: call step(closure)")
        else:
            loss, moved = self._closure_optimizer.search(evaluate)

        step = runner.new_step(self._inner_optimizers)
        if moved is not None:
            step.adopt(moved)
        runner.run(step)
        step.write()
        runner.finish(step, self.param_groups)
        self._has_stepped = True
        return loss

    # --- state -------------------------------------------------------------------------------------------------------

    def _make_inner_optimizers(self) -> None:
        # State keys of the first optimizer are torch's own, so its checkpoints load into the optimizer alone, and back.
        wraps = [(bound, bound.transform) for bound in self._transforms if isinstance(bound.transform, Wrap)]
        for number, (bound, wrap) in enumerate(wraps):
            inner = wrap.inner_optimizer(bound, self, f"_{number}" if len(wraps) > 1 else "")
            if isinstance(inner, ClosureOptimizer):
                self._closure_optimizer = inner
            elif isinstance(inner, GradientOptimizer):
                self._inner_optimizers[bound.index] = inner

    @torch.inference_mode(False)  # or no step outside could ever write to the state
    def _initialize(self, is_loaded: bool = False) -> None:
        """Make all state now, wrapped optimizers' and kept numbers, so that every rank has every key from the start.

        is_loaded: whether a checkpoint has just been loaded.
        """
        if not self._inner_optimizers:
            self._make_inner_optimizers()
        params = self._runner.params.read()
        members = [(group, param) for group in self.param_groups for param in group["params"]]
        for inner in self._inner_optimizers.values():
            inner.initialize(members)
        self._runner.kept.create(params.entries, params.groups, is_loaded)
        self._runner.anchors.create(params.entries, params.groups, is_loaded)
        # Where all state is there, parameters without any are marked, or checkpoint code would step this rank alone.
        if self._closure_optimizer is None and all(
            inner.keeps_no_more(self.param_groups) for inner in self._inner_optimizers.values()
        ):
            mark_initialized(self.state, [param for _, param in members])
        self._known = params.entries

    def _follow_params(self, now: tuple[NamedParam, ...]) -> None:
        """Begin anew for tensors that others have put in the places of parameters (accelerate does), and forget those.

        With more or fewer places than before nothing is forgotten: DeepSpeed shows one group at a time.
        """
        if now is self._known or self._known is None or len(now) != len(self._known):
            return
        held = {entry.tensor for entry in now}
        for gone in [entry.tensor for entry in self._known if entry.tensor not in held]:
            self.state.pop(gone, None)
        self._initialize()


def _for_chain(group: dict[str, Any]) -> dict[str, Any]:
    """A param group with the decay that it has for `attach` as the chain's own: of `param_groups`, or of a checkpoint."""
    keys = [key for key in group if key.startswith("distwd_weight_decay")]
    known = dict(group) if keys else group
    for key in keys:
        attached, own = known.pop(key), key.removeprefix("distwd_")
        # Where the two differ, the optimizer's own is 0, or it would have decayed twice.
        if is_zero(known.get(own, 0)):
            known[own] = attached
    return known


def validate_transforms(transforms: Sequence[Any]) -> None:
    """Raise ValueError for transforms that cannot stand in one chain, or not in this order."""
    # What the ranks could disagree on shows in the first step only; what one rank can see is refused here.
    if not transforms:
        raise ValueError("Chain needs at least one transform, e.g. Chain(params, Adam(), WeightDecay(0.1), LR(1e-3))")
    for transform in transforms:
        if isinstance(transform, type) and issubclass(transform, Transform):
            raise ValueError(f"{transform.__name__} is a class; write {transform.__name__}(...)")
        if isinstance(transform, list | tuple):
            raise ValueError("the transforms are in a list; pass them one by one, as Chain(params, *transforms)")
        if isinstance(transform, torch.optim.Optimizer):
            name = type(transform).__name__
            raise ValueError(f"{name} holds its parameters already; pass its class, as Wrap({name}, ...)")
        if not isinstance(transform, Transform):
            raise ValueError(
                f"{transform!r} is not a transform; wrap a torch optimizer class as Wrap({getattr(transform, '__name__', 'TheClass')}, ...)"
            )
    wraps = [transform for transform in transforms if isinstance(transform, Wrap)]
    for index, transform in enumerate(transforms):
        if isinstance(transform, Wrap) and transform.evaluates_closure:
            # It computes its own gradients: what stands before it would act on gradients that it never sees.
            before = [other for other in transforms[:index] if other.target != "closure"]
            if before or len(wraps) > 1:
                raise ValueError(
                    f"{transform!r} evaluates the gradient itself: only rules with target='closure' may stand "
                    "before it, and no second optimizer beside it"
                )
            return


def warn_without_lr(transforms: Sequence[Transform]) -> None:
    """Warn where an optimizer is wrapped whose usual learning rate is not 1, and nothing scales what it does."""
    names = [one.optimizer_name for one in transforms if isinstance(one, Wrap) and one.needs_lr]
    if names and not any(isinstance(one, LR) for one in transforms):
        warn_user(
            f"no LR in this chain: {names[0]} steps with a learning rate of 1; put LR(1e-3), say, behind it (LR(1.0) if 1 is meant)"
        )
