"""What surrounds a step in real training, in one process: scalers, clipping, modes, compilers, tensors as settings."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._dynamo.utils import counters

from distwd import LR, Adam, CautiousWeightDecay, Chain, RelativeWeightDecay, WeightDecay, Wrap, attach
from distwd.attach.joint import attachments_on
from tests import wire
from tests.one_process import fp32_parameters
from tests.runs import differing, grads_of

OF_GRADIENTS = {"norm_input": "grad", "metric": "l2"}
RULES = {
    "absolute": WeightDecay(0.1),
    "of updates": RelativeWeightDecay(0.1),
    "of gradients": RelativeWeightDecay(0.01, **OF_GRADIENTS),
    "of parameters": RelativeWeightDecay(0.01, norm_input="params"),
    "cautious": CautiousWeightDecay(0.1),
}
COUPLINGS = ("lr", "none", "gradient")
WAYS = ("chain", *COUPLINGS)


def optimizer_of(way: str, params: dict, rule, lr=0.01, **adam) -> torch.optim.Optimizer:
    """A chain, or an AdamW with the rule attached."""
    if way == "chain":
        return Chain(params.items(), Adam(**adam), rule, LR(lr))
    optimizer = torch.optim.AdamW(params.items(), lr=lr, weight_decay=0, **adam)
    attach(optimizer, rule, coupling=way)
    return optimizer


def feed(params: dict, step: int, scale: float = 1.0) -> None:
    for name, grad in grads_of(step).items():
        params[name].grad = grad * scale


def values(params: dict) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in params.items()}


def plain(way: str, rule, lrs=(0.01, 0.01, 0.01), **adam) -> dict[str, torch.Tensor]:
    """Steps with nothing around them."""
    params = fp32_parameters()
    optimizer = optimizer_of(way, params, rule, **adam)
    for step, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        feed(params, step)
        optimizer.step()
    return values(params)


# --- modes --------------------------------------------------------------------------------------------------------------

MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RULES)
def test_a_step_inside_a_mode_is_the_step(name, way, mode):
    params = fp32_parameters()
    with MODES[mode]():
        optimizer = optimizer_of(way, params, RULES[name])
        for step in range(3):
            feed(params, step)
            optimizer.step()
    assert differing(values(params), plain(way, RULES[name])) == []


# --- scaled and clipped gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RULES)
def test_unscaled_and_clipped_before_the_step_is_clipped_without_a_scaler(name, way, fused):
    """The scale is a power of two, so the bits agree."""
    ends = []
    for enabled in (True, False):
        params = fp32_parameters()
        optimizer = optimizer_of(way, params, RULES[name], fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for step in range(3):
            feed(params, step, 2.0**10 if enabled else 1.0)
            # The scaler has to know that it has scaled something.
            scaler.scale(torch.ones(()))
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params.values(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        ends.append(values(params))
    for key in ends[0]:
        # With the flag of a fused optimizer λ becomes a tensor: its product is rounded before it is added.
        close = {"rtol": 1e-6, "atol": 1e-7} if fused else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(ends[0][key], ends[1][key], **close)
    assert differing(ends[0], plain(way, RULES[name], fused=fused)) != []


@pytest.mark.parametrize("way", WAYS)
def test_a_metric_of_gradients_is_of_the_clipped_ones(way):
    params = fp32_parameters()
    with_stats = optimizer = optimizer_of(way, params, RULES["of gradients"])
    if way != "chain":
        (with_stats,) = attachments_on(optimizer)
    feed(params, 0)
    norm = torch.nn.utils.clip_grad_norm_(params.values(), 0.5)
    assert norm > 1
    optimizer.step()
    (numbers,) = with_stats.stats().values()
    torch.testing.assert_close(numbers["metric"], torch.tensor(0.5), rtol=1e-5, atol=0)


OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", RULES)
def test_a_chain_around_any_optimizer_skips_what_the_scaler_skips(name, optimizer):
    cls, kwargs = OPTIMIZERS[optimizer]
    ends = []
    for scale in (1.0, 2.0**10):
        params = fp32_parameters()
        chain = Chain(params.items(), Wrap(cls, **kwargs), RULES[name], LR(0.01))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=1.0 - 2.0**-53)
        for step in range(3):
            feed(params, step, scaler.get_scale())
            before = values(params)
            if step == 1:
                params["up.bias"].grad[0] = torch.inf
            scaler.scale(torch.ones(()))
            scaler.step(chain)
            scaler._scale.fill_(scale)
            scaler.update(scale)
            assert (differing(values(params), before) == []) == (step == 1)
        ends.append(values(params))
    assert differing(*ends) == []


# --- accumulation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RULES)
def test_accumulated_gradients_decay_once(name, way):
    """Two backward passes of half the loss: the sum is exact."""
    params = fp32_parameters()
    optimizer = optimizer_of(way, params, RULES[name])
    for step in range(3):
        for _ in range(2):
            loss = sum((params[n] * grad).sum() for n, grad in grads_of(step).items())
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert differing(values(params), plain(way, RULES[name])) == []


# --- compiled -----------------------------------------------------------------------------------------------------------


def scheduled(way: str, rule, backend: str | None, lrs=(0.01, 0.02, 0.03, 0.04, 0.05)) -> tuple[dict, list[int]]:
    """Steps with another lr each, within a compiled function; and how many frames had been compiled after each."""
    torch._dynamo.reset()
    params, frames = fp32_parameters(), []
    if way == "chain":
        optimizer: torch.optim.Optimizer = Chain(params.items(), Adam(), rule, LR(torch.tensor(0.01)))
    else:
        optimizer = torch.optim.SGD(params.items(), lr=torch.tensor(0.01), momentum=0.9, foreach=False)
        attach(optimizer, rule, coupling=way)

    def step_of(grads):
        for param, grad in zip(params.values(), grads, strict=True):
            param.grad = grad * 1.0
        optimizer.step()
        return sum(param.sum() for param in params.values())

    run = step_of if backend is None else torch.compile(step_of, backend=backend)
    for step, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"].fill_(lr)
        run(list(grads_of(step).values()))
        frames.append(counters["frames"]["ok"])
    return values(params), frames


COMPILED = [(way, name, "eager") for way in WAYS for name in ("absolute", "of updates", "of gradients")]
COMPILED += [("chain", "of updates", "aot_eager"), ("lr", "of updates", "aot_eager")]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's, as it traces its own optimizer
@pytest.mark.parametrize(("way", "name", "backend"), COMPILED)
def test_a_compiled_function_that_steps_takes_the_same_steps_and_is_compiled_once(way, name, backend):
    """A chain keeps its bits. An optimizer with a rule attached does not: torch's own arithmetic differs by an ulp or two when compiled."""
    compiled, frames = scheduled(way, RULES[name], backend)
    assert frames[0] > 0
    assert frames[-1] == frames[1], f"compiled anew: {frames}"
    eager, undecayed = scheduled(way, RULES[name], None)[0], scheduled(way, WeightDecay(0.0), None)[0]
    close = {"rtol": 0, "atol": 0} if way == "chain" else {"rtol": 2e-6, "atol": 2e-6}
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key], **close)
    assert max((eager[key] - undecayed[key]).abs().max().item() for key in eager) > 1e-3


# --- tensors as settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RULES)
def test_tensors_that_change_in_place_take_effect_and_are_never_read(name, way):
    """What a CUDA graph needs: nothing of lr or λ becomes a Python number. As numbers in float64, to the rounding of fp32."""
    rule, lrs, decays = RULES[name], (0.01, 0.03, 0.002), (0.1, 0.0, 0.3)
    ends = []
    for as_tensors in (True, False):
        params = fp32_parameters()
        optimizer = optimizer_of(way, params, rule, torch.tensor(0.01) if as_tensors else 0.01, foreach=False)
        (group,) = optimizer.param_groups
        key = "weight_decay" if way == "chain" else "distwd_weight_decay"
        if as_tensors:
            group[key] = torch.tensor(0.1)
        for step, (lr, decay) in enumerate(zip(lrs, decays, strict=True)):
            feed(params, step)
            if not as_tensors:
                group.update({"lr": lr, key: decay})
                optimizer.step()
                continue
            group["lr"].fill_(lr)
            group[key].fill_(decay)
            with wire.no_host_sync() if step else contextlib.nullcontext():
                optimizer.step()
        ends.append(values(params))
    for key in ends[0]:
        torch.testing.assert_close(ends[0][key], ends[1][key], rtol=2e-6, atol=2e-6)
