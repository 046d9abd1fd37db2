"""What `bench.py` times: models as lists of shapes, and each way to step them."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import distwd

LR, DECAY = 1e-3, 0.1
BASELINE = "AdamW fused"

Named = list[tuple[str, torch.nn.Parameter]]
Shapes = list[tuple[str, tuple[int, ...]]]
# Takes a step; called again and again.
Way = Callable[[], object]


def transformer(width: int, layers: int = 11) -> Shapes:
    """The parameters of a decoder, 6 tensors a layer and 4 beside them: 70 tensors, 39,988,736 elements for width 512."""
    shapes: Shapes = [("embedding", (10 * width, width)), ("position", (width // 2, width))]
    for i in range(layers):
        matrices = {
            "qkv": (3 * width, width),
            "out": (width, width),
            "up": (4 * width, width),
            "down": (width, 4 * width),
        }
        shapes += [(f"{i}.{norm}", (width,)) for norm in ("norm_1", "norm_2")]
        shapes += [(f"{i}.{name}", shape) for name, shape in matrices.items()]
    return [*shapes, ("norm", (width,)), ("head", (10 * width, width))]


def stacked_experts(num: int, width: int) -> Shapes:
    """The experts of a layer, as two stacks of `num` matrices each."""
    return [("up", (num, 2 * width, width)), ("down", (num, width, 2 * width))]


def equal_tensors(count: int, side: int = 64) -> Shapes:
    """`count` square tensors."""
    return [(f"{i}", (side, side)) for i in range(count)]


@dataclass(frozen=True)
class Case:
    """One way to take a step.

    make: from named parameters to that way. goal: the ratio that is aimed at, to the time of the case `against`.
    is_foreign: others' code, which is left out on a layout where it does not work.
    """

    name: str
    make: Callable[[Named], Way]
    goal: str = ""
    against: str = BASELINE
    is_foreign: bool = False


def cases(large: bool = False, device: str = "cpu") -> list[Case]:
    """All ways that work here; the first is what the others are compared with.

    large: also those for large tensors only.
    device: where they are to run.
    """
    relative = distwd.RelativeWeightDecay
    # What is decided before the optimizer has stepped, and what looks at its update.
    before, behind = ("≤ 1.6", "≤ 2.0") if large else ("≤ 1.5", "≤ 1.5")
    found = [
        Case(BASELINE, lambda named: _adamw(named, fused=True)),
        Case("AdamW foreach", lambda named: _adamw(named, fused=False)),
        Case("chain, no decay", lambda named: _chain(named)),
        Case("absolute", lambda named: _chain(named, distwd.WeightDecay(DECAY)), "≤ 1.35"),
        Case("relative params", lambda named: _chain(named, relative(DECAY, norm_input="params")), before),
        Case("relative grad", lambda named: _chain(named, relative(DECAY, norm_input="grad")), before),
        Case("relative update", lambda named: _chain(named, relative(DECAY, norm_input="update")), behind),
        Case("cautious", lambda named: _chain(named, distwd.CautiousWeightDecay(DECAY)), behind),
    ]
    rules = {
        "absolute": distwd.WeightDecay(DECAY),
        "relative params": relative(DECAY, norm_input="params"),
        "relative update": relative(DECAY, norm_input="update"),
        "cautious": distwd.CautiousWeightDecay(DECAY),
    }
    goals = {case.name: case.goal for case in found}
    for name, rule in rules.items():
        found.append(Case(f"attach, {name}", partial(_attach, rule=rule), goals[name]))
    for name, rule in rules.items() if large and _compiles(device) else ():
        if name != "absolute":  # a product, or the host's own
            found += [
                Case(f"{name}, compiled", partial(_chain, rule=rule, compile=True), goals[name]),
                Case(f"attach, {name}, compiled", partial(_attach, rule=rule, compile=True), goals[name]),
            ]
    for norm_input in ("params", "update"):
        rule = relative(DECAY, norm_input=norm_input, scope="tensor")
        name = f"relative {norm_input}"
        found.append(Case(f"{name}, per tensor", partial(_chain, rule=rule), "≤ 1.3", name))
    norm_rules = {
        "RadialBrake": distwd.RadialBrake(),
        "Hyperball": distwd.Hyperball(),
        "ConstrainedWeightDecay": distwd.ConstrainedWeightDecay(),
    }
    for name, norm_rule in norm_rules.items():
        found.append(Case(name, partial(_chain, rule=norm_rule), "≤ 1.15", "relative update"))
    found += [
        Case("NormControl", partial(_chain, rule=distwd.NormControl(DECAY)), "≤ 1.1", "relative params, per tensor"),
        Case("by hand, Hyperball", by_hand_hyperball, "", "Hyperball"),
        Case("by hand, params", by_hand_params, "≥ 5", "relative params"),
        Case("by hand, update", by_hand_update, "≥ 5", "relative update"),
    ]
    if importlib.util.find_spec("torchzero") is not None:
        found.append(Case("torchzero, update", torchzero_update, "≥ 5", "relative update", is_foreign=True))
    return found


def _adamw(named: Named, fused: bool) -> Way:
    kind = {"fused": True} if fused else {"foreach": True}
    return torch.optim.AdamW(named, lr=LR, weight_decay=DECAY, **kind).step  # type: ignore[arg-type]


def _chain(named: Named, rule: Any = None, compile: bool = False) -> Way:
    rules = [] if rule is None else [rule]
    return distwd.Chain(named, distwd.Adam(fused=True), *rules, distwd.LR(LR), compile=compile).step


def _attach(named: Named, rule: Any, compile: bool = False) -> Way:
    optimizer = torch.optim.AdamW(named, lr=LR, weight_decay=0, fused=True)
    distwd.attach(optimizer, rule, compile=compile)
    return optimizer.step


def _compiles(device: str) -> bool:
    try:
        distwd.Chain([torch.nn.Parameter(torch.ones(1, device=device))], distwd.LR(LR), compile=True)
    except ValueError as error:
        print(f"left out: the compiled ways. {error}", file=sys.stderr)
        return False
    return True


# --- without distwd: a number of each parameter, so with DTensors a collective for each --------------------------------


def by_hand_params(named: Named) -> Way:
    """Decay by mean |p|, as one writes it with DTensors; then torch's AdamW."""
    params = [param for _, param in named]
    optimizer = torch.optim.AdamW(named, lr=LR, weight_decay=0, fused=True)
    numel = sum(param.numel() for param in params)

    @torch.no_grad()
    def step() -> None:
        mad = torch.stack([_whole(param.abs().sum()) for param in params]).sum() / numel
        for param in params:
            param.mul_(1 - LR * DECAY * mad)
        optimizer.step()

    return step


def by_hand_update(named: Named) -> Way:
    """Decay by mean |update|: step, see how far the parameters went, and decay them from where they were."""
    params = [param for _, param in named]
    optimizer = torch.optim.AdamW(named, lr=LR, weight_decay=0, fused=True)
    numel = sum(param.numel() for param in params)

    @torch.no_grad()
    def step() -> None:
        before = [param.clone() for param in params]
        optimizer.step()
        total = torch.stack([_whole((old - new).abs().sum()) for old, new in zip(before, params, strict=True)]).sum()
        mad = total / numel / LR
        for old, new in zip(before, params, strict=True):
            new.sub_(old.mul_(LR * DECAY * mad))

    return step


def by_hand_hyperball(named: Named) -> Way:
    """Step, see how far each matrix went, turn it by that direction from where it was, and give it its first norm back.

    Norms of each matrix: of the parameter as it begins (once), of its update, and of what has become of it.
    """
    params = [param for _, param in named]
    optimizer = torch.optim.AdamW(named, lr=LR, weight_decay=0, fused=True)
    radii: list[Tensor] = []

    @torch.no_grad()
    def step() -> None:
        radii.extend(map(_norms, params) if not radii else ())
        before = [param.clone() for param in params]
        optimizer.step()
        for old, new, radius in zip(before, params, radii, strict=True):
            update = old - new
            turned = old.sub_(update.mul_(LR * radius / _norms(update)))
            new.copy_(turned.mul_(radius / _norms(turned)))

    return step


def _norms(tensor: Tensor) -> Tensor:
    """The norm of a parameter, or of each matrix of a stack."""
    if tensor.dim() < 3:
        return _whole(torch.linalg.vector_norm(tensor))
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=(-2, -1), keepdim=True)
    return norms


def _whole(number: Tensor) -> Tensor:
    return number.full_tensor() if isinstance(number, DTensor) else number


def torchzero_update(named: Named) -> Way:
    """The library where the rule comes from."""
    tz = importlib.import_module("torchzero")
    rule = tz.m.RelativeWeightDecay(DECAY, norm_input="update")
    step: Way = tz.Optimizer([param for _, param in named], tz.m.Adam(), rule, tz.m.LR(LR)).step
    return step


def _is_meant(name: str, word: str, names: set[str]) -> bool:
    return name == word if word in names else word in name


def has_large(shapes: Shapes) -> bool:
    """Whether there are tensors that compile=True is for, on several ranks too."""
    return any(math.prod(shape) >= 1 << 20 for _, shape in shapes)


def chosen(words: Sequence[str], large: bool = False, device: str = "cpu") -> list[Case]:
    """The cases whose names hold one of `words` (a whole name: only that one), what they are compared with, and the baseline.

    All, for no words.
    """
    every = cases(large, device)
    names = {case.name for case in every}
    wanted = {name for name in names if not words or any(_is_meant(name, word, names) for word in words)}
    # What a case is compared with may be compared with another itself.
    for _ in range(2):
        wanted |= {case.against for case in every if case.name in wanted} | {BASELINE}
    return [case for case in every if case.name in wanted]
