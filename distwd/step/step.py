"""A step being assembled: what the transforms of a chain have said so far, and the end where it is written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.apply import apply_, differences, fold
from ..kernels.formulas import DecayTerm, Mask, Rate
from ..kernels.stochastic import LOW, RandomBits, RandomStream
from ..kernels.sums import wide_dtype
from ..kernels.tally import Tally
from ..kernels.workspace import Workspace
from ..metrics.measure import Source, sources_of
from ..sharding.local import local_like, local_tensor
from ..sharding.params import NamedParam


@dataclass(slots=True)
class Batch:
    """The parameters of one param group, device and dtype that have a gradient this step, as local tensors.

    index: their positions among all parameters. What is pending is scale/ahead · (−update if flipped else update) + Σ pulls.
    At first `update` is the gradients themselves (`owns_update` False: not ours to write to). minus: what is yet to be subtracted
    from `update`: the whole difference would cost the memory of another shard. ahead: a factor that `update` has already, and that the
    sentence comes to later. absorbed: whether pulls have become part of
    `update`. draws: noise for what is written to the parameters; None: it is rounded to the nearest.
    tally: counts what the decay leaves unchanged. at_once: pulls that have been written already.
    """

    group: dict[str, Any]
    group_index: int
    index: list[int]
    whole: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    update: list[Tensor]
    workspace: Workspace
    owns_update: bool = False
    minus: list[Tensor] | None = None
    flipped: bool = False
    scale: Rate = 1.0
    ahead: Rate | None = None
    terms: list[DecayTerm] = field(default_factory=list)
    absorbed: bool = False
    random_stream: RandomStream | None = None
    tally: Tally | None = None
    at_once: list[DecayTerm] = field(default_factory=list)

    @property
    def is_low(self) -> bool:
        """Whether the parameters are bf16 or fp16."""
        return self.params[0].dtype in LOW

    @property
    def random_bits(self) -> RandomBits | None:
        """The noise of the next write to the parameters."""
        return None if self.random_stream is None else self.random_stream.next()

    @property
    def is_plain(self) -> bool:
        """Whether the pending update is `update` (minus `minus`), but perhaps for its sign."""
        return not self.terms and self.ahead is None and self.is_unscaled

    @property
    def is_unscaled(self) -> bool:
        """Whether the scale is 1 (a tensor is never known to be)."""
        return not isinstance(self.scale, Tensor) and self.scale == 1

    @property
    def mask(self) -> Mask:
        """What cautious pulls look at."""
        return Mask(self.update, -1 if self.flipped else 1, self.minus)

    @property
    def signed_scale(self) -> Rate:
        """The factor of `update`."""
        scale = self.scale if self.ahead is None else self.scale * inverse(self.ahead)
        return -scale if self.flipped else scale

    def part(self, positions: Collection[int]) -> Batch:
        """Only the parameters at these positions; before anything is pending."""
        kept = [number for number, position in enumerate(self.index) if position in positions]
        if len(kept) == len(self.index):
            return self
        lists: dict[str, Any] = {
            name: [getattr(self, name)[number] for number in kept]
            for name in ("index", "whole", "params", "grads", "update")
        }
        return replace(self, **lists, terms=[], at_once=[])

    def scale_by(self, lr: Rate) -> None:
        """Multiply what is pending by a learning rate."""
        if lr is self.ahead:
            self.ahead = None
        else:
            self.scale = self.scale * lr
        self.terms = [term.scaled(lr) for term in self.terms]

    def apply_(
        self, terms: Sequence[DecayTerm], updates: list[Tensor] | None = None, scale: Rate = 1.0, clear: bool = False
    ) -> None:
        """Write to the parameters:  p ← p − Σ pull(p) − scale·u.  clear: leave zeros in the updates."""
        workspace, random_bits, tally = self.workspace, self.random_bits, self.tally
        apply_(
            self.params,
            terms,
            updates,
            scale,
            self.mask,
            workspace=workspace,
            random_bits=random_bits,
            tally=tally,
            clear=clear,
        )

    def settle(self) -> None:
        """Subtract what is yet to be subtracted from `update`."""
        if self.minus is not None:
            self.update, self.owns_update, self.minus = differences(self.update, self.minus), True, None

    def fold(self) -> None:
        """Make `update` the pending update exactly."""
        self.settle()
        out = self.update if self.owns_update else [torch.empty_like(u) for u in self.update]
        fold(self.update, self.params, self.terms, self.signed_scale, out, self.mask, workspace=self.workspace)
        self.absorbed = self.absorbed or bool(self.terms)
        self.update, self.owns_update, self.flipped, self.scale, self.terms = out, True, False, 1.0, []
        self.ahead = None


class Waiting(Protocol):
    """An optimizer that has been reached but not yet run; what comes after decides how it is run."""

    reads_params: bool

    def update(self, batches: Sequence[Batch]) -> None:
        """Put the optimizer's update, times each batch's scale, into `batch.update`; the parameters stay."""

    def direct(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Those whose parameters themselves may be stepped, with their scales and pulls."""

    def step(self, batches: Sequence[Batch]) -> None:
        """Write pulls and update to the parameters."""


class Rates(Protocol):
    """Where a rule learns its rate for a batch."""

    def rate(self, place: Any, batch: Batch, settings: Mapping[str, Any]) -> Rate:
        """λ, or λ times what was measured."""


class Step:
    """One step of a chain, over local tensors; no transform writes before it must.

    entries: all parameters of the optimizer. rates: tells a rule its rate. hosts: the wrapped optimizers by place.
    scratch: where blocks are worked on.
    host: an optimizer that waits for what comes after it. grad_scale: what a GradScaler has multiplied the gradients by.
    found_inf: by param group, not 0 where its step will be skipped. pulls_gradients: whether pulls on the update are pulls on gradients.
    in_play: the indices of the groups that are stepped; the others are as if they had no parameters. None: all groups.
    old: local parameters as they were, by position, where an optimizer has stepped them already.
    """

    def __init__(
        self,
        entries: Sequence[NamedParam],
        groups: Sequence[dict[str, Any]],
        rates: Rates,
        hosts: Mapping[int, Any],
        workspace: Workspace,
        in_play: frozenset[int] | None = None,
    ) -> None:
        self.entries = entries
        self.groups = groups
        self.rates = rates
        self.hosts = hosts
        self.workspace = workspace
        self.in_play = frozenset(range(len(groups))) if in_play is None else in_play
        playing = ((position, entry) for position, entry in enumerate(entries) if entry.group in self.in_play)
        self.batches = list(_batches(playing, groups, workspace))
        self.host: Waiting | None = None
        self.grad_scale: Tensor | None = None
        self.found_inf: Mapping[int, Tensor | None] = {}
        self.pulls_gradients = False
        self.old: Mapping[int, Tensor] = {}

    def rate(self, place: Any, batch: Batch, settings: Mapping[str, Any], on_gradients: bool) -> Rate:
        """The rate of a rule: as scaled as the gradients if it goes to them, and 0 in a step that will be skipped."""
        rate = self.rates.rate(place, batch, settings)
        if self.grad_scale is not None and on_gradients:
            rate = rate * self.grad_scale
        found_inf = self.found_inf.get(batch.group_index)
        return rate if found_inf is None else unless(found_inf, rate)

    def adopt(self, moved: Mapping[Tensor, Tensor]) -> None:
        """Take as the update what an optimizer has found already: how far it moved each local parameter."""
        for batch in self.batches:
            batch.update, batch.owns_update, batch.flipped = [moved[param] for param in batch.whole], True, True

    def source(self, of: str) -> list[Source]:
        """What a metric of `of` is taken of; parameters without a gradient are missing in all but "params"."""
        if of == "params":
            return sources_of(self._params())
        if of == "grad":
            return [Source(batch.index, batch.grads) for batch in self.batches]
        self._run_host()
        for batch in self.batches:
            if batch.terms:  # what is only scaled, or a difference, is made so when it is measured
                batch.fold()
        return [Source(batch.index, batch.update, batch.minus or (), batch.signed_scale) for batch in self.batches]

    def _params(self) -> list[Tensor | None]:
        """Local parameters as the step began, by position; None for those of groups that are not in play."""
        old, in_play = self.old, self.in_play
        now = [local_tensor(entry.tensor) if entry.group in in_play else None for entry in self.entries]
        return [old.get(position, tensor) for position, tensor in enumerate(now)] if old else now

    def fold(self, exact: bool = False) -> None:
        """Make `batch.update` the update at this place: run a waiting optimizer, add what is pending.

        A flipped sign may stay (optimizers leave −update behind) unless `exact`.
        """
        self._run_host()
        for batch in self.batches:
            if not batch.is_plain or (exact and batch.flipped):
                batch.fold()

    def _run_host(self) -> None:
        if self.host is not None:
            host, self.host = self.host, None
            host.update(self.batches)

    def release_params(self) -> None:
        """Before someone writes to the parameters: whatever still has to read them as they are, reads them now."""
        waiting = self.host is not None and self.host.reads_params
        if waiting or any(batch.terms for batch in self.batches):
            self.fold()
        for batch in self.batches:
            batch.settle()

    def release_grads(self) -> None:
        """Before someone writes to the gradients: an update that has gone on from them must not see it."""
        if self.host is not None or any(not batch.is_plain for batch in self.batches):
            self.fold()

    def write(self) -> None:
        """The end of the step: p ← p − Σ pulls − scale·update."""
        rest = self.batches
        if self.host is not None:
            direct = list(self.host.direct(self.batches))
            taken = set(map(id, direct))
            rest = [batch for batch in self.batches if id(batch) not in taken]
            for run, some in ((self.host.step, direct), (self.host.update, rest)):
                if some:
                    run(some)
            self.host = None
        for batch in rest:
            batch.apply_(batch.terms, batch.update, batch.signed_scale, clear=batch.owns_update)
        for host in self.hosts.values():
            host.cleared(rest)


def inverse(lr: Rate) -> Rate:
    """1/lr; at lr 0 it is 0, and an update over lr is taken as 0."""
    if isinstance(lr, Tensor):
        return torch.where(lr == 0, 0.0, 1 / lr)
    return 1 / lr if lr else 0.0


def unless(found_inf: Tensor, rate: Rate) -> Tensor:
    """`rate`, or 0 where `found_inf` is not 0 (or is True): by selection, since 0 · inf is NaN."""
    # Everything goes to where the flag is: bringing the flag here would wait for the device.
    if isinstance(rate, Tensor):
        rate = rate.to(found_inf.device, non_blocking=True)
    else:
        rate = torch.full((), rate, dtype=wide_dtype(found_inf.device), device=found_inf.device)
    return torch.where(found_inf != 0, 0.0, rate)


def check_gradient(name: str, gradient: Tensor) -> None:
    """Raise ValueError for a gradient that no rule can work on."""
    if gradient.layout is not torch.strided:
        raise ValueError(f"the gradient of {name} is sparse; use dense gradients (for an embedding: sparse=False)")


def _batches(
    entries: Iterable[tuple[int, NamedParam]], groups: Sequence[dict[str, Any]], workspace: Workspace
) -> Iterator[Batch]:
    found: dict[tuple[int, torch.device, torch.dtype], tuple[list[int], list[Tensor], list[Tensor], list[Tensor]]] = {}
    for position, entry in entries:
        param = entry.tensor
        if (gradient := param.grad) is None:
            continue
        check_gradient(entry.name, gradient)
        local = local_tensor(param)
        key = (entry.group, local.device, local.dtype)
        if (lists := found.get(key)) is None:
            lists = found[key] = ([], [], [], [])
        index, whole, params, grads = lists
        index.append(position)
        whole.append(param)
        params.append(local)
        grads.append(local_like(gradient, param))
    for (group, _, _), (index, whole, params, grads) in found.items():
        yield Batch(groups[group], group, index, whole, params, grads, grads, workspace)
