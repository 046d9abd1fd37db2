"""RelativeWeightDecay: decay relative to a metric of the whole model, or to a ratio of two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, plain_number
from ..metrics.metric import SCOPES, SOURCES, Measure, MetricName, Scope, Source, parse_metric
from .base import Rule, Target


class RelativeWeightDecay(Rule):
    """Decay in proportion to a metric over the whole model:  u ← u + c·sign(p)·|p|^(ord−1),  c = λ·M(x).

    With a ratio, a power and a running mean:  c = λ·(M(norm_input)/M(per))^power,  c̄ ← s·c̄ + (1−s)·c from c̄ = 0; c̄ decays.

    M is `metric` over all elements x of `norm_input`, each counted once however the model is sharded; the same on every
    rank, from one all-reduce. Accumulated in float64; the coefficient is rounded once, to float32.
    weight_decay: λ ≥ 0, float or 0-d tensor, per step; scaled by the learning rate if `LR` stands behind the rule.
    ord: ≥ 1, as in `WeightDecay`. target: as in `WeightDecay`.
    norm_input: "update" (the update at this place of the chain), "grad" (the gradient as the step began, or as a
        target="grad" transform left it), "params", or "second_moment" (v̂, the running mean of g² that Adam and its like
        keep as `exp_avg_sq`: after this step's gradient, bias-corrected, under amsgrad the largest so far). A missing
        gradient counts as zeros; v̂ of a parameter without one stays as it is.
    metric: "mad" (mean |x|), "std", "var", "sum", "rms", "l0", "l1", "l2", "l3", "l4", "linf", or a number p; see
        `global_metric`.
    cautious: decay only where update·p > 0, as `CautiousWeightDecay`.
    scope: one metric over "all" parameters of the optimizer, one per param "group", one per "tensor", or one per "matrix":
        the last two dimensions of a parameter, so stacked experts [E, m, n] have E. The cost is one all-reduce in any case.
    per: what the metric is divided by: the same metric of another input, or None for 1. Where it is 0, c is 0.
    power: a finite number. Where a power < 0 would divide by 0, c is 0.
    smoothing: s in [0, 1), the weight of the running mean c̄ (one for each number of `scope`), which lies in the
        optimizer's state and in checkpoints as "distwd_RelativeWeightDecay_mean". 0 keeps nothing.
    All but `target` are keys of the param groups. Parameters: any float dtype and sharding.
    Raises ValueError for any value not named here, for a fractional power of a "sum", which may be negative, and for
    "second_moment" where no optimizer that keeps it stands before the rule.
    Source: torchzero's `RelativeWeightDecay`; AWD (arXiv 2210.00094) for `per` and `smoothing`, SWD (arXiv 2011.11152) for
    `power` and "second_moment".

    >>> import torch
    >>> from distwd import LR, Chain, RelativeWeightDecay
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0])); w.grad = torch.tensor([3.0, -5.0])
    >>> chain = Chain([w], RelativeWeightDecay(0.1, norm_input="grad"), LR(0.5))
    >>> chain.step()
    >>> chain.stats()["RelativeWeightDecay"]
    {'metric': tensor(4.), 'coefficient': tensor(0.4000), 'coefficients': {0: tensor(0.4000)}}
    """

    # Groups that differ in `ord` or `cautious` alone share one coefficient, and `stats` shows one.
    coefficient_settings = frozenset({"weight_decay", "power"})
    measured_as = "×"
    silent: ClassVar[Mapping[str, Any]] = {"per": None, "power": 1.0, "smoothing": 0.0}

    def __init__(
        self,
        weight_decay: float | Tensor = 0.1,
        ord: float = 2,
        norm_input: Source = "update",
        metric: MetricName | float = "mad",
        target: Target = "update",
        *,
        cautious: bool = False,
        scope: Scope = "all",
        per: Source | None = None,
        power: float = 1.0,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            target=target,
            weight_decay=weight_decay,
            ord=ord,
            norm_input=norm_input,
            metric=metric,
            cautious=cautious,
            scope=scope,
            per=per,
            power=power,
            smoothing=smoothing,
        )

    def check(self, settings: Mapping[str, Any]) -> None:
        super().check(settings)
        check_choice("norm_input", settings["norm_input"], SOURCES)
        parse_metric(settings["metric"])
        check_choice("scope", settings["scope"], SCOPES)
        if not isinstance(settings["cautious"], bool):
            raise ValueError(f"cautious={settings['cautious']!r} must be True or False")
        if settings["per"] is not None:
            check_choice("per", settings["per"], SOURCES)
        power, smoothing = plain_number(settings["power"]), plain_number(settings["smoothing"])
        for name, value in (("power", power), ("smoothing", smoothing)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} is not usable: it must be a finite number")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing!r} must be >= 0 and < 1: the share of the running mean that stays")
        if settings["metric"] == "sum" and not float(power).is_integer():
            raise ValueError(f"a sum may be negative, and then power={power!r} of it is no number; use another metric")

    def measures(self, settings: Mapping[str, Any]) -> Mapping[str, Measure]:
        asks = {"metric": settings["norm_input"], "per": settings["per"]}
        return {name: Measure(of, settings["metric"], settings["scope"]) for name, of in asks.items() if of is not None}

    def keeps(self, settings: Mapping[str, Any]) -> Mapping[str, float | Measure]:
        return {"mean": 0.0} if settings["smoothing"] else {}

    def coefficient(
        self, settings: Mapping[str, Any], measured: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> Any:
        decay, power, smoothing = (settings[name] for name in ("weight_decay", "power", "smoothing"))
        metric, per = measured["metric"], measured.get("per")
        ratio = metric if per is None else metric / per
        # NaN ** 0 would be 1. What is no number stays none.
        powered = ratio if power == 1 else torch.where(ratio.isnan(), ratio, ratio**power)
        # By selection where it would be a division by 0.
        if per is not None:
            powered = torch.where(per == 0, 0.0 * metric, powered)
        if power < 0:
            powered = torch.where(ratio == 0, 0.0, powered)
        value = decay * powered
        if not kept:
            return value
        # λ = 0 is off for the mean too: it goes on from zeros, were the metric infinite, since 0·inf would stay in it.
        is_off = torch.zeros_like(value) + decay == 0
        mean = smoothing * kept["mean"] + (1 - smoothing) * torch.where(is_off, 0.0, value)
        return mean, {"mean": mean}

    def rate_words(self, settings: Mapping[str, Any]) -> list[str]:
        if settings["per"] is None and settings["power"] == 1:
            words = super().rate_words(settings)
        else:
            asks = self.measures(settings).values()
            ratio = " / ".join(f"{ask.parsed.name} of {ask.of}" for ask in asks)
            by = "" if settings["scope"] == "all" else f" by {settings['scope']}"
            power = "" if settings["power"] == 1 else f"^{settings['power']:g}"
            words = [f"{self.measured_as} ({ratio}){power}{by}"]
        return words + ([f"smoothed {settings['smoothing']:g}"] if settings["smoothing"] else [])
