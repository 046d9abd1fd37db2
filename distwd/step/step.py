"""One step: the batches that it works on, what is pending for each, and the one place that writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._torch import local_tensor
from ..kernels.apply import add_terms, apply_, differences
from ..kernels.blocks import Workspace, number_on
from ..kernels.formulas import DecayTerm, Mask, Rate
from ..kernels.stochastic import LOW, RandomBits
from ..kernels.sums import wide_dtype
from ..metrics.measure import Source, sources_of
from ..sharding.collectives import local_like
from ..sharding.params import NamedParam

# --- what is pending -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class PendingUpdate:
    """The update of one batch as it stands:  u = (scale / applied_lr) · (±1) · (tensors − minus).

    The factors are kept apart because each multiplication that is not made saves a pass over memory.

    tensors: local tensors, shaped like the parameters. At first they are the gradients themselves.
    is_owned: whether `tensors` may be overwritten (gradients and parameters may not).
    minus: subtracted when the update is read, a block at a time; None: nothing.
    is_negated: whether the sign is −1. An optimizer that steps zeros leaves −lr·u there.
    scale: the product of the learning rates that have been passed.
    applied_lr: a learning rate that the optimizer has multiplied by already, and that the chain comes to later.
    is_scaled: whether a learning rate has been passed, were it 1: then u is a thing of its own, and not the gradient.
    """

    tensors: list[Tensor]
    is_owned: bool = False
    minus: list[Tensor] | None = None
    is_negated: bool = False
    scale: Rate = 1.0
    applied_lr: Rate | None = None
    is_scaled: bool = False

    @property
    def is_unscaled(self) -> bool:
        """Whether the scale is the number 1."""
        # A tensor is never known to be 1: reading it would wait for the device.
        return not isinstance(self.scale, Tensor) and self.scale == 1

    @property
    def factor(self) -> Rate:
        """What `tensors` (− `minus`) must be multiplied by."""
        scale = self.scale
        if (lr := self.applied_lr) is not None:
            # An update over a learning rate of 0 is taken as 0: it moves nothing, and is not NaN.
            scale = scale * (torch.where(lr == 0, 0.0, 1 / lr) if isinstance(lr, Tensor) else 1 / lr if lr else 0.0)
        return -scale if self.is_negated else scale

    @property
    def mask(self) -> Mask:
        """What cautious terms compare the parameters with. Scales do not matter: they are not negative."""
        return Mask(self.tensors, -1 if self.is_negated else 1, self.minus)

    def scale_by(self, lr: Rate) -> None:
        """u ← lr·u."""
        self.is_scaled = True
        # By identity: an equal number from another place is another learning rate.
        if lr is self.applied_lr:
            self.applied_lr = None
        else:
            self.scale = self.scale * lr

    def subtract_now(self) -> None:
        """Make the difference `tensors` − `minus` a tensor of its own, before one of the two changes."""
        if self.minus is not None:
            self.tensors, self.is_owned, self.minus = differences(self.tensors, self.minus), True, None


@dataclass(slots=True)
class Tally:
    """Counts the elements that were written, and those that have the value that they would have without the decay.

    The counts stay on the device.
    """

    num_written: int = 0
    unchanged: list[Tensor] = field(default_factory=list)

    def add(self, written: list[Tensor], without: list[Tensor]) -> None:
        """Compare what was written with what would have been."""
        for one, other in zip(written, without, strict=True):
            self.num_written += one.numel()
            self.unchanged.append((one == other).sum())

    def share(self) -> Tensor:
        """Unchanged / written, 0-d float32."""
        return torch.stack(self.unchanged).sum() / self.num_written


@dataclass(slots=True)
class Batch:
    """The parameters of one param group, device and dtype that have a gradient in this step.

    group, group_index: the param group, and its index.
    index: the positions of the parameters among all parameters of the optimizer.
    whole: the parameters as the optimizer holds them (DTensors or plain).
    params, grads: local tensors of parameters and gradients.
    pending: the update as it stands.
    workspace: where blocks are worked on.
    terms: decay that waits to be written, beside the pending update:  p ← p − Σ terms − u.
    proximal: decay of the parameter as it will be then; never part of the update, nor of what a mask or metric sees.
    is_absorbed: whether terms have become part of the pending update.
    written: terms of target="params_direct", which have been written already.
    random_stream: random bits for stochastic rounding; None: round to the nearest.
    tally: counts what the decay leaves unchanged; None: nobody asked.
    num_cells: how many matrices of each parameter lie here, where rates are by matrix: every 1-d rate then has one number for
        each of them, in order. None: 1-d rates have one for each parameter.
    keeps_apart: whether terms stay apart from the pending update, since norm rules look at both.
    keep, update_factor: where norm rules act, the factors of the parameters (with L2 terms in it) and of the update.
    """

    group: dict[str, Any]
    group_index: int
    index: list[int]
    whole: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    pending: PendingUpdate
    workspace: Workspace
    terms: list[DecayTerm] = field(default_factory=list)
    proximal: list[DecayTerm] = field(default_factory=list)
    is_absorbed: bool = False
    written: list[DecayTerm] = field(default_factory=list)
    random_stream: Iterator[RandomBits] | None = None
    tally: Tally | None = None
    num_cells: list[int] | None = None
    keeps_apart: bool = False
    keep: Rate | None = None
    update_factor: Rate = 1.0

    @property
    def is_low(self) -> bool:
        """Whether the parameters are bf16 or fp16."""
        return self.params[0].dtype in LOW

    def next_bits(self) -> RandomBits | None:
        """The random bits of the next write to the parameters; every write has bits of its own."""
        return None if self.random_stream is None else next(self.random_stream)

    @property
    def all_terms(self) -> list[DecayTerm]:
        """All decay that waits to be written."""
        return [*self.terms, *self.proximal]

    @property
    def shrinks_at_once(self) -> bool:
        """Whether proximal terms must be part of the write: it is rounded, or they look at the parameters before it."""
        return bool(self.proximal) and (self.is_low or any(term.reads_old for term in self.proximal))

    @property
    def is_materialized(self) -> bool:
        """Whether the update is `pending.tensors` (− `pending.minus`), but perhaps for its sign."""
        return not self.terms and self.pending.applied_lr is None and self.pending.is_unscaled

    def select(self, positions: Collection[int]) -> Batch:
        """Only the parameters at these positions. For a batch of which nothing has been said yet."""
        kept = [number for number, position in enumerate(self.index) if position in positions]
        if len(kept) == len(self.index):
            return self
        grads = [self.grads[number] for number in kept]
        # A list of its own for the gradients, and the same one for the pending update: that they are one tells that nothing
        # has changed them.
        return replace(
            self,
            index=[self.index[number] for number in kept],
            whole=[self.whole[number] for number in kept],
            params=[self.params[number] for number in kept],
            grads=grads,
            pending=PendingUpdate(grads),
            terms=[],
            proximal=[],
            written=[],
            num_cells=None if self.num_cells is None else [self.num_cells[number] for number in kept],
        )

    def scale_by(self, lr: Rate) -> None:
        """Multiply everything that is pending by a learning rate."""
        self.pending.scale_by(lr)
        # Terms are scaled as the update is, so decay behind the optimizer and before `LR` is decoupled and × lr.
        self.terms = [term.scaled(lr) for term in self.terms]
        self.proximal = [term.scaled(lr) for term in self.proximal]

    def apply_(self, terms: Sequence[DecayTerm], with_update: bool = False) -> None:
        """Write to the parameters:  p ← prox(p − Σ terms(p)), with − u too if asked. Then u is zeros where it is ours."""
        pending, random_bits = self.pending, self.next_bits()
        tensors, factor = (pending.tensors, pending.factor) if with_update else (None, 1.0)
        clear = with_update and pending.is_owned
        without = None
        if self.tally is not None and (terms or self.keep is not None):
            # The same write with the same random bits, but without the decay, on copies.
            without = [param.clone() for param in self.params]
            if tensors is not None:
                spent = [tensor.clone() for tensor in tensors] if clear else tensors
                apply_(
                    without,
                    [],
                    spent,
                    factor,
                    workspace=self.workspace,
                    random_bits=random_bits,
                    clear=clear,
                    num_cells=self.num_cells,
                )
        apply_(
            self.params,
            terms,
            tensors,
            factor if self.keep is None else factor * self.update_factor,
            pending.mask,
            workspace=self.workspace,
            random_bits=random_bits,
            clear=clear,
            num_cells=self.num_cells,
            keep=self.keep,
        )
        if self.tally is not None and without is not None:
            self.tally.add(self.params, without)

    def count_unchanged(self) -> None:
        """Count what the terms leave unchanged where an optimizer does them itself: as if they were written alone."""
        if self.tally is not None:
            copies = [param.clone() for param in self.params]
            apply_(copies, self.all_terms, workspace=self.workspace, num_cells=self.num_cells)
            self.tally.add(copies, self.params)

    def update_with_terms(self) -> list[Tensor]:
        """The update with the terms in it, as tensors of their own; what is pending stays as it is."""
        pending = self.pending
        us = pending.tensors if pending.minus is None else differences(pending.tensors, pending.minus)
        out = [torch.empty_like(u) for u in us]
        self._add_terms(us, out)
        return out

    def materialize(self) -> None:
        """Make the pending update plain tensors, with scale, sign and terms in them."""
        self.pending.subtract_now()
        pending = self.pending
        # Gradients and parameters are not ours to write to.
        out = pending.tensors if pending.is_owned else [torch.empty_like(u) for u in pending.tensors]
        self._add_terms(pending.tensors, out)
        self.is_absorbed = self.is_absorbed or bool(self.terms)
        self.pending, self.terms = PendingUpdate(out, is_owned=True), []

    def _add_terms(self, us: list[Tensor], out: list[Tensor]) -> None:
        """out ← the update, of which `us` are the tensors less what is subtracted from them, with the terms in it."""
        pending = self.pending
        add_terms(
            us,
            self.params,
            self.terms,
            pending.factor,
            out,
            pending.mask,
            workspace=self.workspace,
            num_cells=self.num_cells,
        )


# --- the step --------------------------------------------------------------------------------------------------------


class WaitingOptimizer(ABC):
    """An optimizer that the chain has come to. It has not run yet: what comes after it decides how it is run.

    reads_params: whether what it does may depend on the values of the parameters.
    """

    reads_params: ClassVar[bool]

    @abstractmethod
    def can_step(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Those whose parameters it may step itself, with their scales and terms."""

    @abstractmethod
    def step(self, batches: Sequence[Batch]) -> None:
        """Write terms and update to the parameters."""

    @abstractmethod
    def update(self, batches: Sequence[Batch]) -> None:
        """Put the optimizer's update, times each batch's scale, into `batch.pending`; the parameters stay."""

    def note_cleared(self, batches: Sequence[Batch]) -> None:
        """The updates of `batches` have been written; the tensors that were ours hold zeros now."""


class Step:
    """One step over local tensors. Transforms say what shall happen; nothing is written before it must be.

    entries: all parameters of the optimizer, in order.
    frozen: the positions of those that are not trained: they require no gradient and have none. No metric counts them.
    groups: all param groups.
    active_groups: indices of the groups that this step is of; the others are as if they had no parameters.
    settings: the `GroupSettings` of every transform in every group, by (index of the transform, index of the group).
    rate_of: tells a rule its coefficient for a batch (`Coefficients.rate`).
    anchors: tells a rule the local tensors that it pulls a batch to (`Anchors.of`).
    inner_optimizers: the wrapped optimizers, by the index of their transform.
    workspace: where blocks are worked on.

    Whoever steps for an external optimizer (`attach`) also gives:
    grad_scale: what a GradScaler has multiplied the gradients by; None: nothing.
    found_inf: by group index, a tensor that is not 0 where the optimizer will skip its step.
    decays_gradients: whether the pending update is the gradient that the optimizer will see.
    old: local parameters as they were before the optimizer's step, by position, where it has stepped already.
    second_moments: what the optimizer that has stepped last keeps as v̂; None: there is none.
    shows_bare_update: whether every rule sees the update as the optimizer has made it, and not the decay of others.
    """

    def __init__(
        self,
        entries: Sequence[NamedParam],
        groups: Sequence[dict[str, Any]],
        active_groups: frozenset[int],
        settings: Mapping[tuple[int, int], Any],
        rate_of: Callable[..., Rate],
        anchors: Callable[..., list[Tensor]],
        inner_optimizers: Mapping[int, WaitingOptimizer],
        workspace: Workspace,
        *,
        only: Collection[int] | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Mapping[int, Tensor | None] | None = None,
        decays_gradients: bool = False,
    ) -> None:
        """only: indices of the groups to make batches of; None: all active ones. Metrics still are over all of them."""
        self.entries, self.groups, self.active_groups = entries, groups, active_groups
        self.settings = settings
        self.rate_of, self.anchors = rate_of, anchors
        self.inner_optimizers, self.workspace = inner_optimizers, workspace
        self.grad_scale, self.found_inf, self.decays_gradients = grad_scale, found_inf or {}, decays_gradients
        self.waiting: WaitingOptimizer | None = None
        self.old: Mapping[int, Tensor] = {}
        self.shows_bare_update = False
        self.second_moments: Callable[[Step], list[Source]] | None = None

        found: dict[tuple[int, torch.device, torch.dtype], Batch] = {}
        frozen = []
        for position, entry in enumerate(entries):
            param, group = entry.tensor, entry.group
            # A parameter without a gradient is left alone, by torch's optimizers too.
            if (gradient := param.grad) is None:
                if group in active_groups:
                    check_no_gradient(entry.name, param)
                if not param.requires_grad:
                    frozen.append(position)
                continue
            if group not in active_groups:
                continue
            if only is not None and group not in only:
                continue
            check_gradient(entry.name, gradient)
            local = local_tensor(param)
            # What foreach takes in one list: one device, one dtype; and one group, for its settings.
            key = (group, local.device, local.dtype)
            if (batch := found.get(key)) is None:
                grads: list[Tensor] = []
                batch = Batch(groups[group], group, [], [], [], grads, PendingUpdate(grads), workspace)
                found[key] = batch
            batch.index.append(position)
            batch.whole.append(param)
            batch.params.append(local)
            batch.grads.append(local_like(gradient, param))
        self.batches = list(found.values())
        self.frozen = tuple(frozen)

    # --- what transforms ask ---------------------------------------------------------------------

    def rate(self, bound: Any, batch: Batch, on_gradients: bool) -> Rate:
        """The rate of a rule; on_gradients: whether its term will be added to gradients."""
        own = self.settings[bound.index, batch.group_index]
        rate = own.values["weight_decay"] if own.is_absolute else self.rate_of(bound, batch)
        # A fused optimizer under a GradScaler divides what it is given by the scale.
        if self.grad_scale is not None and on_gradients:
            rate = rate * self.grad_scale
        found_inf = self.found_inf.get(batch.group_index)
        return rate if found_inf is None else zero_where(found_inf, rate)

    def anchors_of(self, bound: Any, toward: str, batch: Batch) -> list[Tensor]:
        """The local tensors that a rule pulls a batch to, one for each parameter; toward: "initial" or "given"."""
        return self.anchors(bound, toward, batch, self.entries)

    def keeps_numbers(self, index: int) -> bool:
        """Whether the transform with this index keeps numbers, in any group. The same on every rank."""
        return any(own.keeps for (other, _), own in self.settings.items() if other == index)

    def tensors_for(self, of: str) -> list[Source]:
        """What a metric of `of` is taken of. Parameters without a gradient are missing in "update" and "grad"."""
        if of == "params":
            # All that are trained, with a gradient or without, as they were when the step began.
            locals_: list[Tensor | None] = []
            frozen = set(self.frozen)
            for position, entry in enumerate(self.entries):
                if entry.group not in self.active_groups or position in frozen:
                    locals_.append(None)
                else:
                    old = self.old.get(position)
                    locals_.append(local_tensor(entry.tensor) if old is None else old)
            return sources_of(locals_)
        if of == "second_moment":
            # Of this step's gradient, so the optimizer has to run first. Where none has come yet, as in a hidden step, there is
            # nothing.
            self.run_waiting()
            return [] if self.second_moments is None else self.second_moments(self)
        # Gradients that a GradScaler has multiplied: metrics are of what the optimizer will make of them.
        unscale = 1.0 if self.grad_scale is None else 1 / self.grad_scale.to(wide_dtype(self.grad_scale.device))
        if of == "grad":
            return [Source(batch.index, batch.grads, (), unscale) for batch in self.batches]
        self.run_waiting()
        found = []
        for batch in self.batches:
            # Decay that stands before the rule is part of the update that it sees.
            if batch.terms and not self.shows_bare_update:
                if batch.keeps_apart:
                    found.append(Source(batch.index, batch.update_with_terms(), (), unscale))
                    continue
                batch.materialize()
            # A scale or a difference needs no tensor of its own: it is applied where the update is summed.
            update = batch.pending
            found.append(Source(batch.index, update.tensors, update.minus or (), update.factor * unscale))
        return found

    # --- what transforms do ----------------------------------------------------------------------

    def adopt(self, moved: Mapping[Tensor, Tensor]) -> None:
        """Take as the update what an optimizer has found already: how far it moved each local parameter."""
        for batch in self.batches:
            batch.pending = PendingUpdate([moved[param] for param in batch.whole], is_owned=True, is_negated=True)

    def materialize(self, exact: bool = False) -> None:
        """Run a waiting optimizer, and make every pending update plain tensors, but where terms have to stay apart from it.

        exact: the sign too; else optimizers may leave −u behind.
        """
        self.run_waiting()
        for batch in self.batches:
            if batch.keeps_apart and batch.terms:
                continue
            # What is plain already is not copied.
            if not batch.is_materialized or (exact and batch.pending.is_negated):
                batch.materialize()

    def read_before_write(self, target: str) -> None:
        """Before someone writes to "params" or "grad": whatever still has to read them as they are reads them now."""
        if target == "params":
            # Terms are of the parameters as they are now, and so may the waiting optimizer's step be.
            waits = self.waiting is not None and self.waiting.reads_params
            if waits or any(batch.terms for batch in self.batches):
                self.materialize()
            for batch in self.batches:
                batch.pending.subtract_now()  # the difference may be to the parameters themselves
        else:
            # An update that has gone on from the gradients must not see what is written to them now.
            if self.waiting is not None or any(not batch.is_materialized for batch in self.batches):
                self.materialize()
            for batch in self.batches:
                if batch.pending.is_scaled and batch.pending.tensors is batch.grads:
                    batch.materialize()

    def write(self) -> None:
        """The end of the step:  p ← prox(p − Σ terms − u)."""
        rest = self.batches
        if self.waiting is not None:
            waiting, self.waiting = self.waiting, None
            # An optimizer that can steps the parameters itself: one pass over memory, and torch's own rounding.
            direct = list(waiting.can_step(self.batches))
            taken = set(map(id, direct))
            rest = [batch for batch in self.batches if id(batch) not in taken]
            if direct:
                waiting.step(direct)
            for batch in direct:
                if batch.proximal:
                    batch.apply_(batch.proximal)
            if rest:
                waiting.update(rest)
        for batch in rest:
            batch.apply_(batch.all_terms, with_update=True)
        # Zeros that have been cleared while they were in the cache need not be cleared again in the next step.
        for inner in self.inner_optimizers.values():
            inner.note_cleared(rest)

    def run_waiting(self) -> None:
        """Let the waiting optimizer find its update now."""
        if self.waiting is not None:
            # Not waiting any more before it runs: if it raises, the step is over.
            waiting, self.waiting = self.waiting, None
            waiting.update(self.batches)


# --- numbers that may be tensors -------------------------------------------------------------------------------------


def zero_where(flag: Tensor, rate: Rate) -> Tensor:
    """`rate`, or 0 where `flag` is not 0 (or is True). By selection, since 0 · inf is NaN."""
    # Everything goes to where the flag is: bringing the flag here would wait for the device.
    if isinstance(rate, Tensor):
        rate = number_on(flag.device, rate, rate.dtype)
    else:
        rate = torch.full((), rate, dtype=wide_dtype(flag.device), device=flag.device)
    return torch.where(flag != 0, 0.0, rate)


def check_gradient(name: str, gradient: Tensor) -> None:
    """Raise ValueError for a gradient that no rule can work on."""
    if gradient.layout is not torch.strided:
        raise ValueError(f"the gradient of {name} is sparse; use dense gradients (for an embedding: sparse=False)")


def check_no_gradient(name: str, param: Tensor) -> None:
    """Raise ValueError for a parameter whose gradient lies beside `.grad`, where no rule looks and optimizers may."""
    # Megatron's main_grad, and the decoupled_grad of its precision-aware optimizer.
    for place in ("main_grad", "decoupled_grad"):
        if isinstance(getattr(param, place, None), Tensor) and param.requires_grad:
            raise ValueError(
                f"the gradient of {name} lies in .{place}, and its .grad is None: rules look at .grad, so nothing would decay; set "
                f".grad before the step, or use the optimizer's own weight_decay"
            )
