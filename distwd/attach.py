"""attach: decay for an optimizer that already exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .attached import (
    COUPLINGS,
    PutBack,
    Snapshot,
    must_follow,
    sentence,
    skip_where,
    write_after,
    write_before,
    write_gradients,
)
from .checks import check_choice
from .conductor import Conductor, Holders
from .decays.rule import Decay
from .layout import Layout
from .plan.plan import Plan
from .refusals import check_decays, check_host, free_keys
from .step import Step
from .transform import places_of


def attach(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *decays: Decay,
    coupling: str = "lr",
    group: dist.ProcessGroup | None = None,
    layout: Layout | None = None,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    check_replicas: bool = True,
) -> Attachment:
    """Add decay to an optimizer that exists, through its own step hooks.

    coupling: "gradient": g ← g + λ·d(p), before the optimizer; "lr": p ← p − lr·λ·d(p), AdamW's; "none": p ← p − λ·d(p).
        λ is `weight_decay`, times the metric for a relative rule; d(p) is of the parameter before the step. Each equals
        the `Chain` with the rules at that place; norm_input="update" then is what the optimizer did to the parameters,
        over lr for "lr".
    optimizer: any torch optimizer with step hooks, its own weight_decay 0; or several of one model that are stepped once
        each, in any order, and share one metric and one collective.
    decays: rules; λ becomes the key `distwd_weight_decay` of the optimizer's groups, read at every step, and saved with them.
    group, layout, check_replicas: as for `Chain`. named_parameters: names, where the optimizer was built without.
    Returns an `Attachment`; its `remove()` takes everything back.
    Raises ValueError if the optimizer decays already, has no step hooks (a wrapper: attach to what it wraps), or a rule is
    given twice to it by mistake; PlanError at the first step as `Chain`.
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
    hosts = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    return Attachment(hosts, decays, coupling, group, layout, named_parameters, check_replicas)


class Attachment:
    """Decay that `attach` has added to one or several optimizers.

    `plan` and `phases` and `stats()` as of `Chain`; `remove()` takes the decay off again. Made by `attach`, not by hand.

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
        decays: Sequence[Decay],
        coupling: str,
        group: dist.ProcessGroup | None,
        layout: Layout | None,
        named_parameters: Iterable[tuple[str, Tensor]] | None,
        check_replicas: bool,
    ) -> None:
        check_choice("coupling", coupling, COUPLINGS)
        check_decays(decays)
        for host in hosts:
            check_host(host, decays, coupling)
        holders = Holders.of(group, layout, check_replicas)
        self._hosts, self._coupling = list(hosts), coupling
        self._names = {} if named_parameters is None else {id(param): name for name, param in named_parameters}
        self._distwd_keys = free_keys(hosts, len(decays))
        places = sentence(decays, coupling, self._distwd_keys, [place.label for place in places_of(decays)])
        self._conductor = Conductor(
            places, holders, lambda: self._groups, lambda: list(map(self._with_names, self._groups))
        )
        rules = [decay for decay in decays if decay.target != "closure"]
        self._follows = coupling != "gradient" and bool(rules) and must_follow(rules, hosts)
        self._direct = any(decay.target == "params_direct" for decay in rules)
        self._began = False
        self._round: set[int] = set()
        self._snapshot: Snapshot | None = None
        self._put_back: PutBack = []
        self._put_back_grads: list[tuple[Tensor, Tensor | None]] = []
        self._write_keys()
        self._handles = [handle for host in hosts for handle in self._hook(host)]

    def remove(self) -> None:
        """Take the decay off: hooks, group keys, and whatever was changed for the length of a step."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for group in self._groups:
            for key in self._distwd_keys:
                group.pop(key, None)

    @property
    def plan(self) -> Plan:
        """Who holds what. Built when first asked for, together with the other ranks: then every rank must ask."""
        return self._conductor.plan

    @property
    def phases(self) -> int:
        """Collectives per step (of a closure target: per evaluation of the closure); 0 for absolute rules and on one rank."""
        return self._conductor.phases

    def stats(self) -> dict[str, dict[str, Any]]:
        """The last `metric` and `coefficient` of every relative rule, as `Chain.stats`."""
        return self._conductor.stats()

    # --- what the hosts hold -----------------------------------------------------------------------------------------

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for host in self._hosts for group in host.param_groups]

    def _with_names(self, group: dict[str, Any]) -> dict[str, Any]:
        if "param_names" in group or not self._names:
            return group
        names = [self._names.get(id(param)) for param in group["params"]]
        return group if None in names else {**group, "param_names": names}

    def _write_keys(self) -> None:
        """Give every group its own decay; a group that came without (from an old checkpoint) gets the rule's."""
        for place in (*self._conductor.in_step, *self._conductor.in_closure):
            for key in place.keys.values():
                for group in self._groups:
                    group.setdefault(key, place.transform.defaults["weight_decay"])

    # --- hooks -------------------------------------------------------------------------------------------------------

    def _hook(self, host: torch.optim.Optimizer) -> list[Any]:
        return [
            host.register_step_pre_hook(self._before),
            host.register_step_post_hook(self._after),
            host.register_state_dict_pre_hook(lambda _: self._restore()),
        ]

    @torch.no_grad()
    def _before(self, host: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Act before the host's step, or at its first evaluation of the closure, when the gradients are there."""
        if len(self._hosts) == 1:
            self._round.clear()  # not empty after a step that raised
        if not self._round:
            self._begin_round()
        if id(host) in self._round:
            raise ValueError(
                f"{type(host).__name__} steps a second time before the others that it shares its decay with have stepped; "
                "step each once, or attach to each on its own"
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        first = not self._round
        self._round.add(id(host))
        if closure is None:
            if self._conductor.in_closure:
                raise ValueError(
                    "a rule has target='closure': call step(closure) with a function that evaluates the model"
                )
            if first:
                self._act_before()
            return None
        return _with_closure(args, kwargs, self._evaluating(closure, first))

    def _evaluating(self, closure: Callable[[], Any], first: bool) -> Callable[[], Any]:
        decaying = self._conductor.decaying(closure)
        waiting = [first]

        def evaluate() -> Any:
            loss = decaying()
            if waiting.pop() if waiting else False:
                with torch.no_grad():
                    self._act_before()
            return loss

        return evaluate

    def _begin_round(self) -> None:
        self._restore()  # after a step that raised, and so never came to its post hook
        self._write_keys()
        self._skipped = False
        self._conductor.prepare(again=self._began)
        self._began = True
        if self._follows:
            kept = {} if self._snapshot is None else self._snapshot.before
            self._snapshot = Snapshot(self._conductor.entries, kept)

    def _act_before(self) -> None:
        self._skipped = self._is_rehearsal()
        if self._skipped or self._follows:
            return
        step = self._new_step()
        if self._coupling == "gradient":
            _rescale(step, lambda scale: 1 / scale)
        self._conductor.act(step, self._conductor.in_step)
        self._skip_found_inf(step)
        if self._coupling == "gradient":
            _rescale(step, lambda scale: scale)
            self._put_back_grads = write_gradients(step)
        else:
            self._put_back = write_before(step, self._host_of(), self._coupling)

    @torch.no_grad()
    def _after(self, host: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(self._round) < len(self._hosts):
            return
        self._round.clear()
        self._restore()
        if self._follows and not self._skipped:
            assert self._snapshot is not None
            step = self._new_step()
            step.grad_scale = None  # a fused kernel has unscaled the gradients
            moved_to = self._snapshot.rewind(step, per_lr=self._coupling == "lr")
            self._conductor.act(step, self._conductor.in_step)
            self._skip_found_inf(step)
            write_after(step, moved_to, self._direct)

    def _restore(self) -> None:
        for group, values in self._put_back:
            group.update(values)
        for param, grad in self._put_back_grads:
            param.grad = grad
        self._put_back, self._put_back_grads = [], []

    # --- a step ------------------------------------------------------------------------------------------------------

    def _new_step(self) -> Step:
        step = self._conductor.new_step({})
        scales = (getattr(host, "grad_scale", None) for host in self._hosts)
        step.grad_scale = next((scale for scale in scales if scale is not None), None)
        return step

    def _skip_found_inf(self, step: Step) -> None:
        for host in self._hosts:
            found_inf = getattr(host, "found_inf", None)
            if found_inf is not None:
                skip_where(step, found_inf)

    def _host_of(self) -> dict[int, torch.optim.Optimizer]:
        hosts = [host for host in self._hosts for _ in host.param_groups]
        return dict(enumerate(hosts))

    def _is_rehearsal(self) -> bool:
        """Whether this step only asks the hosts for their state, as torch.distributed.checkpoint does: none yet, lr 0, gradients 0."""
        if any(host.state for host in self._hosts) or any(group.get("lr", 1) != 0 for group in self._groups):
            return False
        return self._conductor.moves_nothing()


def _rescale(step: Step, factor: Callable[[Tensor], Tensor]) -> None:
    """Multiply what is pending by a function of the gradients' scale, if they have one."""
    if step.grad_scale is not None:
        for batch in step.batches:
            by = factor(step.grad_scale)
            batch.scale, batch.pulls = batch.scale * by, [pull.scaled(by) for pull in batch.pulls]


def _with_closure(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]) -> tuple[Any, Any]:
    """The arguments of `step` with another closure, where the caller had put it."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs
