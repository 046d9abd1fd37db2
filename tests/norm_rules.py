"""Sentences with norm rules, and what should come out of them: whole float64 tensors, element by element, in one process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.oracle import AdamPart, Decay, LrPart, Oracle, Part

ADAM, LR = AdamPart(), LrPart(0.01)


@dataclass(frozen=True)
class Norm:
    """A norm rule of the library: "brake", "ball" or "constrained"; or a "control", which is a pull."""

    kind: str
    settings: Mapping[str, object] = field(default_factory=dict)
    scope: str = "matrix"

    def __hash__(self) -> int:
        return id(self)

    def get(self, name: str, default: object = None):
        return self.settings.get(name, default)


def rule_of(part: Norm):
    import distwd

    made = {
        "brake": distwd.RadialBrake,
        "ball": distwd.Hyperball,
        "constrained": distwd.ConstrainedWeightDecay,
        "control": distwd.NormControl,
    }
    return made[part.kind](**part.settings, scope=part.scope)


BRAKE = Norm("brake", {"outward": 0.3, "inward": 0.6})
BALL = Norm("ball")
BOUND = Norm("constrained", {"bound": 0.05, "rate": 0.004})
START = Norm("constrained", {"bound": "initial", "factor": 0.9, "rate": 0.004})
LATER = Norm("constrained", {"bound": "initial", "factor": 0.95, "after": 2, "rate": 0.004})
SEARCH = Norm("constrained", {"bound": "inflection", "every": 1, "smoothing": 0.2, "rate": 0.004})
CONTROL = Norm("control", {"weight_decay": 0.5, "ratio": 1.3})

SENTENCES: dict[str, tuple[Part | Norm, ...]] = {
    "brake": (ADAM, BRAKE, LR),
    "ball": (ADAM, BALL, LrPart(0.3)),
    "bound": (ADAM, BOUND, LR),
    "start": (ADAM, START, LR),
    "later": (ADAM, LR, LATER),
    "search": (ADAM, SEARCH, LrPart(0.2)),
    "control": (ADAM, CONTROL, LR),
    "control and ball": (ADAM, CONTROL, BALL, LR),
    "decay, brake, decay": (ADAM, Decay(0.5), BRAKE, Decay(0.3, cautious=True), LR),
    "bent pulls": (
        ADAM,
        Decay(0.5, ord=1),
        Decay(0.4, cautious=True),
        Norm("brake", {"outward": 0.2, "inward": 0.1}),
        Decay(0.2, ord=3),
        LR,
    ),
    "by the update": (ADAM, Decay(0.5, metric="mad", ord=1), BRAKE, Decay(0.1, metric="l2"), LR),
    "two": (ADAM, Decay(0.2), BRAKE, Decay(0.3), BOUND, LR, Decay(0.02)),
    "behind LR": (ADAM, LR, Decay(0.01), BRAKE, BOUND),
    "by tensor": (
        ADAM,
        Decay(0.3, metric="rms", norm_input="params", scope="tensor"),
        Norm("brake", {"outward": 0.2}, "tensor"),
        LR,
    ),
    "by group": (ADAM, Decay(0.3), Norm("ball", scope="group"), LR),
}
# All-reduces on several ranks: one where something is measured, and another where a metric is of the update behind a pull.
PHASES = dict.fromkeys(SENTENCES, 1) | {"by the update": 2}


def norm(x: Tensor, scope: str) -> Tensor:
    """‖x‖ of the whole tensor, or of each matrix, to be multiplied with it."""
    if scope == "matrix" and x.dim() > 2:
        return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return torch.linalg.vector_norm(x)


class NormOracle(Oracle):
    """`Oracle` with norm rules. kept: by part and name what a rule has kept, float64."""

    def __init__(self, params: Mapping[str, Tensor], parts, groups=()):
        super().__init__(params, parts, groups)
        self.kept: dict[tuple[int, object], dict[str, Tensor]] = {}

    def step(self, grads: Mapping[str, Tensor | None]) -> None:
        begins = max(index for index, part in enumerate(self.parts) if isinstance(part, AdamPart))
        self.grads = {name: g.detach().double().clone() for name, g in grads.items() if g is not None}
        self.live = [name for name in self.params if name in self.grads]
        self.update = {}
        for name in self.live:
            self.num_steps[name] += 1
        for index, part in enumerate(self.parts[: begins + 1]):
            self._apply(index, part)
        bare = dict(self.update)
        behind = self.parts[begins + 1 :]
        lrs = [part.lr if isinstance(part, LrPart) else 1.0 for part in behind]
        before = {name: self.params[name].clone() for name in self.live}
        after = {name: self.params[name] - math.prod(lrs) * bare[name] for name in self.live}
        for place, part in enumerate(behind):
            rest = math.prod(lrs[place + 1 :])
            if isinstance(part, LrPart):
                self.update = {name: part.lr * u for name, u in self.update.items()}
            elif isinstance(part, Norm) and part.kind != "control":
                self._act(part, before, after, bare, math.prod(lrs[:place]), lrs)
            else:
                seen = dict(self.update)
                if isinstance(part, Norm):
                    for name in self.live:
                        self.update[name] = self.update[name] + self._control(part, name) * self.params[name]
                else:
                    self._decay(part)
                for name in self.live:
                    pull = rest * (self.update[name] - seen[name])
                    before[name] = before[name] - pull
                    after[name] = after[name] - pull
        for name in self.live:
            self.params[name] = after[name]

    def _control(self, part: Norm, name: str) -> Tensor:
        now = norm(self.params[name], part.scope)
        radius = self.kept.setdefault((id(part), name), {"radius": now})["radius"]
        return part.get("weight_decay") * (1 - part.get("ratio", 1.0) * radius / now)

    def _act(self, part: Norm, before, after, bare, at, lrs) -> None:
        def of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
            if part.scope != "group":
                return norm(tensors[name], part.scope)
            group = next(group for group in self.groups if name in group)
            whole = [tensors.get(one, self.params[one]) for one in group]
            return torch.sqrt(sum(one.square().sum() for one in whole))

        if part.kind == "ball":
            zeros = {name: torch.zeros_like(p) for name, p in self.params.items()} | bare
            # One radius of a group, from its first step on, whichever of its parameters rest then.
            cells = {
                name: next(i for i, group in enumerate(self.groups) if name in group) if part.scope == "group" else name
                for name in self.live
            }
            radii = {
                name: self.kept.setdefault((id(part), cells[name]), {"radius": of(self.params, name)})["radius"]
                for name in self.live
            }
            scales = {name: radii[name] / (at * of(zeros, name)) for name in self.live}
            for name in self.live:
                after[name] = after[name] + (1 - scales[name]) * math.prod(lrs) * bare[name]
            gains = {name: radii[name] / of(after, name) for name in self.live}
        else:
            gains = {name: self._gain(part, name, of(before, name), of(after, name)) for name in self.live}
        for name in self.live:
            after[name] = gains[name] * after[name]

    def _gain(self, part: Norm, name: str, before: Tensor, after: Tensor) -> Tensor:
        if part.kind == "brake":
            outward, inward = part.get("outward", 0.5), part.get("inward", 1.0)
            return (before + torch.where(after > before, outward, inward) * (after - before)) / after
        p = self.params[name]
        n = p.shape[-2:].numel() if part.scope == "matrix" and p.dim() > 2 else p.numel()
        kept = self.kept.setdefault((id(part), name), {"steps": 0, "λ": torch.zeros_like(after)})
        square, bound = after**2 / n, part.get("bound")
        if bound == "initial" and part.get("after", 0) == 0:
            kept.setdefault("κ", part.get("factor", 1.0) * norm(p, part.scope) ** 2 / n)
        elif not isinstance(bound, str):
            kept["κ"] = torch.full_like(after, bound)
        kappa = kept.get("κ", torch.full_like(after, torch.nan))
        grown = (kept["λ"] + part.get("rate", 1.0) * (square - kappa)).clamp(0, 0.5)
        kept["λ"] = torch.where(kappa.isnan(), kept["λ"], grown)
        gain = torch.where(kappa.isnan(), 1.0, 1 - 2 * kept["λ"])
        kept["steps"] += 1
        t = kept["steps"]
        if bound == "initial" and t == part.get("after", 0):
            kept["κ"] = part.get("factor", 1.0) * square
        if bound == "inflection":
            every, s = part.get("every", 200), part.get("smoothing", 0.99)
            kept["mean"] = after if t < every else s * kept.get("mean", torch.zeros_like(after)) + (1 - s) * after
            if t % every == 0:
                slope = (kept["mean"] - kept.get("last", torch.zeros_like(after))) / kept["mean"]
                if t >= 4 * every:
                    found = (slope > 0.01) & (slope < kept["slope"]) & kappa.isnan()
                    kept["κ"] = torch.where(found, square, kappa)
                kept["last"], kept["slope"] = kept["mean"], slope
        return gain
