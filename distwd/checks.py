"""Checks of arguments. Each message names the argument, the reason and what to do."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def plain_number(value: Any) -> Any:
    """A number of another library (numpy's float32, say) as Python's own; anything else as it is.

    It computes with all its digits then, and a checkpoint that holds it is loaded without that library.
    """
    if isinstance(value, (bool, Tensor)) or type(value) in (int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_nonnegative(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a finite number ≥ 0, or a tensor with one such element.

    name: the argument, for the message.
    value: what the user gave. The value of a meta tensor is not checked: it has none. Any other tensor is read, so this is
        for constructors, not for steps.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"{name} must be a number or a 0-d tensor, not a tensor of shape {tuple(value.shape)}; pass one number"
            )
        if value.is_meta:
            return
        value = value.item()
    value = plain_number(value)
    # bool is an int to Python; weight_decay=True is a mistake.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number or a 0-d tensor, not {value!r}")
    # Not `value < 0`: NaN shall be refused too.
    if not value >= 0 or math.isinf(value):
        raise ValueError(f"{name}={value!r} is not usable: it must be finite and not negative; pass {name} >= 0")


def check_number(name: str, value: Any) -> None:
    """As `check_nonnegative`, but tensors are not checked. Nothing is read, so it may run in every step."""
    if not isinstance(value, Tensor):
        check_nonnegative(name, value)


def check_ord(ord: Any) -> None:
    """Raise ValueError unless `ord` is a finite number ≥ 1."""
    ord = plain_number(ord)
    if isinstance(ord, bool) or not isinstance(ord, (int, float)) or not ord >= 1 or math.isinf(ord):
        raise ValueError(
            f"ord={ord!r} is not usable: the direction sign(p)·|p|^(ord-1) needs a finite number ord >= 1; 2 is ordinary weight decay"
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, choices))}")


def is_zero(value: Any) -> bool:
    """Whether a value is the number 0; a tensor is not read to find out."""
    return isinstance(value := plain_number(value), (int, float)) and value == 0


def check_spelling(where: str, group: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ValueError for a key of a param group that looks like a misspelling of one that is read.

    where: how the message calls the group.
    known: the keys that are read. Keys that look like none of them are other libraries', and left alone.
    """
    known = sorted(known)
    for key in group:
        # What schedulers put there ("initial_lr"), and names that say more ("max_weight_decay"), are names of their own.
        if key in known or any(key.endswith(f"_{name}") for name in known):
            continue
        for near in difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.85):
            raise ValueError(f"{where} has the key {key!r}, which nothing reads; did you mean {near!r}?")


def warn_user(text: str) -> None:
    """Warn at the line that has called distwd: the first one outside of it and of torch, which may call its hooks."""
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_back and frame.f_globals.get("__name__", "").startswith(("distwd.", "torch.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)
