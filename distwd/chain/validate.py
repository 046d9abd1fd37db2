"""Sentences that cannot be read, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..optimizers.wrap import Wrap
from ..rules.base import Rule
from ..step.transform import Transform


def validate_transforms(transforms: Sequence[Any]) -> None:
    """Raise ValueError for a sentence that cannot be read."""
    if not transforms:
        raise ValueError("Chain needs at least one transform, e.g. Chain(params, Adam(), WeightDecay(0.1), LR(1e-3))")
    for transform in transforms:
        if isinstance(transform, type) and issubclass(transform, Transform):
            raise ValueError(f"{transform.__name__} is a class; write {transform.__name__}(...)")
        if not isinstance(transform, Transform):
            raise ValueError(
                f"{transform!r} is not a transform; wrap a torch optimizer class as Wrap({getattr(transform, '__name__', 'TheClass')}, ...)"
            )
    searching = [i for i, transform in enumerate(transforms) if isinstance(transform, Wrap) and transform.searches]
    for index in searching[:1]:
        before = [t for t in transforms[:index] if not (isinstance(t, Rule) and t.target == "closure")]
        if before or len([t for t in transforms if isinstance(t, Wrap)]) > 1:
            raise ValueError(
                f"{transforms[index]!r} evaluates the gradient itself: only rules with target='closure' may stand "
                "before it, and no second optimizer beside it"
            )
