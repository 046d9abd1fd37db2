"""RelativeWeightDecay: decay relative to a metric of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..checks import check_choice
from ..metrics.metric import SCOPES, SOURCES, Measure, parse_metric
from .base import Rule


class RelativeWeightDecay(Rule):
    """Decay in proportion to a number about the whole model:  u ← u + λ·M(x)·sign(p)·|p|^(ord−1).

    M is `metric` over all elements x of `norm_input`, each counted once however the model is sharded; the same on every
    rank, from one all-reduce. Accumulated in float64; λ·M is rounded once, to float32.
    weight_decay: λ ≥ 0, float or 0-d tensor, per step; scaled by the learning rate if `LR` stands behind the rule.
    ord: ≥ 1, as in `WeightDecay`. target: as in `WeightDecay`.
    norm_input: "update" (the update at this place of the chain), "grad" (the gradient as the step began, or as a
        target="grad" transform left it) or "params". A missing gradient counts as zeros.
    metric: "mad" (mean |x|), "std", "var", "sum", "rms", "l0", "l1", "l2", "l3", "l4", "linf", or a number p; see
        `global_metric`.
    cautious: decay only where update·p > 0, as `CautiousWeightDecay`.
    scope: one number over "all" parameters of the optimizer, one per param "group", or one per "tensor"; the cost is one
        all-reduce in any case.
    All but `target` are keys of the param groups. Parameters: any float dtype and sharding.
    Raises ValueError for any value not named here.
    Source: torchzero's `RelativeWeightDecay`.

    >>> import torch
    >>> from distwd import LR, Chain, RelativeWeightDecay
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0])); w.grad = torch.tensor([3.0, -5.0])
    >>> chain = Chain([w], RelativeWeightDecay(0.1, norm_input="grad"), LR(0.5))
    >>> chain.step()
    >>> chain.stats()["RelativeWeightDecay"]
    {'metric': tensor(4.), 'coefficient': tensor(0.4000)}
    """

    # Groups that differ in `ord` or `cautious` alone share one coefficient, and `stats` shows one.
    coefficient_settings = frozenset({"weight_decay"})
    measured_as = "×"

    def __init__(
        self,
        weight_decay: float | Tensor = 0.1,
        ord: float = 2,
        norm_input: str = "update",
        metric: str | float = "mad",
        target: str = "update",
        *,
        cautious: bool = False,
        scope: str = "all",
    ) -> None:
        super().__init__(
            target=target,
            weight_decay=weight_decay,
            ord=ord,
            norm_input=norm_input,
            metric=metric,
            cautious=cautious,
            scope=scope,
        )

    def check(self, settings: Mapping[str, Any]) -> None:
        super().check(settings)
        check_choice("norm_input", settings["norm_input"], SOURCES)
        parse_metric(settings["metric"])
        check_choice("scope", settings["scope"], SCOPES)
        if not isinstance(settings["cautious"], bool):
            raise ValueError(f"cautious={settings['cautious']!r} must be True or False")

    def measures(self, settings: Mapping[str, Any]) -> Mapping[str, Measure]:
        return {"metric": Measure(settings["norm_input"], settings["metric"], settings["scope"])}

    def coefficient(
        self, settings: Mapping[str, Any], measured: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> Any:
        return settings["weight_decay"] * measured["metric"]
