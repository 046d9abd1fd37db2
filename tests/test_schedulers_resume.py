"""A schedule of weight decay is right on the first step after a resume, whatever is loaded first."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from distwd import LR, Adam, Chain, WeightDecay, attach
from distwd.groups.schedulers import (
    CorrectedWeightDecay,
    CosineWeightDecay,
    InverseTimeWeightDecay,
    LambdaWeightDecay,
    LinearWeightDecay,
)
from tests.layouts import gather, place, whole_model
from tests.test_schedulers import adamw

MODEL_SEED = 3


def falling(step: int) -> float:
    return 1 / (1 + step)


SCHEDULES: dict[str, Callable[..., Any]] = {
    "lambda": lambda o: LambdaWeightDecay(o, falling),
    "linear": lambda o: LinearWeightDecay(o, 0.0, 2.0, 4),
    "cosine": lambda o: CosineWeightDecay(o, 3, 0.75, warmup_iters=2),
    "inverse time": lambda o: InverseTimeWeightDecay(o, 3),
    "corrected": CorrectedWeightDecay,
    "independent": lambda o: CorrectedWeightDecay(o, form="independent"),
}
KINDS = ("adamw", "chain", "attached", "tensor")


def job(kind: str, schedule: str) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer, Any, Any]:
    """A model, its optimizer and both schedulers, as a script makes them at its start."""
    ranks = dist.get_world_size() if dist.is_initialized() else 0
    held = place("fsdp2" if ranks else "single", whole_model(MODEL_SEED))
    named = list(held.items())
    groups: list[dict[str, Any]] = [
        {"params": [pair for pair in named if pair[1].ndim >= 2]},
        {"params": [pair for pair in named if pair[1].ndim < 2], "weight_decay": 0.0},
    ]
    if kind == "chain":
        optimizer: torch.optim.Optimizer = Chain(groups, Adam(), WeightDecay(0.5), LR(0.125))
    elif kind == "attached":
        groups[1] = {"params": groups[1]["params"], "distwd_weight_decay": 0.0}
        optimizer = torch.optim.AdamW(groups, lr=0.125, weight_decay=0.0)
        attach(optimizer, WeightDecay(0.5))
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.125, weight_decay=torch.tensor(0.5) if kind == "tensor" else 0.5)
    lr = lr_scheduler.LambdaLR(optimizer, lambda t: (0.5, 1.0, 0.75, 0.5, 0.25, 0.125)[t % 6])
    return held, optimizer, lr, SCHEDULES[schedule](optimizer)


def train(held: dict, optimizer: torch.optim.Optimizer, lr: Any, decay: Any, steps: range) -> None:
    ranks = dist.get_world_size() if dist.is_initialized() else 0
    for step in steps:
        grads = place("fsdp2" if ranks else "single", whole_model(50 + step, scale=0.1))
        for name, param in held.items():
            param.grad = grads[name].detach()
        optimizer.step()
        lr.step()
        decay.step()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def interrupted(kind: str, schedule: str, order: str) -> dict[str, torch.Tensor]:
    """Three steps, a checkpoint, a new process, three more steps. order: what is loaded, one after the other."""
    first = job(kind, schedule)
    train(*first, range(3))
    params = {name: param.detach().clone() for name, param in first[0].items()}
    saved = dict(zip("ols", (through_a_file(part.state_dict()) for part in first[1:]), strict=True))
    held, optimizer, lr, decay = job(kind, schedule)
    with torch.no_grad():
        for name, param in held.items():
            param.copy_(params[name])
    for part in order:
        {"o": optimizer, "l": lr, "s": decay}[part].load_state_dict(saved[part])
    train(held, optimizer, lr, decay, range(3, 6))
    return {name: param.detach() for name, param in held.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(kind, schedule):
    whole = job(kind, schedule)
    train(*whole, range(6))
    for order in ("ols", "slo", "los"):
        resumed = interrupted(kind, schedule, order)
        assert all(torch.equal(param, resumed[name]) for name, param in whole[0].items()), order
    forgotten = interrupted(kind, schedule, "ol")
    assert not torch.equal(forgotten["up.weight"], whole[0]["up.weight"])  # non-vacuity


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_step_after_a_resume_has_its_decay(schedule):
    whole = job("adamw", schedule)
    train(*whole, range(3))
    saved = [through_a_file(part.state_dict()) for part in whole[1:]]
    expected = whole[3].get_last_wd()
    optimizer = job("adamw", schedule)[1]
    assert optimizer.param_groups[0]["weight_decay"] != expected[0]  # non-vacuity
    # A script may make its scheduler only after the optimizer has been loaded: the base value is beside the saved one.
    plain = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups])
    plain.load_state_dict(saved[0])
    assert plain.param_groups[0]["initial_weight_decay"] == 0.5
    late = SCHEDULES[schedule](plain)
    late.load_state_dict(saved[2])
    assert late.get_last_wd() == expected
    if schedule in ("lambda", "linear", "cosine"):  # or only give it the last epoch
        plain.load_state_dict(saved[0])
        makes = {
            "lambda": lambda: LambdaWeightDecay(plain, falling, 2),
            "linear": lambda: LinearWeightDecay(plain, 0.0, 2.0, 4, 2),
        }
        again = makes.get(schedule, lambda: CosineWeightDecay(plain, 3, 0.75, 2, warmup_iters=2))()
        assert again.get_last_wd() == expected


def test_the_peak_of_the_learning_rate_is_remembered():
    first = adamw(weight_decay=0.5, lr=1.0)
    scheduler = CorrectedWeightDecay(first)
    first.param_groups[0]["lr"] = 0.25
    scheduler.step()
    second = adamw(weight_decay=0.5, lr=0.5)
    resumed = CorrectedWeightDecay(second)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.get_last_wd() == scheduler.get_last_wd() == [0.125, 0.0, 0.5]
    resumed.step()
    assert resumed.get_last_wd() == [0.125, 0.0, 0.5]


def checkpointed(kind: str, schedule: str, flatten: bool) -> tuple:
    """On ranks: the uninterrupted run, and one that goes through torch.distributed.checkpoint's state dicts."""
    whole = job(kind, schedule)
    model = nn.ModuleDict()  # what the state-dict functions want: something that has these parameters by these names
    for name, param in whole[0].items():
        _child(model, name.split(".")[0]).register_parameter(name.split(".")[1], param)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    train(*whole, range(3))
    # What is returned are the optimizer's own tensors, which the next step changes.
    state = copy.deepcopy(get_optimizer_state_dict(model, whole[1], options=options))
    params = {name: param.detach().clone() for name, param in whole[0].items()}
    others = [part.state_dict() for part in whole[2:]]
    train(*whole, range(3, 6))
    held, optimizer, lr, decay = job(kind, schedule)
    for name, param in held.items():
        _child(model, name.split(".")[0]).register_parameter(name.split(".")[1], param)
        param.detach().copy_(params[name])
    set_optimizer_state_dict(model, optimizer, state, options=options)
    lr.load_state_dict(others[0])
    decay.load_state_dict(others[1])
    train(held, optimizer, lr, decay, range(3, 6))
    return gather(whole[0]), gather(held), decay.get_last_wd()


def _child(model: nn.ModuleDict, name: str) -> nn.Module:
    if name not in model:
        model[name] = nn.Module()
    return model[name]


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("kind", "schedule"), [("chain", "cosine"), ("adamw", "corrected"), ("attached", "linear")])
def test_sharded_checkpoints_keep_the_schedule(worlds, kind, schedule, flatten):
    for whole, resumed, values in worlds.run(2, checkpointed, kind, schedule, flatten):
        assert all(torch.equal(param, resumed[name]) for name, param in whole.items())
        assert values[0] not in (0.0, 0.5)
        assert values[1] == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("is_resumed", [True, False])
def test_a_group_that_came_since_the_last_step_is_saved_too(kind, schedule, is_resumed):
    """Layers are unfrozen in the middle of an epoch, and the schedule steps once an epoch. Saving changes nothing."""
    held, optimizer, lr, decay = job(kind, schedule)
    train(held, optimizer, lr, decay, range(2))

    def add(to: torch.optim.Optimizer) -> dict:
        new = {"params": [("new", torch.nn.Parameter(torch.ones(2)))], "lr": 0.02}
        to.add_param_group(new)
        return to.param_groups[-1]

    add(optimizer)
    saved = through_a_file(optimizer.state_dict()), through_a_file(decay.state_dict())
    if is_resumed:
        _, optimizer, _, decay = job(kind, schedule)
        add(optimizer)
        optimizer.load_state_dict(saved[0])
        decay.load_state_dict(saved[1])
    key = next(key for key in decay._driven() if key in optimizer.param_groups[-1])
    # What is set after the save counts, as ever: the base value is noted by the next step.
    optimizer.param_groups[-1][key] = 0.5
    decay.step()
    assert optimizer.param_groups[-1][f"initial_{key}"] == 0.5
    again = through_a_file(decay.state_dict())
    assert len(again["bases"]) == len(optimizer.param_groups)
