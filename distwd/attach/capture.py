"""Decay that has to wait until the optimizer has stepped, because it looks at what the optimizer did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import _torch
from .._torch import local_tensor
from ..checks import is_zero
from ..kernels.apply import apply_from_
from ..kernels.blocks import BufferPool
from ..metrics.measure import Source
from ..optimizers.state import borrow_state, second_moments
from ..sharding.params import NamedParam, is_frozen
from ..step.runner import StepRunner
from ..step.step import Batch, PendingUpdate, Step
from .joint import JointStep
from .watch import Watch, decay_copies_
from .zero_proxy import ZeroProxyCapture

Optimizer = torch.optim.Optimizer


class UpdateCapture:
    """Learns what optimizers do, by a shadow copy on zeros or from a copy of the parameters, and writes decay after it.

    Which of the two serves a parameter depends on nothing but the parameter, its optimizer and the rules. So all its
    copies on other ranks go the same way, whatever those ranks hold beside it: the two round differently.

    runner: runs the rules.
    joint: the steps that belong together.
    coupling: "lr": the update is what the optimizer did over its learning rate; "none": what it did.
    decays_at_once: whether a rule changes the parameters before the step is written.
    measures_update: whether a rule looks at the update; else the optimizer may look at the parameters.
    """

    def __init__(
        self, runner: StepRunner, joint: JointStep, coupling: str, decays_at_once: bool, measures_update: bool
    ) -> None:
        self._runner, self._joint = runner, joint
        self._over_lr, self._decays_at_once = coupling == "lr", decays_at_once
        self._watches = {id(each): Watch(measures_update) for each in joint.optimizers}
        self.forget()

    def forget(self) -> None:
        """Let go of all memory."""
        self._snapshot, self._zero_proxies = SnapshotCapture(), ZeroProxyCapture()
        self._proxied: set[int] = set()  # optimizers whose last step was a proxy's
        self._noted: set[int] = set()  # optimizers of which it is noted what they did in this step
        self._on_zeros: set[int] = set()  # positions of parameters whose update is learnt from zeros
        self._step: Step | None = None  # of the optimizer that has come last
        # What optimizers have stepped with, part by part: which parameters had a gradient, and their learning rates.
        self._parts_on_zeros: list[Batch] = []
        self._parts_copied: list[Batch] = []

    def begin(self, optimizer: Optimizer, is_first: bool) -> Optimizer | None:
        """`optimizer` is about to step; its gradients may not be there yet. Copy what cannot be learnt otherwise.

        is_first: whether it is the first of a joint step.
        Returns what steps in its place, once it has been shown its gradients; None if the optimizer steps itself.
        """
        # A decay at once is undone from the copy if the step fails. And an optimizer whose decay waits for others steps
        # at once, so that everyone sees its step.
        may_use_proxy = not self._decays_at_once and self._joint.each_alone
        # Settled once in a step: the closure may attach another rule, or remove one.
        uses_proxy = may_use_proxy and self._zero_proxies.works_for(optimizer)
        self._proxied = self._proxied | {id(optimizer)} if uses_proxy else self._proxied - {id(optimizer)}
        if is_first:
            self._zero_proxies.begin()
            self._on_zeros, self._parts_on_zeros, self._parts_copied = set(), [], []
            copied = []
            # All optimizers of a joint step at once: if the decay fails, the steps of all of them are undone.
            for each in [optimizer] if self._joint.each_alone else self._joint.optimizers:
                for position, entry in self._params_of(each):
                    local = local_tensor(entry.tensor)
                    # Zeros are plain tensors.
                    if uses_proxy and type(local) in _torch.ORDINARY:
                        self._on_zeros.add(position)
                    else:
                        copied.append((position, entry))
            self._snapshot.take(copied)
        self._step = None
        self._noted.discard(id(optimizer))
        return self._zero_proxies.proxy_of(optimizer) if uses_proxy else None

    def act(self, optimizer: Optimizer, is_first: bool) -> None:
        """The gradients of `optimizer` are there, and it steps next. Raises ValueError for sparse ones.

        What rules need of the gradients is taken now: the optimizer may scale them, add momentum to them, or let them go.
        """
        step = self._step = self._joint.new_step(optimizer, of_all=False)
        self._runner.begin(step, is_first)
        # A fused kernel divides the gradients by the GradScaler's scale, so what is added to them afterwards is as it is.
        step.grad_scale = None
        # Rules of several attachments cannot see one another's decay, so those of one do not either.
        step.shows_bare_update = True
        for batch in step.batches:
            # The optimizer, or a scheduler that steps before the others have, may change it.
            if (lr := batch.group.get("lr")) is not None:
                # Prodigy and D-Adaptation step with d·lr, with a d that they find in their step and show in their groups.
                d = batch.group.get("d", 1.0)
                if self._over_lr and "d" not in batch.group:
                    self._watches[id(optimizer)].warn_of_hidden_step(optimizer)
                lr = lr * d if isinstance(d, Tensor) or d != 1 else lr.clone() if isinstance(lr, Tensor) else lr
                batch.group = {**batch.group, "lr": lr}
        # Each part of a batch is written in its own way. What has no gradient now is in neither part.
        on_zeros, copied = (
            [part for batch in step.batches if (part := batch.select(positions)).index]
            for positions in (self._on_zeros, self._snapshot.old)
        )
        if id(optimizer) in self._proxied:
            self._zero_proxies.show_gradients(optimizer, on_zeros)
        if id(optimizer) not in self._proxied:
            self._watches[id(optimizer)].note_gradients(step.batches)
        # Gradients that the optimizer lets go are let go here too, but where a rule will write to them.
        if not any("grad" in bound.transform.changes for bound in self._runner.in_step):
            for batch in (*step.batches, *on_zeros, *copied):
                batch.grads.clear()
        self._parts_on_zeros += on_zeros
        self._parts_copied += copied

    def note(self, optimizer: Optimizer, is_shared: bool = False) -> None:
        """`optimizer` has stepped, and nobody has written a decay of this step: note what it did.

        is_shared: whether another attachment may write before this one does.
        """
        if id(optimizer) in self._proxied or id(optimizer) in self._noted:
            return
        self._noted.add(id(optimizer))
        # It has not called the closure that it was given.
        if self._step is None:
            self.act(optimizer, is_first=not self._parts_copied)
        own, step = list(self._params_of(optimizer)), self._step
        assert step is not None
        updated = [position for batch in step.batches for position in batch.index]
        has_lr = not any(is_zero(batch.group.get("lr")) for batch in step.batches)
        if self._watches[id(optimizer)].look(optimizer, own, self._snapshot.old, updated, has_lr):
            self._runner.has_looked = True  # a second warning would say that nothing is trained
        for position, entry in own:
            if copies := self._watches[id(optimizer)].copies_of(optimizer, position, entry.tensor):
                self._snapshot.copies[position] = copies
        if is_shared:
            self._snapshot.keep_new(own)

    def after(self, optimizer: Optimizer, stepped: Optimizer, is_complete: bool) -> None:
        """`optimizer` has stepped. When all of the joint step have, run the rules on what they did, and write.

        stepped: what has stepped in its place; itself where it has no proxy.
        is_complete: whether it was the last one.
        Raises ValueError if a hook has replaced the proxy. Where an error comes from the rules, all steps are undone.
        """
        if id(optimizer) in self._proxied:
            self._zero_proxies.commit(optimizer, stepped)
        else:
            self.note(optimizer)
        if not is_complete:
            return
        assert self._step is not None
        step, on_zeros, copied = self._step, self._parts_on_zeros, self._parts_copied
        self._step, self._parts_on_zeros, self._parts_copied = None, [], []
        # In the order of the parameters, whatever the order of the optimizers.
        copied.sort(key=lambda batch: batch.index[0])
        step.batches = on_zeros + copied
        step.second_moments = self._second_moments
        with (
            self._zero_proxies.adopted(on_zeros, self._over_lr),
            self._snapshot.adopted(step, copied, self._over_lr, self._decays_at_once),
        ):
            self._runner.run(step, has_begun=True)
        # Several optimizers count their steps together, here; one that shares nothing counts its own.
        self._runner.finish(step, optimizer.param_groups if self._joint.each_alone else step.groups)

    def _second_moments(self, step: Step) -> list[Source]:
        """v̂ of all trained parameters, from the state of the optimizers that have stepped."""
        owner_of = {id(group): each for each in self._joint.optimizers for group in each.param_groups}
        owners = {index: owner_of[id(group)] for index, group in enumerate(step.groups) if id(group) in owner_of}
        return second_moments(
            step,
            lambda group: (type(owners[group]).__name__, step.groups[group]),
            lambda group, param: borrow_state(owners[group].state, param, "", as_local=True),
        )

    def _params_of(self, optimizer: Optimizer) -> Iterator[tuple[int, NamedParam]]:
        """The parameters of an optimizer that are shown now, with their positions among all."""
        params = self._runner.now
        own = set(map(id, optimizer.param_groups))
        indices = {index for index in params.active if id(params.groups[index]) in own}
        return (
            (position, entry)
            for position, entry in enumerate(params.entries)
            # What is frozen is not updated: it needs no copy, which would cost as much as the model.
            if entry.group in indices and not is_frozen(entry.tensor)
        )


class SnapshotCapture:
    """Copies local parameters before the optimizer steps; the update is the difference. Right for every optimizer."""

    def __init__(self) -> None:
        self.old: dict[int, Tensor] = {}  # copies, by position
        self.new: dict[int, Tensor] = {}  # as the optimizer has left them, where another attachment writes to them too
        self.copies: dict[int, list[Tensor]] = {}  # what the optimizer itself keeps and steps from, by position
        self._buffers, self._new_buffers = BufferPool(), BufferPool()

    def take(self, entries: Iterable[tuple[int, NamedParam]]) -> None:
        """Copy the parameters of these (position, parameter) pairs."""
        self.copies, self.new = {}, {}
        self.old = self._copies_of(entries, self._buffers)

    def keep_new(self, entries: Iterable[tuple[int, NamedParam]]) -> None:
        """Copy these parameters as the optimizer has left them: another attachment writes its decay before ours is measured."""
        self.new |= self._copies_of([each for each in entries if each[0] in self.old], self._new_buffers)

    @staticmethod
    def _copies_of(entries: Iterable[tuple[int, NamedParam]], buffers: BufferPool) -> dict[int, Tensor]:
        # Into the buffers of earlier steps where they fit: a new buffer in each step costs more than the copy.
        found = [(position, local_tensor(entry.tensor)) for position, entry in entries]
        positions, locals_ = [position for position, _ in found], [local for _, local in found]
        copies = buffers.take(positions, locals_)
        alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for copy, local in zip(copies, locals_, strict=True):
            olds, news = alike.setdefault((local.device, local.dtype), ([], []))
            olds.append(copy)
            news.append(local)
        for olds, news in alike.values():
            torch._foreach_copy_(olds, news)
        return dict(zip(positions, copies, strict=True))

    @contextmanager
    def adopted(self, step: Step, batches: Sequence[Batch], over_lr: bool, decays_at_once: bool) -> Iterator[None]:
        """Make batches what they would be if the optimizer had not written yet; write decay when the block has ended.

        Their parameters are the old ones, and their pending update is what the optimizer did. The terms, which are of
        the old parameters, are then written to the new ones. If the block raises, the optimizer's step is undone.

        step: the step that the batches are of.
        batches: those whose parameters were copied.
        over_lr: whether the update is what the optimizer did over its learning rate.
        decays_at_once: whether a rule changes the old parameters themselves; then the whole step is written to those.
        """
        try:
            step.old = self.old
            moved_to, seen = [], []
            for batch in batches:
                moved_to.append(batch.params)
                # What the optimizer has made of them: other attachments may have decayed the parameters since.
                seen.append([self.new.get(i, param) for i, param in zip(batch.index, batch.params, strict=True)])
                batch.params = [self.old[position] for position in batch.index]
                # new − old is −u. The difference is left to whoever needs it, a block at a time: as a whole it would
                # cost the memory of another shard.
                lr = batch.group["lr"] if over_lr else None
                batch.pending = PendingUpdate(seen[-1], minus=batch.params, is_negated=True, applied_lr=lr)
            yield
            for batch, params, made in zip(batches, moved_to, seen, strict=True):
                # The new parameters hold the update, but not the decay that has gone into it or into the old ones.
                copies = [self.copies.get(position, []) for position in batch.index] if self.copies else []
                if batch.is_absorbed or decays_at_once or batch.keep is not None:
                    # A factor of the whole step is written to the old parameters, with the update.
                    batch.pending.subtract_now()
                    batch.apply_(batch.all_terms, with_update=True)
                    for param, decayed, own in zip(made, batch.params, copies, strict=False):
                        for copy in own:
                            copy.sub_(param.to(copy.dtype) - decayed)
                    if self.new:
                        torch._foreach_sub_(batch.params, made)
                        torch._foreach_add_(params, batch.params)
                    else:
                        torch._foreach_copy_(params, batch.params)
                else:
                    # Before the parameters: a mask looks at what the optimizer has made of them.
                    if any(copies):
                        decay_copies_(batch, copies)
                    # Without the decay nothing would be written here, so the parameters as they are tell what it changes.
                    tally = batch.tally if batch.all_terms else None
                    without = None if tally is None else [param.clone() for param in params]
                    # The optimizer's own write stays as it is, bit for bit.
                    apply_from_(
                        params,
                        batch.params,
                        batch.all_terms,
                        batch.pending.mask,
                        workspace=batch.workspace,
                        random_bits=batch.next_bits(),
                        num_cells=batch.num_cells,
                    )
                    if tally is not None and without is not None:
                        tally.add(params, without)
        except Exception:
            # Another rank has died, say. A step without its decay must not stay: whoever tries again would step twice.
            for position, old in self.old.items():
                local_tensor(step.entries[position].tensor).copy_(old)
            raise
