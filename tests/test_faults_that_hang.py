"""Faults that show only after a timeout: some rank waits for another in vain. All end within the group's timeout, by name, unchanged.

Each fault has a world of its own, and a short timeout once all are there; they wait side by side.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout

import distwd
from tests import layouts, runs
from tests.layouts import whole_model
from tests.runs import PARAMS_SEED, differing
from tests.test_mutants import before_measuring
from tests.world import RankError, World

START, TIMEOUT = 120.0, 8.0  # of the process group, in seconds: until all are there, and then
SLACK = 15.0  # for a busy machine: the backend's clock and ours are not the same


@dataclass
class Ending:
    """How a step ended on one rank: the error, whether a parameter changed, and how long it took."""

    kind: str
    message: str
    changed: bool
    seconds: float


class Job:
    """A model with an optimizer, one step old."""

    def __init__(self, way: str, rules: Callable[[], list] = lambda: [distwd.RelativeWeightDecay(0.1)], **settings):
        self.held = layouts.place("ddp2" if dist.get_world_size() == 2 else "replicated3", whole_model(PARAMS_SEED))
        if way == "chain":
            self.optimizer = distwd.Chain(self.held.items(), distwd.Adam(), *rules(), distwd.LR(0.1), **settings)
        else:
            self.optimizer = torch.optim.AdamW(self.held.items(), lr=0.1, weight_decay=0, foreach=False)
            self.attachment = distwd.attach(self.optimizer, *rules(), **settings)

    def step(self, index: int = 0) -> None:
        runs.feed("ddp2" if dist.get_world_size() == 2 else "replicated3", self.held, index)
        self.optimizer.step()

    def ready(self) -> None:
        """Everybody is here, however long that took: from now on nobody waits for long."""
        dist.barrier()
        _set_pg_timeout(datetime.timedelta(seconds=TIMEOUT))

    def ending(self, act: Callable[[], object] | None = None) -> Ending:
        before = {name: param.detach().clone() for name, param in self.held.items()}
        start, kind, message = time.monotonic(), "nothing", ""
        try:
            (act or self.step)()
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        changed = any(not torch.equal(param, before[name]) for name, param in self.held.items())
        return Ending(kind, message, changed, time.monotonic() - start)


def guilty() -> bool:
    return dist.get_rank() == 1


def late() -> dict:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    return {"params": [("late", param)]}


def group_added_on_one_rank(way: str) -> Ending:
    job = Job(way)
    job.step()
    job.ready()
    if guilty():
        job.optimizer.add_param_group(late())
    return job.ending()


def taken_back_in_time(way: str) -> tuple[Ending, dict]:
    """The guilty rank hears of it while the others still wait, takes its group off again, and all go on."""
    job = Job(way)
    job.step()
    job.ready()
    ending = Ending("nothing", "", False, 0.0)
    if guilty():
        job.optimizer.add_param_group(late())
        ending = job.ending()
        gone = job.optimizer.param_groups.pop()
        job.optimizer.state.pop(gone["params"][0], None)
    job.step(1)
    job.step(2)
    return ending, {name: param.detach() for name, param in job.held.items()}


def other_shape_on_one_rank(way: str) -> Ending:
    job = Job(way)
    job.step()
    job.ready()
    if guilty():
        job.held["gate.weight"].data = torch.ones(2)
    return job.ending(job.optimizer.step)


def another_metric_later(way: str) -> Ending:
    job = Job(way)
    job.step()
    job.ready()
    if guilty():
        job.optimizer.param_groups[0]["metric"] = "std"
    return job.ending()


def bad_number_on_one_rank(way: str) -> Ending:
    job = Job(way)
    job.step()
    job.ready()
    if guilty():
        job.optimizer.param_groups[0]["weight_decay" if way == "chain" else "distwd_weight_decay"] = -1.0
    return job.ending()


def closure_raises_on_one_rank(way: str) -> Ending:
    job = Job(way)
    job.step()
    job.ready()

    def closure() -> None:
        if guilty():
            raise FloatingPointError("no data left")

    return job.ending(lambda: job.optimizer.step(closure))


def absolute_on_one_rank(way: str) -> Ending:
    rules = [distwd.WeightDecay(0.1)] if guilty() else [distwd.RelativeWeightDecay(0.1)]
    job = Job(way, lambda: rules)
    job.ready()
    return job.ending()


def plan_printed_on_one_rank(way: str) -> Ending:
    """`if rank == 0: print(optimizer.plan)`. What the other rank is in meanwhile goes on, and so does the first step."""
    job = Job(way)
    job.ready()
    ending = Ending("nothing", "", False, 0.0)
    if guilty():
        ending = job.ending(lambda: str((job.optimizer if way == "chain" else job.attachment).plan))
    else:
        time.sleep(TIMEOUT / 2)
    total = torch.ones(4880)
    dist.all_reduce(total)
    assert (total == 2).all()
    job.step()
    return ending


def other_group_on_one_rank(way: str) -> Ending:
    pair = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=TIMEOUT))
    job = Job(way, group=None if guilty() or dist.get_rank() == 2 else pair)
    job.ready()
    return job.ending()


def one_rank_does_not_step(way: str) -> Ending:
    """As where one rank skips a step because its own gradients are not finite."""
    job = Job(way)
    job.step()
    job.ready()
    return Ending("nothing", "", False, 0.0) if guilty() else job.ending()


def all_but_one_come(way: str) -> Ending:
    """It dies in the middle of a step: the others have sent their numbers, or are about to."""
    job = Job(way)
    job.step()
    job.ready()
    with before_measuring(lambda: guilty() and os.kill(os.getpid(), signal.SIGKILL)):
        ending = job.ending()
    raise AssertionError(f"survived: {ending}")  # the world reports what its ranks raise, and that one died


# fault: (ranks, how it ends on the guilty rank, how on the others, a pattern in every message)
FAULTS = {
    group_added_on_one_rank: (2, "PlanError", "PlanError", "new: late.*add_param_group"),
    other_shape_on_one_rank: (2, "PlanError", "PlanError", "shapes.*have changed"),
    another_metric_later: (3, "PlanError", "PlanError", "std of update"),
    bad_number_on_one_rank: (2, "ValueError", "PlanError", "-1.0"),
    closure_raises_on_one_rank: (2, "FloatingPointError", "PlanError", "no data left"),
    absolute_on_one_rank: (3, "nothing", "PlanError", "the same rules"),
    plan_printed_on_one_rank: (2, "PlanError", "nothing", "has come to build a plan.*on every rank, and print on one"),
    other_group_on_one_rank: (3, "PlanError", "PlanError", "same group="),
    one_rank_does_not_step: (2, "nothing", "CollectiveError", "another rank.*Timed out"),
}
WAYS = ("chain", "attach")
# A metric of an attached rule is no key of the groups: nobody can change it later.
RAN = [(fault, way) for fault in FAULTS for way in WAYS if (fault, way) != (another_metric_later, "attach")]


def run_alone(ranks: int, fn: Callable, *args: object) -> list:
    world = World(ranks, START)
    try:
        return world.run(fn, *args)
    finally:
        world.kill()


@pytest.fixture(scope="module")
def ended() -> Iterator[Callable[[Callable, str], list]]:
    """What came of a fault; all of them have been started together."""
    with ThreadPoolExecutor(10) as pool:
        waiting = {(fault, way): pool.submit(run_alone, FAULTS[fault][0], fault, way) for fault, way in RAN}
        waiting |= {(taken_back_in_time, way): pool.submit(run_alone, 2, taken_back_in_time, way) for way in WAYS}
        yield lambda fault, way: waiting[fault, way].result()


def name_of(thing: object) -> str:
    return getattr(thing, "__name__", str(thing))


@pytest.mark.parametrize(("fault", "way"), RAN, ids=name_of)
def test_a_fault_ends_on_every_rank_in_time_with_the_reason(ended, fault, way):
    _, its, others, pattern = FAULTS[fault]
    for rank, ending in enumerate(ended(fault, way)):
        assert ending.kind == (its if rank == 1 else others), ending
        assert ending.kind == "nothing" or re.search(pattern, ending.message), ending
        assert ending.seconds < TIMEOUT + SLACK
        # A rank with absolute decay alone makes no collective, and its step is right.
        assert ending.changed == (ending.kind == "nothing" and fault is absolute_on_one_rank), ending


@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_raise_the_same_for_a_group_that_one_has_added(ended, way):
    one, other = ended(group_added_on_one_rank, way)
    assert one.message == other.message
    assert "rank 1: " in one.message


@pytest.mark.parametrize("way", WAYS)
def test_a_group_added_by_mistake_can_be_taken_back_while_the_others_wait(ended, worlds, way):
    (_, good), (ending, other) = ended(taken_back_in_time, way)
    assert ending.kind == "PlanError"
    assert "new: late" in ending.message
    assert not ending.changed
    assert differing(good, other) == []
    assert differing(good, worlds.run(2, three_steps, way)[0]) == []


def three_steps(way: str) -> dict:
    job = Job(way)
    for index in range(3):
        job.step(index)
    return {name: param.detach() for name, param in job.held.items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_killed_in_a_step_ends_the_step_of_the_others(way):
    """At once, and with the parameters from before it."""
    with pytest.raises(RankError) as raised:
        run_alone(3, all_but_one_come, way)
    text = str(raised.value)
    assert "rank 1 raised:\nthe process died" in text
    assert "never came back" not in text
    for rank in (0, 2):
        (ending,) = re.findall(rf"rank {rank} raised:.*?survived: (Ending\(.*?\))\n", text, re.DOTALL)
        assert "kind='CollectiveError'" in ending
        assert "changed=False" in ending
