"""Pipelines as torch runs them (torch.distributed.pipelining): ranks hold different parameters, and decay as one process does."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.layouts import submesh, whole_of
from tests.one_process import relative, replay, seen_of
from tests.releases import needs_torch
from tests.runs import differing

pytestmark = needs_torch("2.11", "torch's own schedules hang on gloo in 2.7 where stages are sharded, and abort in 2.9")

SCHEDULES = {"gpipe": (ScheduleGPipe, 1), "1f1b": (Schedule1F1B, 1), "interleaved": (ScheduleInterleaved1F1B, 2)}
NUM_MICROBATCHES, NUM_STEPS = 4, 3
PIPELINE = ("pp", "inner")


def blocks(num: int) -> list[nn.Module]:
    """The stages of a model, all of one shape, so that the stages' own names collide in earnest."""
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5)) for _ in range(num)]


def whole_pipeline(num: int) -> dict[str, torch.Tensor]:
    return {f"{i}.{n}": p.detach().clone() for i, block in enumerate(blocks(num)) for n, p in block.named_parameters()}


class Pipeline:
    """This rank's stages of a model of as many stages as the schedule wants, plain or wrapped by `inner`."""

    def __init__(self, schedule: str, inner: str = "plain"):
        kind, per_rank = SCHEDULES[schedule]
        group = None if inner == "plain" else submesh("pp", 2, 2, names=PIPELINE).get_group()
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.num_stages = per_rank * size
        every = blocks(self.num_stages)
        self.mine = {i: WRAPS[inner](every[i]) for i in range(rank, self.num_stages, size)}
        stages = [
            PipelineStage(block, i, self.num_stages, torch.device("cpu"), group=group) for i, block in self.mine.items()
        ]
        self._schedule = kind(stages if per_rank > 1 else stages[0], NUM_MICROBATCHES, loss_fn=_loss)

    def named_parameters(self, by_stage: bool = True) -> list[tuple[str, nn.Parameter]]:
        """By names of the whole model, or by those that a stage's own module has (several stages on a rank: numbered from 0)."""
        numbers = self.mine if by_stage else range(len(self.mine))
        prefix = [f"{i}." for i in numbers] if by_stage or len(self.mine) > 1 else [""]
        return [
            (start + name, param)
            for start, block in zip(prefix, self.mine.values(), strict=True)
            for name, param in block.named_parameters()
        ]

    def backward(self, step: int) -> None:
        x = torch.linspace(-1 - step, 1, 40).view(8, 5)
        first = (x,) if 0 in self.mine else ()
        last = {"target": x.flip(0)} if self.num_stages - 1 in self.mine else {}
        self._schedule.step(*first, **last)


def _loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).square().mean()


def _fsdp(block: nn.Module) -> nn.Module:
    return fully_shard(block, mesh=submesh("inner", 2, 2, names=PIPELINE))


def _tp(block: nn.Module) -> nn.Module:
    """The norm's copies over `inner` are plain."""
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(block, submesh("inner", 2, 2, names=PIPELINE), plan)


WRAPS = {"plain": lambda block: block, "fsdp": _fsdp, "tp": _tp}
CASES = [("gpipe", "plain"), ("1f1b", "plain"), ("interleaved", "plain"), ("1f1b", "fsdp"), ("gpipe", "tp")]


def trained(schedule: str, inner: str, how: str) -> tuple[list[dict], dict, list[dict], str]:
    """Each step's whole gradients of what this rank holds, the parameters at the end, what was measured, and the plan."""
    pipeline = Pipeline(schedule, inner)
    held = dict(pipeline.named_parameters())
    optimizer, rule = relative(how, held.items())
    grads, seen = [], []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        pipeline.backward(step)
        grads.append({name: whole_of(param.grad) for name, param in held.items()})
        optimizer.step()
        seen.append(seen_of(rule))
    return grads, {name: whole_of(param) for name, param in held.items()}, seen, str(rule.plan)


@functools.cache
def _alone(num: int) -> list[dict]:
    """The gradients of the first step in one process, micro-batch by micro-batch, as a pipeline adds them up."""
    whole = nn.Sequential(*blocks(num))
    x = torch.linspace(-1, 1, 40).view(8, 5)
    for part, target in zip(x.chunk(NUM_MICROBATCHES), x.flip(0).chunk(NUM_MICROBATCHES), strict=True):
        (_loss(whole(part), target) / NUM_MICROBATCHES).backward()
    return {name: param.grad for name, param in whole.named_parameters()}


@pytest.mark.parametrize("how", ["chain", "attach"])
@pytest.mark.parametrize(("schedule", "inner"), CASES)
def test_a_pipeline_decays_as_one_process_does(worlds, schedule, inner, how):
    """Relative to updates, parameters and gradients at once; with equal gradients every bit is equal."""
    ranks = worlds.run(2 if inner == "plain" else 4, trained, schedule, inner, how)
    grads = [{name: g for theirs, *_ in ranks for name, g in theirs[step].items()} for step in range(NUM_STEPS)]
    params = {name: param for _, theirs, *_ in ranks for name, param in theirs.items()}
    whole = whole_pipeline(4 if schedule == "interleaved" else 2)
    expected, measured = replay(whole, grads, how)
    assert differing(params, expected) == []
    assert all(seen == measured for _, _, seen, _ in ranks)
    assert all("rank" in plan.splitlines()[-1] for *_, plan in ranks)
    if inner == "plain":
        assert differing(grads[0], _alone(4 if schedule == "interleaved" else 2)) == []


# --- without names, or with names that are a stage's own ------------------------------------------------------------


def refusal(schedule: str, inner: str, names: str, init: str = "random") -> tuple[str, bool]:
    """The outcome on this rank, and whether a parameter changed."""
    import distwd

    pipeline = Pipeline(schedule, inner)
    params = pipeline.named_parameters(by_stage=names == "global")
    if init == "equal":  # as when every rank seeds alike and then builds its own stage
        for _, param in params:
            nn.init.ones_(param)
    pipeline.backward(0)
    before = [whole_of(param) for _, param in params]
    given = [param for _, param in params] if names == "none" else params
    chain = distwd.Chain(given, distwd.DirectWeightDecay(0.5), distwd.RelativeWeightDecay(0.1), distwd.LR(0.1))
    try:
        chain.step()
        outcome = f"{chain.plan.numel} elements"
    except distwd.PlanError as error:
        outcome = str(error)
    return outcome, any(not torch.equal(old, whole_of(param)) for old, (_, param) in zip(before, params, strict=True))


@pytest.mark.parametrize(("schedule", "inner"), CASES)
def test_without_names_a_pipeline_is_refused_and_names_are_asked_for(worlds, schedule, inner):
    outcomes = worlds.run(2 if inner == "plain" else 4, refusal, schedule, inner, "none")
    assert len(set(outcomes)) == 1
    assert "pass model.named_parameters()" in outcomes[0][0]
    assert not outcomes[0][1]


@pytest.mark.parametrize(("schedule", "inner"), CASES)
def test_names_that_are_a_stages_own_are_refused(worlds, schedule, inner):
    """Of two tensors of one name and shape some bits differ: they cannot be copies."""
    outcomes = worlds.run(2 if inner == "plain" else 4, refusal, schedule, inner, "own")
    assert len(set(outcomes)) == 1
    assert "copies of one piece have different bits" in outcomes[0][0]
    assert "different parameters (experts, pipeline stages), give them different names" in outcomes[0][0]
    assert not outcomes[0][1]


@pytest.mark.parametrize("inner", ["plain", "fsdp"])
def test_global_names_are_enough_even_where_all_stages_are_equal(worlds, inner):
    outcomes = worlds.run(2 if inner == "plain" else 4, refusal, "1f1b", inner, "global", "equal")
    assert set(outcomes) == {(f"{sum(p.numel() for p in whole_pipeline(2).values())} elements", True)}


@pytest.mark.parametrize("names", ["own", "none"])
@pytest.mark.parametrize(("schedule", "inner"), [("1f1b", "plain"), ("interleaved", "plain"), ("1f1b", "fsdp")])
def test_stages_that_were_initialised_alike_are_distinguished_by_their_gradients(worlds, schedule, inner, names):
    """Same names, same shapes, same bits: only their gradients show that they are no copies."""
    outcomes = worlds.run(2 if inner == "plain" else 4, refusal, schedule, inner, names, "equal")
    assert len(set(outcomes)) == 1
    assert ("different gradients" in outcomes[0][0]) or (names == "none" and inner == "fsdp")  # meshes show that one
    assert "different names" in outcomes[0][0]
    assert ("pass model.named_parameters()" in outcomes[0][0]) == (names == "none")
    assert not outcomes[0][1]
