"""`python -m distwd verify` on ranks that are there already: every layout holds, and each fault of distwd is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from distwd import Plan
from distwd.cli import layouts, verify
from distwd.cli.process import Ranks
from distwd.cli.rules import RULES, WAYS

SOME = ("l2 of params", "mad of update")


@pytest.fixture(scope="module")
def reference() -> verify.Reference:
    cases = [verify.Case(rule, way) for rule in RULES if rule.name.endswith(SOME) for way in WAYS]
    return verify.run_alone(torch.device("cpu"), cases)


def judged(
    reference: verify.Reference, folder: Path | None, names: tuple[str, ...], mutant: str = ""
) -> list[verify.Verdict]:
    """On ranks: the verdicts of the layouts with these names."""
    ranks = Ranks(torch.device("cpu"), "gloo", dist.get_rank(), dist.get_world_size(), ("here",))
    some = [layout for layout in layouts.layouts_of(ranks.size, "cpu")[0] if layout.name in names]
    with MUTANTS[mutant]() if mutant else mock.MagicMock():
        return [verify.judge(layout, reference, ranks, folder and folder / layout.name) for layout in some]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_layout_holds(worlds, reference, tmp_path, size):
    names = {2: ("TP", "2 stages"), 3: ("HSDP", "experts"), 4: ("FSDP2 x TP", "experts", "2 stages")}[size]
    for verdicts in worlds.run(size, judged, reference, tmp_path, names):
        assert [verdict.layout for verdict in verdicts] == list(names)
        for verdict in verdicts:
            assert verdict.faults == []
            assert verdict.equal == verdict.resumed == verdict.cases == 4
            assert verdict.collectives == {1: [1]}


def patched(target: str, change: Callable[[Any], Any]) -> Any:
    """Replace what `target` names by `change(original)`."""
    owner, _, name = target.rpartition(".")
    module = __import__(owner, fromlist=[name])
    return mock.patch.object(module, name, change(getattr(module, name)))


def no_reduction() -> Any:
    """Each rank takes its own part for the whole."""
    return patched("distwd.metrics.measure.sum_over_ranks", lambda reduce: lambda values, world: values)


def wrong_group() -> Any:
    """The sum stops at one axis of a mesh."""
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("far", "near"))["near"].get_group()

    def change(reduce: Any) -> Any:
        return lambda values, world: reduce(values, dataclasses.replace(world, group=pairs))

    return patched("distwd.metrics.measure.sum_over_ranks", change)


def copies_count() -> Any:
    """Every copy counts."""

    def change(build: Any) -> Any:
        def wrong(*args: Any) -> Any:
            built = build(*args)
            return dataclasses.replace(built, owned=(True,) * len(built.owned))

        return wrong

    # In a first step most wrong owners are found out by the gradients of copies. Here the numbers have to show it.
    both = ExitStack()
    both.enter_context(patched("distwd.metrics.plan.build", change))
    both.enter_context(mock.patch("distwd.optimizers.init_step.check_gradients"))
    return both


def stale_plan() -> Any:
    """A plan is never built anew."""
    return mock.patch.object(Plan, "fits", return_value=True)


def one_more() -> Any:
    """A collective that nobody needs."""

    def change(reduce: Any) -> Any:
        return lambda values, world: reduce(values, world) + 0 * reduce(values.clone(), world)

    return patched("distwd.metrics.measure.sum_over_ranks", change)


def forgotten_state() -> Any:
    """A checkpoint lacks the optimizer's memory."""

    def change(load: Any) -> Any:
        def wrong(model: Any, optimizer: Any, state: Any, options: Any) -> None:
            load(model, optimizer, state, options=options)
            for entry in optimizer.state.values():
                entry["exp_avg"].zero_()

        return wrong

    return patched("distwd.cli.verify.set_optimizer_state_dict", change)


MUTANTS = {
    "no reduction": no_reduction,
    "wrong group": wrong_group,
    "copies count": copies_count,
    "stale plan": stale_plan,
    "one more": one_more,
    "forgotten state": forgotten_state,
}
CAUGHT = [
    ("no reduction", "FSDP2", 4, "bits"),
    ("no reduction", "2 stages", 4, "bits"),
    ("wrong group", "FSDP2 x TP", 4, "bits"),
    ("wrong group", "experts", 4, "bits"),
    ("copies count", "DDP", 2, "bits"),
    ("copies count", "TP", 2, "bits"),
    ("stale plan", "FSDP2", 2, "error"),
    ("one more", "FSDP2", 2, "collectives"),
    ("forgotten state", "FSDP2", 2, "resume"),
]


@pytest.mark.parametrize(("mutant", "layout", "size", "check"), CAUGHT)
def test_a_fault_is_found_and_named(worlds, reference, tmp_path, mutant, layout, size, check):
    folder = tmp_path if check == "resume" else None
    for (verdict,) in worlds.run(size, judged, reference, folder, (layout,), mutant):
        assert check in {fault.check for fault in verdict.faults}
        assert len({fault.check for fault in verdict.faults} - {"collectives"}) <= 1
        fault = next(fault for fault in verdict.faults if fault.check == check)
        assert fault.layout == layout
        if check == "bits":
            assert "elements here, largest difference" in fault.text
            assert "in one process" in fault.text  # the number that is wrong


def test_an_error_is_reported_with_its_layout():
    error = verify.Fault("TP", "error", "", 0, "PlanError: no (alike on every rank)")
    verdicts = [verify.Verdict("DDP", "dp=2", 4, 4, None, {0: [0], 1: [1]}), verify.Verdict("TP", "tp=2", 4)]
    verdicts[1].faults = [error]
    words = dict.fromkeys(("distwd", "torch", "python", "device", "backend", "compared"), "x")
    result = {
        **words,
        "ranks": 2,
        "machines": 2,
        "left_out": {},
        "resume_left_out": "2 machines need a folder",
        "seconds": 1,
    }
    lines = verify.report(result, verdicts).splitlines()
    assert "FAIL TP, error, rank 0: PlanError: no (alike on every rank)" in lines
    assert "left out: resume, 2 machines need a folder" in lines
    assert [line.split() for line in lines if line.startswith(("DDP", "TP"))] == [
        ["DDP", "dp=2", "4", "of", "4", "0", "and", "1", "-", "0.0"],
        ["TP", "tp=2", "ERROR", "-", "ERROR", "0.0"],
    ]
    assert lines[-1].startswith("FAIL: 1 of 2 rows")


def test_folders_that_not_every_machine_sees_are_left_out(worlds):
    for folder, reason in worlds.run(2, on_two_machines):
        assert folder is None
        assert "--folder" in reason


def on_two_machines() -> tuple[Path | None, str]:
    ranks = Ranks(torch.device("cpu"), "gloo", dist.get_rank(), dist.get_world_size(), ("one", "other"))
    return verify.make_shared_folder(None, ranks)
