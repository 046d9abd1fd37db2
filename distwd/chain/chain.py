"""Chain: an optimizer written as a sentence of transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..metrics.plan import Plan
from ..optimizers.base import InnerOptimizer
from ..optimizers.closure import ClosureOptimizer
from ..optimizers.lr import LR
from ..optimizers.state import NO_PARAMS_KEY, mark_initialized, without_mark
from ..optimizers.wrap import Wrap
from ..sharding.layout import Layout
from ..sharding.params import NamedParam, normalised_groups
from ..step.group_keys import with_keys
from ..step.rounding import Rounding
from ..step.runner import PlanOptions, StepRunner, in_step
from ..step.transform import Transform, bind
from .validate import validate_transforms


class Chain(torch.optim.Optimizer):
    """An optimizer as a sentence of transforms:  u ← g;  u ← tₖ(…t₁(u));  p ← p − u.

    params: what torch.optim takes: tensors, (name, tensor) pairs (preferred: names make errors readable and pipeline
        stages work), or group dicts; DTensors on any meshes, plain tensors, or a mix.
    transforms: rules (`WeightDecay`, ...), optimizers (`Adam`, `Wrap`) and `LR`, in the order in which they act. A rule
        before the optimizer is coupled (L2 in the gradient), between optimizer and `LR` decoupled and scaled by the
        learning rate, after `LR` not scaled by it.
    group: the ranks that together hold the model; default all ranks if torch.distributed is initialised, else this
        process. No group is created.
    layout: who holds what, for tensors whose ownership no DTensor tells (see `Plan.build`).
    check_replicas: whether the bits of copies are compared (see `Plan.build`), and, by a first step that builds the plan, their gradients.
    rounding: how parameters in bf16 and fp16 are written: to the "nearest", or "stochastic": to the neighbour above with
        the probability of the distance from the one below, so that small decays are not lost but right in the mean. The
        noise is a hash of seed, number of the step, name (or position) of the parameter and place of the element in the whole
        tensor: the same on every replica, in every run and on any sharding. Its step is a key of the groups.
    seed: an integer, the same on every rank.
    track_unchanged: whether `stats()` tells of how many elements the decay made no difference. That costs computing what
        is written a second time.
    compile: whether to let torch.compile fuse what distwd itself computes on tensors of more than 32 K elements (on GPUs 4 M): the
        first step takes some seconds longer, all others less time. A C++ compiler is needed on CPUs, Triton on GPUs; ValueError
        where there is none. On CPUs the parameters get the same bits as without it.

    Every hyperparameter of a transform is a key of `param_groups`: `lr`, `betas`, `weight_decay`, ...; if two transforms
    bring the same key, the second's is `weight_decay_1`, and so on. Everything of torch.optim.Optimizer works: groups,
    schedulers, hooks, closures, state_dict, checkpoints. Absolute decay never communicates; relative decay costs one
    all-reduce per phase (`phases` tells how many).
    `print(optimizer)` tells what is decayed, by how much and by which rule, without a word to other ranks.
    Raises ValueError for what cannot work, naming it; PlanError at the first step if the ranks do not agree on who
    holds what. Source: the form is torchzero's and optax's.

    >>> import torch
    >>> from distwd import LR, Adam, Chain, RelativeWeightDecay
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = Chain(model.named_parameters(), Adam(), RelativeWeightDecay(0.1), LR(1e-3))
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step()
    >>> sorted(optimizer.stats()["RelativeWeightDecay"])
    ['coefficient', 'metric']
    """

    def __init__(
        self,
        params: Iterable[Any],
        *transforms: Transform,
        group: dist.ProcessGroup | None = None,
        layout: Layout | None = None,
        check_replicas: bool = True,
        rounding: str = "nearest",
        seed: int = 0,
        track_unchanged: bool = False,
        compile: bool = False,
    ) -> None:
        validate_transforms(transforms)
        self._holders = PlanOptions.of(group, layout, check_replicas)
        self._rounds, self._tracks, self._compiles = (rounding, seed), track_unchanged, compile
        self._places = bind(transforms)
        self._acted = False
        self._forget()
        defaults = {key: bound.transform.defaults[name] for bound in self._places for name, key in bound.keys.items()}
        super().__init__(normalised_groups(params, group), {**defaults, **self._rounding.defaults})
        self._runner.check_compiler()
        self._initialize()

    def _forget(self) -> None:
        """Drop what can be made again; none of it belongs into a copy or a checkpoint."""
        self._rounding = Rounding(*self._rounds, self._holders.layout)
        self._runner = StepRunner(
            self._places, self._holders, lambda: self.param_groups, self._rounding, self._tracks, self._compiles
        )
        self._hosts: dict[int, InnerOptimizer] = {}
        self._search: ClosureOptimizer | None = None
        self._begun: tuple[NamedParam, ...] | None = None
        self._checked: dict[tuple[int, int], dict[str, Any]] = {}

    # --- what torch.optim.Optimizer asks of an optimizer -------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does. Raises ValueError, with nothing added, for settings that a transform cannot use."""
        settings = {**self.defaults, **param_group}
        for bound in self._places:
            bound.transform.check(bound.settings(settings))
        begun = self._begun is not None  # not while the base class adds the first groups
        if begun:
            self._follow()
        super().add_param_group(param_group)
        self.state.pop(NO_PARAMS_KEY, None)  # type: ignore[call-overload]
        if begun:
            self._initialize()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load as torch does. A setting that the saved groups do not have yet stays as it is; with state comes having stepped."""
        own_marks = set(self.state) & {NO_PARAMS_KEY}
        super().load_state_dict(with_keys(dict(state_dict), self.param_groups, list(self.defaults)))
        self._acted = self._acted or bool(state_dict["state"])
        if NO_PARAMS_KEY in own_marks:
            mark_initialized(self.state, [])

    def state_dict(self) -> dict[str, Any]:
        """As torch's: groups, and state by the position of the parameter."""
        self._follow()
        return without_mark(super().state_dict())

    def __getstate__(self) -> dict[str, Any]:
        if self._holders.group is not None or self._holders.layout:
            raise TypeError(
                "a Chain with group= or layout= cannot be pickled, since process groups cannot; pickle its state_dict()"
            )
        own = ("_holders", "_places", "_acted", "_rounds", "_tracks", "_compiles")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_runner" not in self.__dict__:
            self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        # Process groups are shared, not copied.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        holders, self._holders = self._holders, PlanOptions()
        try:
            state = copy.deepcopy(self.__getstate__(), memo)
        finally:
            self._holders = holders
        twin.__setstate__({**state, "_holders": holders})
        return twin

    def __repr__(self) -> str:
        words = [f"  {bound.label}: {bound.transform!r}" for bound in self._places]
        return "\n".join(["Chain(", *words, ")", super().__repr__()])

    def __str__(self) -> str:
        words = [f"  {bound.label}: {bound.transform!r}" for bound in self._places]
        return "\n".join(["Chain(", *words, ")", self._runner.audit()])

    # --- what distwd adds --------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Who holds what. Built when first asked for, together with the other ranks: then every rank must ask."""
        return self._runner.plan

    @property
    def phases(self) -> int:
        """Collectives per step (of a closure target: per evaluation of the closure); 0 for absolute rules and on one rank."""
        return self._runner.phases

    def stats(self) -> dict[str, dict[str, Any]]:
        """The last `metric` and `coefficient` (λ·metric, without learning rate) of every relative rule, by its label in `repr`.

        0-d tensors, not synchronised. For scope="all" one of each (by group index where groups have settings of their own),
        for "group" by group index, for "tensor" by the names of the parameters that this rank holds. {} before the first step.
        With track_unchanged=True also "unchanged_here", by group index: the share of the elements that *this rank* wrote in
        the last step which have the bits that they would have without the decay.
        """
        return self._runner.stats()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. closure: evaluates the model anew and returns the loss; needed for target="closure" and for LBFGS."""
        return self._take_step(closure)

    @in_step
    def _take_step(self, closure: Callable[[], Any] | None) -> Any:
        self._check_settings()
        self._follow()
        self._check_step(closure)
        if self._is_rehearsal(closure):
            return self._rehearse()
        loss, moved = self._evaluate(closure)
        step = self._runner.new_step(self._hosts)
        if moved is not None:
            step.adopt(moved)
        self._runner.act(step, self._runner.in_step)
        step.write()
        self._runner.finish(step, self.param_groups)
        self._acted = True
        return loss

    def _evaluate(self, closure: Callable[[], Any] | None) -> tuple[Any, Mapping[Tensor, Tensor] | None]:
        """The loss, and how far a searching optimizer would move the parameters."""
        evaluate = None if closure is None else self._runner.decaying(closure)
        if self._search is None:
            return (None if evaluate is None else evaluate()), None
        if evaluate is None:
            raise ValueError(f"{self._search.cls.__name__} evaluates the model itself: call step(closure)")
        return self._search.search(evaluate)

    def _check_settings(self) -> None:
        """Refuse bad settings that were put into a group by hand; looks closely only at those that are new."""
        for index, group in enumerate(self.param_groups):
            for bound in self._places:
                settings = bound.settings(group)
                # A tensor was checked when it came with the constructor or its group; reading it here would synchronise.
                numbers = {name: 0.0 if isinstance(value, Tensor) else value for name, value in settings.items()}
                if self._checked.get((index, bound.index)) != numbers:
                    bound.transform.check(numbers)
                    self._checked[index, bound.index] = numbers

    def _check_step(self, closure: Callable[[], Any] | None) -> None:
        """Refuse what cannot work before anything is changed."""
        if not self._hosts and self._search is None:
            self._make_hosts()
        if closure is None and self._runner.in_closure:
            label = self._runner.in_closure[0].label
            raise ValueError(
                f"{label} has target='closure': call step(closure) with a function that evaluates the model"
            )
        self._runner.prepare()

    def _make_hosts(self) -> None:
        wraps = [(bound, bound.transform) for bound in self._places if isinstance(bound.transform, Wrap)]
        for number, (bound, wrap) in enumerate(wraps):
            host = wrap.host(bound, self, f"_{number}" if number else "")
            if isinstance(host, ClosureOptimizer):
                self._search = host
            else:
                self._hosts[bound.index] = host

    @torch.inference_mode(False)  # or no step outside could ever write to the state
    def _initialize(self) -> None:
        """Make every wrapped optimizer's state now, so that every rank has every key from the start."""
        if not self._hosts:
            self._make_hosts()
        members = [(group, param) for group in self.param_groups for param in group["params"]]
        for host in self._hosts.values():
            host.initialize(members)
        if self._search is None and all(host.begins_whole(self.param_groups) for host in self._hosts.values()):
            mark_initialized(self.state, [param for _, param in members])
        self._begun = self._runner.entries

    def _follow(self) -> None:
        """Begin anew for tensors that others have put in the places of parameters (accelerate does), and forget those.

        With more or fewer places than before nothing is forgotten: DeepSpeed shows one group at a time.
        """
        now = self._runner.entries
        if now is self._begun or self._begun is None or len(now) != len(self._begun):
            return
        held = {entry.tensor for entry in now}
        for gone in [entry.tensor for entry in self._begun if entry.tensor not in held]:
            self.state.pop(gone, None)
        self._initialize()

    # --- the hidden step of checkpoints ------------------------------------------------------------------------------

    def _is_rehearsal(self, closure: Callable[[], Any] | None) -> bool:
        """Whether this step only asks for the state to exist: nothing has been stepped yet, every lr is 0 and so is every gradient.

        torch.distributed.checkpoint and others step an optimizer so; a decay that is not scaled by lr would change parameters.
        """
        if self._runner.has_agreed:
            return False
        keys = [bound.keys["lr"] for bound in self._places if isinstance(bound.transform, LR)]
        acted = self._acted or closure is not None or not keys
        idle = not acted and all(bool(group[key] == 0) for group in self.param_groups for key in keys)
        return self._runner.only_rehearses(idle)

    def _rehearse(self) -> None:
        step = self._runner.new_step(self._hosts)
        for host in self._hosts.values():
            if not any(host.has_state(entry.tensor) for entry in step.entries):
                host.update(step.batches)
