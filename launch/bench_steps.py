"""Step times: all cases interleaved, many rounds, as ratios to torch's fused AdamW in the same round."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench_cases import BASELINE, Case, Named, Shapes, Way, chosen, has_large
from bench_ranks import Here, collectives_of

Record = dict[str, Any]


def measure_world(here: Here, models: Mapping[str, Shapes], rounds: int, words: Sequence[str]) -> list[Record]:
    """One world, some models: every case's times, ratios, collectives and extra memory; on every rank alike."""
    runs = []
    for title, shapes in models.items():
        here.say(f"{title}, on {here.size} rank{'s' if here.size > 1 else ''} ...")
        setting = {
            "model": title,
            "tensors": len(shapes),
            "ranks": here.size,
            "threads": here.threads,
            "rounds": rounds,
        }
        runs.append({**setting, **_measure_model(here, shapes, rounds, words)})
    return runs


def _measure_model(here: Here, shapes: Shapes, rounds: int, words: Sequence[str]) -> Record:
    gc.collect()  # what a model before this one has left must not be given back while this one is measured
    grads, values = here.shards(shapes, seed=1), here.shards(shapes, seed=2)
    ready: list[Ready] = []
    failed: dict[str, str] = {}
    for case in chosen(words, has_large(shapes), here.device.type):
        outcome = _prepare(here, case, here.named(shapes, values, grads))
        if isinstance(outcome, str):
            failed[case.name] = outcome
        else:
            ready.append(outcome)
    times = _interleaved(here, {one.case.name: one.step for one in ready}, rounds)
    held = next(one.held_bytes for one in ready if one.case.name == BASELINE)
    return {"cases": [_row(one, times, held) for one in ready], "failed": failed}


@dataclass(frozen=True)
class Ready:
    """A case that has taken its first steps, and what was counted meanwhile.

    held_bytes: what it keeps between steps. peak_bytes: the most there is during one.
    """

    case: Case
    step: Way
    held_bytes: int
    peak_bytes: int
    collectives: int


def _prepare(here: Here, case: Case, named: Named) -> Ready | str:
    """Build the optimizer and step it; or why that cannot be, where it is not ours. Alike on every rank."""
    made: list[Way] = []

    def begin() -> None:
        made.append(case.make(named))
        made[0]()
        made[0]()

    try:
        held, peak = here.bytes_of(begin, lambda: made[0]())
    except (RuntimeError, NotImplementedError) as error:
        if not case.is_foreign:
            raise
        return str(error).split("\n")[0]
    held_bytes, peak_bytes = (int(number) for number in here.worst([held, peak]))
    return Ready(case, made[0], held_bytes, peak_bytes, collectives_of(made[0]))


def _interleaved(here: Here, steps: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """[rounds] seconds by case. Each round takes every case once, in an order of its own that all ranks share."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            times[name].append(here.seconds(steps[name]))
        gc.collect()
    gc.enable()
    return {name: here.worst(seconds) for name, seconds in times.items()}


def _row(one: Ready, times: dict[str, list[float]], baseline_held: int) -> Record:
    """extra_bytes: at the peak of a step, beyond parameters, gradients and what fused AdamW keeps."""
    case, mine = one.case, times[one.case.name]
    return {
        "name": case.name,
        "seconds": spread(mine),
        "ratio": _ratio(mine, times[BASELINE]),
        "against": case.against,
        "goal": case.goal,
        "ratio_against": _ratio(mine, times[case.against]),
        "collectives": one.collectives,
        "extra_bytes": one.peak_bytes - baseline_held,
    }


def _ratio(mine: Sequence[float], other: Sequence[float]) -> Record:
    """By round, so that what slows the machine down for a while slows both; of the best, beside them."""
    by_round = [a / b for a, b in zip(mine, other, strict=True)]
    return {**spread(by_round), "of_best": min(mine) / min(other)}


def spread(numbers: Sequence[float]) -> Record:
    """The best, the quartiles and the median."""
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else [numbers[0]] * 3
    return {"best": min(numbers), "q1": low, "median": middle, "q3": high}
