"""The benchmark runs, counts what it claims to count, and its variants compute what they are named for. No time is asserted."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distwd.cli import timing
from distwd.cli.bench import transformer

ROOT = Path(__file__).resolve().parent.parent
OURS = {
    "chain, no decay": 0,
    "absolute": 0,
    "cautious": 0,
    "relative params": 1,
    "relative grad": 1,
    "relative update": 1,
    "RadialBrake": 1,
    "Hyperball": 1,
    "NormControl": 1,
    "ConstrainedWeightDecay": 1,
    "attach, absolute": 0,
    "attach, cautious": 0,
    "attach, relative params": 1,
    "attach, relative update": 1,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a quick run printed, and what it wrote."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    command = [sys.executable, "launch/bench.py", "--quick", "--rounds", "2", "--threads", "1", "--json", str(file)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.fixture(scope="module")
def cases() -> Any:
    """launch/bench_cases.py, by its path: `launch` is no package."""
    spec = importlib.util.spec_from_file_location("launch_bench_cases", ROOT / "launch" / "bench_cases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_case_is_timed_on_one_and_two_ranks_and_three_models(bench, cases):
    printed, written = bench
    assert [run["ranks"] for run in written["steps"]] == [1, 1, 1, 2, 2, 2]
    for run in written["steps"]:
        timed = {row["name"] for row in run["cases"]}
        assert timed | run["failed"].keys() == {case.name for case in cases.cases()}
        # Others' code may not work on DTensors.
        assert run["failed"].keys() <= {case.name for case in cases.cases() if case.is_foreign}
        assert run["copy"] > 0
        for row in run["cases"]:
            assert row["name"] in printed
            assert 0 < row["seconds"]["best"] <= row["seconds"]["median"]
            assert row["bytes_per_element"]["median"] > 0
            assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
    assert written["machine"]["torch"] == torch.__version__
    assert written["partial"]["ratio"].keys() == {"sum", "partial", "compiled"}
    assert all(ratio["median"] > 0 for ratio in written["partial"]["ratio"].values())
    assert "the same, compiled" in printed
    assert written["telling"][0]["params"] == 100


def test_only_the_parts_that_are_asked_for_are_run(monkeypatch):
    """Minutes of a card are not spent on plans, which are made on the CPU."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    program = importlib.import_module("bench")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words, parts in (
        ([], ["steps", "partial", "plan", "telling"]),
        (["--device", "cuda"], ["steps", "partial"]),
        (["--device", "cuda", "--parts", "plan"], ["plan"]),
    ):
        monkeypatch.setattr(sys, "argv", ["bench.py", *words])
        assert list(program.parse_options().parts) == parts
    found = program.numbers(program.Here.alone("cpu", 1), True, 1, ["telling"])
    assert list(found) == ["telling"]
    # What is not there is not shown.
    shown = {
        "machine": program.machine_and_others(torch.device("cpu")),
        "load_after": (0.0,),
        "notes": ["a note"],
        **found,
    }
    program.show(shown)


def test_memory_for_a_plan_grows_as_the_rows_do(bench):
    """Four times the ranks, four times the bytes, however tensors are held: nothing is squared in the number of ranks."""
    _, written = bench
    for held in ("cut", "copied", "uneven"):
        plans = {plan["ranks"]: plan for plan in written["plan"] if plan["held"] == held}
        assert plans.keys() == {16, 64, 256}
        for few, many in ((16, 64), (64, 256)):
            grown = plans[many]["rows"] / plans[few]["rows"]
            assert plans[many]["bytes"] <= 1.1 * grown * plans[few]["bytes"], held


def test_collectives_are_as_promised(bench):
    _, written = bench
    for run in written["steps"]:
        counted = {row["name"]: row["collectives"] for row in run["cases"]}
        several = run["ranks"] > 1
        for name, expected in OURS.items():
            assert counted[name] == expected * several, name
        for name in ("relative params, per tensor", "relative update, per tensor"):
            assert counted[name] == several, name
        assert counted["by hand, params"] == run["tensors"] * several


def test_extra_memory_is_seen_where_there_is_some(bench):
    """A copy of all parameters is noticed, and arithmetic in place is not taken for one."""
    _, written = bench
    for run in written["steps"]:
        extra = {row["name"]: row["extra_bytes"] for row in run["cases"]}
        copy = extra["by hand, update"]
        assert extra["AdamW fused"] < copy / 4
        assert extra["absolute"] < copy / 4
        assert copy > 10_000


def test_the_ways_to_be_compared_take_the_same_step(cases):
    """Otherwise their times would mean nothing."""

    def after_a_step(case: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        named = []
        for name, shape in transformer(16, layers=1) + cases.stacked_experts(3, 4):
            param = torch.nn.Parameter(torch.randn(shape, generator=generator))
            param.grad = torch.randn(shape, generator=generator)
            named.append((name, param))
        case.make(named)()
        return torch.cat([param.detach().flatten() for _, param in named])

    result = {case.name: after_a_step(case) for case in cases.cases(large=True)}
    compiled = [name for name in result if name.endswith(", compiled")]
    assert len(compiled) == 6
    for one, other in (
        *((name, name.removesuffix(", compiled")) for name in compiled),
        ("absolute", "AdamW fused"),
        ("AdamW foreach", "AdamW fused"),
        ("attach, absolute", "AdamW fused"),
        ("attach, relative params", "relative params"),
        ("attach, relative update", "relative update"),
        ("attach, cautious", "cautious"),
        ("by hand, params", "relative params"),
        ("by hand, update", "relative update"),
        ("by hand, Hyperball", "Hyperball"),
        ("torchzero, update", "relative update"),
        ("NVIDIA's hook, Hyperball", "Hyperball"),
        ("NVIDIA's hook, RadialBrake", "RadialBrake"),
    ):
        if one in result:
            torch.testing.assert_close(result[one], result[other], rtol=1e-5, atol=1e-7)
    assert not torch.equal(result["chain, no decay"], result["relative params"])


def test_the_first_model_is_the_one_that_is_described(cases):
    shapes = [shape for _, shape in transformer(512)]
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes)) == (70, 39_988_736)


# --- how it measures ------------------------------------------------------------------------------------------------


def adamw(named: timing.Named) -> timing.Way:
    return torch.optim.AdamW(named, lr=0.1, fused=True).step


SHAPES = [("w", (3, 4)), ("b", (2,))]
CASES = [
    timing.Case(timing.BASELINE, adamw),
    timing.Case("slow", adamw),
    timing.Case("other", adamw, "≤ 2", "slow"),
]


def test_ratios_shares_and_bytes_are_those_of_one_round(monkeypatch):
    """From times that are given. Taken over medians instead of rounds, the ratios would be others."""
    given = {
        "copy": [1.0, 2.0, 1.0],
        "forward and backward": [8.0, 16.0, 8.0],
        timing.BASELINE: [2.0, 4.0, 2.0],
        "slow": [3.0, 6.0, 5.0],
        "other": [6.0, 6.0, 5.0],
    }
    seen = []

    def in_turns(here, ways, rounds):
        seen.append(set(ways))
        return {name: [(seconds, seconds / 10) for seconds in given[name]] for name in ways}

    monkeypatch.setattr(timing, "_in_turns", in_turns)
    here = timing.Here.alone("cpu", torch.get_num_threads(), side=8)
    found = timing.compare(here, SHAPES, CASES, 3, {"forward and backward": lambda: None})
    assert seen == [set(given)]  # all of them in one run
    _, slow, other = found["cases"]
    assert slow["ratio"]["median"] == 1.5
    assert slow["ratio"]["of_best"] == 1.5
    assert other["ratio_against"]["median"] == 1.0
    assert other["ratio_against"]["best"] == 1.0
    assert slow["training"]["median"] == pytest.approx(0.1)  # (3 − 2) / (8 + 2), and (6 − 4) / (16 + 4)
    assert (
        slow["bytes_per_element"]["median"] == 2 * 8 * 8 * 4 / 14 * 3
    )  # of a copy of [8, 8], by elements of the model
    assert found["copy"] == 2 * 8 * 8 * 4
    assert found["beside"]["forward and backward"]["median"] == 8.0
    table = timing.steps_table({**found, "model": "a model", "ranks": 1, "threads": 1, "rounds": 3})
    assert "+10.0 %" in table
    assert "host ms" not in table  # a CPU has one clock


def test_what_does_not_fit_the_memory_comes_in_several_runs(monkeypatch):
    monkeypatch.setattr(timing.Here, "num_that_fit", lambda here, num_bytes: 1)
    runs = []
    in_turns = timing._in_turns
    monkeypatch.setattr(
        timing, "_in_turns", lambda here, ways, rounds: runs.append(set(ways)) or in_turns(here, ways, 1)
    )
    here = timing.Here.alone("cpu", torch.get_num_threads(), side=8)
    found = timing.compare(here, SHAPES, CASES, 1)
    # Each with the baseline, and with what it is compared with.
    assert runs == [{"copy", timing.BASELINE, "slow"}, {"copy", timing.BASELINE, "slow", "other"}]
    assert [row["name"] for row in found["cases"]] == [case.name for case in CASES]


def test_memory_that_is_free_is_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(timing.Path, "read_text", lambda path: "MemTotal: 9 kB\nMemAvailable:     80 kB\n")
    here = timing.Here.alone("cpu", torch.get_num_threads(), side=8)
    assert here.num_that_fit(1024) == 40
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert here.num_that_fit(1024) == 10


def test_a_card_has_two_clocks_and_is_not_read_between_the_calls(monkeypatch):
    """On a card that is made up: the events say 6 ms of three calls, the host is asked of itself."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def elapsed_time(self, other: Event) -> float:
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    ticks = iter([10.0, 10.3])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    world = timing.World(None, 0, 1, (), torch.device("cuda"))
    here = timing.Here(torch.device("cuda"), 1, None, world, torch.zeros(2, 2), calls=3)
    assert here.times(lambda: order.append("work")) == pytest.approx((0.002, 0.1))
    assert order == ["wait", "record", "work", "work", "work", "record", "wait"]


# --- busy cores -------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Any:
    """launch/bench.py, and a Bench for two threads in an environment without a setting of threads."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    for key in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--threads", "2"])
    module = importlib.import_module("bench")
    return module, module.Bench(module.parse_options())


@pytest.mark.parametrize("lost", [0.0, 0.05, 0.7])
def test_threads_sleep_where_much_time_is_lost_in_waiting_and_the_report_shows_it(started, lost, monkeypatch):
    module, bench = started
    monkeypatch.setattr(module, "lost_in_waiting", lambda threads: lost if threads == 2 else None)
    bench.let_threads_sleep()
    assert os.environ.pop("OMP_WAIT_POLICY", None) == ("passive" if lost > 0.1 else None)
    assert bool(bench.notes) == (lost > 0.1)


@pytest.mark.parametrize("key", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_the_users_own_setting_of_waiting_is_not_touched(started, key, monkeypatch):
    module, bench = started
    monkeypatch.setenv(key, "1000")
    monkeypatch.setattr(module, "lost_in_waiting", lambda threads: 1.0)
    bench.let_threads_sleep()
    assert {name for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ} == {key}


def test_time_is_lost_only_in_operations_that_take_a_time_slice(monkeypatch):
    threads = torch.get_num_threads()
    ticks = iter([0.0, 0.0001, 0.0002, 0.0102, 0.0103, 0.0203])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    assert timing.lost_in_waiting(threads, seconds=0.02) == pytest.approx(0.02 / 0.0203)
