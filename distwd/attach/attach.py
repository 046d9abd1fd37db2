"""attach: decay for an optimizer that already exists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .. import _torch
from ..checks import check_choice
from ..metrics.plan import Plan, PlanOptions
from ..optimizers.init_step import mark_if_no_params
from ..optimizers.lr import LR
from ..optimizers.state import NO_PARAMS_KEY, without_mark
from ..rules.base import Rule
from ..sharding.layout import Layout
from ..sharding.params import ParamList
from ..step.rounding import KEY, Rounding
from ..step.runner import StepRunner, step_method
from ..step.state import State, kept_in, restore_kept
from ..step.step import Step
from ..step.transform import BoundTransform, Transform, bind, with_current_values
from .before import WriteBefore
from .capture import UpdateCapture
from .joint import JointStep, refuse_under_scaler
from .overrides import Overrides, attachments_on, unused_keys, write_keys
from .validate import check_groups, list_optimizers, needs_update, validate_optimizers

COUPLINGS = ("lr", "gradient", "none")


def attach(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *decays: Rule,
    coupling: str = "lr",
    group: dist.ProcessGroup | None = None,
    layout: Layout | None = None,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    check_replicas: bool = True,
    rounding: str = "nearest",
    seed: int = 0,
    track_unchanged: bool = False,
    compile: bool = False,
) -> Attachment:
    """Add decay to an optimizer that exists, through its own step hooks.

    coupling: "gradient": g ← g + λ·d(p), before the optimizer; "lr": p ← p − lr·λ·d(p), AdamW's; "none": p ← p − λ·d(p).
        λ is `weight_decay`, times the metric for a relative rule; d(p) is of the parameter before the step. Each equals
        the `Chain` with the rules at that place; norm_input="update" then is what the optimizer did to the parameters,
        over lr for "lr".
    optimizer: any torch optimizer with step hooks, its own weight_decay 0; or several of one model that are stepped once
        each, in any order, and share one metric and one collective. (Under a GradScaler, which may skip one and not the
        others: numbers of the parameters, and of the updates of fused ones.)
    decays: rules; λ is kept in the groups' key `distwd_weight_decay`, read at every step, and saved with them.
    group, layout, check_replicas: as for `Chain`. rounding, seed: as for `Chain`, of what distwd itself writes to bf16 and
        fp16 parameters: the decay. How the optimizer rounds its own step, it has done already. track_unchanged, compile: as for `Chain`.
    named_parameters: names, where the optimizer was built without.
    Raises ValueError if the optimizer decays already or has no step hooks (a wrapper: attach to what it wraps);
    PlanError at the first step as `Chain`.
    Source: the couplings are those of torch.optim.Adam, torch.optim.AdamW and Loshchilov & Hutter, arXiv 1711.05101.

    >>> import torch
    >>> from distwd import WeightDecay, attach
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = torch.optim.SGD([w], lr=0.5)
    >>> attachment = attach(optimizer, WeightDecay(0.1))
    >>> w.grad = torch.zeros(2)
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 0.9500, -1.9000])
    >>> attachment.remove()
    """
    return Attachment(
        list_optimizers(optimizer),
        decays,
        coupling,
        PlanOptions.of(group, layout, check_replicas),
        named_parameters,
        rounding=rounding,
        seed=seed,
        track_unchanged=track_unchanged,
        compile=compile,
    )


class ExternalOptimizer(Transform):
    """The attached optimizer among the transforms: rules behind it see its update. It steps by itself, between the hooks."""

    is_linear = False
    optimizer_name = "the optimizer"

    def __init__(self) -> None:
        self.defaults: dict[str, Any] = {}

    def apply(self, step: Step, bound: BoundTransform) -> None:
        """Nothing: what it did, or what it will see, is in the step already."""


class Strategy(Protocol):
    """When the rules act: before the optimizer's step (`WriteBefore`), or after it (`UpdateCapture`)."""

    def begin(self, optimizer: Optimizer) -> None:
        """The first optimizer of a joint step is about to step."""

    def proxy_of(self, optimizer: Optimizer) -> Optimizer | None:
        """What steps in the place of `optimizer`; None: it steps itself."""

    def before(self, optimizer: Optimizer, is_first: bool) -> None:
        """The gradients of `optimizer` are there, and it steps next; is_first: of its joint step."""

    def after(self, optimizer: Optimizer, stepped: Optimizer) -> None:
        """`optimizer` has stepped, or what has `stepped` in its place."""

    def complete(self, optimizer: Optimizer) -> None:
        """All optimizers of a joint step have stepped; `optimizer` was the last."""

    def abort(self) -> None:
        """A step was broken off."""

    def forget(self) -> None:
        """Let go of all memory."""


class Attachment:
    """Decay that `attach` has added to one or several optimizers.

    `plan`, `phases`, `stats()` and `print` as of `Chain`; `remove()` takes the decay off again. Made by `attach`.

    >>> import torch
    >>> from distwd import RelativeWeightDecay, attach
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -5.0]))
    >>> optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0)
    >>> attachment = attach(optimizer, RelativeWeightDecay(0.5, norm_input="params"))
    >>> w.grad = torch.ones(2)
    >>> optimizer.step()
    >>> attachment.stats()["RelativeWeightDecay"]
    {'metric': tensor(4.), 'coefficient': tensor(2.)}
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        rules: Sequence[Rule],
        coupling: str,
        options: PlanOptions,
        named_parameters: Iterable[tuple[str, Tensor]] | None,
        *,
        rounding: str,
        seed: int,
        track_unchanged: bool,
        compile: bool,
    ) -> None:
        check_choice("coupling", coupling, COUPLINGS)
        validate_optimizers(optimizers, rules, coupling)
        self._optimizers, self._rules, self._coupling = list(optimizers), tuple(rules), coupling
        self._rounding = Rounding(rounding, seed, options.layout, *unused_keys(optimizers, 1, f"distwd_{KEY}"))
        # The keys with which λ lies in the optimizers' groups, and the values of groups that have none yet.
        keys = unused_keys(optimizers, len(rules))
        decaying = [(key, rule) for key, rule in zip(keys, rules, strict=True) if "weight_decay" in rule.defaults]
        self._defaults = {key: rule.defaults["weight_decay"] for key, rule in decaying} | self._rounding.defaults
        self.keys = list(self._defaults)
        transforms = self._bind(keys)

        self._runner = StepRunner(
            transforms,
            ParamList(self._shown_groups, named_parameters or ()),
            options,
            self._rounding,
            state_of=self._state_of,
            may_keep=self._may_keep,
            track_unchanged=track_unchanged,
            compiles=compile,
        )
        self._runner.check()
        in_step = [rule for rule in rules if rule.target != "closure"]
        waits = coupling != "gradient" and bool(in_step) and needs_update(in_step, optimizers)
        # Rules that need no metric share nothing: each optimizer is decayed in its own hooks, whatever the others do.
        each_alone = len(optimizers) == 1 or not any(rule.sources(rule.defaults) for rule in rules)
        self.overrides = Overrides()
        self._joint = JointStep(self._runner, optimizers, each_alone, waits)
        self._needs_updates = waits
        self._strategy: Strategy
        if waits:
            at_once = any(rule.target == "params_direct" for rule in in_step)
            self._strategy = UpdateCapture(self._runner, self._joint, coupling, at_once)
        else:
            self._strategy = WriteBefore(self._runner, self._joint, coupling, self.overrides)

        self._is_init_step = False
        self._is_in_joint_step = False  # whether a joint step has begun, and no post hook has come yet
        self._has_stepped = False
        self._just_stepped: set[int] = set()  # optimizers whose post hook has come in this joint step
        self._depth: dict[int, int] = {}  # of steps within steps, by optimizer
        self._loaded: dict[int, dict[int, State]] = {}  # kept numbers of a state dict that is being loaded
        write_keys(self._shown_groups(), self._defaults)
        self._create_kept()
        self._handles = [handle for optimizer in optimizers for handle in self._hook(optimizer)]

    def remove(self) -> None:
        """Take the decay off: hooks, group keys, and whatever was changed for the length of a step."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._strategy.forget()
        groups = self._runner.params.read().groups
        self._runner.kept.remove(self._runner.params.read().entries)
        for optimizer in self._optimizers:
            optimizer.state.pop(NO_PARAMS_KEY, None)  # type: ignore[call-overload]
        for group in groups:
            for key in self.keys:
                group.pop(key, None)

    @property
    def plan(self) -> Plan:
        """Who holds what. Built when first asked for, together with the other ranks: then every rank must ask."""
        return self._runner.plan

    @property
    def phases(self) -> int:
        """Collectives per step (of a closure target: per evaluation of the closure); 0 for absolute rules and on one rank."""
        return self._runner.phases

    def stats(self) -> dict[str, dict[str, Any]]:
        """The last numbers of every rule that is not absolute, as `Chain.stats`."""
        return self._runner.stats()

    def __repr__(self) -> str:
        optimizers = " and ".join(type(optimizer).__name__ for optimizer in self._optimizers)
        rules = ", ".join(repr(rule) for rule in self._rules)
        return f"Attachment({optimizers}, {rules}, coupling={self._coupling!r})"

    def __str__(self) -> str:
        return f"{self!r}\n{self._runner.audit()}"

    # --- what it is attached to ------------------------------------------------------------------

    def _shown_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def _bind(self, keys: Sequence[str]) -> tuple[BoundTransform, ...]:
        """The rules around the optimizer: before it ("gradient"), between it and its lr ("lr"), or behind both ("none")."""
        # Of a rule's hyperparameters only `weight_decay` is a key of the optimizer's groups.
        rules: list[tuple[Transform, dict[str, str]]] = [
            (rule, {"weight_decay": key} if "weight_decay" in rule.defaults else {})
            for rule, key in zip(self._rules, keys, strict=True)
        ]
        external: list[tuple[Transform, dict[str, str]]] = [(ExternalOptimizer(), {"maximize": "maximize"})]
        if self._coupling == "gradient":
            ordered = rules + external
        else:
            # The update is scaled by the optimizer already; LR scales the decay alike.
            lr: list[tuple[Transform, dict[str, str]]] = [(LR(1.0), {"lr": "lr"})]
            ordered = external + rules + (lr if self._coupling == "lr" else [])
        # A second attachment keeps numbers under keys of its own, as it has group keys of its own.
        others = sum(len(attachments_on(optimizer)) for optimizer in self._optimizers[:1])
        suffix = f"_attachment_{others}" if others else ""
        return bind([transform for transform, _ in ordered], [own for _, own in ordered], suffix)

    def _state_of(self, param: Tensor) -> Any:
        """The `state` of the optimizer that holds `param`."""
        for optimizer in self._optimizers:
            if param in optimizer.state:
                return optimizer.state
        for optimizer in self._optimizers:
            if any(param is one for group in optimizer.param_groups for one in group["params"]):
                return optimizer.state
        return {}

    def _may_keep(self, param: Tensor) -> bool:
        """Whether numbers of ours may lie in the state of `param`. Many optimizers begin theirs only while it is empty."""
        states = self._state_of(param)
        if states.get(param):
            return True
        # It has been updated, and its optimizer keeps nothing for it.
        has_stepped = any(states is each.state for each in self._optimizers if id(each) in self._just_stepped)
        return has_stepped and param.grad is not None

    def _create_kept(self, is_loaded: bool = False) -> None:
        if not self._runner.kept.keeps_any:
            return
        params = self._runner.params.read()
        self._runner.kept.create(params.entries, params.groups, is_loaded)

    # --- hooks -----------------------------------------------------------------------------------

    def _hook(self, optimizer: Optimizer) -> list[Any]:
        after = optimizer.register_step_post_hook(self._after)
        # What two attachments change on an optimizer is put back in the opposite order.
        _torch.run_first_after_step(optimizer, after)
        return [
            after,
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_state_dict_pre_hook(lambda _: self._restore()),
            optimizer.register_state_dict_post_hook(lambda _, saved: without_mark(saved)),
            optimizer.register_load_state_dict_pre_hook(lambda *_: self._restore()),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    @step_method
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Act before the optimizer's step, or at its first evaluation of the closure, when the gradients are there."""
        if self._is_nested(optimizer):
            return None
        is_first = self._joint.is_begun_by(optimizer)
        if is_first:
            self._begin_joint_step(optimizer)
        else:
            self._runner.read()
        self._joint.enter(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if is_first:
            self._is_init_step = self._joint.is_init_step(optimizer, closure is not None)
        if closure is None and self._runner.in_closure:
            raise ValueError("a rule has target='closure': call step(closure) with a function that evaluates the model")
        proxy = self._strategy.proxy_of(optimizer)
        if closure is None and proxy is None:
            self._act_before(optimizer, is_first)
            return None

        # A proxy asks for its gradients by a closure when it steps: hooks that come after this one may still change them.
        evaluate_model = self._runner.decaying(closure or (lambda: None))
        has_acted = False

        def evaluate() -> Any:
            nonlocal has_acted
            loss = evaluate_model()
            if not has_acted:
                has_acted = True
                self._act_before(optimizer, is_first)
            return loss

        stepped = proxy or optimizer
        if "closure" in kwargs:
            return (stepped, *args[1:]), {**kwargs, "closure": evaluate}
        return (stepped, evaluate, *args[2:]), kwargs

    def _begin_joint_step(self, optimizer: Optimizer) -> None:
        self._restore()
        self._joint.begin(optimizer, has_raised=self._is_in_joint_step)
        if not self._joint.each_alone:
            refuse_under_scaler(self._optimizers, self._rules, self._coupling, self._needs_updates)
        for each in self._optimizers:
            check_groups(each, self._coupling)
        write_keys(self._runner.params.groups, self._defaults)
        self._runner.prepare()
        self._is_init_step, self._is_in_joint_step = False, True
        self._just_stepped.clear()
        self._strategy.begin(optimizer)

    @step_method
    def _act_before(self, optimizer: Optimizer, is_first: bool) -> None:
        if self._is_init_step:
            if self._has_stepped:
                self._runner.measure_only(self._joint.new_step(optimizer))
            return
        self._joint.note_gradients(optimizer)
        self._strategy.before(optimizer, is_first)

    @step_method
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        depth = self._depth.get(id(optimizer), 1)
        self._depth[id(optimizer)] = depth - 1
        if depth > 1:
            return
        self._is_in_joint_step = False
        self._just_stepped.add(id(optimizer))
        if not self._is_init_step:
            self._strategy.after(optimizer, args[0])
        mark_if_no_params(optimizer)
        self.overrides.restore(has_stepped=True)
        if self._joint.is_complete():
            self._has_stepped = self._has_stepped or not self._is_init_step
            if not self._is_init_step:
                self._strategy.complete(optimizer)
            self._joint.end()
        self._create_kept()
        if self._joint.is_complete() or not self._joint.is_open:
            self._just_stepped.clear()

    def _is_nested(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer's own step has called this step: a subclass that calls `super().step()`.

        torch wraps `step` once for every class, so hooks run for both.
        """
        if self._depth.get(id(optimizer), 0):
            # Its last step has not come to the post hook. Either that step still runs, or it has raised: the stack tells.
            wrapper = type(optimizer).step.__code__  # the same code for every class
            steps = 0
            frame: FrameType | None = _torch.calling_frame()
            while frame is not None:
                steps += frame.f_code is wrapper and frame.f_locals.get("self") is optimizer
                frame = frame.f_back
            if steps > 1:
                self._depth[id(optimizer)] += 1
                return True
        self._depth[id(optimizer)] = 1
        return False

    def _restore(self) -> None:
        self.overrides.restore(has_stepped=False)
        self._strategy.abort()

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._loaded[id(optimizer)] = kept_in(state_dict)
        return with_current_values(state_dict, optimizer.param_groups, self.keys)

    def _after_load(self, optimizer: Optimizer) -> None:
        kept = self._loaded.pop(id(optimizer), {})
        restore_kept(optimizer, kept)
        self._create_kept(is_loaded=True)
        mark_if_no_params(optimizer)
