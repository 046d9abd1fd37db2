"""What `bench.py` times: models as lists of shapes, and each way to step them, with distwd and without."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import distwd
from distwd._torch import is_in_dispatch_mode
from distwd.cli.bench import DECAY, LR, adamw_step, attach_step, chain_step
from distwd.cli.timing import BASELINE, Case, Named, Shapes, Way

NVIDIA = "emerging_optimizers"


def stacked_experts(num: int, width: int) -> Shapes:
    """The experts of a layer, as two stacks of `num` matrices each."""
    return [("up", (num, 2 * width, width)), ("down", (num, width, 2 * width))]


def equal_tensors(count: int, side: int = 64) -> Shapes:
    """`count` square tensors."""
    return [(f"{i}", (side, side)) for i in range(count)]


def cases(large: bool = False, device: str = "cpu") -> list[Case]:
    """All ways that work here; the first is what the others are compared with.

    large: also those for large tensors only.
    device: where they are to run.
    """
    relative = distwd.RelativeWeightDecay
    # What is decided before the optimizer has stepped, and what looks at its update.
    before, behind = ("≤ 1.6", "≤ 2.0") if large else ("≤ 1.5", "≤ 1.5")
    rules: dict[str, tuple[distwd.Rule, str]] = {
        "absolute": (distwd.WeightDecay(DECAY), "≤ 1.35"),
        "relative params": (relative(DECAY, norm_input="params"), before),
        "relative grad": (relative(DECAY, norm_input="grad"), before),
        "relative update": (relative(DECAY, norm_input="update"), behind),
        "cautious": (distwd.CautiousWeightDecay(DECAY), behind),
    }
    found = [
        Case(BASELINE, adamw_step),
        Case("AdamW foreach", partial(adamw_step, fused=False)),
        Case("chain, no decay", chain_step),
    ]
    found += [Case(name, partial(chain_step, rule=rule), goal) for name, (rule, goal) in rules.items()]
    del rules["relative grad"]  # what differs from params shows in a chain
    found += [Case(f"attach, {name}", partial(attach_step, rule=rule), goal) for name, (rule, goal) in rules.items()]
    del rules["absolute"]  # a product, or the optimizer's own: nothing to compile
    for name, (rule, goal) in rules.items() if (large or device == "cuda") and _compiles(device) else ():
        found += [
            Case(f"{name}, compiled", partial(chain_step, rule=rule, compile=True), goal),
            Case(f"attach, {name}, compiled", partial(attach_step, rule=rule, compile=True), goal),
        ]
    for norm_input in ("params", "update"):
        name, rule = f"relative {norm_input}", relative(DECAY, norm_input=norm_input, scope="tensor")
        found.append(Case(f"{name}, per tensor", partial(chain_step, rule=rule), "≤ 1.3", name))
    norm_rules: dict[str, distwd.Rule] = {
        "RadialBrake": distwd.RadialBrake(),
        "Hyperball": distwd.Hyperball(),
        "ConstrainedWeightDecay": distwd.ConstrainedWeightDecay(),
    }
    for name, norm_rule in norm_rules.items():
        found.append(Case(name, partial(chain_step, rule=norm_rule), "≤ 1.15", "relative update"))
    found += [
        Case(
            "NormControl", partial(chain_step, rule=distwd.NormControl(DECAY)), "≤ 1.1", "relative params, per tensor"
        ),
        Case("by hand, Hyperball", by_hand_hyperball, "", "Hyperball"),
        Case("by hand, params", by_hand_params, "≥ 5", "relative params"),
        Case("by hand, update", by_hand_update, "≥ 5", "relative update"),
    ]
    found += [
        Case(name, make, goal, against, is_foreign=True)
        for package, name, make, goal, against in (
            ("torchzero", "torchzero, update", torchzero_update, "≥ 5", "relative update"),
            ("heavyball", "HeavyBall, Hyperball", heavyball_hyperball, "", "Hyperball"),
            (NVIDIA, "NVIDIA's hook, Hyperball", nvidia_hyperball, "", "Hyperball"),
            (NVIDIA, "NVIDIA's hook, RadialBrake", nvidia_radial_brake, "", "RadialBrake"),
        )
        if importlib.util.find_spec(package) is not None
    ]
    return found


def _compiles(device: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # where Triton is missing, the ways would be uncompiled ones
            distwd.Chain([torch.nn.Parameter(torch.ones(1, device=device))], distwd.LR(LR), compile=True)
    except (ValueError, UserWarning) as error:
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


def heavyball_hyperball(named: Named) -> Way:
    """HeavyBall's optimizer of that name: the gradient over the root of its second moment, without a first moment.

    It keeps the norm of each whole tensor, of a stack too, and gathers the tensors that are sharded. Its formulas are compiled,
    as by its default, but for small tensors, where that takes a second for each of a thousand.
    """
    heavyball = importlib.import_module("heavyball")
    params = [param for _, param in named]
    # As it is by default it clears the gradients, which all cases share.
    optimizer = heavyball.HyperBallAdamW(params, lr=LR, betas=(0.9, 0.999), consume_grad=False)
    mode = heavyball.utils.compile_mode if has_large([(name, param.shape) for name, param in named]) else None

    def step() -> None:
        # Where collectives are counted, torch refuses to run code that is compiled as a whole graph.
        heavyball.utils.compile_mode = None if is_in_dispatch_mode() else mode
        optimizer.step()

    return step


def nvidia_hyperball(named: Named) -> Way:
    """Emerging-Optimizers' hook around a step of AdamW, each matrix with a hook of its own, as radii differ."""
    hook = importlib.import_module(f"{NVIDIA}.weight_update_hooks").HyperballHook
    return _hooked(named, lambda norm: hook(norm))


def nvidia_radial_brake(named: Named) -> Way:
    """Emerging-Optimizers' hook around a step of AdamW."""
    hook = importlib.import_module(f"{NVIDIA}.weight_update_hooks").RadialBrakeHook
    return _hooked(named, lambda norm: hook())


def _hooked(named: Named, make: Callable[[float], Any]) -> Way:
    """Its optimizers call hooks with a parameter and its update, one matrix after the other; so it is done here with Adam's."""
    params = [param for _, param in named]
    optimizer = torch.optim.AdamW(named, lr=LR, weight_decay=0, fused=True)

    def matrices(tensor: Tensor) -> Sequence[Tensor]:
        return tensor.unbind() if tensor.dim() > 2 else [tensor]

    with torch.no_grad():
        hooks = [[make(float(_whole(one.norm()))) for one in matrices(param)] for param in params]

    @torch.no_grad()
    def step() -> None:
        before = [param.clone() for param in params]
        optimizer.step()
        for old, new, own in zip(before, params, hooks, strict=True):
            update = (old - new).div_(LR)
            for hook, p, u, to in zip(own, matrices(old), matrices(update), matrices(new), strict=True):
                state = hook.pre_weight_update_inplace(p, u)
                p.add_(u, alpha=-LR)
                hook.post_weight_update_inplace(p, state)
                to.copy_(p)

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
