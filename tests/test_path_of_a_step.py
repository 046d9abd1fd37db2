"""How far a reader of a step has to walk: the files that it enters, and the frames from `step` down to a sum; each read once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import distwd
from distwd.sharding.params import ParamList
from distwd.step.phases import Schedule

PACKAGE = str(Path(distwd.__file__).parent)


def chain(*rules: distwd.Rule) -> Callable[[list[Any]], Any]:
    return lambda named: distwd.Chain(named, distwd.Adam(), *rules, distwd.LR(0.1))


def attached(*rules: distwd.Rule) -> Callable[[list[Any]], Any]:
    def make(named: list[Any]) -> Any:
        optimizer = torch.optim.AdamW(named, lr=0.1, weight_decay=0)
        distwd.attach(optimizer, *rules)
        return optimizer

    return make


CASES = {
    "chain, absolute": (chain(distwd.WeightDecay(0.1)), 14, None),
    "chain, relative": (chain(distwd.RelativeWeightDecay(0.1)), 23, 8),
    "attach, relative to the update": (attached(distwd.RelativeWeightDecay(0.1)), 27, 9),
}


def third_step(make: Callable[[list[Any]], Any]) -> tuple[Any, Callable[[], Any]]:
    """An optimizer after two steps, and its third: nothing is planned any more."""
    named = [(f"layer.{number}", torch.nn.Parameter(torch.randn(7, 5))) for number in range(3)]
    optimizer = make(named)

    def step() -> None:
        for _, param in named:
            param.grad = torch.randn(7, 5)
        optimizer.step()

    step()
    step()
    return optimizer, step


def walked(step: Callable[[], Any]) -> tuple[set[str], int]:
    """The files of distwd that a step enters, and the most frames of distwd above a `sum` of a tensor."""
    files: set[str] = set()
    deepest = 0

    def look(frame: FrameType, event: str, function: Any) -> None:
        nonlocal deepest
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            files.add(frame.f_code.co_filename)
        elif event == "c_call" and getattr(function, "__name__", "") == "sum":
            above: FrameType | None = frame
            frames = 0
            while above is not None:
                # Python 3.12 has no frames for comprehensions; older ones do.
                frames += above.f_code.co_filename.startswith(PACKAGE) and not above.f_code.co_name.startswith("<")
                above = above.f_back
            deepest = max(deepest, frames)

    sys.setprofile(look)
    try:
        step()
    finally:
        sys.setprofile(None)
    return files, deepest


@pytest.mark.parametrize("case", CASES)
def test_a_step_enters_few_files_and_few_frames(case):
    make, num_files, num_frames = CASES[case]
    _, step = third_step(make)
    files, frames = walked(step)
    assert len(files) <= num_files, sorted(files)
    assert num_frames is None or 0 < frames <= num_frames


@pytest.mark.parametrize("case", CASES)
def test_groups_are_read_once_and_the_schedule_is_kept(case, monkeypatch):
    make, _, _ = CASES[case]
    optimizer, step = third_step(make)
    calls = {"read": 0, "of": 0}
    read, of = ParamList.read, Schedule.of.__func__

    def counting_read(self: ParamList) -> Any:
        calls["read"] += 1
        return read(self)

    def counting_of(cls: type[Schedule], *args: Any) -> Any:
        calls["of"] += 1
        return of(cls, *args)

    monkeypatch.setattr(ParamList, "read", counting_read)
    monkeypatch.setattr(Schedule, "of", classmethod(counting_of))
    step()
    assert calls == {"read": 1, "of": 0}
    # A setting that changes leads to one new schedule (for the step, and for closures), once.
    groups = optimizer.param_groups
    groups[0]["distwd_weight_decay" if "distwd_weight_decay" in groups[0] else "weight_decay"] = 0.25
    calls.update(read=0, of=0)
    step()
    assert calls == {"read": 1, "of": 2}
