"""Rules that hold or steer norms: NormControl, a pull; Hyperball, RadialBrake and ConstrainedWeightDecay, which act on the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..checks import check_choice, check_nonnegative, plain_number
from ..metrics.metric import SCOPES, Measure, Scope
from .base import Rule

Settings = Mapping[str, Any]
Numbers = Mapping[str, Tensor]


class NormControl(Rule):
    """Pull each norm to a radius:  u ← u + λ·(1 − ratio·R/‖p‖)·p.

    The coefficient is negative where ‖p‖ < ratio·R, and then p grows. A norm of 0 has coefficient 0.
    weight_decay: λ ≥ 0, float or 0-d tensor, per step; scaled by the learning rate if `LR` stands behind the rule.
    ratio: ≥ 0, of the radius; with 0 the rule is `WeightDecay`.
    radius: R, in units of ‖p‖: a number ≥ 0, or "initial", the norm of the parameter as the first real step begins, which is
        kept in the optimizer's state (`radius`, float32).
    scope: what has one norm: "matrix" (the last two dimensions, so one for each of stacked experts), "tensor", "group" or "all".
    All are keys of the param groups. p: any float dtype and sharding. One all-reduce, shared with other rules.
    Raises ValueError for any value not named here.
    Source: Loshchilov, arXiv 2311.11446 (AdamWN).

    >>> import torch
    >>> from distwd import LR, Chain, NormControl
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -4.0])); w.grad = torch.zeros(2)
    >>> Chain([w], LR(0.1), NormControl(0.1, radius=4.0)).step()
    >>> w.detach()
    tensor([ 2.9400, -3.9200])
    """

    def __init__(
        self,
        weight_decay: float | Tensor,
        ratio: float | Tensor = 1.0,
        *,
        radius: float | Literal["initial"] = "initial",
        scope: Scope = "matrix",
    ) -> None:
        super().__init__(weight_decay=weight_decay, ratio=ratio, radius=radius, scope=scope)

    def check(self, settings: Settings) -> None:
        super().check(settings)
        check_nonnegative("ratio", settings["ratio"])
        check_choice("scope", settings["scope"], SCOPES)
        _check_radius(settings["radius"])

    def measures(self, settings: Settings) -> Mapping[str, Measure]:
        return {"norm": Measure("params", "l2", settings["scope"])}

    def keeps(self, settings: Settings) -> Mapping[str, float | Measure]:
        return {"radius": Measure("params", "l2", settings["scope"])} if settings["radius"] == "initial" else {}

    def coefficient(self, settings: Settings, measured: Numbers, kept: Numbers) -> Any:
        norm, radius = measured["norm"], kept.get("radius", settings["radius"])
        c = torch.where(norm == 0, 0.0, settings["weight_decay"] * (1 - settings["ratio"] * radius / norm))
        return (c, dict(kept)) if kept else c


class Hyperball(Rule):
    """Keep each norm, and turn by the learning rate:  θ ← R·unit(θ₋ − η·R·unit(u)).

    u is the update at the rule's place, between the optimizer and `LR`; η, the learning rate behind it, is an angle. Pulls
    that stand before the rule are part of the step, and pulls behind it are added afterwards. unit(0) is 0.
    radius: R, in units of ‖θ‖: a number > 0 · "initial": the norm as the first real step begins, kept in the optimizer's
        state (`radius`, float32), so nothing drifts · None: off.
    scope: what has one norm: "matrix", as in `NormControl`, "tensor" or "group".
    Both are keys of the param groups. θ: any float dtype and sharding. One all-reduce, shared with other rules.
    Raises ValueError for any value not named here, and for another place; PlanError in the first step, by name, for
    parameters that begin as zeros and would stay so.
    Source: arXiv 2606.16899 (MuonH, AdamH).

    >>> import torch
    >>> from distwd import LR, Chain, Hyperball
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -4.0])); w.grad = torch.tensor([1.0, 2.0])
    >>> Chain([w], Hyperball(), LR(0.1)).step()
    >>> w.detach(), w.norm().detach()
    (tensor([ 2.6479, -4.2413]), tensor(5.))
    """

    off: ClassVar[Mapping[str, Any]] = {"radius": None}
    needs_lr_behind: ClassVar[bool] = True
    nonzero: ClassVar[tuple[str, ...]] = ("radius",)

    def __init__(self, radius: float | Literal["initial"] | None = "initial", *, scope: Scope = "matrix") -> None:
        super().__init__(radius=radius, scope=scope)

    def check(self, settings: Settings) -> None:
        super().check(settings)
        radius = settings["radius"]
        if radius is not None:
            _check_radius(radius)
            if not isinstance(radius, (str, Tensor)) and radius == 0:
                raise ValueError(
                    "radius=0 would make parameters zero, for good; pass a number above 0, or None for off"
                )

    def is_off(self, settings: Settings) -> bool:
        return settings["radius"] is None

    def keeps(self, settings: Settings) -> Mapping[str, float | Measure]:
        return {"radius": Measure("params", "l2", settings["scope"])} if settings["radius"] == "initial" else {}

    def scale(self, settings: Settings, before: Tensor, update: Tensor, kept: Numbers) -> Any:
        # Of an update that is next to nothing it would be infinite in float32, and infinity times 0 is NaN.
        most = torch.finfo(torch.float32).max
        return torch.where(update == 0, 0.0, (kept.get("radius", settings["radius"]) / update).clamp(max=most))

    def gain(self, settings: Settings, before: Tensor, after: Tensor, kept: Numbers) -> Any:
        gain = torch.where(after == 0, 1.0, kept.get("radius", settings["radius"]) / after)
        return (gain, dict(kept)) if kept else gain


class RadialBrake(Rule):
    """Slow down how fast norms change:  ‖θ‖ ← ‖θ₋‖ + s·(‖θ̃‖ − ‖θ₋‖),  the direction is that of θ̃.

    θ̃ is the step as assembled before the rule's place, and θ₋ the parameter after the pulls among that: the brake does not act on
    what decay removes. Pulls behind the rule are added afterwards.
    outward: s where the norm grows, ≥ 0, a number or a 0-d tensor. inward: s where it shrinks. 1 and 1 are off; 0 and 0 keep
        the norm.
    scope: as in `Hyperball`.
    All are keys of the param groups. θ: any float dtype and sharding. One all-reduce, shared with other rules.
    Raises ValueError for any value not named here, and before an optimizer.
    Source: NVIDIA's Emerging-Optimizers.

    >>> import torch
    >>> from distwd import LR, Chain, RadialBrake
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -4.0])); w.grad = torch.tensor([1.0, 2.0])
    >>> Chain([w], RadialBrake(0.5), LR(0.1)).step()
    >>> w.detach()
    tensor([ 2.8705, -4.1572])
    """

    off: ClassVar[Mapping[str, Any]] = {"outward": 1.0, "inward": 1.0}

    def __init__(self, outward: float | Tensor = 0.5, inward: float | Tensor = 1.0, *, scope: Scope = "matrix") -> None:
        super().__init__(outward=outward, inward=inward, scope=scope)

    def check(self, settings: Settings) -> None:
        super().check(settings)
        for name in ("outward", "inward"):
            check_nonnegative(name, settings[name])

    def is_off(self, settings: Settings) -> bool:
        return all(not isinstance(settings[name], Tensor) and settings[name] == 1 for name in ("outward", "inward"))

    def gain(self, settings: Settings, before: Tensor, after: Tensor, kept: Numbers) -> Any:
        growth = after - before
        speed = torch.where(growth > 0, settings["outward"], settings["inward"])
        return torch.where(after == 0, 1.0, (before + speed * growth) / after)


class ConstrainedWeightDecay(Rule):
    """Decay as much as it takes to keep the mean square below a bound:  λ ← min(½, max(0, λ + μ·(mean θ̃² − κ)));  θ ← (1 − 2λ)·θ̃.

    θ̃ is the step as assembled before the rule's place; λ is the new one, kept for each parameter (`multiplier`). The decay is
    not scaled by the learning rate. Pulls behind the rule are added afterwards.
    bound: κ, in units of θ²: a number ≥ 0, for every parameter.
        "initial": factor · mean θ², as the step number `after` of the parameter ends (0: as its first one begins).
        "inflection": mean θ̃² when its growth slows down. Every `every` steps the relative growth of a running mean of ‖θ̃‖
        (`smoothing`) is compared with that before; from the fourth time on, where 0.01 < growth < growth before.
        κ acts from the next step on; until then nothing is written. None: the rule is off.
    factor, rate (μ): ≥ 0. after: a whole number ≥ 0, of steps that count. every: a whole number ≥ 1, of steps. smoothing: in [0, 1).
    scope: what has one mean and one λ, as in `Hyperball`.
    All are keys of the param groups. θ: any float dtype and sharding. One all-reduce, shared with other rules.
    Raises ValueError for any value not named here, and before an optimizer.
    Source: Franke et al., arXiv 2311.09058 (CPR, AdamCPR); there λ is not limited, and beyond ½ flips signs.

    >>> import torch
    >>> from distwd import LR, Chain, ConstrainedWeightDecay
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -4.0])); w.grad = torch.zeros(2)
    >>> Chain([w], ConstrainedWeightDecay(10.0, rate=0.002), LR(0.1)).step()
    >>> w.detach()
    tensor([ 2.9700, -3.9600])
    """

    off: ClassVar[Mapping[str, Any]] = {"bound": None}
    norm_metric = "rms"
    acts_at_lr_zero = True

    def __init__(
        self,
        bound: float | Literal["initial", "inflection"] | None = "inflection",
        *,
        factor: float = 1.0,
        after: int = 0,
        rate: float = 1.0,
        every: int = 200,
        smoothing: float = 0.99,
        scope: Scope = "matrix",
    ) -> None:
        super().__init__(
            bound=bound, factor=factor, after=after, rate=rate, every=every, smoothing=smoothing, scope=scope
        )

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if self.is_off(settings):
            return
        if isinstance(settings["bound"], str):
            check_choice("bound", settings["bound"], ("initial", "inflection"))
        else:
            check_nonnegative("bound", settings["bound"])
        for name in ("factor", "rate"):
            check_nonnegative(name, settings[name])
        # Steps are counted, and a number between two of them would never come: the bound would never be found.
        for name, least in (("after", 0), ("every", 1)):
            num = plain_number(settings[name])
            if isinstance(num, bool) or not isinstance(num, (int, float)) or not num >= least or num % 1 != 0:
                raise ValueError(f"{name}={num!r} must be a whole number of steps, {least} or more")
        smoothing = plain_number(settings["smoothing"])
        if isinstance(smoothing, bool) or not isinstance(smoothing, (int, float)) or not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing!r} must be in [0, 1)")

    def is_off(self, settings: Settings) -> bool:
        return settings["bound"] is None

    def keeps(self, settings: Settings) -> Mapping[str, float | Measure]:
        if self.is_off(settings):
            return {}
        found: dict[str, float | Measure] = {"multiplier": 0.0}
        if settings["bound"] == "initial" and settings["after"] == 0:
            return found | {"start": Measure("params", "rms", settings["scope"])}
        if isinstance(settings["bound"], str):
            found |= {"bound": 0.0, "is_bounded": 0.0, "steps": 0.0}
        if settings["bound"] == "inflection":
            found |= {"mean": 0.0, "mean_before": 0.0, "growth": 0.0}
        return found

    def gain(self, settings: Settings, before: Tensor, after: Tensor, kept: Numbers) -> Any:
        square, new = after.square(), dict(kept)
        bound, is_bounded = settings["bound"], torch.ones_like(after, dtype=torch.bool)
        if "start" in kept:
            bound = settings["factor"] * kept["start"].square()
        elif "bound" in kept:
            bound, is_bounded = kept["bound"], kept["is_bounded"] > 0
        multiplier = (kept["multiplier"] + settings["rate"] * (square - bound)).clamp(0.0, 0.5)
        new["multiplier"] = torch.where(is_bounded, multiplier, kept["multiplier"])
        gain = torch.where(is_bounded, 1 - 2 * new["multiplier"], 1.0)
        if "bound" in kept:
            # What becomes the bound now acts from the next step on.
            steps = new["steps"] = kept["steps"] + 1
            if settings["bound"] == "initial":
                found, is_found = settings["factor"] * square, steps == settings["after"]
            else:
                found, is_found = square, self._search(settings, after, steps, kept, new)
            is_found = is_found & ~is_bounded
            new["bound"] = torch.where(is_found, found, bound)
            new["is_bounded"] = torch.where(is_found, 1.0, kept["is_bounded"])
        return gain, new

    def _search(self, settings: Settings, norm: Tensor, steps: Tensor, kept: Numbers, new: dict[str, Tensor]) -> Tensor:
        """Whether growth has slowed down with this step; moves the running mean and its growth in `new`."""
        every, smoothing = settings["every"], settings["smoothing"]
        # A copy until step `every`, and averaged from there.
        mean = torch.where(steps < every, norm, smoothing * kept["mean"] + (1 - smoothing) * norm)
        # As it will be kept: a growth of next to nothing would differ between shardings in what is rounded away.
        mean = mean.float().to(norm.dtype)
        is_time = steps % every == 0
        growth = torch.where(mean == 0, 0.0, (mean - kept["mean_before"]) / mean)
        new["mean"] = mean
        new["mean_before"] = torch.where(is_time, mean, kept["mean_before"])
        new["growth"] = torch.where(is_time & (steps >= 2 * every), growth, kept["growth"])
        is_slower: Tensor = is_time & (steps >= 4 * every) & (growth > 0.01) & (growth < kept["growth"])
        return is_slower


def _check_radius(radius: Any) -> None:
    if isinstance(radius, str):
        check_choice("radius", radius, ("initial",))
    else:
        check_nonnegative("radius", radius)
