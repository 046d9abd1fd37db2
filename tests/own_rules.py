"""Rules of one's own, as a user writes them; and each again as plain arithmetic on whole float64 tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import distwd
from distwd import Measure, Rule
from tests.oracle import AdamPart, Decay, LrPart, Oracle, metric_of

SPREAD = 1e-8  # keeps a ratio finite


class AdaptiveWeightDecay(Rule):
    """Decay in proportion to |gradient| / |parameter|:  c̄ ← s·c̄ + (1−s)·λ·‖g‖/‖p‖;  p ← p − c̄·p."""

    def __init__(self, weight_decay, *, smoothing=0.1, target="update"):
        super().__init__(weight_decay=weight_decay, smoothing=smoothing, target=target)

    def measures(self, settings):
        return {"grad": Measure("grad", "l2", scope="all"), "params": Measure("params", "l2", scope="all")}

    def keeps(self, settings):
        return {"mean": 0.0}

    def coefficient(self, settings, measured, kept):
        ratio = settings["weight_decay"] * measured["grad"] / (measured["params"] + SPREAD)
        mean = settings["smoothing"] * kept["mean"] + (1 - settings["smoothing"]) * ratio
        return mean, {"mean": mean}


class Multiplier(Rule):
    """A multiplier for each parameter, which grows while mean p² is above a bound:  μ ← μ + clamp(mean p² − bound, 0, 10)."""

    def measures(self, settings):
        return {"rms": Measure("params", "rms")}

    def keeps(self, settings):
        return {"multiplier": 1.0}

    def coefficient(self, settings, measured, kept):
        grown = kept["multiplier"] + (measured["rms"] ** 2 - 0.01).clamp(min=0.0, max=10.0)
        return settings["weight_decay"] * grown, {"multiplier": grown}


class TwoScopes(Rule):
    """c = λ·‖g‖ / (1 + rms of the parameter): one number of the whole model, and one of each parameter."""

    def measures(self, settings):
        return {"grad": Measure("grad", "l2", scope="all"), "rms": Measure("params", "rms", scope="tensor")}

    def coefficient(self, settings, measured, kept):
        return settings["weight_decay"] * measured["grad"] / (1 + measured["rms"])


class Radius(Rule):
    """c = λ·‖p‖/R, where R is ‖p‖ as the first real step begins."""

    scope = "tensor"

    def measures(self, settings):
        return {"norm": Measure("params", "l2", self.scope)}

    def keeps(self, settings):
        return {"radius": Measure("params", "l2", self.scope)}

    def coefficient(self, settings, measured, kept):
        return settings["weight_decay"] * measured["norm"] / kept["radius"], {"radius": kept["radius"]}


class RadiusOfAll(Radius):
    scope = "all"


class MeanOfUpdate(Rule):
    """c = λ·c̄, with a running mean of mean |u| in each param group, and the largest that was seen."""

    def measures(self, settings):
        return {"mad": Measure("update", "mad", scope="group")}

    def keeps(self, settings):
        return {"mean": 0.0, "largest": 0.0}

    def coefficient(self, settings, measured, kept):
        mean = 0.5 * kept["mean"] + 0.5 * measured["mad"]
        largest = torch.maximum(kept["largest"], measured["mad"])
        return settings["weight_decay"] * (mean + largest), {"mean": mean, "largest": largest}


class Fading(Rule):
    """c = λ/(1 + t) in step t: it counts, and measures nothing."""

    def keeps(self, settings):
        return {"steps": 0.0}

    def coefficient(self, settings, measured, kept):
        return settings["weight_decay"] / (1 + kept["steps"]), {"steps": kept["steps"] + 1}


class ByUpdate(Rule):
    """c = λ·‖u‖: a number of the update, and nothing kept."""

    def measures(self, settings):
        return {"update": Measure("update", "l2", scope="all")}

    def coefficient(self, settings, measured, kept):
        return settings["weight_decay"] * measured["update"]


class Scaled(distwd.WeightDecay):
    """c = factor·λ."""

    def __init__(self, weight_decay, factor):
        super().__init__(weight_decay)
        self.factor = factor

    def coefficient(self, settings, measured, kept):
        return self.factor * settings["weight_decay"]


RULES: dict[str, tuple[Callable[..., Rule], float]] = {
    "adaptive": (AdaptiveWeightDecay, 0.5),
    "multiplier": (lambda decay: Multiplier(weight_decay=decay), 0.02),
    "two scopes": (lambda decay: TwoScopes(weight_decay=decay), 0.05),
    "radius": (lambda decay: Radius(weight_decay=decay), 0.1),
    "radius of all": (lambda decay: RadiusOfAll(weight_decay=decay), 0.1),
    "mean of update": (lambda decay: MeanOfUpdate(weight_decay=decay), 0.1),
    "fading": (lambda decay: Fading(weight_decay=decay), 0.1),
    "by update": (lambda decay: ByUpdate(weight_decay=decay), 0.01),
}
SCOPES = {"multiplier": "tensor", "two scopes": "tensor", "radius": "tensor", "mean of update": "group"}
MEASURES_NOTHING = ("fading",)
# What a rule keeps, by the names of the keys in the optimizer's state.
KEPT = {
    "adaptive": {"distwd_AdaptiveWeightDecay_mean"},
    "multiplier": {"distwd_Multiplier_multiplier"},
    "two scopes": set(),
    "radius": {"distwd_Radius_radius", "distwd_Radius_num_steps"},
    "radius of all": {"distwd_RadiusOfAll_radius", "distwd_RadiusOfAll_num_steps"},
    "mean of update": {"distwd_MeanOfUpdate_mean", "distwd_MeanOfUpdate_largest"},
    "fading": {"distwd_Fading_steps"},
    "by update": set(),
}


def rule_of(name: str) -> Rule:
    make, weight_decay = RULES[name]
    return make(weight_decay)


def kept_of(optimizer, params: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """The kept numbers of every parameter, as Python floats, from the optimizer's state."""
    return {
        name: {key: value.item() for key, value in optimizer.state.get(param, {}).items() if key.startswith("distwd_")}
        for name, param in params.items()
    }


# --- the oracle -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own(Decay):
    """A rule of `RULES` as a part of a chain."""

    rule: str = ""


def part(rule: str, **settings) -> Own:
    return Own(RULES[rule][1], rule=rule, **settings)


PLACES = {
    "before": lambda own: [own, AdamPart(), LrPart(0.01)],
    "between": lambda own: [AdamPart(), own, LrPart(0.01)],
    "after": lambda own: [AdamPart(), LrPart(0.01), own],
}
COUPLING = {"before": "gradient", "between": "lr", "after": "none"}


class OwnOracle(Oracle):
    """`Oracle` with rules of one's own.

    kept: by part and cell (a parameter's name, a group's index, or "all") the numbers that it carries, float64.
    answers: by part and cell the coefficient of the last step.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept: dict[tuple[int, object], dict[str, float]] = {}
        self.answers: dict[tuple[int, object], float] = {}

    def step(self, grads):
        self.answers = {}
        self._moved: dict[tuple[int, object], dict[str, float]] = {}
        super().step(grads)
        for cell, numbers in self._moved.items():
            # A parameter's own numbers rest with it; those of many move in every step.
            if cell[1] not in self.params or cell[1] in self.live:
                self.kept[cell] = numbers

    def _cell(self, own: Own, name: str) -> tuple[int, object]:
        group = next(index for index, group in enumerate(self.groups) if name in group)
        scope = SCOPES.get(own.rule, "all")
        return id(own), {"tensor": name, "group": group, "all": "all"}[scope]

    def _coefficient(self, own, name):
        if not isinstance(own, Own):
            return super()._coefficient(own, name)
        cell = self._cell(own, name)
        if cell not in self.answers:
            self.answers[cell], moved = self._answer(own, name, dict(self.kept.get(cell, {})))
            if moved is not None:
                self._moved[cell] = moved
        return self.answers[cell]

    def _answer(self, own: Own, name: str, kept: dict[str, float]) -> tuple[float, dict[str, float] | None]:
        decay = own.weight_decay

        def measured(of: str, metric: str, scope: str) -> float:
            return metric_of(self._source(Decay(0.0, metric=metric, norm_input=of, scope=scope), name), metric)

        if own.rule == "adaptive":
            ratio = decay * measured("grad", "l2", "all") / (measured("params", "l2", "all") + SPREAD)
            mean = 0.1 * kept.get("mean", 0.0) + 0.9 * ratio
            return mean, {"mean": mean}
        if own.rule == "multiplier":
            grown = kept.get("multiplier", 1.0) + min(10.0, max(0.0, measured("params", "rms", "tensor") ** 2 - 0.01))
            return decay * grown, {"multiplier": grown}
        if own.rule == "two scopes":
            return decay * measured("grad", "l2", "all") / (1 + measured("params", "rms", "tensor")), None
        if own.rule.startswith("radius"):
            norm = measured("params", "l2", SCOPES.get(own.rule, "all"))
            radius = kept.get("radius", norm)
            return decay * norm / radius, {"radius": radius, "num_steps": kept.get("num_steps", 0) + 1}
        if own.rule == "mean of update":
            mad = measured("update", "mad", "group")
            mean, largest = 0.5 * kept.get("mean", 0.0) + 0.5 * mad, max(kept.get("largest", 0.0), mad)
            return decay * (mean + largest), {"mean": mean, "largest": largest}
        if own.rule == "fading":
            steps = kept.get("steps", 0)
            return decay / (1 + steps), {"steps": steps + 1}
        assert own.rule == "by update"
        return decay * measured("update", "l2", "all"), None

    def kept_numbers(self, own: Own) -> dict[str, dict[str, float]]:
        """As `kept_of`: by parameter and key."""
        prefix = next((key.rsplit("_", 1)[0] for key in sorted(KEPT[own.rule]) if not key.endswith("num_steps")), "")
        found: dict[str, dict[str, float]] = {}
        for name in self.params:
            numbers = self.kept.get(self._cell(own, name), {})
            found[name] = {f"{prefix}_{key}": value for key, value in numbers.items()}
        return found
