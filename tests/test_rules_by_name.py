"""The recipes of docs/pages/reference/rules/names.md, run as they stand there, against slow loops in float64 on whole tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distwd
from tests.test_docs import PUBLIC, Model

PAGE = Path(__file__).parent.parent / "docs" / "pages" / "reference" / "rules" / "names.md"
RECIPE = re.compile(r"^## (\w+)\n[^#]*?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = dict(RECIPE.findall(PAGE.read_text(encoding="utf-8")))
NUM_STEPS, LR = 5, 1e-2

Values = dict[str, Tensor]


def norm_of(values: Values) -> float:
    return math.sqrt(sum((value**2).sum().item() for value in values.values()))


def adam_updates(grads: list[Values]) -> Iterator[tuple[Values, Values]]:
    """For each step (m̂/(√v̂ + eps), v̂)."""
    m, v = ({name: torch.zeros_like(value) for name, value in grads[0].items()} for _ in range(2))
    for t, grad in enumerate(grads, start=1):
        m = {name: 0.9 * m[name] + 0.1 * grad[name] for name in m}
        v = {name: 0.999 * v[name] + 0.001 * grad[name] ** 2 for name in v}
        hats = {name: value / (1 - 0.999**t) for name, value in v.items()}
        yield {name: m[name] / (1 - 0.9**t) / (hats[name].sqrt() + 1e-8) for name in m}, hats


def muon_updates(grads: list[Values]) -> Iterator[Values]:
    """What Muon of torch takes off zeros at lr 1; it looks at gradients alone."""
    zeros = {name: torch.nn.Parameter(torch.zeros(grad.shape)) for name, grad in grads[0].items() if grad.dim() > 1}
    muon = torch.optim.Muon(zeros.values(), lr=1.0, weight_decay=0.0)
    for grad in grads:
        for name, param in zeros.items():
            param.data.zero_()
            param.grad = grad[name].float()
        muon.step()
        yield {name: -param.detach().double() for name, param in zeros.items()}


def adam(params: Values, grads: list[Values], decay_at: Callable[[int, Values, Values, float, str], float]) -> Values:
    """θ ← θ − η_t·(λ·θ + m̂/(√v̂ + eps)); decay_at: λ, of t, θ, v̂, η_t and the parameter's name."""
    for t, (updates, hats) in enumerate(adam_updates(grads)):
        lr = decay_at.lrs[t] if hasattr(decay_at, "lrs") else LR
        params = {
            name: value - lr * (decay_at(t, params, hats, lr, name) * value + updates[name])
            for name, value in params.items()
        }
    return params


def cosine_lrs() -> list[float]:
    return [LR * (1 + math.cos(math.pi * t / 5)) / 2 for t in range(NUM_STEPS)]


def awd(params: Values, grads: list[Values]) -> Values:
    mean = 0.0
    for grad in grads:
        mean = 0.1 * mean + 0.9 * 0.1 * norm_of(grad) / norm_of(params)
        params = {name: value - 0.05 * (mean * value + grad[name]) for name, value in params.items()}
    return params


def swd(params: Values, grads: list[Values]) -> Values:
    def decay_at(t, values, hats, lr, name):
        num = sum(hat.numel() for hat in hats.values())
        return 1e-2 / math.sqrt(sum(hat.sum().item() for hat in hats.values()) / num)

    return adam(params, grads, decay_at)


def by_lr(decay: Callable[[float], float]) -> Callable[[Values, list[Values]], Values]:
    def train(params: Values, grads: list[Values]) -> Values:
        def decay_at(t, values, hats, lr, name):
            return decay(lr)

        decay_at.lrs = cosine_lrs()
        return adam(params, grads, decay_at)

    return train


def by_time(decay: Callable[[int], float]) -> Callable[[Values, list[Values]], Values]:
    """Matrices decay; norms and biases do not."""
    return lambda params, grads: adam(
        params, grads, lambda t, values, hats, lr, name: decay(t) if values[name].dim() > 1 else 0.0
    )


def megatron(t: int) -> float:
    """As its code has it: start + coefficient·(end − start), 0.5·(cos(π·(1 − r)) + 1)."""
    return 0.02 + 0.5 * (math.cos(math.pi * (1 - min(t, 4) / 4)) + 1) * (0.1 - 0.02)


def dino(t: int) -> float:
    """As its `cosine_scheduler`: final + 0.5·(base − final)·(1 + cos(π·i/n))."""
    return 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * t / 5))


def turn(value: Tensor, update: Tensor, radius: Tensor) -> Tensor:
    """R·unit(θ₋ − η·R·unit(u))"""
    moved = value - LR * radius * update / update.norm()
    return radius * moved / moved.norm()


def adam_h(params: Values, grads: list[Values]) -> Values:
    radius = {name: value.norm() for name, value in params.items()}
    for updates, _ in adam_updates(grads):
        params = {
            name: turn(value, updates[name], radius[name]) if value.dim() > 1 else value - LR * updates[name]
            for name, value in params.items()
        }
    return params


def muon_h(params: Values, grads: list[Values]) -> Values:
    radius = {name: value.norm() for name, value in params.items()}
    for updates in muon_updates(grads):
        params = params | {name: turn(params[name], update, radius[name]) for name, update in updates.items()}
    return params


def radial_brake(params: Values, grads: list[Values]) -> Values:
    """‖θ‖ grows by half of what it would; then η·0.025·θ₋ is taken off where u·θ₋ > 0."""
    for updates in muon_updates(grads):
        new = dict(params)
        for name, update in updates.items():
            value = params[name]
            moved = value - LR * update
            growth = moved.norm() - value.norm()
            norm = value.norm() + (0.5 if growth > 0 else 1.0) * growth
            new[name] = norm * moved / moved.norm() - LR * 0.025 * (update * value > 0) * value
        params = new
    return params


def adam_wn(params: Values, grads: list[Values]) -> Values:
    radius = {name: value.norm().item() for name, value in params.items()}

    def decay_at(t, values, hats, lr, name):
        return 0.1 * (1 - radius[name] / values[name].norm().item()) if values[name].dim() > 1 else 0.0

    return adam(params, grads, decay_at)


def cpr(params: Values, grads: list[Values]) -> Values:
    multipliers = dict.fromkeys(params, 0.0)
    bounds: Values = {}
    for t, (updates, _) in enumerate(adam_updates(grads), start=1):
        moved = {name: value - LR * updates[name] for name, value in params.items()}
        for name, value in moved.items():
            if name in bounds:
                multipliers[name] = min(0.5, max(0.0, multipliers[name] + float((value**2).mean() - bounds[name])))
        params = {name: (1 - 2 * multipliers[name]) * value for name, value in moved.items()}
        if t == 2:
            bounds = {name: (value**2).mean() for name, value in moved.items() if value.dim() > 1}
    return params


ORACLES: dict[str, Callable[[Values, list[Values]], Values]] = {
    "AWD": awd,
    "SWD": swd,
    "AdamC": by_lr(lambda lr: 0.1 * lr / LR),
    "PaLM": by_lr(lambda lr: lr),
    "Megatron": by_time(megatron),
    "DINO": by_time(dino),
    "AdamH": adam_h,
    "MuonH": muon_h,
    "RadialBrake": radial_brake,
    "AdamWN": adam_wn,
    "CPR": cpr,
}


def trained(code: str, grads: list[Values]) -> tuple[Values, Values]:
    """The parameters before and after, float64."""
    torch.manual_seed(0)
    model = Model()
    space: dict[str, Any] = {name: getattr(distwd, name) for name in PUBLIC} | {"torch": torch, "model": model}
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    exec(compile(code, str(PAGE), "exec"), space)
    for grad in grads:
        for name, param in model.named_parameters():
            param.grad = grad[name].to(param.dtype)
        space["optimizer"].step()
        for key in ("lr_scheduler", "wd_scheduler"):
            if key in space:
                space[key].step()
    return before, {name: p.detach().double() for name, p in model.named_parameters()}


def gradients() -> list[Values]:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: p.shape for name, p in Model().named_parameters()}
    return [
        {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
        for _ in range(NUM_STEPS)
    ]


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("name", ORACLES)
def test_a_recipe_equals_its_formula(name):
    if "Muon" in CODE[name] and not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch 2.9: torch.optim.Muon")
    grads = gradients()
    before, ours = trained(CODE[name], grads)
    assert apart(ours, ORACLES[name](before, grads)) < 2e-7
    # A decay of another size would be seen, and that a norm rule is not there.
    without = re.sub(
        r"^    (Hyperball|RadialBrake|NormControl|ConstrainedWeightDecay)\(.*\),\n", "", CODE[name], flags=re.M
    )
    if without == CODE[name]:
        without = re.sub(
            r"(RelativeWeightDecay\(\n\s+|WeightDecay\(|weight_decay=|model, )[\d.e-]+", r"\g<1>0.0", without
        )
    assert without != CODE[name]
    assert apart(ours, trained(without, grads)[1]) > 1e-5


def test_every_recipe_of_the_page_has_an_oracle():
    assert CODE.keys() == ORACLES.keys()


NAMES = [
    "AdamC",
    "AWD",
    "SWD",
    "CPR",
    "MuonH",
    "AdamH",
    "SODA",
    "L2-SP",
    "L2-Init",
    "AdamHD",
    "pWD",
    "AdamWN",
    "PaLM",
    "Megatron",
    "DINO",
    "radial brake",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_people_search_for_is_in_the_index(name):
    index = PAGE.read_text(encoding="utf-8").split("## ")[0]
    assert re.search(rf"^\| [^|]*\b{re.escape(name)}\b", index, re.MULTILINE)
