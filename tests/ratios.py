"""Ratios of metrics, second moments and running means: rules by name, and each again as arithmetic on whole float64 tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distwd import RelativeWeightDecay
from tests.oracle import AdamPart, Decay, LrPart, Oracle, metric_of

# name -> λ, and the knobs. The first two are AWD and SWD.
RATIOS: dict[str, tuple[float, dict[str, Any]]] = {
    "awd": (0.5, {"norm_input": "grad", "metric": "l2", "per": "params", "smoothing": 0.1}),
    "swd": (0.02, {"norm_input": "second_moment", "power": -0.5}),
    "awd by tensor": (
        0.5,
        {"norm_input": "grad", "metric": "l1", "per": "params", "smoothing": 0.5, "scope": "tensor"},
    ),
    "swd by group": (0.02, {"norm_input": "second_moment", "power": -0.5, "scope": "group", "smoothing": 0.3}),
    "update per params": (0.3, {"metric": "rms", "per": "params", "power": 1.5, "scope": "group"}),
    "moment per params": (0.1, {"norm_input": "second_moment", "metric": "l3", "per": "params", "scope": "tensor"}),
    "smoothed update": (0.1, {"smoothing": 0.9, "cautious": True}),
}
KEPT = "distwd_RelativeWeightDecay_mean"
PLACES = {
    "before": lambda own: [own, AdamPart(), LrPart(0.01)],
    "between": lambda own: [AdamPart(), own, LrPart(0.01)],
    "after": lambda own: [AdamPart(), LrPart(0.01), own],
}
COUPLING = {"before": "gradient", "between": "lr", "after": "none"}


def places_of(name: str) -> list[str]:
    """Where a rule may stand: no second moment is there before the optimizer."""
    return [place for place in PLACES if place != "before" or RATIOS[name][1].get("norm_input") != "second_moment"]


def rule_of(name: str) -> RelativeWeightDecay:
    weight_decay, knobs = RATIOS[name]
    return RelativeWeightDecay(weight_decay, **knobs)


@dataclass(frozen=True)
class Ratio(Decay):
    """A rule of `RATIOS` as a part of a chain."""

    per: str | None = None
    power: float = 1.0
    smoothing: float = 0.0


def part(name: str, **settings: Any) -> Ratio:
    weight_decay, knobs = RATIOS[name]
    return Ratio(weight_decay, **{"metric": "mad", **knobs, **settings})


class RatioOracle(Oracle):
    """`Oracle` with ratios.

    means: by cell (a parameter's name, a group's index, or "all") the running mean.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.means: dict[object, float] = {}

    def step(self, grads):
        self._answers: dict[object, float] = {}
        super().step(grads)
        # A parameter's own mean rests with it; that of many moves in every step.
        self.means |= {
            cell: value for cell, value in self._answers.items() if cell not in self.params or cell in self.live
        }

    def cell(self, own: Ratio, name: str) -> object:
        # λ and its mean are a group's own, also where the metric is over all.
        group = next(index for index, group in enumerate(self.groups) if name in group)
        return name if own.scope == "tensor" else group

    def _coefficient(self, own, name):
        if not isinstance(own, Ratio):
            return super()._coefficient(own, name)
        cell = self.cell(own, name)
        if cell not in self._answers:
            metric = metric_of(self._source(own, name), own.metric)
            ratio = metric
            if own.per is not None:
                per = metric_of(self._source(Decay(0.0, norm_input=own.per, scope=own.scope), name), own.metric)
                ratio = metric / per if per else 0.0
            value = own.setting("weight_decay", name) * (ratio**own.power if ratio else 0.0)
            mean = self.means.get(cell, 0.0)
            self._answers[cell] = own.smoothing * mean + (1 - own.smoothing) * value
        return self._answers[cell]

    def _source(self, part, name):
        if part.setting("norm_input", name) != "second_moment":
            return super()._source(part, name)
        group = next(group for group in self.groups if name in group)
        names = {"all": list(self.params), "group": group, "tensor": [name]}[part.scope]
        index = next(index for index, each in enumerate(self.parts) if isinstance(each, AdamPart))
        beta = self.parts[index].betas[1]
        found = []
        for each in names:
            v, t = self.memory.get((index, "v", each)), self.num_steps[each]
            found.append(self.params[each] * 0.0 if v is None else v / (1 - beta**t))
        return found
