"""attach: decay for an optimizer that already exists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .. import _torch
from ..checks import check_choice, is_zero, plain_number
from ..metrics.plan import PlanOptions
from ..optimizers.init_step import FirstStep, mark_if_no_params
from ..optimizers.lr import LR
from ..optimizers.state import NO_PARAMS_KEY, lacks_second_moment, without_mark
from ..rules.base import Rule
from ..sharding.layout import Layout
from ..sharding.params import ParamList, is_for_both
from ..step.rounding import KEY as ROUNDING_KEY
from ..step.rounding import Rounding, RoundingMode
from ..step.runner import ShowsRunner, StepRunner, step_method
from ..step.state import State, kept_in, restore_kept
from ..step.step import Step
from ..step.transform import BoundTransform, Transform, bind, with_current_values
from .before import WriteBefore
from .capture import UpdateCapture
from .joint import KEY, JointStep, Overrides, attachments_on, refuse_under_scaler, unused_keys, write_keys
from .validate import check_groups, list_names, list_optimizers, needs_update, validate_optimizers

Coupling = Literal["lr", "gradient", "none"]
COUPLINGS: tuple[str, ...] = get_args(Coupling)


def attach(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *decays: Rule,
    coupling: Coupling = "lr",
    group: dist.ProcessGroup | None = None,
    layout: Layout | None = None,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    check_replicas: bool = True,
    rounding: RoundingMode = "nearest",
    seed: int = 0,
    track_unchanged: bool = False,
    compile: bool = False,
    take_over: bool = False,
) -> Attachment:
    """Add decay to an optimizer that exists, through its own step hooks:  p ← p − lr·λ·d(p).

    d(p) = sign(p)·|p|^(ord−1), of the parameter before the step. λ is the rule's `weight_decay`, times the metric for a
    relative rule.

    optimizer: any torch optimizer with step hooks, its own weight_decay 0. Or several of one model that are stepped
        once each, in any order, and share one metric and one collective. (Under a GradScaler, which may skip one and
        not the others: numbers of the parameters, and of the updates of fused ones.)
    decays: rules. λ is per step (times lr for coupling="lr"). It is the key `distwd_weight_decay` of the optimizer's
        param groups: it is read at every step, and saved with them.
    coupling: how the decay meets the learning rate. Each equals the `Chain` with the rules at that place.
        "lr" (AdamW's): p ← p − lr·λ·d(p). The update, for norm_input="update", is what the optimizer did, over lr.
        "none": p ← p − λ·d(p). The update is what the optimizer did to the parameters.
        "gradient": g ← g + λ·d(p), before the optimizer. The update is the gradient.
    group: the ranks that together hold the model, as for `Chain`.
    layout: who holds what, where no DTensor tells, as for `Chain`.
    named_parameters: (name, tensor) pairs, where the optimizer was built without names.
    check_replicas: whether copies are compared, as for `Chain`.
    rounding: "nearest" or "stochastic", as for `Chain`, of what distwd itself writes to bf16 and fp16 parameters: the
        decay, and the update of torch's elementwise optimizers where a rule looks at it.
    seed: an integer, the same on every rank.
    track_unchanged: as for `Chain`.
    compile: as for `Chain`.
    take_over: whether the `weight_decay` of each group becomes its λ of the first rule, and the optimizer's own is 0 from
        then on; so exclusions that somebody else has made stay. `remove()` gives it back.

    Parameters: any float dtype and sharding that the optimizer itself can step.
    Returns the `Attachment`, whose `remove()` removes the decay again.
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
        take_over=take_over,
    )


class ExternalOptimizer(Transform):
    """The attached optimizer among the transforms. It steps by itself, between the hooks; rules behind it see its update."""

    is_linear = False
    changes = frozenset({"update", "second_moment"})
    optimizer_name = "the optimizer"

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.defaults: dict[str, Any] = {}
        self.lacks_second_moment = next((type(one).__name__ for one in optimizers if lacks_second_moment(one)), "")

    def apply(self, step: Step, bound: BoundTransform) -> None:
        """Nothing: what it did, or what it will see, is in the step already."""


class Attachment(ShowsRunner):
    """Decay that `attach` has added to one or several optimizers; made by `attach`.

    plan: who holds what.
    phases: collectives per step.
    stats(): the last numbers of its rules.
    print(attachment): what is decayed, by how much and by which rule.
    remove(): removes the decay again.

    >>> import torch
    >>> from distwd import RelativeWeightDecay, attach
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -5.0]))
    >>> optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0)
    >>> attachment = attach(optimizer, RelativeWeightDecay(0.5, norm_input="params"))
    >>> w.grad = torch.ones(2)
    >>> optimizer.step()
    >>> attachment.stats()["RelativeWeightDecay"]
    {'metric': tensor(4.), 'coefficient': tensor(2.), 'coefficients': {0: tensor(2.)}}
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
        take_over: bool,
    ) -> None:
        check_choice("coupling", coupling, COUPLINGS)
        named = None if named_parameters is None else list_names(named_parameters, optimizers)
        validate_optimizers(optimizers, rules, coupling, take_over)
        self._optimizers, self._rules, self._coupling = list(optimizers), tuple(rules), coupling
        self._rounding = Rounding(rounding, seed, options.layout, *unused_keys(optimizers, 1, f"distwd_{ROUNDING_KEY}"))
        # The keys with which λ lies in the optimizers' groups, and the values of groups that have none yet. Of a rule's
        # hyperparameters only `weight_decay` has a key, and what switches a norm rule off: a schedule needs it, and the
        # groups are not ours to fill.
        names = unused_keys(optimizers, len(rules))
        rule_keys = [
            {name: key.replace("weight_decay", name) for name in ("weight_decay", *rule.off) if name in rule.defaults}
            for rule, key in zip(rules, names, strict=True)
        ]
        settings = {
            key: (name, plain_number(rule.defaults[name]), rule.off.get(name))
            for rule, own in zip(rules, rule_keys, strict=True)
            for name, key in own.items()
        }
        decays = [key for key, (name, *_) in settings.items() if name == "weight_decay"]
        self.defaults = {key: default for key, (_, default, _) in settings.items()} | self._rounding.defaults
        self._off = {key: off for key, (name, _, off) in settings.items() if name != "weight_decay"}
        # A name is taken also where the rule has no λ: its other keys end as that would.
        self.keys = list(dict.fromkeys([*self.defaults, *names]))

        # The chain that this attachment is equal to: rules before the optimizer ("gradient"), between it and its lr
        # ("lr"), or behind both ("none"). The update is scaled by the optimizer already; LR scales the decay alike.
        external: list[tuple[Transform, dict[str, str]]] = [(ExternalOptimizer(optimizers), {"maximize": "maximize"})]
        lr: list[tuple[Transform, dict[str, str]]] = [(LR(1.0), {"lr": "lr"})] if coupling == "lr" else []
        own_rules: list[tuple[Transform, dict[str, str]]] = list(zip(rules, rule_keys, strict=True))
        ordered = own_rules + external if coupling == "gradient" else external + own_rules + lr
        # Two attachments must not share kept numbers in the optimizers' state, as they do not share group keys.
        others = {other.state_suffix for optimizer in optimizers for other in attachments_on(optimizer)}
        suffixes = ["", *(f"_attachment_{number}" for number in range(1, len(others) + 1))]
        self.state_suffix = next(suffix for suffix in suffixes if suffix not in others)
        transforms = bind([transform for transform, _ in ordered], [keys for _, keys in ordered], self.state_suffix)

        self._runner = StepRunner(
            transforms,
            ParamList(
                lambda: [group for optimizer in self._optimizers for group in optimizer.param_groups],
                named or (),
            ),
            options,
            self._rounding,
            state_of=self._state_of,
            may_keep=self._may_keep,
            track_unchanged=track_unchanged,
            compiles=compile,
            # Rules of several attachments cannot see one another's decay, so those of one do not either.
            shows_bare_update=True,
        )
        self._runner.check()
        self._keeps_state = self._runner.kept.keeps_any or self._runner.anchors.keeps_any([{}])

        # When the rules act: behind the optimizer where they look at what it did, else before it, which costs no copy.
        # (Rules with target="closure" act in the closure in any case.)
        in_step = [rule for rule in rules if rule.target != "closure"]
        self._needs_updates = coupling != "gradient" and bool(in_step) and needs_update(in_step, optimizers)
        # Rules that need no metric share nothing: each optimizer is decayed in its own hooks, whatever the others do.
        each_alone = len(optimizers) == 1 or not any(rule.sources() for rule in rules)
        self.overrides = Overrides()
        self._joint = JointStep(self._runner, optimizers, each_alone, self._needs_updates)
        at_once = any(rule.target == "params_direct" for rule in in_step)
        measures_update = any(rule.is_cautious(rule.defaults) or "update" in rule.sources() for rule in in_step)
        self._before_step = WriteBefore(self._runner, self._joint, coupling, self.overrides)
        self._behind_step = UpdateCapture(self._runner, self._joint, coupling, at_once, measures_update)
        self._may_act_behind = coupling != "gradient" and bool(in_step)
        self._strategy: WriteBefore | UpdateCapture = self._before_step

        self._first_step = FirstStep(self._runner)
        self._is_init_step = False
        self._has_raised = False  # whether a joint step has begun, and no post hook has come yet
        self._has_stepped = False
        self._just_stepped: set[int] = set()  # optimizers whose post hook has come in this joint step
        self._depth: dict[int, int] = {}  # of steps within steps, by optimizer
        self._loaded: dict[int, dict[int, State]] = {}  # kept numbers of a state dict that is being loaded
        if take_over and not decays:
            raise ValueError("take_over=True has no rule with a weight_decay that could take over the optimizer's")
        self._takes_all, self._decay_key = take_over, next(iter(decays), None)
        self._taken_over: dict[int, Any] = {}  # decay of the optimizers' own, by index of the group
        # Indices of the groups that came with it in both keys, as `param_groups` makes them; and how many were looked at.
        self._doubled: set[int] = set()
        self._num_known = 0
        self._write_keys()
        # What was read before the groups had our keys shows no decay of ours.
        self._runner.params.forget()
        self._create_kept()

        # Hooks last: an optimizer that was refused is as it was.
        self._handles: list[Any] = []
        for optimizer in optimizers:
            after = optimizer.register_step_post_hook(self._after)
            # What two attachments change on an optimizer is put back in the opposite order.
            _torch.run_first_after_step(optimizer, after)
            self._handles += [
                after,
                optimizer.register_step_pre_hook(self._before),
                # A state dict shows the optimizer's own settings, also after a step that has raised.
                optimizer.register_state_dict_pre_hook(lambda _: self._restore()),
                optimizer.register_state_dict_post_hook(lambda _, saved: without_mark(saved)),
                optimizer.register_load_state_dict_pre_hook(lambda *_: self._restore()),
                optimizer.register_load_state_dict_pre_hook(self._before_load),
                optimizer.register_load_state_dict_post_hook(self._after_load),
            ]

    def remove(self) -> None:
        """Remove the decay: hooks, group keys, and whatever was changed for the length of a step."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        # The attachment itself may live on in a variable; the copies and gradients that it holds must not.
        self._before_step.forget()
        self._behind_step.forget()
        self._joint.end()
        params = self._runner.params.read()
        self._runner.kept.remove(params.entries)
        self._runner.anchors.forget()
        for optimizer in self._optimizers:
            optimizer.state.pop(NO_PARAMS_KEY, None)  # type: ignore[call-overload]
        # All groups, also those that DeepSpeed hides outside of their step.
        for group in params.groups:
            for key in self.keys:
                group.pop(key, None)
        for index, decay in self._taken_over.items():
            params.groups[index]["weight_decay"] = decay
        for index in self._doubled:
            params.groups[index][KEY] = params.groups[index]["weight_decay"]
        self._taken_over = {}

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that are attached."""
        return self._rules

    @property
    def coupling(self) -> str:
        """How the decay meets the learning rate."""
        return self._coupling

    def __repr__(self) -> str:
        optimizers = " and ".join(type(optimizer).__name__ for optimizer in self._optimizers)
        rules = ", ".join(repr(rule) for rule in self._rules)
        return f"Attachment({optimizers}, {rules}, coupling={self._coupling!r})"

    def __str__(self) -> str:
        return f"{self!r}\n{self._runner.audit()}"

    # --- numbers that rules keep in the optimizers' state ------------------------------------------

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
        """Whether numbers of ours may lie in the state of `param`."""
        # Many optimizers begin their own only while it is empty.
        states = self._state_of(param)
        if states.get(param):
            return True
        # It has been updated, and its optimizer keeps nothing for it.
        has_stepped = any(states is each.state for each in self._optimizers if id(each) in self._just_stepped)
        return has_stepped and param.grad is not None

    def _write_keys(self) -> None:
        """Give groups the keys that they lack. A decay of the optimizer's own becomes ours, if it is to be taken over."""
        groups = self._runner.params.groups
        others = [other for each in self._optimizers for other in attachments_on(each) if other is not self]
        key = self._decay_key
        if key == KEY:
            self._doubled |= {i for i in range(self._num_known, len(groups)) if is_for_both(groups[i])}
            self._num_known = len(groups)
        for index, group in enumerate(groups if key is not None else ()):
            own = group.get("weight_decay")
            is_doubled = index in self._doubled and is_for_both(group)
            if key is None or own is None or (is_zero(own) and key in group) or not (self._takes_all or is_doubled):
                continue
            # Of two attachments the first may have let the optimizer do its decay in this very step.
            if any(id(group) in other.overrides.groups for other in others):
                continue
            group[key], group["weight_decay"] = own, 0.0
            self._taken_over[index] = own
        known = {key: value for other in others for key, value in other.defaults.items()}
        write_keys(groups, self.defaults, known, self._off)

    def _create_kept(self, is_loaded: bool = False) -> None:
        if not self._keeps_state:
            return
        params = self._runner.params.read()
        self._runner.kept.create(params.entries, params.groups, is_loaded)
        self._runner.anchors.create(params.entries, params.groups, is_loaded)

    # --- hooks -----------------------------------------------------------------------------------

    @step_method
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre hook: act before the optimizer steps, or at its first evaluation of the closure, when gradients are there."""
        if self._depth.get(id(optimizer), 0) and self._is_nested(optimizer):
            self._depth[id(optimizer)] += 1
            return None
        self._depth[id(optimizer)] = 1

        is_first = self._joint.join(optimizer, self._has_raised)
        if is_first:
            # A step that has raised never comes to its post hook: what it has changed is put back now.
            self._restore()
            # Beside another attachment, too, decay waits: it would be the other's parameter before the step, or its update.
            among = [optimizer] if self._joint.each_alone else self._optimizers
            is_alone = all(len(attachments_on(each)) == 1 for each in among)
            self._joint.needs_updates = self._needs_updates or (self._may_act_behind and not is_alone)
            self._strategy = self._behind_step if self._joint.needs_updates else self._before_step
            if not self._joint.each_alone:
                refuse_under_scaler(self._optimizers, self._rules, self._coupling, self._joint.needs_updates)
            self._write_keys()
            for each in self._optimizers:
                check_groups(each, self._coupling)
            self._runner.prepare()
            self._is_init_step, self._has_raised = False, True
            self._just_stepped.clear()
        else:
            self._runner.read()
        self._joint.enter(optimizer)

        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # Some optimizers take something else first (a loss, a scale). It is theirs.
        if not callable(closure):
            closure = None
        if is_first:
            self._is_init_step = self._first_step.is_init_step_of(optimizer, closure is not None)
            if self._is_init_step:
                # Checkpoint code steps each optimizer alone, so it is no part of a joint step.
                self._joint.end()
        if not self._is_init_step:
            self._runner.begin_real(getattr(optimizer, "found_inf", None), optimizer.param_groups)
        if closure is None and self._runner.in_closure:
            raise ValueError("a rule has target='closure': call step(closure) with a function that evaluates the model")
        proxy = self._strategy.begin(optimizer, is_first)
        if closure is None and proxy is None:
            self._act(optimizer, is_first)
            return None

        # With a closure the gradients of now are stale: Lightning clears and computes them in it. A proxy gets a
        # closure too, and asks for its gradients when it steps: hooks that come after this one may still change them.
        evaluate_model = self._runner.decaying(closure or (lambda: None))
        has_acted = False

        def evaluate() -> Any:
            nonlocal has_acted
            loss = evaluate_model()
            # LBFGS evaluates many times; the first evaluation counts. The closure may have called `remove()`: then
            # nothing would put back what is changed here.
            if not has_acted and self._handles:
                has_acted = True
                self._act(optimizer, is_first)
            return loss

        # The closure goes where the caller has put it: accelerate passes it by position, Lightning by keyword.
        stepped = proxy or optimizer
        if "closure" in kwargs:
            return (stepped, *args[1:]), {**kwargs, "closure": evaluate}
        return (stepped, evaluate, *args[2:]), kwargs

    @step_method
    def _act(self, optimizer: Optimizer, is_first: bool) -> None:
        """The gradients of `optimizer` are there, and it steps next. (The optimizer's step may call this, by the closure.)"""
        if not self._is_init_step:
            self._joint.note_gradients(optimizer)
            self._strategy.act(optimizer, is_first)
        elif self._has_stepped:
            # A real step may look so on one rank alone (no state, lr 0, gradients 0). The others wait for its part.
            self._runner.measure_only(self._joint.new_step(optimizer))

    @step_method
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Post hook: put back what was changed for the step, and act if the rules have waited for it."""
        depth = self._depth.get(id(optimizer), 1)
        # Where an inner step has raised, and the outer one has gone on, the depth is one too many.
        if depth > 1 and self._is_nested(optimizer):
            self._depth[id(optimizer)] = depth - 1
            return
        # All attachments see what the optimizer has made of the parameters before the first of them writes.
        attachments = attachments_on(optimizer)
        for each in attachments if len(attachments) > 1 else ():
            each._note(optimizer)
        self._depth[id(optimizer)] = 0

        self._has_raised = False
        self._just_stepped.add(id(optimizer))
        self.overrides.restore(has_stepped=True)
        mark_if_no_params(optimizer)
        is_complete = self._joint.is_complete
        try:
            if not self._is_init_step:
                self._has_stepped = self._has_stepped or is_complete
                self._strategy.after(optimizer, args[0], is_complete)
        finally:
            # Also where the decay has failed: then all steps are undone, and the next one is the first again.
            if is_complete:
                self._joint.end()
        # Many optimizers begin their state in their first step, and only then there is room for kept numbers.
        if self._runner.keeps_state:
            self._create_kept()
        # A hidden step is no part of a joint step.
        if is_complete or self._is_init_step:
            self._just_stepped.clear()

    def _note(self, optimizer: Optimizer) -> None:
        """`optimizer` has stepped, and another attachment is about to write its decay."""
        # Not where it was attached in the step under way.
        if self._strategy is self._behind_step and self._depth.get(id(optimizer), 0) and not self._is_init_step:
            self._behind_step.note(optimizer, is_shared=True)

    def _is_nested(self, optimizer: Optimizer) -> bool:
        """Whether a step of the optimizer itself has called this one: a subclass whose step calls `super().step()`.

        torch wraps `step` once for every class, so hooks run for both. The stack is searched, and only where the last
        step has not come to its post hook: whether that one still runs, or has raised, nothing else tells.
        """
        wrapper = type(optimizer).step.__code__  # the same code for every class
        num_steps = 0
        frame: FrameType | None = _torch.calling_frame()
        while frame is not None:
            num_steps += frame.f_code is wrapper and frame.f_locals.get("self") is optimizer
            frame = frame.f_back
        return num_steps > 1

    def _restore(self) -> None:
        """Put back what is changed for the length of a step; the next optimizer of a joint step measures anew."""
        self.overrides.restore(has_stepped=False)
        self._joint.shared = None

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._loaded[id(optimizer)] = kept_in(state_dict)
        # What a checkpoint brings in one key alone is a decay of the optimizer's own, were it the same number.
        own = set(map(id, optimizer.param_groups))
        places = [index for index, group in enumerate(self._runner.params.groups) if id(group) in own]
        for index, group in zip(places, state_dict["param_groups"], strict=False):
            if self._decay_key == KEY and is_for_both(group):
                self._doubled.add(index)
            elif KEY not in group:
                self._doubled.discard(index)
        return with_current_values(state_dict, optimizer.param_groups, self.keys)

    def _after_load(self, optimizer: Optimizer) -> None:
        kept = self._loaded.pop(id(optimizer), {})
        restore_kept(optimizer, kept)
        self._create_kept(is_loaded=True)
        mark_if_no_params(optimizer)
