"""Schedules of weight decay, in the manner of torch.optim.lr_scheduler."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..checks import check_choice, check_nonnegative, plain_number

Form = Literal["corrected", "independent", "squared"]
FORMS: tuple[str, ...] = get_args(Form)

_KEY = re.compile(r"(distwd_)?weight_decay(_\d+)?")
_BASE = "initial_"  # as lr_scheduler's "initial_lr"


class WeightDecayScheduler(ABC):
    """What all schedules share: the group keys they set, the base values, `step`, and the saved state.

    A subclass gives the value at an epoch (`_value`), and names the attributes to save (`_settings`). Every value is computed
    from the base value, never from the previous one. So no rounding piles up, and a schedule can leave 0 again. A group whose
    base value is 0 does not decay, and is left alone.

    optimizer: any optimizer with weight decay in its param groups.
    last_epoch: number of the last step, −1 for none.
    keys: the group keys to set; None for all that look like a weight decay.
    Raises TypeError for what is no optimizer, ValueError if no group has a key.
    """

    _settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, optimizer: torch.optim.Optimizer, last_epoch: int, keys: Sequence[str] | None) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"{type(optimizer).__name__} is not an optimizer: it has no param_groups")
        self.optimizer = optimizer
        self.last_epoch = plain_number(last_epoch)
        self._keys = None if keys is None else tuple(keys)
        self._bases: list[dict[str, float]] = []  # base values by param group, by key
        self._last: list[dict[str, Any]] = []  # the values that the last step wrote, likewise
        for key in self._driven() or ["weight_decay"]:
            if not any(key in group for group in optimizer.param_groups):
                raise ValueError(
                    f"{type(optimizer).__name__} has no group with {key!r}; attach a rule, or name its key"
                )
            # In a resumed run the groups hold λ_t. Taken for λ₀ it would be scaled twice.
            if last_epoch >= 0 and any(key in group and _BASE + key not in group for group in optimizer.param_groups):
                raise ValueError(
                    f"param_groups lack {_BASE + key!r}: with last_epoch={last_epoch} the optimizer must be loaded before"
                )
        self.step()

    def step(self) -> None:
        """Write the next value into every group. Call it after `optimizer.step()`, and after the lr schedulers."""
        # Groups may have been added since the last step, and rules attached: note the base values of what is new.
        driven = self._driven()
        for index, group in enumerate(self.optimizer.param_groups):
            if index == len(self._bases):
                self._bases.append({})
            for key in driven:
                if key in group and key not in self._bases[index]:
                    # A loaded group holds the value of the step at which it was saved, and the base value beside it.
                    # float() reads a tensor: once per key, not in every step.
                    base = float(group.get(_BASE + key, group[key]))
                    self._bases[index][key] = group[_BASE + key] = base

        epoch = self.last_epoch + 1
        values: list[dict[str, Any]] = []
        for index, bases in enumerate(self._bases):
            values.append({key: self._value(epoch, index, base) for key, base in bases.items() if base})
        # All values are checked before one is written, so that a refused schedule changes nothing.
        for index, new in enumerate(values):
            for key, value in new.items():
                # A tensor is not checked: that would read it in every step.
                if not isinstance(value, Tensor) and not 0 <= value < math.inf:
                    raise ValueError(
                        f"the schedule gives param_groups[{index}] {key}={value!r}; it must be finite and >= 0"
                    )
        self.last_epoch = epoch
        self._write(values)

    def get_last_wd(self, key: str | None = None) -> list[float | Tensor]:
        """The weight decay that each group has now.

        key: which of several weight decays; default the first.
        Returns a number per group; for a 0-d tensor a copy of it; 0 for a group without the key.
        """
        key = self._driven()[0] if key is None else key
        # Tensors are cloned: the next step fills the group's own in place.
        values = [group.get(key, 0.0) for group in self.optimizer.param_groups]
        return [value.clone() if isinstance(value, Tensor) else value for value in values]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain numbers. Functions are not saved; give them again."""
        # The last values too: those of a function, or of a learning rate, cannot be computed again on loading.
        last = [{key: float(value) for key, value in values.items()} for values in self._last]
        own = {name: getattr(self, name) for name in self._settings}
        # A group that was added since the last step has no base value yet, and gets none by being saved: the next step
        # notes the value that it has then.
        num_new = len(self.optimizer.param_groups) - len(self._bases)
        bases = [dict(bases) for bases in self._bases] + [{} for _ in range(num_new)]
        return {"last_epoch": self.last_epoch, "bases": bases, "last": last, **own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a saved state, and write its values into the groups.

        It may be called before or after the optimizer is loaded.
        state_dict: what `state_dict` returned.
        Raises ValueError, with nothing changed, for the state of another scheduler or of other groups.
        """
        # All checks come before the first assignment, so that a refused state changes nothing.
        missing = {"last_epoch", "bases", "last", *self._settings} - set(state_dict)
        if missing:
            raise ValueError(f"state_dict lacks {sorted(missing)[0]!r}: it is not the state of a {type(self).__name__}")
        saved, held = len(state_dict["bases"]), len(self.optimizer.param_groups)
        if saved != held:
            raise ValueError(f"state_dict is of {saved} param groups, the optimizer has {held}; build the same groups")
        for name in self._settings:
            setattr(self, name, state_dict[name])
        self.last_epoch = state_dict["last_epoch"]
        self._bases = [dict(bases) for bases in state_dict["bases"]]
        self._write([dict(values) for values in state_dict["last"]])

    @abstractmethod
    def _value(self, epoch: int, index: int, base: float) -> float | Tensor:
        """The weight decay of group `index` at `epoch`, whose base value is `base` > 0."""

    def _driven(self) -> list[str]:
        """The keys to set, in the order in which groups have them."""
        if self._keys is not None:
            return list(self._keys)
        # Looked up anew each time: `attach` may add its key after the scheduler is made, and `remove` takes it away.
        found = (key for group in self.optimizer.param_groups for key in group if _KEY.fullmatch(key))
        # Beside a decay that `attach` has added, the optimizer's own is 0. So the attached one comes first.
        return sorted(dict.fromkeys(found), key=lambda key: not key.startswith("distwd_"))

    def _write(self, values: list[dict[str, Any]]) -> None:
        """Write values (by param group, by key) into the groups. A tensor is filled, so that a captured graph sees it."""
        self._last = values
        written: set[int] = set()
        # Not strict: a group may have been added since these values were computed or saved.
        for group, bases, new in zip(self.optimizer.param_groups, self._bases, values, strict=False):
            # A checkpoint from before the schedule brings groups without base values.
            group.update({_BASE + key: base for key, base in bases.items() if key in group})
            for key, value in new.items():
                if key not in group:
                    continue  # the rule was removed since
                old = group[key]
                if not isinstance(old, Tensor):
                    group[key] = float(value)
                    continue
                # torch gives one default tensor to all groups. Filled in place, the last group's value would win.
                if id(old) in written:
                    old = old.clone()
                group[key] = old.copy_(value) if isinstance(value, Tensor) else old.fill_(value)
                written.add(id(old))


class LambdaWeightDecay(WeightDecayScheduler):
    """Weight decay by a function:  λ_t = λ₀·f(t).

    optimizer: any optimizer with `weight_decay` in its groups, a `Chain`, or one that `attach` gave decay to.
    wd_lambda: f, from the number of steps so far (0 at first) to a factor ≥ 0; or a list of them, one per param group.
    last_epoch: the last step done, −1 for none. As in torch.optim.lr_scheduler, other values need loaded groups.
    keys: which group keys to set; default all of `weight_decay`, `weight_decay_1`, ..., `distwd_weight_decay`, ....

    λ₀ is the group's value when the scheduler is made; it is kept as `initial_weight_decay`. A group with λ₀ = 0 stays at 0.
    A λ that is a tensor is filled in place. Use one scheduler per key: each writes λ, and the last one wins.
    Raises ValueError for λ_t < 0, TypeError for what is no optimizer.
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
        function = self.wd_lambda if callable(self.wd_lambda) else _of_group("wd_lambda", self.wd_lambda, index)
        factor: float = function(epoch)
        return base * factor


class LinearWeightDecay(WeightDecayScheduler):
    """Weight decay on a line:  λ_t = λ₀·(s + (e − s)·min(t, T)/T).

    start_factor: s ≥ 0, the factor at first; 0 for a warm-up of the decay.
    end_factor: e ≥ 0, the factor from step T on.
    total_iters: T ≥ 1, in calls of `step`.

    The other arguments, and errors, are those of `LambdaWeightDecay`: optimizer, last_epoch, keys.
    Source: torch.optim.lr_scheduler.LinearLR, with the same arguments.

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
        _check_count("total_iters", total_iters, 1)
        self.start_factor: float = plain_number(start_factor)
        self.end_factor: float = plain_number(end_factor)
        self.total_iters: int = plain_number(total_iters)
        super().__init__(optimizer, last_epoch, keys)

    def _value(self, epoch: int, index: int, base: float) -> float | Tensor:
        done = min(epoch, self.total_iters) / self.total_iters
        # In this form, and not as s + (e − s)·done, both ends are exact.
        return base * ((1 - done) * self.start_factor + done * self.end_factor)


class CosineWeightDecay(WeightDecayScheduler):
    """Weight decay on half a cosine, down or up:  λ_t = λ_end + (λ₀ − λ_end)·(1 + cos(π·(t − W)/T))/2, after a warm-up λ₀·t/W.

    wd_min: λ_end ≥ 0, an absolute value as torch's eta_min. Above λ₀ the decay goes up, as DINO's from 0.04 to 0.4. From
        t = W + T on it stays there (torch's CosineAnnealingLR would go back).
    warmup_iters: W ≥ 0, in calls of `step`.
    T_max: T ≥ 1, in calls of `step`, without the warm-up.

    A group with λ₀ = 0 (norms and biases) stays at 0.
    The other arguments, and errors, are those of `LambdaWeightDecay`: optimizer, last_epoch, keys.
    Source: torch.optim.lr_scheduler.CosineAnnealingLR; DINO (arXiv 2104.14294); Megatron-LM's --weight-decay-incr-style cosine.

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
        _check_count("T_max", T_max, 1)
        _check_count("warmup_iters", warmup_iters, 0)
        check_nonnegative("wd_min", wd_min)
        self.T_max: int = plain_number(T_max)
        self.wd_min: float = plain_number(wd_min)
        self.warmup_iters: int = plain_number(warmup_iters)
        super().__init__(optimizer, last_epoch, keys)

    def _value(self, epoch: int, index: int, base: float) -> float | Tensor:
        if epoch < self.warmup_iters:
            return base * epoch / self.warmup_iters
        done = min(epoch - self.warmup_iters, self.T_max) / self.T_max
        left = (1 + math.cos(math.pi * done)) / 2
        # A weighted sum, so that both ends are exact.
        return left * base + (1 - left) * self.wd_min


class InverseTimeWeightDecay(WeightDecayScheduler):
    """Weight decay that falls with time:  λ_t = λ₀/(1 + t/T).

    timescale: T > 0, in calls of `step`: there λ is half of λ₀.

    The other arguments, and errors, are those of `LambdaWeightDecay`: optimizer, last_epoch, keys.
    Source: ADANA (arXiv 2602.05298); SODA (arXiv 2605.11172), with T = 2.

    >>> import torch
    >>> from distwd import InverseTimeWeightDecay
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], weight_decay=0.5)
    >>> scheduler = InverseTimeWeightDecay(optimizer, timescale=1)
    >>> optimizer.step(); scheduler.step()
    >>> scheduler.get_last_wd()
    [0.25]
    """

    _settings = ("timescale",)

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        timescale: float,
        last_epoch: int = -1,
        *,
        keys: Sequence[str] | None = None,
    ) -> None:
        timescale = plain_number(timescale)
        if isinstance(timescale, bool) or not isinstance(timescale, (int, float)) or not 0 < timescale < math.inf:
            raise ValueError(f"timescale={timescale!r} is not usable: it must be a finite number > 0, in steps")
        self.timescale: float = timescale
        super().__init__(optimizer, last_epoch, keys)

    def _value(self, epoch: int, index: int, base: float) -> float | Tensor:
        return base / (1 + epoch / self.timescale)


class CorrectedWeightDecay(WeightDecayScheduler):
    """Weight decay tied to the learning rate:  λ_t = λ₀·η_t/η_max ("corrected"), λ₀/η_max ("independent") or λ₀·η_t ("squared").

    What a step then removes depends on where the rule stands:
        scaled by η (AdamW; between optimizer and `LR`; coupling="lr"): corrected (η²/η_max)·λ₀θ, as AdamC;
        independent (η/η_max)·λ₀θ; squared η²·λ₀θ, as PaLM with λ₀ = 1.
        not scaled by η (behind `LR`; coupling="none"): corrected (η/η_max)·λ₀θ, which is the independent decay there;
        squared η·λ₀θ.

    lr_max: η_max > 0, a number or one per param group. Default: the largest lr so far, per group, saved and restored. In a
        warm-up η/η_max is then 1 up to the peak; give the peak if the decay shall be warmed up with the lr.
        "squared" knows no η_max.
    form: "corrected", "independent" or "squared".

    Make it after the lr scheduler, and step it after it: it reads η as it is then, which is the next step's. If λ is a number
    and lr a tensor, the lr is read in every step (a synchronisation); if λ is a tensor, nothing is read. While η_max is 0,
    λ is 0.
    The other arguments, and errors, are those of `LambdaWeightDecay`: optimizer, last_epoch, keys. ValueError also for groups
    without "lr", and for lr_max with form="squared".
    Source: Defazio, arXiv 2506.02285 (AdamC); Loshchilov & Hutter, arXiv 1711.05101, and Wortsman et al., arXiv 2309.14322;
    Chowdhery et al., arXiv 2204.02311 (PaLM).

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
        form: Form = "corrected",
        keys: Sequence[str] | None = None,
    ) -> None:
        check_choice("form", form, FORMS)
        if form == "squared" and lr_max is not None:
            raise ValueError(
                f"form='squared' is λ₀·lr and knows no lr_max={lr_max!r}; leave it out, or use 'corrected'"
            )
        is_list = isinstance(lr_max, Sequence)
        peaks = [plain_number(peak) for peak in (lr_max if isinstance(lr_max, Sequence) else [lr_max])]
        for peak in [] if lr_max is None else peaks:
            if isinstance(peak, bool) or not isinstance(peak, (int, float)) or not 0 < peak < math.inf:
                raise ValueError(f"lr_max={peak!r} is not usable: it must be a finite number > 0, or a list of them")
        self.form, self.lr_max = form, peaks if is_list else peaks[0]
        self.peaks: list[Any] = []  # η_max of each group
        super().__init__(optimizer, last_epoch, keys)

    def step(self) -> None:
        """As every schedule; before, note the largest learning rate that each group has had."""
        # For every group, not only those that decay: the saved state has a peak per group.
        peaks: list[Any] = []
        for index, group in enumerate(self.optimizer.param_groups):
            if "lr" not in group:
                raise ValueError(f"param_groups[{index}] has no 'lr' to tie its weight decay to; use another scheduler")
            lr, peak = group["lr"], self.peaks[index] if index < len(self.peaks) else 0.0
            if self.lr_max is not None:
                peak = _of_group("lr_max", self.lr_max, index) if isinstance(self.lr_max, list) else self.lr_max
            elif isinstance(lr, Tensor):
                # max() would read the tensor.
                peak = torch.maximum(torch.as_tensor(peak, dtype=lr.dtype, device=lr.device), lr)
            else:
                peak = max(float(peak), float(lr))
            peaks.append(peak)
        self.peaks = peaks
        super().step()

    def state_dict(self) -> dict[str, Any]:
        """As every schedule, with η_max of each group."""
        return {**super().state_dict(), "peaks": [float(peak) for peak in self.peaks]}

    def _value(self, epoch: int, index: int, base: float) -> float | Tensor:
        lr: Any = 1.0 if self.form == "independent" else self.optimizer.param_groups[index]["lr"]
        peak: Any = 1.0 if self.form == "squared" else self.peaks[index]
        # At the start of a warm-up from 0 the largest lr is 0, and lr/peak is 0/0: no decay then.
        if isinstance(peak, Tensor):
            return base * torch.where(peak > 0, lr / peak, 0.0)
        share: float = lr / peak if peak else 0.0
        return base * share


def _of_group(name: str, values: Sequence[Any], index: int) -> Any:
    """The entry for group `index` of a list that has one per param group."""
    if index >= len(values):
        raise ValueError(
            f"{name} has {len(values)} entries, and there is a param_groups[{index}]; give one for each group"
        )
    return values[index]


def _check_count(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is a whole number, at least `least`."""
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not usable: it must be a whole number >= {least}")
