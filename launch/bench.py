"""Time a step with and without distwd, as ratios to torch's fused AdamW with its own weight decay.

    python launch/bench.py                                    everything: 1 and 2 ranks (it starts them itself), three models
    python launch/bench.py --quick                            the same with small models and few rounds, to see that it works
    python launch/bench.py --ranks 1 --cases absolute relative --rounds 100
    python launch/bench.py --device cuda                      on GPUs: as many ranks as there are, and only what a card is needed for
    python launch/bench.py --parts plan telling               only the plans: on the CPU, whatever the device
    python launch/bench.py --curves                           also over 10² … 10⁴ parameters, on 1, 2 and 4 ranks, as a picture
    torchrun --nproc-per-node 2 launch/bench.py               only the ranks that torchrun has started

All cases are interleaved in one run: a round takes one step of each, in an order of its own, from a cold cache. A ratio is taken
within a round; the table shows its median (and quartiles), and the ratio of the best times. Collectives and memory are counted, not
computed. Gradients are fixed and shared; parameters and optimizer state are each case's own.

What a decay costs beside a training step is told by `python -m distwd bench`, which needs nothing but torch. Here is what compares
with others: decay by hand, torchzero, and, where they are installed, HeavyBall and NVIDIA's Emerging-Optimizers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import torch
    from bench_cases import chosen, equal_tensors, has_large, stacked_experts
    from bench_numbers import HELD, measure_partial, measure_plan, measure_telling
    from bench_ranks import is_under_torchrun, on_this_rank, run_on_ranks
    from bench_report import draw, machine_and_others, show

    from distwd.cli.bench import transformer
    from distwd.cli.process import num_cores
    from distwd.cli.timing import Here, Record, Shapes, compare, lost_in_waiting
except ModuleNotFoundError as error:
    sys.exit(f"bench.py: {error}; install what the program needs with: pip install -e '.[demo]'")

OURS = ("absolute", "relative params", "relative update")
OTHERS = ("by hand, params", "torchzero, update")
PARTS = ("steps", "partial", "plan", "telling")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of ranks (1 2)")
    parser.add_argument("--threads", type=int, help="threads of each rank (default: the cores, shared by the ranks)")
    parser.add_argument("--rounds", type=int, help="steps of every case (default: 11, with --quick 3)")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="WORD",
        help="only cases whose names hold one of these; a whole name: only that one",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small models, few rounds: shows that it works, not how fast"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="only these. Plans are made on the CPU and take a minute, so on GPUs the default is: steps partial",
    )
    parser.add_argument("--curves", action="store_true", help="also step time over the number of parameters")
    parser.add_argument(
        "--points", type=int, nargs="+", metavar="N", help="numbers of parameters for --curves (100 1000 10000)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--picture", type=Path, default=Path("runs/bench.png"), help="where --curves draws to")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu")
    if min(options.ranks) < 1:
        parser.error("--ranks: each must be 1 or more")
    if options.parts is None:
        options.parts = PARTS if options.device == "cpu" else PARTS[:2]
    if options.rounds is None:
        options.rounds = 3 if options.quick else 11
    return options


def models(quick: bool, device: str) -> dict[str, Shapes]:
    if quick:
        return {
            "a small transformer, 16 tensors": transformer(32, layers=2),
            "20 tensors of 4 k": equal_tensors(20),
            "8 stacked experts": stacked_experts(8, 16),
        }
    # A card steps 40 M elements in a third of a millisecond: less than Python takes.
    large = {"40 M elements, 70 tensors": transformer(512)}
    return {
        **(large if device == "cpu" else {"0.25 B elements, 70 tensors": transformer(1280)}),
        "1000 tensors of 4 k": equal_tensors(1000),
        "256 stacked experts": stacked_experts(256, 128),
    }


def measure_world(here: Here, models: Mapping[str, Shapes], rounds: int, words: Sequence[str]) -> list[Record]:
    """One world, some models: every case's times, ratios, collectives and extra memory; on every rank alike."""
    runs = []
    for title, shapes in models.items():
        here.say(f"{title}, on {here.size} rank{'s' if here.size > 1 else ''} ...")
        setting = {"model": title, "tensors": len(shapes), "ranks": here.size, "threads": here.threads}
        cases = chosen(words, has_large(shapes), here.device.type)
        runs.append({**setting, "rounds": rounds, **compare(here, shapes, cases, rounds)})
    return runs


class Bench:
    """Runs what the options ask for, in worlds of their own or on the ranks that torchrun has started."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.notes: list[str] = []
        self.started = is_under_torchrun()

    @property
    def is_main(self) -> bool:
        return int(os.environ.get("RANK", 0)) == 0

    def worlds(self, numbers: list[int]) -> list[int]:
        """Those numbers of ranks that can be run here."""
        if self.started:
            return [int(os.environ["WORLD_SIZE"])]
        if self.options.device == "cpu":
            return numbers
        gpus = torch.cuda.device_count()
        dropped = [number for number in numbers if number > gpus]
        if dropped:
            self.notes.append(
                f"left out: {', '.join(map(str, dropped))} ranks, as a rank needs a GPU and there are {gpus}"
            )
        return [number for number in numbers if number <= gpus]

    def threads(self, ranks: int) -> int:
        return int(self.options.threads or max(1, num_cores() // ranks))

    def let_threads_sleep(self) -> None:
        """On cores that are busy otherwise, threads that wait for others shall not spin: a step would take seconds, and say nothing.

        OpenMP reads this when a process begins, and the ranks are processes to come.
        """
        is_decided = (
            self.started or self.options.device != "cpu" or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ)
        )
        if not is_decided and (lost := lost_in_waiting(self.threads(1))) > 0.1:
            os.environ["OMP_WAIT_POLICY"] = "passive"
            self.notes.append(
                f"other work keeps these cores busy (threads lost {lost:.0%} of the time in waiting for one another): measured with "
                "OMP_WAIT_POLICY=passive, as threads that spin make every case, AdamW too, many times slower"
            )

    def steps(self, ranks: int, shapes: dict[str, Shapes], words: Sequence[str]) -> list[Record]:
        """Every model in one world."""
        arguments = (self.options.device, self.threads(ranks), shapes, self.options.rounds, words)
        found: list[Record] = (
            on_this_rank(measure_world, *arguments) if self.started else run_on_ranks(ranks, measure_world, *arguments)
        )
        return found

    def curves(self) -> list[Record]:
        """Step time over the number of parameters, of 1024 elements each."""
        counts = self.options.points or ((10, 100) if self.options.quick else (100, 1000, 10000))
        found = [
            run
            for ranks in self.worlds([1, 2, 4])
            for count in counts
            for run in self.steps(
                ranks, {f"{count} tensors of 1 k": equal_tensors(count, 32)}, self._compared(ranks, count)
            )
        ]
        if self.is_main:
            draw(found, self.options.picture)
            print(f"picture: {self.options.picture}")
        return found

    def _compared(self, ranks: int, count: int) -> Sequence[str]:
        """The others make a collective or two for each parameter: with thousands, and several ranks, a step of theirs takes seconds."""
        return OURS if ranks > 1 and ranks * count > 4000 else (*OURS, *OTHERS)

    def everything(self) -> Record:
        options = self.options
        self.let_threads_sleep()
        results: Record = {
            "machine": machine_and_others(torch.device(options.device)),
            "options": {k: str(v) for k, v in vars(options).items()},
        }
        worlds = self.worlds(options.ranks)
        if "steps" in options.parts:
            results["steps"] = [
                run
                for ranks in worlds
                for run in self.steps(ranks, models(options.quick, options.device), options.cases)
            ]
        if options.curves:
            results["curves"] = self.curves()
        if self.is_main and set(options.parts) - {"steps"}:
            arguments = (options.device, self.threads(1), options.quick, options.rounds, options.parts)
            # A process of its own, as threads of this one began before `let_threads_sleep`; under torchrun this one is as good.
            results.update(
                numbers(Here.alone(*arguments[:2]), *arguments[2:])
                if self.started
                else run_on_ranks(1, numbers, *arguments)
            )
        return {**results, "notes": self.notes, "load_after": os.getloadavg()}


def numbers(here: Here, quick: bool, rounds: int, parts: Sequence[str]) -> Record:
    """What one process measures alone."""
    here.say(f"{', '.join(part for part in parts if part != 'steps')} ...")
    sizes = [(100, 16), (100, 64), (100, 256)] if quick else [(100, 64), (1000, 64), (1000, 1024), (1000, 4096)]
    told = [(100, 64), *([] if quick else [(1000, 4096), (10000, 4096)])]
    ways: dict[str, Callable[[], Any]] = {
        "partial": lambda: measure_partial(here, 1_000_000 if quick else 40_000_000, rounds),
        "plan": lambda: [measure_plan(here, *size, held) for held in HELD for size in sizes],
        "telling": lambda: [measure_telling(*size) for size in told],
    }
    return {part: measure() for part, measure in ways.items() if part in parts}


def main() -> None:
    options = parse_options()
    bench = Bench(options)
    results = bench.everything()
    if not bench.is_main:
        return
    show(results)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"all numbers: {options.json}")


if __name__ == "__main__":
    main()
