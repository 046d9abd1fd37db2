"""What `python -m distwd bench` and launch/bench.py measure with: several ways to step, in turns, on all ranks together."""

from __future__ import annotations

import gc
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ..sharding.collectives import gather_objects, sum_over_ranks
from ..sharding.tables import text_table
from ..sharding.world import World
from .process import num_cores, versions
from .wire import Wire

Named = list[tuple[str, nn.Parameter]]
Shapes = list[tuple[str, tuple[int, ...]]]
Way = Callable[[], object]  # takes a step; called again and again
Record = dict[str, Any]  # what JSON can hold

BASELINE = "AdamW fused"
MIB = 1 << 20
# A matrix of floats: larger than the last-level cache of most CPUs, and of all cards.
_SIDE = {"cpu": 4096, "cuda": 8192}
# Of a case, in float32: the parameter, two moments, an update that waits and an anchor. Gradients are shared.
_BYTES_HELD = 20


@dataclass(frozen=True, slots=True)
class Here:
    """A rank: where it stands, and what it measures with.

    device: of its tensors.
    threads: of each operation on the CPU.
    mesh: all ranks in a row; None in a world of one.
    world: the same ranks, for a word with the others.
    sweep: [side, side] float32: what clears the caches, and keeps a card busy.
    calls: calls of a step that are timed at once, one behind the other.
    """

    device: torch.device
    threads: int
    mesh: DeviceMesh | None
    world: World
    sweep: Tensor
    calls: int

    @classmethod
    def alone(cls, device: torch.device | str, threads: int, side: int | None = None) -> Here:
        """This process, in a world of one. side: of `sweep`; None: as the device needs it."""
        torch.set_num_threads(threads)
        device = torch.device(device)
        side = side or _SIDE[device.type]
        sweep = torch.zeros(side, side, device=device)
        return cls(device, threads, None, World(None, 0, 1, (), device), sweep, 1 if device.type == "cpu" else 3)

    @classmethod
    def among(cls, device: torch.device | str, threads: int) -> Here:
        """This process among those of the process group; on GPUs its current one. Every rank calls it: it makes a mesh."""
        alone, world = cls.alone(device, threads), World.of(None)
        if world.size == 1:
            return alone
        mesh = init_device_mesh(alone.device.type, (world.size,))
        # From where their tensors are, as a plan decides it.
        world = world.at([alone.device], world.types_of([alone.device]))
        return cls(alone.device, threads, mesh, world, alone.sweep, alone.calls)

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def size(self) -> int:
        return self.world.size

    def say(self, text: str) -> None:
        """A word on how far it is, once."""
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def shards(self, shapes: Shapes, seed: int) -> list[Tensor]:
        """Random tensors, cut by rows over the ranks as FSDP2 does: this rank's part of each."""
        generator = torch.Generator(self.device).manual_seed(seed + self.rank)
        found = []
        for _, (num_rows, *rest) in shapes:
            rows = -(-num_rows // self.size)
            rows = max(0, min(rows, num_rows - rows * self.rank))
            found.append(torch.randn(rows, *rest, generator=generator, device=self.device))
        return found

    def named(self, shapes: Shapes, values: Sequence[Tensor], grads: Sequence[Tensor]) -> Named:
        """Parameters of their own that start at `values` and share `grads`; DTensors, where there are several ranks."""

        def whole(local: Tensor, shape: tuple[int, ...]) -> Tensor:
            if self.mesh is None:
                return local
            strides = torch.empty(shape, device="meta").stride()
            return DTensor.from_local(
                local, self.mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=strides
            )

        found: Named = []
        for (name, shape), value, grad in zip(shapes, values, grads, strict=True):
            param = nn.Parameter(whole(value.clone(), shape))
            param.grad = whole(grad, shape)
            found.append((name, param))
        return found

    def times(self, work: Way, calls: int | None = None) -> tuple[float, float]:
        """Seconds of one call of `work`: (on the device, on the host until it returns); on a CPU both are the same.

        Begun with a cold cache, and at the same time on every rank. A card is not read between the calls: on a card a step
        is as long as the longer of the two.
        """
        calls = calls or self.calls
        # In training, too, a backward pass lies between two steps, and leaves nothing of them in the cache.
        if self.device.type == "cpu":
            self.sweep.add_(1)
        if self.size > 1:
            sum_over_ranks(torch.zeros(1, device=self.device), self.world)
        if self.device.type == "cpu":
            begin = time.perf_counter()
            for _ in range(calls):
                work()
            seconds = (time.perf_counter() - begin) / calls
            return seconds, seconds
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # The card is kept busy (some 20 ms) until much is queued, or it would wait for the host and the events would time that.
        self.sweep @ self.sweep
        first.record()
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        seconds = (time.perf_counter() - begin) / calls
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1000 / calls, seconds

    def worst(self, numbers: Sequence[float]) -> list[float]:
        """The largest over the ranks, one by one: a step is over when the last rank is."""
        return [max(values) for values in zip(*gather_objects(list(numbers), self.world), strict=True)]

    def num_that_fit(self, num_bytes: int) -> int:
        """How many things of so many bytes each fit half of the memory that is free; the same number on every rank."""
        free = sys.maxsize
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info()[0]
        elif Path("/proc/meminfo").exists():
            lines = Path("/proc/meminfo").read_text().splitlines()
            (kib,) = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
            free = int(kib) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        fit: list[int] = gather_objects(free // 2 // num_bytes, self.world)
        return min(fit)


# --- numbers ----------------------------------------------------------------------------------------------------------


def spread(numbers: Sequence[float]) -> Record:
    """The best, the quartiles and the median."""
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else [numbers[0]] * 3
    return {"best": min(numbers), "q1": low, "median": middle, "q3": high}


def bytes_of(device: torch.device, begin: Way, work: Way) -> tuple[int, int]:
    """What `begin` has left in the allocator's hands, and the most there was during `work`, both since before `begin`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        begin()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() - before
        work()
        torch.cuda.synchronize()
        return held, torch.cuda.max_memory_allocated() - before
    # From the profiler's record of every block that torch's CPU allocator gave out and took back.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it tells of its own beginning and end on every use
    with profile(profile_memory=True) as record:
        begin()
        gc.collect()
        with record_function("work"):
            work()
    events = record.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == "work")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = sum(change for when, change in changes if when < start)
    return held, max(accumulate((change for when, change in changes if when >= start), initial=held))


def lost_in_waiting(threads: int, seconds: float = 0.5) -> float:
    """The share of time that threads lose because one of them has no core while the others wait for it.

    Operations of some µs one after the other: on cores that other work keeps busy, many take a time slice of the scheduler, 1 ms or more.
    """
    torch.set_num_threads(threads)
    tensor, lost = torch.zeros(1 << 16), 0.0
    begin = last = time.perf_counter()
    while last < begin + seconds:
        tensor.add_(1)
        now = time.perf_counter()
        lost += now - last if now - last > 1e-3 else 0.0
        last = now
    return lost / (last - begin)


def machine(device: torch.device) -> Record:
    """Where and with what a run is made: processor, cores, load, versions, command."""
    # What the environment says about threads matters as much as the options do.
    threading = [
        f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(("OMP_", "GOMP_", "KMP_"))
    ]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    # Of `python -m distwd` the first argument is a path.
    arguments = ["-m", "distwd", *sys.argv[1:]] if Path(sys.argv[0]).name == "__main__.py" else sys.argv
    return {
        **versions(device),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join([*threading, "python", *arguments]),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": num_cores(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "load_before": load_averages(),
    }


def load_averages() -> tuple[float, ...]:
    """Of the last 1, 5 and 15 minutes; empty where the system does not tell (Windows)."""
    return os.getloadavg() if hasattr(os, "getloadavg") else ()


# --- steps in turns ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One way to take a step.

    make: from named parameters to that way.
    goal: the ratio that is aimed at, to the time of the case `against`.
    is_foreign: others' code, which is left out on a layout where it does not work.
    """

    name: str
    make: Callable[[Named], Way]
    goal: str = ""
    against: str = BASELINE
    is_foreign: bool = False


def compare(
    here: Here, shapes: Shapes, cases: Sequence[Case], rounds: int, beside: Mapping[str, Way] | None = None
) -> Record:
    """Time all cases in turns: a round takes one step of each, in an order of its own that all ranks share.

    shapes: of the parameters; each case has parameters and state of its own.
    cases: the first is what the others are compared with. A ratio is of two steps of one round, so that what slows the machine
        down for a while slows both.
    beside: other work to time in the same rounds; with "forward and backward" there, the share of a training step is told.
    Cases that do not fit half of the free memory together come in several runs, each with the first case and all of `beside`.
    Returns, alike on every rank: {"cases": one record each, "failed": why others' code does not work here, "beside": seconds,
        "copy": bytes per second, read and written, of a large copy}.
    """
    gc.collect()  # what a model before this one has left must not be given back while this one is measured
    grads, values = here.shards(shapes, seed=1), here.shards(shapes, seed=2)
    numel = max(1, sum(grad.numel() for grad in grads))
    target, numbers = torch.empty_like(here.sweep), torch.zeros(2, dtype=torch.float64, device=here.device)
    works: dict[str, Way] = {"copy": lambda: target.copy_(here.sweep), **(beside or {})}
    if here.size > 1:
        works["all-reduce"] = lambda: sum_over_ranks(numbers, here.world)
    # The first call of a work allocates, and begins FSDP2.
    for work in works.values():
        work()

    base, by_name = cases[0].name, {case.name: case for case in cases}
    runs: list[dict[str, Case]] = [{}]
    limit = here.num_that_fit(_BYTES_HELD * numel)
    for case in cases[1:]:
        # A ratio is of one round, so what a case is compared with has to be in the same run, and so on from there.
        needed = {}
        while case.name != base:
            needed[case.name] = case
            case = by_name[case.against]
        if runs[-1] and len(runs[-1] | needed) + 1 > limit:
            runs.append({})
        runs[-1].update(needed)

    rows: dict[str, Record] = {}
    failed: dict[str, str] = {}
    others: dict[str, list[float]] = {name: [] for name in works}
    for number, run in enumerate(runs):
        if len(runs) > 1:
            here.say(f"  {number + 1} of {len(runs)} runs, as not all fits the memory")
        ready: dict[str, _Ready] = {}
        told = time.monotonic()
        for done, case in enumerate((cases[0], *run.values())):
            if time.monotonic() > told + 10:
                told = time.monotonic()
                here.say(f"  {done} of {len(run) + 1} have taken their first steps")
            outcome = _prepare(here, case, here.named(shapes, values, grads))
            if isinstance(outcome, str):
                failed[case.name] = outcome
            else:
                ready[case.name] = outcome
        clocks = _in_turns(here, {**works, **{name: one.step for name, one in ready.items()}}, rounds)
        device = {name: [on_device for on_device, _ in pairs] for name, pairs in clocks.items()}
        for name in works:
            others[name] += device[name]
        for name, one in ready.items():
            mine, plain = device[name], device[base]

            def ratio(other: Sequence[float], mine: Sequence[float] = mine) -> Record:
                return {
                    **spread([a / b for a, b in zip(mine, other, strict=True)]),
                    "of_best": min(mine) / min(other),
                }

            # Bytes for each element that a copy reads and writes in the time of the step.
            at_copy = [2 * target.nbytes / numel * a / b for a, b in zip(mine, device["copy"], strict=True)]
            row = {
                "name": name,
                "seconds": spread(mine),
                "host_seconds": None if here.device.type == "cpu" else spread([host for _, host in clocks[name]]),
                "ratio": ratio(plain),
                "against": one.case.against,
                "goal": one.case.goal,
                "ratio_against": ratio(device[one.case.against]),
                "bytes_per_element": spread(at_copy),
                "collectives": one.collectives,
                # At the peak of a step, beyond parameters, gradients and what the first case keeps.
                "extra_bytes": one.peak_bytes - ready[base].held_bytes,
            }
            if "forward and backward" in works:
                three = zip(mine, plain, device["forward and backward"], strict=True)
                row["training"] = spread([(a - b) / (b + model) for a, b, model in three])
            rows.setdefault(name, row)
    return {
        "cases": [rows[case.name] for case in cases if case.name in rows],
        "failed": failed,
        "beside": {name: spread(seconds) for name, seconds in others.items()},
        "copy": 2 * target.nbytes / statistics.median(others["copy"]),
    }


@dataclass(frozen=True, slots=True)
class _Ready:
    """A case that has taken its first steps, and what was counted meanwhile.

    held_bytes: what it keeps between steps. peak_bytes: the most there is during one.
    """

    case: Case
    step: Way
    held_bytes: int
    peak_bytes: int
    collectives: int


def _prepare(here: Here, case: Case, named: Named) -> _Ready | str:
    """Build the optimizer and step it; or why that cannot be, where it is not ours. Alike on every rank."""
    made: list[Way] = []

    def begin() -> None:
        made.append(case.make(named))
        made[0]()
        made[0]()

    try:
        held, peak = bytes_of(here.device, begin, lambda: made[0]())
    except (RuntimeError, NotImplementedError) as error:
        if not case.is_foreign:
            raise
        return str(error).split("\n")[0]
    held_bytes, peak_bytes = (int(number) for number in here.worst([held, peak]))
    # In a step of its own: a dispatch mode makes every operation slower, and keeps compiled code from running.
    with Wire() as wire:
        made[0]()
    return _Ready(case, made[0], held_bytes, peak_bytes, len(wire.calls))


def _in_turns(here: Here, ways: Mapping[str, Way], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """[rounds] seconds on the device and on the host, by name, of the slowest rank."""
    order = random.Random(0)
    clocks: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    # A collection would hit one case or another, and take as long as a step.
    gc.collect()
    gc.disable()
    try:
        told = time.monotonic()
        for number in range(rounds):
            for name in order.sample(list(ways), len(ways)):
                clocks[name].append(here.times(ways[name]))
            gc.collect()
            if time.monotonic() > told + 10:
                told = time.monotonic()
                here.say(f"  {number + 1} of {rounds} rounds")
    finally:
        gc.enable()
    return {
        name: list(zip(*(here.worst(seconds) for seconds in zip(*pairs, strict=True)), strict=True))
        for name, pairs in clocks.items()
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def times_of(ratio: Mapping[str, float]) -> str:
    """`median (first quartile–third quartile)`."""
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})"


def titled(title: str, rows: Sequence[Sequence[str]]) -> str:
    """A table under a line that says of what. Columns without any text are left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return "\n".join(["", title, *(f"  {line}" for line in text_table(list(zip(*columns, strict=True)))), ""])


def steps_table(run: Mapping[str, Any]) -> str:
    """One row a case of what `compare` found, and lines of what was timed beside them.

    run: the record of `compare`, with "model", "ranks", "threads" and "rounds".
    """
    ranks, threads = run["ranks"], run["threads"]
    where = f"{ranks} rank{'s' * (ranks > 1)} of {threads} thread{'s' * (threads > 1)}"
    base = run["cases"][0]["name"]
    rows = [
        [
            "step",
            "best ms",
            "median ms",
            "host ms",
            f"× {base}",
            "of best",
            "goal",
            "bytes/element",
            "training step",
            "collectives",
            "extra MiB",
        ]
    ]
    for row in run["cases"]:
        seconds, host, training = row["seconds"], row["host_seconds"], row.get("training")
        # A step of a card may take a tenth of a millisecond.
        rows.append(
            [
                row["name"],
                f"{seconds['best'] * 1000:.2f}",
                f"{seconds['median'] * 1000:.2f}",
                "" if host is None else f"{host['median'] * 1000:.2f}",
                times_of(row["ratio"]),
                f"{row['ratio']['of_best']:.2f}",
                row["goal"] if row["against"] == base else "",
                f"{row['bytes_per_element']['median']:.0f}",
                "" if training is None or row["name"] == base else f"{training['median'] * 100:+.1f} %",
                str(row["collectives"]),
                f"{row['extra_bytes'] / MIB:.1f}",
            ]
        )
    lines = [f"  a copy: {run['copy'] / 1e9:.1f} GB/s, read and written"]
    for name, seconds in run["beside"].items():
        if name != "copy":
            milliseconds = {key: value * 1000 for key, value in seconds.items()}
            lines.append(f"  {name}: {times_of(milliseconds)} ms")
    return titled(f"{run['model']}, {where}, {run['rounds']} rounds", rows) + "\n".join([*lines, ""])
