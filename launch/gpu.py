"""What only a GPU can tell, in parts of seconds each: run by launch/gpu.sh, or alone.

    python launch/gpu.py ceilings steps --out runs/gpu
    python launch/gpu.py steps --dry-run              on the CPU, with small tensors: shows that it works, and nothing else

Two clocks for every step: what the card needs (events around many steps that are queued behind one another), and how long the host
is busy until `step()` returns. A step is as long as the longer of the two. All times stand beside the bandwidth of a copy, measured
in the same run. Each part writes PART.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_cases import cases, equal_tensors

import distwd
from distwd.cli.bench import transformer
from distwd.cli.timing import BASELINE, Here, Named, Record, Shapes
from distwd.kernels import blocks

# Case names of the benchmark. The compiled ones on a CPU only where tensors are large.
STEPS = (
    "absolute",
    "relative params",
    "relative update",
    "cautious",
    "attach, relative update",
    "relative params, per tensor",
)
COMPILED = ("relative params, compiled", "relative update, compiled", "cautious, compiled")


class Card:
    """Where it runs: a card, or for a dry run the CPU in its place."""

    def __init__(self, is_dry: bool) -> None:
        self.is_dry = is_dry
        self.device = torch.device("cpu" if is_dry else "cuda")
        self.here = Here.alone(self.device, torch.get_num_threads(), side=8 if is_dry else None)

    def wait(self) -> None:
        if not self.is_dry:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], num: int) -> tuple[float, float]:
        """Of one call of `work`: (on the card, on the host), medians of 5 times `num` calls."""
        work()
        clocks = [self.here.times(work, num) for _ in range(1 if self.is_dry else 5)]
        on_card, on_host = (statistics.median(seconds) for seconds in zip(*clocks, strict=True))
        return on_card, on_host

    def named(self, shapes: Shapes) -> Named:
        """Parameters with gradients, the same numbers in every call."""
        return self.here.named(shapes, self.here.shards(shapes, seed=2), self.here.shards(shapes, seed=1))

    def models(self) -> dict[str, Shapes]:
        if self.is_dry:
            return {"4 tensors": equal_tensors(4)}
        return {
            "40 M elements, 70 tensors": transformer(512),
            "0.25 B elements, 70 tensors": transformer(1280),
            "1000 tensors of 4 k": equal_tensors(1000),
        }


def ceilings(card: Card) -> Record:
    """Bytes per second of a copy, a read and a multiplication in place: what all other times are held against."""
    x = torch.ones(1 << (12 if card.is_dry else 28), device=card.device)
    y = torch.empty_like(x)
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (8, lambda: y.copy_(x)),
        "read": (4, lambda: x.amax()),
        "mul_": (8, lambda: y.mul_(1.0)),
        "norm in float64": (4, lambda: torch._foreach_norm([x], 1, dtype=torch.float64)),
        "sum in float64": (4, lambda: x.sum(dtype=torch.float64)),
    }
    return {name: bytes_each * x.numel() / card.seconds(work, 5)[0] for name, (bytes_each, work) in works.items()}


def steps(card: Card) -> Record:
    """Seconds of a step, on the card and on the host, and bytes beyond what AdamW keeps, by model and case."""
    found: Record = {"copy": ceilings(card)["copy"]}
    for title, shapes in card.models().items():
        is_large = max(math.prod(shape) for _, shape in shapes) >= 1 << 20
        names = {BASELINE, *STEPS, *(COMPILED if is_large or not card.is_dry else ())}
        rows = {}
        for case in cases(is_large, card.device.type):
            if case.name not in names:
                continue
            # One after the other: all together they would not fit.
            named = card.named(shapes)
            step = case.make(named)
            begin = time.perf_counter()
            step()
            card.wait()
            first = time.perf_counter() - begin
            step()
            if not card.is_dry:
                torch.cuda.reset_peak_memory_stats()
            on_card, on_host = card.seconds(step, 3)
            peak = 0 if card.is_dry else torch.cuda.max_memory_allocated()
            rows[case.name] = {"card": on_card, "host": on_host, "first": first, "peak_bytes": peak}
            del named, step
            gc.collect()  # an optimizer and its hooks hold each other
        base = rows[BASELINE]
        for row in rows.values():
            row["ratio"] = row["card"] / base["card"]
        found[title] = rows
    return found


def launches(card: Card) -> Record:
    """Kernels of a step as the profiler counts them, for few and many parameters."""
    kind = torch.profiler.ProfilerActivity.CPU if card.is_dry else torch.profiler.ProfilerActivity.CUDA
    found: Record = {}
    for case in cases():
        if case.name not in (BASELINE, *STEPS):
            continue
        found[case.name] = {}
        for count in (4, 8) if card.is_dry else (10, 100, 1000):
            step = case.make(card.named(equal_tensors(count)))
            step()
            with torch.profiler.profile(activities=[kind]) as profile:
                step()
                card.wait()
            found[case.name][count] = sum(event.count for event in profile.key_averages())
    return found


def block_sizes(card: Card) -> Record:
    """Seconds of a step on the card by the size of a block; the default of distwd is 2^22 elements."""
    (shapes, *_) = card.models().values()
    usual, found = blocks._GPU_BLOCK, {}
    rules: dict[str, Any] = {
        "std of params": distwd.RelativeWeightDecay(0.1, norm_input="params", metric="std"),
        "cautious": distwd.CautiousWeightDecay(0.1),
    }
    try:
        for power in (20, 22, 24, 26):
            blocks._GPU_BLOCK = 1 << power
            for name, rule in rules.items():
                chain = distwd.Chain(card.named(shapes), distwd.Adam(fused=True), rule, distwd.LR(1e-3))
                found[f"{name}, 2^{power}"] = card.seconds(chain.step, 3)[0]
    finally:
        blocks._GPU_BLOCK = usual
    return found


def numerics(card: Card) -> Record:
    """Elements that differ between a tensor stepped whole and cut in two at an odd place, by kernel; 0: the cut does not show."""
    found: Record = {}
    size, cut = 100_003, 33_331
    kinds: list[dict[str, Any]] = [{"fused": True}, {"foreach": True}, {"foreach": False}]
    for kind in kinds:
        for name, rule in {"none": None, "cautious": distwd.CautiousWeightDecay(0.1)}.items():
            (whole,) = card.named([("w", (size,))])
            value, grad = whole[1].detach().clone(), whole[1].grad
            assert grad is not None
            parts: Named = []
            for number, piece in enumerate((slice(cut), slice(cut, None))):
                # Views of one tensor, as a shard may lie in memory: the second begins at no multiple of 16 bytes.
                part = torch.nn.Parameter(value[piece])
                part.grad = grad[piece].clone()
                parts.append((f"w{number}", part))
            for named in ([whole], parts):
                rules = [] if rule is None else [rule]
                chain = distwd.Chain(named, distwd.Adam(**kind), *rules, distwd.LR(1e-3))
                for _ in range(3):
                    chain.step()
            joined = torch.cat([param.detach() for _, param in parts])
            found[f"Adam({kind}), decay {name}"] = int((joined != whole[1].detach()).sum())
    return found


PARTS: dict[str, Callable[[Card], Record]] = {
    "ceilings": ceilings,
    "numerics": numerics,
    "steps": steps,
    "launches": launches,
    "blocks": block_sizes,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="where PART.json is written")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small tensors")
    options = parser.parse_args(words)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; try it out with --dry-run")
    options.out.mkdir(parents=True, exist_ok=True)
    card = Card(options.dry_run)
    for part in options.parts:
        found = PARTS[part](card)
        (options.out / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({part: found}, indent=1), flush=True)


if __name__ == "__main__":
    main()
