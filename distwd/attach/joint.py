"""Several hosts of one model: whose steps belong together, and what a GradScaler does to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import applies_grad_scaler, scaler_states
from ..optimizers.init_step import is_init_step, scaler_of_this_step
from ..rules.base import Rule
from ..step.group_keys import attachments_on
from ..step.runner import StepRunner

InnerOptimizer = torch.optim.Optimizer


class JointStep:
    """Hosts that share their numbers are stepped once each, in any order, and the first step measures for all.

    A round ends when all have stepped. A new one begins before that where a host steps again, or a GradScaler has been updated since:
    then the others were skipped. So they were where a host has other gradients than when the last one stepped; but decay that
    follows the hosts' updates can wait for those, from whatever gradients. Hosts that share nothing are each a round.
    """

    def __init__(self, hosts: Sequence[InnerOptimizer], each_alone: bool, follows: bool) -> None:
        self._hosts, self._each_alone, self._follows = hosts, each_alone, follows
        self._stepped: dict[int, Tensor | None] = {}
        self._grads: dict[int, list[Tensor | None]] = {}
        self._moved: list[Tensor] = []  # parameters with a gradient, of hosts that have stepped
        self._scaling: Any = None

    @property
    def is_open(self) -> bool:
        """Whether some host has stepped, and another has not."""
        return not self._each_alone and bool(self._stepped)

    def is_begun_by(self, host: InnerOptimizer) -> bool:
        """Whether a step of `host` is the first of a round."""
        if not self.is_open or id(host) in self._stepped or _scaling() is not self._scaling:
            return True
        then = self._grads.get(id(host), [])
        return not self._follows and any(a is not b for a, b in zip(_grads(host), then, strict=False))

    def begin(self, host: InnerOptimizer, raised: bool) -> None:
        """Nobody has stepped yet. Raises ValueError if the last round waits for updates, unless it was a step that `raised`."""
        waits = self.is_open and self._follows and not raised
        self.end()
        if waits:
            raise ValueError(
                f"{type(host).__name__} steps a second time before the others have stepped, but their decay depends on the "
                "updates of all; step each once, or attach to each on its own"
            )
        self._scaling = None if self._each_alone else _scaling()

    def enter(self, host: InnerOptimizer) -> None:
        """`host` steps; a GradScaler's verdict on it is known now, on the others it may not be.

        Raises ValueError if what stepped before has lost its gradients: by them the round will know what was updated.
        """
        if any(param.grad is None for param in self._moved):
            self.end()
            raise ValueError(
                f"gradients were cleared before {type(host).__name__} stepped, but decay of several optimizers depends on the updates "
                "of all; call zero_grad when all have stepped"
            )
        self._stepped[id(host)] = getattr(host, "found_inf", None)

    def rehearses(self, host: InnerOptimizer, conductor: StepRunner, has_closure: bool) -> bool:
        """As `is_rehearsal`. Checkpoint code asks each host alone, and that is no part of a round."""
        found = is_init_step([host], conductor, has_closure)
        if found:
            self.end()
        return found

    def note_gradients(self, host: InnerOptimizer) -> None:
        """The gradients of `host`, which steps, are there now: a closure may have just made them."""
        if self._each_alone:
            return
        if self._follows:
            self._moved += [param for group in host.param_groups for param in group["params"] if param.grad is not None]
        else:
            # Held, and not only their ids: a new gradient may come to lie where an old one was.
            self._grads = {id(each): _grads(each) for each in self._hosts}

    def is_complete(self) -> bool:
        """Whether all hosts of the round have stepped."""
        return self._each_alone or len(self._stepped) == len(self._hosts)

    def verdicts(self, groups: Sequence[dict[str, Any]]) -> dict[int, Tensor | None]:
        """By index of a group: the found_inf with which its host is stepped, of hosts that have come to it."""
        host_of = {id(group): id(host) for host in self._hosts for group in host.param_groups}
        return {index: self._stepped.get(host_of.get(id(group), 0)) for index, group in enumerate(groups)}

    def end(self) -> None:
        """The round is over: let go of its gradients."""
        self._stepped, self._grads, self._moved, self._scaling = {}, {}, [], None


def refuse_under_scaler(hosts: Sequence[InnerOptimizer], decays: Sequence[Rule], coupling: str, follows: bool) -> None:
    """Raise ValueError where a GradScaler that skips one of several hosts would leave their shared numbers undefined.

    It unscales and judges them one after the other. So numbers of gradients are not to be had together; nor is the update of a
    host that it may pass over without a word. On every rank alike: all use a scaler, or none.
    """
    if scaler_of_this_step() is None and not any(getattr(host, "grad_scale", None) is not None for host in hosts):
        return
    needs = {need.of for decay in decays if (need := decay.need(decay.defaults)) is not None}
    of_gradients = "grad" in needs or (coupling == "gradient" and "update" in needs)
    of_gradients = of_gradients or (
        coupling == "gradient" and any(decay.is_cautious(decay.defaults) for decay in decays)
    )
    at_once = any(decay.target != "update" for decay in decays)
    unheard = follows and not all(applies_grad_scaler(host) for host in hosts)
    if of_gradients or at_once or unheard:
        what = (
            "a number of the gradients" if of_gradients else "a decay at once" if at_once else "a number of the updates"
        )
        way_out = " (or use fused optimizers)" if unheard and not of_gradients and not at_once else ""
        raise ValueError(
            f"a GradScaler unscales and may skip one of several optimizers and not the others, so {what} over all of them is not "
            f"defined; attach to each on its own, or use norm_input='params'{way_out}"
        )


def _scaling() -> Any:
    """What a GradScaler has only until its next update."""
    scaler = scaler_of_this_step()
    return None if scaler is None else scaler_states(scaler)


def _grads(host: InnerOptimizer) -> list[Tensor | None]:
    """The host's gradients, its own where an attachment has lent it others."""
    lent = {id(stand_in): grad for other in attachments_on(host) for _, grad, stand_in, _ in other.lent_grads}
    grads = (param.grad for group in host.param_groups for param in group["params"])
    return [lent.get(id(grad), grad) for grad in grads]
