"""What all decay rules share: what they need measured, and how a pull finds its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checks import check_choice, check_nonnegative, check_ord
from ..kernels.apply import fold
from ..kernels.formulas import DecayTerm, Rate
from ..metrics.metric import Metric
from ..step.step import Batch, Step, unless
from ..step.transform import BoundTransform, Transform

TARGETS = ("update", "grad", "params_direct", "closure")
_GROWTH = ("params_difference", "update_difference")
NORM_INPUTS = ("update", "grad", "params")
SCOPES = ("all", "group", "tensor")


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that a rule asks for: `metric` of the tensors `of`, one per `scope`."""

    of: str
    metric: Metric
    scope: str


class Rule(Transform):
    """A rule that adds pulls:  rate · mask · d(p),  d(p) = sign(p)·|p|^(ord−1).

    Subclasses say what they need measured (`need`); everything else is here.
    """

    target = "update"

    @property
    def changes(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({{"params_direct": "params", "closure": "grad"}.get(self.target, self.target)})

    def need(self, settings: Mapping[str, Any]) -> Measure | None:
        """The number that the coefficient depends on; None for an absolute rule."""
        return None

    def check(self, settings: Mapping[str, Any]) -> None:
        check_nonnegative("weight_decay", settings["weight_decay"])
        check_ord(settings["ord"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(_words(self))})"

    def is_cautious(self, settings: Mapping[str, Any]) -> bool:
        """Whether to decay only where update·p > 0."""
        return False

    def apply(self, step: Step, bound: BoundTransform) -> None:
        settings = [bound.settings(batch.group) for batch in step.batches]
        cautious = [self.is_cautious(own) for own in settings]
        self._make_way(step, any(cautious))
        on_gradients = self.target in ("grad", "closure") or (self.target == "update" and step.pulls_gradients)
        for batch, own, is_cautious in zip(step.batches, settings, cautious, strict=True):
            rate = step.rate(bound, batch, own, on_gradients)
            if is_cautious:
                rate = _where_scaled(batch, rate)
            # A pull that is put while the update is not scaled yet will be scaled by exactly what scales the update.
            before_lr = own["weight_decay"] if batch.is_unscaled and self.need(own) is None else None
            self._put(batch, DecayTerm(rate, float(own["ord"]), is_cautious, bound.sign(batch.group), before_lr))

    def _make_way(self, step: Step, cautious: bool) -> None:
        """Settle what this rule would otherwise change behind the back of an earlier one."""
        if cautious and (self.target != "update" or any(batch.terms for batch in step.batches)):
            step.fold()
        if self.target == "params_direct":
            step.release_params()
        elif self.target != "update":
            step.release_grads()

    def _put(self, batch: Batch, term: DecayTerm) -> None:
        if self.target == "update":
            batch.terms.append(term)
        elif self.target == "params_direct":
            batch.apply_([term])
            batch.at_once.append(term)
        else:
            fold(batch.grads, batch.params, [term], 1.0, batch.grads, batch.mask, workspace=batch.workspace)


def _where_scaled(batch: Batch, rate: Rate) -> Rate:
    """`rate`, or 0 where the learning rate is 0: there the update is 0, whatever its mask is taken of."""
    if isinstance(batch.scale, Tensor):
        return unless(batch.scale == 0, rate)
    return rate if batch.scale else 0.0


def _words(decay: Rule) -> list[str]:
    words = [f"{key}={value!r}" for key, value in decay.defaults.items()]
    return words if decay.target == "update" else [*words, f"target={decay.target!r}"]


def check_target(target: str) -> None:
    """Raise ValueError for a target that is unknown, or that would make decay grow weights."""
    if target in _GROWTH:
        raise ValueError(
            f"target={target!r} would subtract the decay from the update, so weights would grow; "
            "use target='update', or 'params_direct' to decay the parameters at once"
        )
    check_choice("target", target, TARGETS)
