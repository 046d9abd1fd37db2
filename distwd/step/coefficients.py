"""The numbers of a chain: measured by phases, turned into coefficients, kept for `stats()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.formulas import Rate
from ..kernels.sums import wide_dtype
from ..metrics.measure import Request, Slots, measure
from ..metrics.plan import Plan
from ..rules.base import Measure
from .phases import Phase
from .step import Batch, Step
from .transform import BoundTransform


@dataclass(frozen=True, slots=True)
class Measured:
    """What a rule was told for one param group: metric and coefficient = λ·metric, [cells] each, of `need`."""

    need: Measure
    metric: Tensor
    coefficient: Tensor


class Coefficients:
    """Measures what rules need, once per phase, and turns it into rates.

    coefficient = λ · metric in float64, rounded once to float32. The rounding is what makes it the same number on any sharding:
    float64 sums differ between shardings, if at all, far below the last bit of float32.
    """

    def __init__(self, plan: Callable[[], Plan]) -> None:
        self._plan = plan
        self._kept_slots: Slots | None = None
        self._readings: dict[str, dict[int, Measured]] = {}

    def measure(self, phase: Phase, step: Step, bound_transforms: Sequence[BoundTransform]) -> None:
        """Take all numbers of a phase, with one reduction."""
        plan = self._plan()
        needs = list(dict.fromkeys(need for _, need in phase.asks))
        sources = {of: step.source(of) for of in dict.fromkeys(need.of for need in needs)}
        requests = [Request(need.metric, sources[need.of], need.scope) for need in needs]
        measured = measure(plan, requests, slots=self._slots(), workspace=step.workspace)
        numbers = dict(zip(needs, measured, strict=True))
        if step.grad_scale is not None:
            numbers = {need: _unscaled(number, need, step.grad_scale) for need, number in numbers.items()}
        asked = {index for index, _ in phase.asks}
        for bound in bound_transforms:
            if bound.index in asked:
                # Groups that are not in play keep the numbers of their own last step.
                kept = {i: old for i, old in self._readings.get(bound.label, {}).items() if i not in step.in_play}
                kept = kept if len(step.in_play) < len(step.groups) else {}
                self._readings[bound.label] = kept | _read(bound, step, numbers)

    def rate(self, bound: BoundTransform, batch: Batch, settings: Mapping[str, Any]) -> Rate:
        """λ for an absolute rule; for a relative one the coefficient, as a tensor: one number, or one by parameter."""
        readings = self._readings.get(bound.label, {})
        if batch.group_index not in readings:
            decay: Rate = settings["weight_decay"]
            return decay
        reading = readings[batch.group_index]
        coefficient = reading.coefficient.to(wide_dtype(reading.coefficient.device))
        if reading.need.scope == "tensor":
            return coefficient[self._slots().index(batch.index, coefficient.device)]
        return coefficient[batch.group_index if reading.need.scope == "group" else 0]

    def _slots(self) -> Slots:
        """Kept as long as the plan holds: making them takes a walk over all parameters."""
        plan = self._plan()
        if self._kept_slots is None or self._kept_slots.plan is not plan:
            self._kept_slots = Slots(plan)
        return self._kept_slots

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is measured within leaves no trace in `stats`."""
        kept = dict(self._readings)
        yield
        self._readings = kept

    def stats(self) -> dict[str, dict[str, Any]]:
        """By rule: the last metric and coefficient; see `Chain.stats`."""
        return {
            label: {key: self._table(readings, key) for key in ("metric", "coefficient")}
            for label, readings in self._readings.items()
        }

    def _table(self, readings: Mapping[int, Measured], key: str) -> Any:
        plan = self._plan()
        told: dict[Any, Tensor] = {}
        for index, reading in readings.items():
            values = getattr(reading, key).to(plan.result_dtype if key == "metric" else torch.float32)
            if reading.need.scope == "tensor":
                told.update(
                    {
                        e.name: values[cell]
                        for e, cell in zip(plan.entries, plan.name_ids, strict=True)
                        if e.group == index
                    }
                )
            else:
                told[index] = values[index if reading.need.scope == "group" else 0]
        one = len({id(getattr(reading, key)) for reading in readings.values()}) == 1
        return told[0] if one and readings[0].need.scope == "all" else told


def _read(bound: BoundTransform, step: Step, numbers: Mapping[Measure, Tensor]) -> dict[int, Measured]:
    """By param group in play; groups with equal settings share one reading."""
    shared: dict[Any, Measured] = {}
    readings = {}
    for index in sorted(step.in_play):
        settings = bound.settings(step.groups[index])
        need, decay = bound.transform.need(settings), settings["weight_decay"]  # type: ignore[attr-defined]
        key = (need, id(decay) if isinstance(decay, Tensor) else decay)
        if key not in shared:
            metric = numbers[need]
            shared[key] = Measured(need, metric, (metric * _on(decay, metric)).to(torch.float32))
        readings[index] = shared[key]
    return readings


def _unscaled(number: Tensor, need: Measure, grad_scale: Tensor) -> Tensor:
    """A metric of gradients that a GradScaler has multiplied by `grad_scale`, as if it had not."""
    scaled = need.of != "params" and need.metric.degree
    return number / grad_scale.to(number.device, number.dtype) ** need.metric.degree if scaled else number


def _on(decay: float | Tensor, like: Tensor) -> float | Tensor:
    return decay.to(like.device, like.dtype) if isinstance(decay, Tensor) else decay
