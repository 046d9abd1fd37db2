"""What a metric is made of: which local sums it needs, and the formula that finishes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checks import check_choice

Statistics = Mapping["Statistic", Tensor]


@dataclass(frozen=True, slots=True)
class Statistic:
    """One number that every rank can compute over its own elements, and that combines over ranks.

    kind: "sum" Σx · "power" Σ|x|^p · "count" number of non-zeros · "max" max|x| · "min" min|x|.
    """

    kind: str
    p: float = 1.0

    @property
    def is_sum(self) -> bool:
        """Whether ranks combine by adding; else by the extremum."""
        return self.kind not in ("max", "min")

    @property
    def identity(self) -> float:
        """What a rank without elements contributes."""
        return math.inf if self.kind == "min" else 0.0

    @property
    def of_zeros(self) -> float | None:
        """What elements that count as zero contribute, where that is not nothing."""
        if self.kind == "min":
            return 0.0
        return math.inf if self.kind == "power" and self.p < 0 else None


SUM, ABS, SQUARE = Statistic("sum"), Statistic("power", 1.0), Statistic("power", 2.0)
COUNT, MAX, MIN = Statistic("count"), Statistic("max"), Statistic("min")


@dataclass(frozen=True, slots=True)
class Metric:
    """A number about all elements x of many tensors; `finish(moments, n)` is its formula, elementwise over cells.

    degree: M(s·x) = s^degree · M(x) for s > 0.
    """

    name: str
    statistics: tuple[Statistic, ...]
    finish: Callable[[Statistics, Tensor], Tensor]
    degree: int = 1

    def __call__(self, statistics: Statistics, n: Tensor) -> Tensor:
        """moments: by kind, [cells]; n: elements in each cell, [cells]. Over no elements every metric is 0."""
        return torch.where(n == 0, 0.0, self.finish(statistics, n))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Metric) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


def _variance(m: Statistics, n: Tensor) -> Tensor:
    # (Σx² − (Σx)²/n) / (n−1) loses |mean/std|² of float64's 2^-53: fp32 stays exact up to a ratio of about 10^4.
    spread = (m[SQUARE] - m[SUM] ** 2 / n).clamp(min=0.0)
    return torch.where(n > 1, spread / (n - 1).clamp(min=1), 0.0 * spread)


_NAMED = {
    "mad": Metric("mad", (ABS,), lambda m, n: m[ABS] / n),
    "std": Metric("std", (SUM, SQUARE), lambda m, n: _variance(m, n).sqrt()),
    "var": Metric("var", (SUM, SQUARE), _variance, degree=2),
    "sum": Metric("sum", (SUM,), lambda m, n: m[SUM]),
    "rms": Metric("rms", (SQUARE,), lambda m, n: (m[SQUARE] / n).sqrt()),
}


def parse_metric(metric: str | float) -> Metric:
    """The Metric that a user's word or number names.

    >>> from distwd.metrics.metric import parse_metric
    >>> parse_metric("l2") == parse_metric(2)
    True

    Raises ValueError for anything else.
    """
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
    """‖x‖_p = (Σ|x|^p)^(1/p); p = 0 counts the non-zeros, ±inf is the largest and the smallest |x|."""
    if p == 0:
        return Metric("l0", (COUNT,), lambda m, n: m[COUNT], degree=0)
    if math.isinf(p):
        extremum = MAX if p > 0 else MIN
        return Metric(f"l{p:g}", (extremum,), lambda m, n: m[extremum])
    statistic = Statistic("power", p)
    name = f"l{int(p) if p.is_integer() else p!r}"
    return Metric(name, (statistic,), lambda m, n: m[statistic].sqrt() if p == 2 else m[statistic] ** (1 / p))


SOURCES = ("update", "grad", "params")
SCOPES = ("all", "group", "tensor")


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric that a rule asks for:  M(x), x all elements of `of`.

    of: "params" (the parameters before the step), "grad" (the gradients as the step began, or as a target="grad"
        transform left them) or "update" (the update at the rule's place).
    metric: as in `global_metric`: "mad", "rms", "l2", a number p, ...
    scope: "all" = one number over all parameters of the optimizer, "group" = one for each param group,
        "tensor" = one for each whole parameter. In any case it costs no more than one all-reduce.

    Every element counts once, however the model is sharded; a missing gradient counts as zeros.
    Raises ValueError for any value not named here.

    >>> from distwd import Measure
    >>> Measure("grad", "l2", scope="all")
    Measure(of='grad', metric='l2', scope='all')
    """

    of: str
    metric: str | float = field(compare=False)
    scope: str = "tensor"
    parsed: Metric = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("of", self.of, SOURCES)
        check_choice("scope", self.scope, SCOPES)
        # "l2" and 2 name one metric, which is then measured once.
        object.__setattr__(self, "parsed", parse_metric(self.metric))
