"""Metrics of the second moment: of every optimizer that keeps one, however it runs; refused where there is none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distwd import LR, Adam, Chain, Measure, RelativeWeightDecay, Rule, Wrap, attach
from tests import layouts, runs, wire
from tests.layouts import LAYOUTS, whole_model
from tests.runs import PARAMS_SEED

AGAIN = {1: ("down.bias", "head.weight")}  # without a gradient in a step, and with one before it
NEVER = ("gate.weight",)
BETA = 0.75
KNOBS: dict[str, dict[str, Any]] = {
    "single tensor": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True, "foreach": True},
    "fused amsgrad": {"amsgrad": True, "fused": True},
    "maximize": {"maximize": True, "foreach": False},
}


def swd(weight_decay: float = 0.05, **knobs: Any) -> RelativeWeightDecay:
    return RelativeWeightDecay(weight_decay, norm_input="second_moment", power=-0.5, **knobs)


def grads_of(step: int) -> dict[str, Tensor | None]:
    """Smaller from step to step, so that the largest second moment is not the last."""
    missing = (*NEVER, *AGAIN.get(step, ()))
    return {name: None if name in missing else grad * 4.0**-step for name, grad in runs.grads_of(step).items()}


def mean_of(largest: bool, num_steps: int) -> list[float]:
    """By step the mean v̂ over all elements, float64: v and t of a parameter rest where it has no gradient."""
    shapes = whole_model(0)
    v = {name: torch.zeros_like(value).double() for name, value in shapes.items()}
    top, t, means = {name: value.clone() for name, value in v.items()}, dict.fromkeys(v, 0), []
    for step in range(num_steps):
        for name, grad in grads_of(step).items():
            if grad is not None:
                t[name] += 1
                v[name] = BETA * v[name] + (1 - BETA) * grad.double() ** 2
                top[name] = torch.maximum(top[name], v[name])
        used = top if largest else v
        hats = [used[name] / (1 - BETA ** t[name]) for name in used if t[name]]
        means.append(sum(hat.sum().item() for hat in hats) / sum(value.numel() for value in v.values()))
    return means


def train(optimizer: Any, decay: Any, params: dict[str, nn.Parameter], num_steps: int = 4) -> list[tuple[float, float]]:
    """By step the metric and the coefficient."""
    seen = []
    for step in range(num_steps):
        for name, grad in grads_of(step).items():
            params[name].grad = None if grad is None else grad.to(params[name].dtype)
        optimizer.step()
        ((_, table),) = decay.stats().items()
        seen.append((table["metric"].item(), table["coefficient"].item()))
    return seen


def params_of(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value) for name, value in whole_model(PARAMS_SEED, dtype).items()}


def assert_right(seen: list[tuple[float, float]], largest: bool = False, rel: float = 1e-6) -> None:
    means = mean_of(largest, len(seen))
    assert [metric for metric, _ in seen] == pytest.approx(means, rel=rel)
    assert [value for _, value in seen] == pytest.approx([0.05 * mean**-0.5 for mean in means], rel=rel)


# --- optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", KNOBS)
def test_adam_in_a_chain_and_attached(knobs):
    own = {"betas": (0.9, BETA), **KNOBS[knobs]}
    params = params_of()
    chain = Chain(params.items(), Adam(**own), swd(), LR(0.01))
    assert_right(train(chain, chain, params), own.get("amsgrad", False))
    attached = params_of()
    optimizer = torch.optim.AdamW(attached.items(), lr=0.01, weight_decay=0, **own)
    assert_right(train(optimizer, attach(optimizer, swd()), attached), own.get("amsgrad", False))
    assert runs.differing(params, attached) == []  # both are one sentence


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
@pytest.mark.parametrize("how", ["chain", "attach", "attach none"])
def test_every_optimizer_of_torch_that_keeps_one(cls, how):
    params, betas = params_of(), (0.9, BETA)
    if how == "chain":
        optimizer: Any = Chain(params.items(), Wrap(cls, betas=betas), swd(), LR(0.01))
        decay: Any = optimizer
    else:
        optimizer = cls(params.items(), lr=0.01, betas=betas, weight_decay=0)
        decay = attach(optimizer, swd(), coupling="none" if how == "attach none" else "lr")
    assert_right(train(optimizer, decay, params))


def test_betas_and_lr_may_be_tensors():
    params, betas = params_of(), (torch.tensor(0.9), torch.tensor(BETA))
    optimizer = torch.optim.AdamW(params.items(), torch.tensor(0.01), betas, weight_decay=0, foreach=False)
    assert_right(train(optimizer, attach(optimizer, swd()), params))


def test_what_it_decays():
    """v̂ = [1, 4, 9, 2], λ = 0.01: the factor is 1 − 0.1·0.005 = 0.9995."""
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    p.grad = torch.tensor([1.0, 2.0, 3.0, 2.0**0.5])
    bare = p.detach().clone()
    Chain([p], Adam(), swd(0.01), LR(0.1)).step()
    torch.testing.assert_close(p.detach(), 0.9995 * bare - 0.1, rtol=1e-6, atol=0)


def test_a_second_moment_of_zeros_decays_nothing():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    p.grad = torch.zeros(2)
    chain = Chain([p], Adam(), swd(), LR(0.1))
    chain.step()
    assert chain.stats()["RelativeWeightDecay"]["coefficient"] == 0
    assert torch.equal(p.detach(), torch.tensor([1.0, 2.0]))


def test_of_two_optimizers_it_is_that_of_the_nearest_before():
    params = params_of()
    first, second = Adam(betas=(0.9, BETA)), Adam(betas=(0.9, 0.5))
    chain = Chain(params.items(), first, swd(), second, swd(), LR(0.01))
    for step in range(3):
        for name, grad in grads_of(step).items():
            params[name].grad = grad
        chain.step()
    shown = chain.stats()
    assert chain.phases == 0  # one process
    assert shown["RelativeWeightDecay"]["metric"].item() == pytest.approx(mean_of(False, 3)[-1], rel=1e-6)
    own = [
        chain.state[p]["exp_avg_sq_1"].double() / (1 - 0.5 ** chain.state[p]["step_1"].item())
        for n, p in params.items()
        if n not in NEVER
    ]
    num = sum(p.numel() for p in params.values())
    expected = sum(v.sum().item() for v in own) / num
    assert shown["RelativeWeightDecay_1"]["metric"].item() == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(mean_of(False, 3)[-1], rel=0.1)


def test_several_optimizers_share_one_number():
    params = params_of()
    half = len(params) // 2
    first, second = dict(list(params.items())[:half]), dict(list(params.items())[half:])
    optimizers = [
        torch.optim.AdamW(first.items(), lr=0.01, betas=(0.9, BETA), weight_decay=0),
        torch.optim.NAdam(second.items(), lr=0.01, betas=(0.9, BETA)),
    ]
    decay = attach(optimizers, swd())
    seen = []
    for step in range(3):
        for name, grad in grads_of(step).items():
            params[name].grad = grad
        for optimizer in optimizers:
            optimizer.step()
        table = decay.stats()["RelativeWeightDecay"]
        seen.append((table["metric"].item(), table["coefficient"].item()))
    assert_right(seen)


class KeepsIt(torch.optim.Optimizer):
    """Somebody's own optimizer with second moments under torch's name; it counts its steps in the groups."""

    def __init__(self, params, lr=0.01, betas=(0.9, BETA)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                v = self.state[p].setdefault("exp_avg_sq", torch.zeros_like(p))
                v.mul_(group["betas"][1]).addcmul_(p.grad, p.grad, value=1 - group["betas"][1])
                p.sub_(group["lr"] * p.grad / (v.sqrt() + 1e-8))


class CountsNothing(KeepsIt):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            del group["step"]


class KeepsAnother(KeepsIt):
    """It keeps `exp_avg_sq` as no tensor like the parameter."""

    def step(self, closure=None):
        super().step()
        for state in self.state.values():
            state["exp_avg_sq"] = torch.zeros(3)


class KeepsMomentum(torch.optim.Optimizer):
    """Somebody's own optimizer without second moments."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("momentum", torch.zeros_like(p)).add_(p.grad)
                    p.sub_(group["lr"] * p.grad)


def test_an_optimizer_that_is_not_torchs():
    params = {"a": nn.Parameter(torch.ones(4)), "b": nn.Parameter(torch.ones(2))}
    optimizer = KeepsIt(params.items())
    decay = attach(optimizer, swd())
    v = {name: torch.zeros(p.numel()).double() for name, p in params.items()}
    for step in range(3):
        for name, p in params.items():
            p.grad = torch.full_like(p, 2.0 + step + (name == "b"))
            v[name] = BETA * v[name] + (1 - BETA) * p.grad.double() ** 2
        optimizer.step()
        expected = sum(each.sum().item() for each in v.values()) / 6 / (1 - BETA ** (step + 1))
        assert decay.stats()["RelativeWeightDecay"]["metric"].item() == pytest.approx(expected, rel=1e-6)


def test_pytorch_optimizers_adams():
    """AdamS (SWD) decays by λ·lr/√(mean v̂), and steps as Adam does."""
    library = pytest.importorskip("pytorch_optimizer", exc_type=ImportError)
    theirs, ours = params_of(), params_of()
    adams = library.AdamS(theirs.values(), lr=0.01, betas=(0.9, BETA), weight_decay=0.05, eps=1e-8)
    adamw = torch.optim.AdamW(ours.items(), lr=0.01, betas=(0.9, BETA), weight_decay=0)
    attach(adamw, swd())
    for step in range(4):
        for params, optimizer in ((theirs, adams), (ours, adamw)):
            for name, grad in runs.grads_of(step).items():
                params[name].grad = grad.clone()
            optimizer.step()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-6)
    moved = max((p - whole_model(PARAMS_SEED)[name]).abs().max().item() for name, p in ours.items())
    assert moved > 1e-2


@pytest.mark.parametrize("how", ["chain", "attach"])
def test_bf16_parameters_have_a_second_moment_in_bf16(how):
    params = params_of(torch.bfloat16)
    # A decay that bf16 rounds away is warned of; here it is not.
    if how == "chain":
        optimizer: Any = Chain(params.items(), Adam(betas=(0.9, BETA)), swd(1.0), LR(0.01))
        decay: Any = optimizer
    else:
        optimizer = torch.optim.AdamW(params.items(), lr=0.01, betas=(0.9, BETA), weight_decay=0)
        decay = attach(optimizer, swd(1.0))
    seen = train(optimizer, decay, params, 2)
    assert [metric for metric, _ in seen] == pytest.approx(mean_of(False, 2), rel=0.02)
    own = [
        optimizer.state[p]["exp_avg_sq"].double() / (1 - BETA ** optimizer.state[p]["step"].item())
        for n, p in params.items()
        if n not in NEVER
    ]
    expected = sum(v.sum().item() for v in own) / sum(p.numel() for p in params.values())
    assert seen[-1][0] == pytest.approx(expected, rel=1e-6)


def test_frozen_parameters_do_not_count():
    params = {"a": nn.Parameter(torch.ones(4)), "frozen": nn.Parameter(torch.ones(400))}
    optimizer = torch.optim.AdamW(params.items(), lr=0.01, weight_decay=0)
    decay = attach(optimizer, swd())
    for param in params.values():
        param.grad = torch.full_like(param, 2.0)
    optimizer.step()
    params["frozen"].requires_grad_(False)
    params["frozen"].grad = None
    params["a"].grad = torch.full((4,), 2.0)
    optimizer.state[params["frozen"]]["exp_avg_sq"].fill_(9.0)
    optimizer.step()
    assert decay.stats()["RelativeWeightDecay"]["metric"].item() == pytest.approx(4.0, rel=1e-6)


# --- rules of one's own -----------------------------------------------------------------------------------------------


class Trust(Rule):
    """c = λ·‖p‖/√(mean v̂ of the parameter)."""

    def measures(self, settings):
        return {"v": Measure("second_moment", "mad"), "norm": Measure("params", "l2")}

    def coefficient(self, settings, measured, kept):
        return settings["weight_decay"] * measured["norm"] / measured["v"].clamp(min=1e-12).sqrt()


def test_a_rule_of_ones_own_measures_it_by_tensor():
    params = params_of()
    before = {name: p.detach().double().norm().item() for name, p in params.items()}
    chain = Chain(params.items(), Adam(betas=(0.9, BETA)), Trust(weight_decay=0.1), LR(0.01))
    train_once = {name: grad for name, grad in grads_of(0).items() if grad is not None}
    for name, grad in train_once.items():
        params[name].grad = grad
    chain.step()
    shown = chain.stats()["Trust"]
    for name, grad in train_once.items():
        v = grad.double().square().mean().item()
        assert shown["v"][name].item() == pytest.approx(v, rel=1e-5)
        assert shown["coefficient"][name].item() == pytest.approx(0.1 * before[name] / v**0.5, rel=1e-5)
    assert shown["v"][NEVER[0]] == 0


# --- refusals ---------------------------------------------------------------------------------------------------------


def one() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2))]


def with_state(cls: type) -> Any:
    """An optimizer that has begun."""
    optimizer = cls(params := one())
    params[0].grad = torch.ones(2, 2)
    optimizer.step()
    return optimizer


NONE_BEFORE = "'second_moment', which an optimizer makes of this step's gradient, and none stands before the rule"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "before the optimizer": (lambda: Chain(one(), swd(), Adam(), LR(0.1)), NONE_BEFORE),
    "without an optimizer": (lambda: Chain(one(), swd(), LR(0.1)), NONE_BEFORE),
    "in the closure": (lambda: Chain(one(), Adam(), swd(target="closure"), LR(0.1)), NONE_BEFORE),
    "coupling gradient": (lambda: attach(torch.optim.Adam(one()), swd(), coupling="gradient"), NONE_BEFORE),
    "SGD behind Adam": (lambda: Chain(one(), Adam(), Wrap(torch.optim.SGD), swd(), LR(0.1)), "SGD keeps no exp_avg_sq"),
    "attached SGD": (lambda: attach(torch.optim.SGD(one(), momentum=0.9), swd()), "SGD keeps no exp_avg_sq"),
    "attached RMSprop": (lambda: attach(torch.optim.RMSprop(one()), swd()), "RMSprop keeps no exp_avg_sq"),
    "one of two": (lambda: attach([torch.optim.Adam(one()), torch.optim.Adagrad(one())], swd()), "Adagrad keeps no"),
    "LBFGS": (lambda: Chain(one(), Wrap(torch.optim.LBFGS), swd()), "LBFGS keeps no exp_avg_sq"),
    "Muon": (lambda: Chain(one(), Wrap(torch.optim.Muon), swd(), LR(0.1)), "Muon keeps no exp_avg_sq"),
    "one that has begun": (lambda: attach(with_state(KeepsMomentum), swd()), "KeepsMomentum keeps no exp_avg_sq"),
    "divided by it": (lambda: attach(torch.optim.SGD(one()), RelativeWeightDecay(0.1, per="second_moment")), "SGD keeps no"),
    "a rule of one's own": (lambda: attach(torch.optim.SGD(one()), Trust(weight_decay=0.1)), "Trust asks for 'second_moment', and SGD"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_where_there_is_none_it_is_refused_at_construction(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build()


def test_a_group_that_asks_for_it_is_refused_with_nothing_changed():
    chain = Chain(one(), Wrap(torch.optim.SGD), RelativeWeightDecay(0.1), LR(0.1))
    with pytest.raises(ValueError, match="SGD keeps no exp_avg_sq"):
        chain.add_param_group({"params": one(), "norm_input": "second_moment"})
    assert len(chain.param_groups) == 1


@pytest.mark.parametrize("cls", [KeepsMomentum, CountsNothing, KeepsAnother])
def test_what_only_the_first_step_tells_is_refused_there(cls):
    optimizer = cls(params := one())
    attachment = attach(optimizer, swd())
    params[0].grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match=f"{cls.__name__} does not tell the second moment of param 0"):
        optimizer.step()
    assert torch.equal(params[0].detach(), torch.ones(2, 2))  # its step is undone
    attachment.remove()
    chain = Chain(params, Wrap(cls), swd(), LR(0.1))
    with pytest.raises(ValueError, match=f"{cls.__name__} does not tell the second moment of param 0"):
        chain.step()
    assert torch.equal(params[0].detach(), torch.ones(2, 2))


def refused_on_ranks(layout: str) -> str:
    held = layouts.place(layout, whole_model(PARAMS_SEED))
    optimizer = KeepsMomentum(list(held.items()) or [nn.Parameter(torch.zeros(0))])
    attach(optimizer, swd())
    runs.feed(layout, held, 0)
    before = {name: layouts.local_of(p).clone() for name, p in held.items()}
    try:
        optimizer.step()
    except (ValueError, RuntimeError) as error:
        assert all(torch.equal(layouts.local_of(p), before[name]) for name, p in held.items())
        return str(error)
    return "nothing"


def test_it_is_refused_on_every_rank(worlds):
    for message in worlds.run(3, refused_on_ranks, "fsdp3"):
        assert "KeepsMomentum does not tell the second moment of" in message


# --- on ranks ---------------------------------------------------------------------------------------------------------


def flavours_on_ranks(layout: str) -> list:
    """All ways to run Adam; by way the metrics of three steps."""
    found = []
    for knobs in KNOBS.values():
        for how in ("chain", "attach"):
            held, own = layouts.place(layout, whole_model(PARAMS_SEED)), {"betas": (0.9, BETA), **knobs}
            if how == "chain":
                optimizer: Any = Chain(held.items(), Adam(**own), swd(), LR(0.01))
                decay: Any = optimizer
            else:
                optimizer = torch.optim.AdamW(held.items(), lr=0.01, weight_decay=0, **own)
                decay = attach(optimizer, swd())
            for step in range(3):
                missing = (*NEVER, *AGAIN.get(step, ()))
                runs.feed(layout, held, step, missing)
                for param in held.values():
                    if param.grad is not None:
                        layouts.local_of(param.grad).mul_(4.0**-step)
                with wire.no_host_sync() if step else nullcontext():
                    optimizer.step()
            found.append(decay.stats()["RelativeWeightDecay"]["metric"].item())
    return found


@pytest.mark.parametrize("layout", ["fsdp3", "tp2"])
def test_ranks_see_the_second_moment_of_the_whole_and_read_nothing(worlds, layout):
    means = [mean_of(own.get("amsgrad", False), 3)[-1] for own in KNOBS.values() for _ in range(2)]
    for seen in worlds.run(LAYOUTS[layout].ranks, flavours_on_ranks, layout):
        assert seen == pytest.approx(means, rel=1e-6)
