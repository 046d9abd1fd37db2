"""A run that is saved on four ranks and loaded on others has the bits of the uninterrupted one, for every optimizer and state dict."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import distwd
from tests import layouts, runs
from tests.layouts import LAYOUTS, Net, whole_model
from tests.runs import PARAMS_SEED, differing


def groups_of(net: nn.Module, **second: float) -> list[dict]:
    """Matrices, and vectors with settings of their own."""
    named = list(net.named_parameters())
    return [
        {"params": [pair for pair in named if pair[1].ndim >= 2]},
        {"params": [pair for pair in named if pair[1].ndim < 2], **second},
    ]


def chain(net: nn.Module) -> torch.optim.Optimizer:
    rule = distwd.RelativeWeightDecay(0.1, metric="rms")
    return distwd.Chain(groups_of(net, weight_decay=0.01), distwd.Adam(foreach=False), rule, distwd.LR(0.01))


def stateless_chain(net: nn.Module) -> torch.optim.Optimizer:
    rule = distwd.RelativeWeightDecay(0.1, norm_input="params", metric="std")
    return distwd.Chain(groups_of(net), rule, distwd.LR(0.01), distwd.WeightDecay(0.001))


def attached(net: nn.Module, cls: Callable[..., torch.optim.Optimizer], **settings: Any) -> torch.optim.Optimizer:
    optimizer = cls(groups_of(net, distwd_weight_decay=0.01), lr=0.01, foreach=False, **settings)
    distwd.attach(optimizer, distwd.RelativeWeightDecay(0.1))
    return optimizer


def norm_rules() -> list[distwd.Rule]:
    """Anchors, radii by matrix, a running mean, and a search that is under way when the run is saved."""
    return [
        distwd.WeightDecay(0.01, toward="initial"),
        distwd.RelativeWeightDecay(0.1, norm_input="grad", metric="l2", per="params", smoothing=0.5),
        distwd.Hyperball(),
        distwd.ConstrainedWeightDecay(every=1, rate=0.1),
    ]


def keeping_chain(net: nn.Module) -> torch.optim.Optimizer:
    return distwd.Chain(groups_of(net), distwd.Adam(foreach=False), *norm_rules(), distwd.LR(0.01))


def attached_and_keeping(net: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(groups_of(net), lr=0.01, foreach=False, weight_decay=0.0)
    distwd.attach(optimizer, *norm_rules())
    return optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "chain": chain,
    "stateless chain": stateless_chain,
    "attached to AdamW": functools.partial(attached, cls=torch.optim.AdamW, weight_decay=0.0),
    "attached to SGD": functools.partial(attached, cls=torch.optim.SGD),
    "attached to momentum": functools.partial(attached, cls=torch.optim.SGD, momentum=0.9),
    "chain that keeps": keeping_chain,
    "attached and keeping": attached_and_keeping,
}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
WAYS = {
    "plain": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "offloaded": StateDictOptions(cpu_offload=True),
    "asynchronous": StateDictOptions(),
    "torch.save": WHOLE,
}
# torch cannot load the full form of an optimizer without any state, its own SGD included ("Expected device to be set").
MATRIX = [
    (optimizer, way)
    for optimizer in OPTIMIZERS
    for way in WAYS
    if (optimizer, way) != ("attached to SGD", "torch.save")
]


class Job:
    """A model, its optimizer, a schedule of lr and one of decay, as a script makes them at its start."""

    def __init__(self, layout: str, optimizer: str, seed: int = PARAMS_SEED) -> None:
        self.layout = layout
        self.net = Net(whole_model(seed))
        LAYOUTS[layout].wrap(self.net)
        self.held = dict(self.net.named_parameters())
        self.optimizer = OPTIMIZERS[optimizer](self.net)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step)),
            distwd.LinearWeightDecay(self.optimizer, 1.0, 3.0, 5),
        ]

    def train(self, steps: range) -> None:
        for step in steps:
            runs.feed(self.layout, self.held, step)
            self.optimizer.step()
            for schedule in self.schedules:
                schedule.step()

    def state(self, options: StateDictOptions) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.net, options=StateDictOptions(
                full_state_dict=options.full_state_dict, cpu_offload=options.cpu_offload)),
            "optimizer": get_optimizer_state_dict(self.net, self.optimizer, options=options),
            "schedules": [schedule.state_dict() for schedule in self.schedules],
        }  # fmt: skip

    def load(self, state: dict[str, Any], options: StateDictOptions) -> None:
        whole = options.full_state_dict
        set_model_state_dict(self.net, state["model"], options=FROM_RANK_0 if whole else StateDictOptions())
        set_optimizer_state_dict(
            self.net, self.optimizer, state["optimizer"], options=FROM_RANK_0 if whole else options
        )
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)

    def whole(self) -> dict[str, torch.Tensor]:
        return layouts.view(self.layout, self.held)


def save(job: Job, way: str, folder: str) -> Callable[[], object]:
    """Begin to save; what is returned waits for the end."""
    state = job.state(WAYS[way])
    if way == "asynchronous":
        # Of its own: the writing thread's collectives must not meet those of the training.
        return dcp.async_save(state, checkpoint_id=folder, process_group=dist.new_group()).result
    if way != "torch.save":
        dcp.save(state, checkpoint_id=folder)
    elif dist.get_rank() == 0:
        torch.save(state, Path(folder) / "whole.pt")
    return dist.barrier


def load(job: Job, way: str, folder: str) -> None:
    options = WAYS[way]
    if way != "torch.save":
        state = job.state(options)
        dcp.load(state, checkpoint_id=folder)
    elif dist.get_rank() == 0:
        state = torch.load(Path(folder) / "whole.pt", weights_only=True)
    else:
        schedules = torch.load(Path(folder) / "whole.pt", weights_only=True)["schedules"]
        state = {"model": {}, "optimizer": {}, "schedules": schedules}
    job.load(state, options)


def uninterrupted(layout: str, optimizer: str, way: str, folder: str) -> dict:
    """Two steps, saved, two more: in the asynchronous way while it is being written."""
    job = Job(layout, optimizer)
    job.train(range(2))
    finish = save(job, way, folder)
    job.train(range(2, 4))
    finish()
    return job.whole()


def resumed(layout: str, optimizer: str, way: str, folder: str, again: str) -> dict:
    """Another model with other values and settings, loaded; stopped before its first step, saved and loaded again; two steps."""
    job = Job(layout, optimizer, seed=PARAMS_SEED + 1)
    job.optimizer.param_groups[0]["lr"] = 123.0
    load(job, way, folder)
    if again:
        save(job, way, again)()
        job = Job(layout, optimizer, seed=PARAMS_SEED + 2)
        load(job, way, again)
    job.train(range(2, 4))
    return job.whole()


@pytest.mark.parametrize(("optimizer", "way"), MATRIX)
def test_saved_at_four_ranks_it_resumes_at_two_at_one_and_over_tp_bit_for_bit(worlds, optimizer, way):
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as again:
        straight = worlds.run(4, uninterrupted, "fsdp4", optimizer, way, folder)[0]
        assert differing(straight, whole_model(PARAMS_SEED)) != []
        for layout in ("fsdp2", "fsdp1rank", "fsdp_tp"):
            stop = again if layout == "fsdp2" else ""
            for params in worlds.run(LAYOUTS[layout].ranks, resumed, layout, optimizer, way, folder, stop):
                assert differing(params, straight) == [], layout


def keys_at_birth_and_later(optimizer: str) -> list[tuple]:
    job = Job("fsdp3", optimizer)
    found = []
    for steps in (range(0), range(2)):
        job.train(steps)
        state = job.optimizer.state_dict()
        found.append((
            {index: sorted(entry) for index, entry in state["state"].items()},
            [sorted(group) for group in state["param_groups"]],
        ))  # fmt: skip
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_rank_has_every_key_from_the_start(worlds, optimizer):
    """Over three ranks some shards are empty. An optimizer's own state begins at its first step; its groups have their keys."""
    ranks = worlds.run(3, keys_at_birth_and_later, optimizer)
    (state, groups), later = ranks[0]
    assert all(rank == ranks[0] for rank in ranks)
    assert groups == later[1]
    assert state == later[0] or optimizer.startswith("attached")
    assert state or optimizer.startswith("attached")
