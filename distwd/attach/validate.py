"""What decay can be attached to: optimizers and rules that are refused, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..checks import plain_number, warn_user
from ..optimizers.elementwise import ELEMENTWISE
from ..optimizers.full_params import needs_closure
from ..rules.base import Rule
from ..sharding.params import is_for_both
from ..step.runner import IN_BACKWARD
from .joint import attachments_on

_TWICE = (
    "param_groups[{index}] already has weight_decay={decay}; set it to 0, or it decays twice (or pass take_over=True, which moves "
    "it to distwd)"
)


def list_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers that `attach` was given. Raises ValueError for none, for one twice, or for a parameter in two."""
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not optimizers:
        raise ValueError("attach got no optimizer; pass one, or a list of those that step one model")
    seen: dict[int, int] = {}  # by identity of the parameter, the optimizer that holds it
    for number, each in enumerate(optimizers):
        for group in getattr(each, "param_groups", ()):
            for param in group["params"]:
                if seen.setdefault(id(param), number) != number or optimizers.index(each) != number:
                    raise ValueError(
                        "a parameter, or a whole optimizer, is listed twice in attach([...]) and would decay twice"
                    )
    return optimizers


def validate_optimizers(
    optimizers: Sequence[Any], rules: Sequence[Any], coupling: str, take_over: bool = False
) -> None:
    """Raise ValueError if there are no rules, or if decay cannot be attached to one of the optimizers.

    take_over: whether decay of the optimizers' own is moved to the first rule, and so is no reason.
    """
    if not rules:
        raise ValueError("attach needs at least one rule, e.g. attach(optimizer, WeightDecay(0.1))")
    for rule in rules:
        if isinstance(rule, type):
            raise ValueError(f"{rule.__name__} is a class; write {rule.__name__}(...)")
        if isinstance(rule, torch.optim.Optimizer):
            raise ValueError(
                f"{type(rule).__name__} is not a decay rule; the optimizer comes first: attach(optimizer, rule)"
            )
        if not isinstance(rule, Rule):
            raise ValueError(
                f"{rule!r} is not a decay rule; attach takes rules only, and leaves the optimizer as it is"
            )
    for optimizer in optimizers:
        name = type(optimizer).__name__
        # Wrappers first: some are torch optimizers by class, and their hooks would never be called.
        _refuse_wrapper(optimizer, name)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"attach takes a torch.optim.Optimizer, not {name}")

        # Optimizers that step inside backward(), as far as they show it before the first step.
        if hasattr(optimizer, "fused_backward"):
            raise ValueError(
                f"{name} changes the parameters inside its own `fused_backward`, and its step does nothing, so no hook would ever "
                "decay; use its own weight_decay, or another optimizer"
            )
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if any(optimizer in _torch.optimizers_in_backward(param) for param in params):
            # An absolute rule needs nothing of other parameters, so it may act there.
            for rule in rules:
                if rule.sources():
                    raise ValueError(IN_BACKWARD.format(label=type(rule).__name__))

        # A class whose `step` torch has not wrapped would take our hooks, and never call them.
        if not getattr(type(optimizer).step, "hooked", False) or not _torch.has_step_hooks(optimizer):
            raise ValueError(
                f"{name} has no step hooks (it does not call torch.optim.Optimizer.__init__); attach to the optimizer that it steps"
            )
        # A notebook cell that runs again.
        for other in attachments_on(optimizer):
            for rule, known in product(rules, other.rules):
                if is_equal(rule, known) and other.coupling == coupling:
                    raise ValueError(
                        f"{rule!r} is attached to {name} already, and would decay twice; call remove() on that attachment first"
                    )
        # What `param_groups` has made says itself that the decay is to be taken over, by the first rule.
        has_key = "weight_decay" in rules[0].defaults
        for index, group in enumerate(optimizer.param_groups):
            if take_over or (has_key and is_for_both(group)):
                continue
            decay = group.get("weight_decay")
            # Read once, here: in a step that would wait for the device.
            if isinstance(decay, Tensor) and bool(decay != 0):
                raise ValueError(_TWICE.format(index=index, decay=decay.item()))
        check_groups(optimizer, coupling, take_over, has_key)
        # LBFGS takes the gradients of its later evaluations as they are, so a decay of the first would stand alone.
        evaluates = needs_closure(type(optimizer)) and any(rule.target != "closure" for rule in rules)
        if evaluates and coupling == "gradient":
            raise ValueError(
                f"{name} evaluates the gradient itself, many times in a step; give the rule target='closure'"
            )


def list_names(named: Any, optimizers: Sequence[torch.optim.Optimizer]) -> list[tuple[str, Tensor]]:
    """`named_parameters` as a list of pairs. Raises ValueError for what is none, or names no parameter of the optimizers.

    Warns where it names some and not all: of a group that is named in part the positions stand for the names.
    """
    pairs = list(named) if isinstance(named, Iterable) and not isinstance(named, torch.nn.Module) else [named]
    if not all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)
        for pair in pairs
    ):
        raise ValueError("named_parameters must be (name, tensor) pairs; pass model.named_parameters()")
    known = {id(tensor) for _, tensor in pairs}
    groups = [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]
    nameless = [
        (index, place)
        for index, group in enumerate(groups)
        for place, param in enumerate(group["params"])
        if id(param) not in known and not group.get("param_names")
    ]
    if nameless:
        index, place = nameless[0]
        shape = tuple(groups[index]["params"][place].shape)
        others = f" and {len(nameless) - 1} others" if len(nameless) > 1 else ""
        what = f"param_groups[{index}]['params'][{place}] of shape {shape}{others} not in named_parameters"
        if len(nameless) == sum(len(group["params"]) for group in groups):
            raise ValueError(
                f"{what}, which names none of the optimizer's parameters: is it of another model, or of this one before it was "
                "sharded or moved? pass named_parameters() of the model that the optimizer steps"
            )
        warn_user(f"{what}: groups with such tensors go by positions instead of names; name them too")
    return pairs


def _refuse_wrapper(optimizer: Any, name: str) -> None:
    """Refuse what only passes steps on to optimizers that it holds in an attribute: one, or a list or dict of them."""
    for key, value in getattr(optimizer, "__dict__", {}).items():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        held = list(held)
        if not held or not all(isinstance(one, torch.optim.Optimizer) for one in held):
            continue
        if held == [value]:
            words = f"attach to the {type(value).__name__} in its `.{key}` instead"
            # ZeroRedundancyOptimizer: positions of a part say nothing to other ranks, so the names have to come along.
            num_held, num_own = (
                sum(len(group["params"]) for group in getattr(one, "param_groups", ())) for one in (value, optimizer)
            )
            if num_held < num_own:
                words += ", which holds this rank's parameters only: give it named_parameters=model.named_parameters()"
        else:
            words = f"attach to all {len(held)} optimizers in its `.{key}` together instead, attach([...], rule)"
        raise ValueError(f"{name} is a wrapper, and its step hooks do not see the step; {words}")


def is_equal(rule: Rule, other: Rule) -> bool:
    """Whether two rules would do the same; tensors are equal to themselves only."""
    if type(rule) is not type(other) or rule.target != other.target or set(rule.defaults) != set(other.defaults):
        return False
    if rule.given is not other.given:  # tensors to pull to
        return False
    pairs = [(value, other.defaults[key]) for key, value in rule.defaults.items()]
    return all(one is two or (not isinstance(one, Tensor) and one == two) for one, two in pairs)


def check_groups(
    optimizer: torch.optim.Optimizer, coupling: str, take_over: bool = False, takes_both: bool = False
) -> None:
    """Raise ValueError if a group decays by itself, or has no lr to couple with. For every step, since groups change.

    take_over, takes_both: whether a decay of its own is still to be moved, of any group or of those of `param_groups`.
    """
    # Of two attachments the first may have let the optimizer do its decay in this very step.
    overridden = {group for other in attachments_on(optimizer) for group in other.overrides.groups}
    for index, group in enumerate(optimizer.param_groups):
        decay = group.get("weight_decay")
        # A scheduler or a checkpoint may have set it again. Tensors are not read in a step.
        if (
            isinstance(plain_number(decay), (int, float))
            and decay != 0
            and id(group) not in overridden
            and not take_over
            and not (takes_both and is_for_both(group))
        ):
            raise ValueError(_TWICE.format(index=index, decay=decay))
        # Nothing that distwd computes is recorded by autograd.
        if group.get("differentiable"):
            raise ValueError(
                f"param_groups[{index}] has differentiable=True, but no derivative goes through a decay of distwd; set it to False, "
                "or use the optimizer's own weight_decay"
            )
        if coupling == "lr" and group.get("lr") is None:
            raise ValueError(f"param_groups[{index}] has no 'lr' to couple with; use coupling='none'")


def needs_update(rules: Sequence[Rule], optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether decay behind the optimizer has to wait until that has stepped.

    So it is where a rule looks at the update, or the optimizer may look at the parameters.
    """
    # Lookahead in a step, trust ratios, fp32 copies: what an unknown optimizer reads must not be decayed before.
    if any(type(optimizer) not in ELEMENTWISE for optimizer in optimizers):
        return True
    # A decay at once needs the decay before it settled: as a part of the update, which is not there before the step.
    targets = [rule.target for rule in rules]
    if "params_direct" in targets and "update" in targets[: len(targets) - targets[::-1].index("params_direct")]:
        return True
    # The second moment is the one that the step makes of its gradient. And decay may look at the parameters before the step
    # and after it, too.
    return any(
        rule.is_cautious(rule.defaults)
        or rule.target == "grad"
        or not rule.sources().isdisjoint(("update", "second_moment"))
        or rule.term(rule.defaults, 1.0).reads_old
        for rule in rules
    )
