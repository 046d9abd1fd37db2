"""Metrics: which sums over local elements each needs, and the formula that makes a number of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from ..checks import check_choice, plain_number
from ..kernels.sums import ABS, COUNT, MAX, MIN, RESTING, SQUARE, SUM, Statistic, products_of

# What a metric may be taken of, and over which parameters: as types, for type checkers, and as tuples, for checks.
Source = Literal["update", "grad", "params", "second_moment"]
SOURCES: tuple[str, ...] = get_args(Source)
# From the coarsest to the finest; a "matrix" is the last two dimensions of a tensor.
Scope = Literal["all", "group", "tensor", "matrix"]
SCOPES: tuple[str, ...] = get_args(Scope)
MetricName = Literal["mad", "std", "var", "sum", "rms", "l0", "l1", "l2", "l3", "l4", "linf"]

Statistics = Mapping[Statistic, Tensor]


@dataclass(frozen=True, slots=True)
class Metric:
    """A number about all elements x of many tensors:  M(x) = finish(statistics of x, number of elements).

    name: "l2", "mad", ...; metrics of one name are equal.
    statistics: the sums and extrema that the formula needs.
    finish: the formula, elementwise over slots (all parameters; or each group; each tensor; each matrix).
    """

    name: str
    statistics: tuple[Statistic, ...] = field(compare=False)
    finish: Callable[[Statistics, Tensor], Tensor] = field(compare=False)

    def __call__(self, statistics: Statistics, n: Tensor) -> Tensor:
        """The numbers, [slots] float64; 0 over no elements.

        statistics: [slots] float64 each, over all ranks. n: [slots] float64, elements in each slot over all ranks.
        """
        # The formulas divide by n. A 0/0 is not chosen, so it does no harm.
        return torch.where(n == 0, 0.0, self.finish(statistics, n))


def _variance(m: Statistics, n: Tensor) -> Tensor:
    # var = (Σx² − (Σx)²/n) / (n−1). The difference loses |mean/std|² of float64's 2^-53, so it keeps float32's
    # precision up to a ratio of about 10^4. A second pass over centred values would be exact, and a second collective.
    spread = (m[SQUARE] - m[SUM] ** 2 / n).clamp(min=0.0)
    # Of one element it is 0, as a coefficient can use it; but a NaN stays a NaN.
    return torch.where(n > 1, spread / (n - 1).clamp(min=1), 0.0 * spread)


_NAMED = {
    "mad": Metric("mad", (ABS,), lambda m, n: m[ABS] / n),
    "std": Metric("std", (SUM, SQUARE), lambda m, n: _variance(m, n).sqrt()),
    "var": Metric("var", (SUM, SQUARE), _variance),
    "sum": Metric("sum", (SUM,), lambda m, n: m[SUM]),
    "rms": Metric("rms", (SQUARE,), lambda m, n: (m[SQUARE] / n).sqrt()),
}


def parse_metric(metric: str | float) -> Metric:
    """The metric of a user's name or number.

    metric: "mad", "std", "var", "sum", "rms", "l0", "l1", "l2", "l3", "l4", "linf", or a number p for the p-norm.
    Raises ValueError for anything else.

    >>> from distwd.metrics.metric import parse_metric
    >>> parse_metric("l2") == parse_metric(2)
    True
    """
    metric = plain_number(metric)
    if isinstance(metric, str):
        if metric in _NAMED:
            return _NAMED[metric]
        if metric in ("l0", "l1", "l2", "l3", "l4", "linf"):
            return _norm(float(metric[1:]))
    elif isinstance(metric, (int, float)) and not isinstance(metric, bool) and not math.isnan(metric):
        return _norm(float(metric))
    raise ValueError(
        f"metric={metric!r} is not known; use one of {', '.join(map(repr, _NAMED))}, 'l0', 'l1', 'l2', 'l3', 'l4', "
        "'linf', or a number p for the p-norm"
    )


def _norm(p: float) -> Metric:
    """‖x‖_p = (Σ|x|^p)^(1/p);  p = 0: number of non-zeros;  p = ±inf: the largest and the smallest |x|."""
    if p == 0:
        return Metric("l0", (COUNT,), lambda m, n: m[COUNT])
    if math.isinf(p):
        extremum = MAX if p > 0 else MIN
        return Metric(f"l{p:g}", (extremum,), lambda m, n: m[extremum])
    statistic = Statistic("power", p)
    name = f"l{int(p) if p.is_integer() else p!r}"
    # sqrt is rounded correctly everywhere; a power of 1/2 need not be.
    return Metric(name, (statistic,), lambda m, n: m[statistic].sqrt() if p == 2 else m[statistic] ** (1 / p))


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric that a rule asks for:  metric of the tensors `of`, one per `scope`.

    of: "update", "grad", "params" or "second_moment" (v̂ of Adam and its like), the tensors it is taken of; as
        `norm_input` of `RelativeWeightDecay`.
    metric: a metric's name, or a number p, see `parse_metric`.
    scope: "all" for one number over all parameters, "group" for one per param group, "tensor" for one per parameter,
        "matrix" for one per matrix: the last two dimensions of a parameter, so one for each of stacked experts [E, m, n].
    parsed: the metric itself. Two measures are equal if they ask for the same number, however it is written.
    Raises ValueError for what is none of these.

    >>> from distwd.metrics.metric import Measure
    >>> Measure("grad", 2, scope="all") == Measure("grad", "l2", scope="all")
    True
    """

    of: Source
    metric: MetricName | float = field(compare=False)
    scope: Scope = "tensor"
    parsed: Metric = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("of", self.of, SOURCES)
        check_choice("scope", self.scope, SCOPES)
        object.__setattr__(self, "parsed", parse_metric(self.metric))


@dataclass(frozen=True, slots=True)
class StepProducts:
    """What norm rules ask for: all inner products of θ, the update u and the directions d(θ) of pulls, one set per `scope`.

    With them the norm of any combination of these tensors is known before it is written:  ‖Σ aᵢ·xᵢ‖² = Σ aᵢ·aⱼ·⟨xᵢ, xⱼ⟩.
    It is asked for and reduced as a Measure is, but of no use to users.

    vectors: the names of the directions; the products are numbered as by `products_of`, and behind them come Σθ² of parameters
        that rest, and N.
    scope: as of a Measure.
    """

    vectors: tuple[str, ...]
    scope: str
    of: str = field(init=False, default="step")
    parsed: Metric = field(init=False, repr=False)

    def __post_init__(self) -> None:
        statistics = (*products_of(range(2 + len(self.vectors))), RESTING)
        name = f"products ({', '.join(('params', 'update', *self.vectors))})"

        def finish(m: Statistics, n: Tensor) -> Tensor:
            return torch.stack([*(m[one] for one in statistics), n])  # [products + 2, slots], float64

        object.__setattr__(self, "parsed", Metric(name, statistics, finish))


Ask = Measure | StepProducts
