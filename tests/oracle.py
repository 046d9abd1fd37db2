"""What should come out: every rule as a slow loop in float64 over whole tensors, in one process.

Nothing here knows of distwd, of ranks or of speed. A step is described as a chain of parts
(`Decay`, `AdamPart`, `SgdPart`, `LrPart`), each with the settings of every parameter spelled out by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Values = dict[str, Tensor]


# --- numbers about a list of tensors ------------------------------------------------------------------------------


def metric_of(tensors: Sequence[Tensor], metric: str | float) -> float:
    """The metric of all elements of all tensors as one population, in float64."""
    x = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors]) if tensors else torch.zeros(0).double()
    n = x.numel()
    if n == 0:
        return 0.0
    if metric == "mad":
        return (x.abs().sum() / n).item()
    if metric == "rms":
        return (x.square().sum() / n).sqrt().item()
    if metric == "sum":
        return x.sum().item()
    if metric in ("var", "std"):
        var = (x - x.sum() / n).square().sum() / max(n - 1, 1)  # one element has no spread
        return (var.sqrt() if metric == "std" else var).item()
    return norm_of(x, float(metric[1:]) if isinstance(metric, str) else float(metric))


def norm_of(x: Tensor, p: float) -> float:
    if p == 0:
        return float((x != 0).sum())
    if math.isinf(p):
        return (x.abs().max() if p > 0 else x.abs().min()).item()
    return ((x.abs() ** p).sum() ** (1 / p)).item()


def direction(x: Tensor, ord: float, cap: float | None = None) -> Tensor:
    """sign(x)·min(|x|, cap)^(ord−1), in float64."""
    x = x.double()
    return x.sign() * x.abs().clamp(max=math.inf if cap is None else cap) ** (ord - 1)


def proximal(new: Tensor, old: Tensor, tau: float, ord: float, cap: float | None = None) -> Tensor:
    """The proximal step of length τ from `new`; `old` is the parameter before the step. In the words of family.md."""
    size = new.abs()
    if ord == 1:
        return new.sign() * (size - tau).clamp(min=0)
    if ord != 2:
        return new / (1 + tau * old.abs() ** (ord - 2)) if tau else new
    if cap is None:
        return new / (1 + tau)
    return torch.where(size <= (1 + tau) * cap, new / (1 + tau), new - tau * cap * new.sign())


# --- the parts of a chain ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decay:
    """One decay rule. `metric=None` is an absolute rule; `by_name` overrides any setting for one parameter."""

    weight_decay: float
    ord: float = 2
    target: str = "update"
    metric: str | float | None = None
    norm_input: str = "update"
    cautious: bool = False
    scope: str = "all"
    toward: float | str | Mapping[str, Tensor] = 0.0
    cap: float | None = None
    proximal: bool = False
    inclusive: bool = False
    by_name: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def setting(self, key: str, name: str):
        return self.by_name.get(name, {}).get(key, getattr(self, key))


@dataclass(frozen=True)
class LrPart:
    lr: float
    by_name: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AdamPart:
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class SgdPart:
    momentum: float = 0.9


Part = Decay | LrPart | AdamPart | SgdPart


class Oracle:
    """Trains whole float64 parameters by a chain of parts; keeps metrics and coefficients of the last step.

    groups: the names of each param group, for `scope="group"`; all in one group by default.
    """

    def __init__(self, params: Mapping[str, Tensor], parts: Sequence[Part], groups: Sequence[Sequence[str]] = ()):
        self.params: Values = {name: value.detach().double().clone() for name, value in params.items()}
        self.parts = list(parts)
        self.groups = [list(group) for group in groups] or [list(params)]
        self.num_steps: dict[str, int] = dict.fromkeys(params, 0)
        self.memory: dict[tuple[int, str, str], Tensor] = {}
        self.coefficients: list[dict[str, float]] = []
        self.initial: Values = {name: value.clone() for name, value in self.params.items()}
        # Proximal decay that waits for the end of the step, with the rate of each parameter so far.
        self.proximal: list[tuple[Decay, dict[str, float]]] = []

    def step(self, grads: Mapping[str, Tensor | None]) -> None:
        self.grads: Values = {name: g.detach().double().clone() for name, g in grads.items() if g is not None}
        self.live = [name for name in self.params if name in self.grads]
        self.coefficients = []
        self.update: Values = {}
        for name in self.live:
            self.num_steps[name] += 1
        # What adds to the gradient inside the closure does so before anything else looks.
        for part in self.parts:
            if isinstance(part, Decay) and part.target == "closure":
                self._add(part, self.grads)
        for index, part in enumerate(self.parts):
            self._apply(index, part)
        self._start_update()
        old = dict(self.params)
        for name in self.live:
            self.params[name] = self.params[name] - self.update[name]
            for part, rates in self.proximal:
                ord, cap = part.setting("ord", name), part.setting("cap", name)
                self.params[name] = proximal(self.params[name], old[name], rates[name], ord, cap)
        self.proximal = []

    def _start_update(self) -> None:
        """The update is the gradient until a transform makes it something else; `target="grad"` still edits it."""
        if not self.update:
            self.update = {name: self.grads[name].clone() for name in self.live}

    def _apply(self, index: int, part: Part) -> None:
        if isinstance(part, Decay):
            self._decay(part)
            return
        self._start_update()
        if isinstance(part, LrPart):
            for _, rates in self.proximal:
                rates.update({name: rate * part.by_name.get(name, part.lr) for name, rate in rates.items()})
        for name in self.live:
            if isinstance(part, LrPart):
                self.update[name] = self.update[name] * part.by_name.get(name, part.lr)
            elif isinstance(part, SgdPart):
                self.update[name] = self._sgd(index, part, name)
            else:
                self.update[name] = self._adam(index, part, name)

    def _decay(self, part: Decay) -> None:
        if part.target == "closure":
            return
        if part.target == "grad":
            self._add(part, self.grads)
            return
        if part.target == "update":
            self._start_update()
            if any(part.setting("proximal", name) for name in self.params):
                rates = {n: self._coefficient(part, n) * part.setting("proximal", n) for n in self.params}
                self.proximal.append((part, rates))
            self._add(part, self.update)
            return
        assert part.target == "params_direct", part.target
        minus = {name: torch.zeros_like(self.params[name]) for name in self.live}
        self._add(part, minus)
        for name in self.live:
            self.params[name] = self.params[name] - minus[name]

    def _add(self, part: Decay, onto: Values) -> None:
        """onto += coefficient · mask · d(p), all seen as they are at this place."""
        terms = {}
        coefficients = {name: self._coefficient(part, name) for name in self.params}
        self.coefficients.append(coefficients)
        for name in self.live:
            toward = part.setting("toward", name)
            anchor = self.initial[name] if toward == "initial" else toward
            pulled = self.params[name] - (anchor[name].double() if isinstance(anchor, Mapping) else anchor)
            rate = coefficients[name] * (not part.setting("proximal", name))
            terms[name] = rate * direction(pulled, part.setting("ord", name), part.setting("cap", name))
            if part.setting("cautious", name):
                seen = self.update.get(name, self.grads[name]) if part.target != "closure" else self.grads[name]
                along = seen * pulled
                is_pulled = along >= 0 if part.setting("inclusive", name) else along > 0
                terms[name] = torch.where(is_pulled, terms[name], 0.0)
        for name in self.live:
            onto[name] = onto[name] + terms[name]

    def _coefficient(self, part: Decay, name: str) -> float:
        weight_decay = part.setting("weight_decay", name)
        metric = part.setting("metric", name)
        if metric is None:
            return weight_decay
        return weight_decay * metric_of(self._source(part, name), metric)

    def _source(self, part: Decay, name: str) -> list[Tensor]:
        """The tensors a parameter's metric is taken of. A missing gradient counts as zeros."""
        scope = part.setting("scope", name)
        group = next(group for group in self.groups if name in group)
        names = {"all": list(self.params), "group": group, "tensor": [name]}[scope]
        norm_input = part.setting("norm_input", name)
        if norm_input == "params":
            return [self.params[each] for each in names]
        seen = self.update or self.grads
        if norm_input == "grad" or part.target == "closure":
            seen = self.grads
        return [seen.get(each, torch.zeros_like(self.params[each])) for each in names]

    def _adam(self, index: int, part: AdamPart, name: str) -> Tensor:
        """Kingma & Ba 2014, algorithm 1, with step size one."""
        u, t = self.update[name], self.num_steps[name]
        beta1, beta2 = part.betas
        m = self._remember(index, "m", name, beta1, u)
        v = self._remember(index, "v", name, beta2, u * u)
        return (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + part.eps)

    def _remember(self, index: int, key: str, name: str, beta: float, new: Tensor) -> Tensor:
        old = self.memory.get((index, key, name), torch.zeros_like(new))
        self.memory[index, key, name] = beta * old + (1 - beta) * new
        return self.memory[index, key, name]

    def _sgd(self, index: int, part: SgdPart, name: str) -> Tensor:
        """torch's momentum: b ← μb + u, from b = 0."""
        old = self.memory.get((index, "b", name), torch.zeros_like(self.update[name]))
        self.memory[index, "b", name] = part.momentum * old + self.update[name]
        return self.memory[index, "b", name]
