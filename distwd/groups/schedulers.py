"""Schedules of weight decay, in the manner of torch.optim.lr_scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_nonnegative
from .scheduler import Values, WeightDecayScheduler, check_count, of_group

FORMS = ("corrected", "independent")


class LambdaWeightDecay(WeightDecayScheduler):
    """Weight decay by a function:  λ_t = λ₀·f(t).

    optimizer: any with `weight_decay` in its groups, a `Chain`, or one that `attach` gave decay to.
    wd_lambda: f, from the number of steps so far (0 at first) to a factor ≥ 0; or a list of them, one per param group.
    last_epoch: the last step done, −1 for none; as in torch.optim.lr_scheduler, other values need loaded groups.
    keys: which group keys to drive; default all of `weight_decay`, `weight_decay_1`, ..., `distwd_weight_decay`, ....
    λ₀ is the group's value at first (kept as `initial_weight_decay`); a group of λ₀ = 0 stays as it is. A tensor λ is filled in
    place. One scheduler per key: each writes λ, the last wins. Raises ValueError for a λ_t < 0, TypeError for no optimizer.
    Source: torch.optim.lr_scheduler.LambdaLR.

    >>> import torch
    >>> from distwd import LambdaWeightDecay
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], weight_decay=0.5)
    >>> scheduler = LambdaWeightDecay(optimizer, lambda t: 1 / (1 + t))
    >>> optimizer.step(); scheduler.step()
    >>> scheduler.get_last_wd()
    [0.25]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        wd_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
        *,
        keys: Sequence[str] | None = None,
    ) -> None:
        self.wd_lambda = wd_lambda
        super().__init__(optimizer, last_epoch, keys)

    def _value(self, epoch: int, index: int, base: float) -> float | Tensor:
        function = self.wd_lambda if callable(self.wd_lambda) else of_group("wd_lambda", self.wd_lambda, index)
        factor: float = function(epoch)
        return base * factor


class LinearWeightDecay(WeightDecayScheduler):
    """Weight decay on a line:  λ_t = λ₀·(s + (e − s)·min(t, T)/T).

    start_factor, end_factor: s and e, ≥ 0 (0 too: a warm-up of the decay). total_iters: T ≥ 1, in calls of `step`.
    optimizer, last_epoch, keys, and errors as `LambdaWeightDecay`; arguments as torch.optim.lr_scheduler.LinearLR, the source.

    >>> import torch
    >>> from distwd import LinearWeightDecay
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], weight_decay=0.5)
    >>> scheduler = LinearWeightDecay(optimizer, start_factor=0.0, end_factor=1.0, total_iters=4)
    >>> optimizer.step(); scheduler.step()
    >>> scheduler.get_last_wd()
    [0.125]
    """

    _settings = ("start_factor", "end_factor", "total_iters")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
        *,
        keys: Sequence[str] | None = None,
    ) -> None:
        check_nonnegative("start_factor", start_factor)
        check_nonnegative("end_factor", end_factor)
        check_count("total_iters", total_iters, 1)
        self.start_factor, self.end_factor, self.total_iters = start_factor, end_factor, total_iters
        super().__init__(optimizer, last_epoch, keys)

    def _value(self, epoch: int, index: int, base: float) -> float | Tensor:
        done = min(epoch, self.total_iters) / self.total_iters
        return base * ((1 - done) * self.start_factor + done * self.end_factor)


class CosineWeightDecay(WeightDecayScheduler):
    """Weight decay on half a cosine, down or up:  λ_t = λ_end + (λ₀ − λ_end)·(1 + cos(π·(t − W)/T))/2, after a warm-up λ₀·t/W.

    T_max: T ≥ 1, in calls of `step`, not counting the warm-up. warmup_iters: W ≥ 0.
    wd_min: λ_end ≥ 0, as eta_min an absolute value; above λ₀ the decay goes up, as DINO's from 0.04 to 0.4. From t = W + T on it stays
        there (torch's CosineAnnealingLR would go back). A group of λ₀ = 0 (norms and biases) stays at 0.
    optimizer, last_epoch, keys, and errors as `LambdaWeightDecay`; arguments as torch.optim.lr_scheduler.CosineAnnealingLR.
    Source: DINO (arXiv 2104.14294); Megatron-LM's --weight-decay-incr-style cosine.

    >>> import torch
    >>> from distwd import CosineWeightDecay
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], weight_decay=0.04)
    >>> scheduler = CosineWeightDecay(optimizer, T_max=2, wd_min=0.4)
    >>> optimizer.step(); scheduler.step()
    >>> scheduler.get_last_wd()
    [0.22]
    """

    _settings = ("T_max", "wd_min", "warmup_iters")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        T_max: int,
        wd_min: float = 0.0,
        last_epoch: int = -1,
        *,
        warmup_iters: int = 0,
        keys: Sequence[str] | None = None,
    ) -> None:
        check_count("T_max", T_max, 1)
        check_count("warmup_iters", warmup_iters, 0)
        check_nonnegative("wd_min", wd_min)
        self.T_max, self.wd_min, self.warmup_iters = T_max, wd_min, warmup_iters
        super().__init__(optimizer, last_epoch, keys)

    def _value(self, epoch: int, index: int, base: float) -> float | Tensor:
        if epoch < self.warmup_iters:
            return base * epoch / self.warmup_iters
        done = min(epoch - self.warmup_iters, self.T_max) / self.T_max
        left = (1 + math.cos(math.pi * done)) / 2
        return left * base + (1 - left) * self.wd_min


class CorrectedWeightDecay(WeightDecayScheduler):
    """Weight decay tied to the learning rate:  λ_t = λ₀·η_t/η_max ("corrected") or λ₀/η_max ("independent").

    What a step then takes off, by where the rule stands:
        scaled by η (AdamW; between optimizer and `LR`; coupling="lr"): corrected (η²/η_max)·λ₀θ, AdamC; independent (η/η_max)·λ₀θ.
        not scaled (behind `LR`; coupling="none"): corrected (η/η_max)·λ₀θ, which is the independent decay there.
    lr_max: η_max > 0, a number or one per param group; default the largest lr seen so far, per group, saved and restored. A warm-up
        then has η/η_max = 1 up to its peak; give the peak if the decay is to be warmed up with it.
    form: "corrected" or "independent". With lr_max=1, "corrected" is λ₀·η, and AdamW's step takes off η²·λ₀θ (PaLM).
    Make it after the lr scheduler, and step it after it: it reads η as it then is, the next step's. A tensor lr beside a number λ is
    read at every step (a synchronisation); beside a tensor λ it is not. While η_max is 0, λ is 0.
    optimizer, last_epoch, keys, and errors as `LambdaWeightDecay`; also ValueError for groups without "lr".
    Source: Defazio, arXiv 2506.02285 (AdamC); Loshchilov & Hutter, arXiv 1711.05101, and Wortsman et al., arXiv 2309.14322.

    >>> import torch
    >>> from distwd import CorrectedWeightDecay
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1, weight_decay=0.5)
    >>> lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    >>> scheduler = CorrectedWeightDecay(optimizer)
    >>> optimizer.step(); lr_scheduler.step(); scheduler.step()
    >>> scheduler.get_last_wd()
    [0.25]
    """

    _settings = ("form", "lr_max", "peaks")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_max: float | Sequence[float] | None = None,
        last_epoch: int = -1,
        *,
        form: str = "corrected",
        keys: Sequence[str] | None = None,
    ) -> None:
        check_choice("form", form, FORMS)
        for peak in lr_max if isinstance(lr_max, Sequence) else [] if lr_max is None else [lr_max]:
            _check_peak(peak)
        self.form, self.lr_max = form, list(lr_max) if isinstance(lr_max, Sequence) else lr_max
        self.peaks: list[Any] = []
        super().__init__(optimizer, last_epoch, keys)

    def state_dict(self) -> dict[str, Any]:
        """As of every scheduler, with η_max of each group."""
        return {**super().state_dict(), "peaks": [float(peak) for peak in self.peaks]}

    def _values(self, epoch: int) -> Values:
        self.peaks = [self._peak(index, group) for index, group in enumerate(self.optimizer.param_groups)]
        return super()._values(epoch)

    def _peak(self, index: int, group: Mapping[str, Any]) -> Any:
        if "lr" not in group:
            raise ValueError(f"param_groups[{index}] has no 'lr' to tie its weight decay to; use another scheduler")
        if self.lr_max is not None:
            return self.lr_max if not isinstance(self.lr_max, list) else of_group("lr_max", self.lr_max, index)
        return _larger(self.peaks[index] if index < len(self.peaks) else 0.0, group["lr"])

    def _value(self, epoch: int, index: int, base: float) -> float | Tensor:
        lr = self.optimizer.param_groups[index]["lr"] if self.form == "corrected" else 1.0
        share: float | Tensor = _share(lr, self.peaks[index])
        return base * share


def _larger(peak: Any, lr: Any) -> Any:
    if not isinstance(lr, Tensor):
        return max(float(peak), lr)
    return torch.maximum(torch.as_tensor(peak, dtype=lr.dtype, device=lr.device), lr)


def _share(lr: Any, peak: Any) -> Any:
    """lr / peak; 0 for a peak of 0."""
    if isinstance(peak, Tensor):
        return torch.where(peak > 0, lr / peak, 0.0)
    return lr / peak if peak else 0.0


def _check_peak(peak: Any) -> None:
    if isinstance(peak, bool) or not isinstance(peak, (int, float)) or not 0 < peak < math.inf:
        raise ValueError(f"lr_max={peak!r} is not usable: it must be a finite number > 0, or a list of them")
