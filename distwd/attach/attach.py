"""attach: decay for an optimizer that already exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import run_first_after_step
from ..checks import check_choice
from ..metrics.plan import Plan
from ..optimizers.init_step import is_within_a_step, mark_idle
from ..optimizers.state import NO_PARAMS_KEY, without_mark
from ..rules.base import Rule
from ..sharding.layout import Layout
from ..step.group_keys import unused_keys, with_keys, write_keys
from ..step.rounding import KEY, Rounding
from ..step.runner import PlanOptions, StepRunner, in_step
from ..step.step import Step
from ..step.transform import bind
from .before import (
    COUPLINGS,
    Overrides,
    PutBackGrads,
    apply_grad_scaler,
    batches_of,
    needs_update,
    sentence,
    with_closure,
    write_before,
    write_gradients,
)
from .capture import UpdateCapture
from .joint import JointStep, refuse_under_scaler
from .validate import as_hosts, check_groups, validate_optimizers


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
    holders = PlanOptions.of(group, layout, check_replicas)
    ways = (rounding, seed, track_unchanged, compile)
    return Attachment(as_hosts(optimizer), decays, coupling, holders, named_parameters, ways)


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
        hosts: Sequence[torch.optim.Optimizer],
        decays: Sequence[Rule],
        coupling: str,
        holders: PlanOptions,
        named_parameters: Iterable[tuple[str, Tensor]] | None,
        ways: tuple[str, int, bool, bool],
    ) -> None:
        rounding, seed, tracks, compiles = ways
        check_choice("coupling", coupling, COUPLINGS)
        validate_optimizers(hosts, decays, coupling)
        self._hosts, self._decays, self._coupling = list(hosts), tuple(decays), coupling
        keys = unused_keys(hosts, len(decays))
        rounds = Rounding(rounding, seed, holders.layout, *unused_keys(hosts, 1, f"distwd_{KEY}"))
        lambdas = {key: decay.defaults["weight_decay"] for key, decay in zip(keys, decays, strict=True)}
        self._defaults = lambdas | rounds.defaults
        self.keys = list(self._defaults)
        bound_transforms = sentence(decays, coupling, keys, [bound.label for bound in bind(decays)])
        self._runner = StepRunner(
            bound_transforms, holders, self._shown, rounds, tracks, compiles, named_parameters or ()
        )
        self._runner.check_compiler()
        rules = [decay for decay in decays if decay.target != "closure"]
        self._follows = coupling != "gradient" and bool(rules) and needs_update(rules, hosts)
        # Rules that need no number have nothing to share: each host then is decayed in its own hooks, whatever the others do.
        self._each_alone = len(hosts) == 1 or all(decay.need(decay.defaults) is None for decay in decays)
        at_once = any(decay.target == "params_direct" for decay in rules)
        self._following = UpdateCapture(coupling == "lr", at_once, waits=not self._each_alone)
        self._round = JointStep(hosts, self._each_alone, self._follows)
        self._step: Step | None = None
        self._rehearses = self._raised = self._acted = False
        self._lent = Overrides()
        write_keys(self._runner.groups, self._defaults)
        self._handles = [handle for host in hosts for handle in self._hook(host)]

    def remove(self) -> None:
        """Take the decay off: hooks, group keys, and whatever was changed for the length of a step."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._following.forget()
        for host in self._hosts:
            host.state.pop(NO_PARAMS_KEY, None)  # type: ignore[call-overload]
        for group in self._runner.groups:
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
        """The last `metric` and `coefficient` of every relative rule, as `Chain.stats`."""
        return self._runner.stats()

    @property
    def lent_groups(self) -> frozenset[int]:
        """Identities of the groups whose own weight_decay does a rule's work during a step."""
        return frozenset(self._lent.groups)

    @property
    def lent_grads(self) -> PutBackGrads:
        """Parameters with their own gradients and what stands in for them during a step."""
        return self._lent.grads

    def __repr__(self) -> str:
        hosts = " and ".join(type(host).__name__ for host in self._hosts)
        rules = ", ".join(repr(decay) for decay in self._decays)
        return f"Attachment({hosts}, {rules}, coupling={self._coupling!r})"

    def __str__(self) -> str:
        return f"{self!r}\n{self._runner.audit()}"

    def _shown(self) -> list[dict[str, Any]]:
        return [group for host in self._hosts for group in host.param_groups]

    def _hook(self, host: torch.optim.Optimizer) -> list[Any]:
        after = host.register_step_post_hook(self._after)
        # What two attachments lend to a host is given back in the opposite order.
        run_first_after_step(host, after)
        return [
            after,
            host.register_step_pre_hook(self._before),
            host.register_state_dict_pre_hook(lambda _: self._restore()),
            host.register_state_dict_post_hook(lambda _, saved: without_mark(saved)),
            host.register_load_state_dict_pre_hook(lambda *_: self._restore()),
            host.register_load_state_dict_pre_hook(lambda _, saved: with_keys(saved, host.param_groups, self.keys)),
            host.register_load_state_dict_post_hook(mark_idle),
        ]

    @in_step
    def _before(self, host: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Act before the host's step, or at its first evaluation of the closure, when the gradients are there."""
        if is_within_a_step(host):
            return None
        first = self._round.is_begun_by(host)
        if first:
            self._begin_round(host)
        self._round.enter(host)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if first:
            self._rehearses = self._round.rehearses(host, self._runner, closure is not None)
        if closure is None and self._runner.in_closure:
            raise ValueError("a rule has target='closure': call step(closure) with a function that evaluates the model")
        double = self._following.double_of(host) if self._follows else None
        if closure is None and double is None:
            self._act_before(host, first)
            return None
        # A double asks for its gradients when it steps: hooks that come after this one may still change them.
        evaluating = self._evaluating(host, closure or (lambda: None), first)
        return with_closure((double or host, *args[1:]), kwargs, evaluating)

    def _evaluating(self, host: torch.optim.Optimizer, closure: Callable[[], Any], first: bool) -> Callable[[], Any]:
        decaying, waiting = self._runner.decaying(closure), [True]

        def evaluate() -> Any:
            loss = decaying()
            if waiting and waiting.pop():
                self._act_before(host, first)
            return loss

        return evaluate

    def _begin_round(self, host: torch.optim.Optimizer) -> None:
        self._restore()
        self._round.begin(host, self._raised)
        if not self._each_alone:
            refuse_under_scaler(self._hosts, self._decays, self._coupling, self._follows)
        for each in self._hosts:
            check_groups(each, self._coupling)
        write_keys(self._runner.groups, self._defaults)
        self._runner.prepare()
        self._rehearses, self._raised = False, True  # until the post hook says otherwise
        if self._follows:
            self._following.begin([host] if self._each_alone else self._hosts, self._runner)

    @in_step
    def _act_before(self, host: torch.optim.Optimizer, first: bool) -> None:
        if self._rehearses:
            if self._acted:
                self._runner.measure_only(self._new_step(host))
            return
        self._round.note_gradients(host)
        if self._follows:
            self._following.show(host, self._runner)
            return
        if first or self._step is None:
            self._step = self._new_step(host)
            self._runner.act(self._step, self._runner.in_step)
        own = batches_of(host, self._step)
        if not self._each_alone:
            apply_grad_scaler(own, host, self._coupling == "gradient")
        if self._coupling == "gradient":
            self._lent.grads += write_gradients(own)
        else:
            self._lent.groups |= write_before(own, host, self._coupling)
        self._runner.finish(self._step, host.param_groups)

    @in_step
    def _after(self, host: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_within_a_step(host):
            return
        self._raised = False
        if self._follows and not self._rehearses:
            self._following.take_back(host, args[0])
        mark_idle(host)
        self._lent.take_back(stepped=True)
        if not self._round.is_complete():
            return
        self._step = None
        self._acted = self._acted or not self._rehearses
        if self._follows and not self._rehearses:
            step = self._new_step(host)
            step.grad_scale = None  # a fused kernel has unscaled the gradients
            with self._following.adopted(step):
                self._runner.act(step, self._runner.in_step)
            self._runner.finish(step, host.param_groups if self._each_alone else step.groups)
        self._round.end()

    def _restore(self) -> None:
        self._lent.take_back(stepped=False)
        self._step = None

    def _new_step(self, host: torch.optim.Optimizer) -> Step:
        step = self._runner.new_step({})
        step.pulls_gradients = self._coupling == "gradient"
        step.found_inf = self._round.verdicts(step.groups)
        if self._each_alone:
            step.grad_scale = getattr(host, "grad_scale", None)
            step.batches = batches_of(host, step)
        return step
