"""What a run tells: a progress bar for the eye, log.jsonl and summary.json for everything else."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


class Journal:
    """Written by rank 0; silent on the others, so that the program needs no `if`."""

    def __init__(self, folder: Path, is_main: bool, start: int, steps: int) -> None:
        self.is_main = is_main
        self.log = folder / "log.jsonl"
        self.summary = folder / "summary.json"
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            forget_after_(self.log, start)
            self.summary.unlink(missing_ok=True)
        # Not on a terminal, every refresh is a line of its own in somebody's file.
        interval = 0.5 if sys.stderr.isatty() else 15
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not is_main, mininterval=interval)

    def advance(self) -> None:
        self.bar.update()

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one line to the log, and show the loss, the coefficient and the speed beside the bar."""
        if not self.is_main:
            return
        with self.log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        shown = {"loss": record["loss"], "coefficient": mean(record["coefficient"]), "tokens/s": record["tokens_per_s"]}
        self.bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items() if value is not None}, refresh=False)

    def close(self, summary: Mapping[str, Any]) -> None:
        self.bar.close()
        if self.is_main:
            self.summary.write_text(json.dumps(summary, indent=2) + "\n")


class Stopwatch:
    """Tokens per second since the last look."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tokens = 0
        self.since = time.perf_counter()

    def look(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        speed = self.tokens / (now - self.since)
        self.tokens, self.since = 0, now
        return speed


def forget_after_(log: Path, step: int) -> None:
    """Drop the lines that a resumed run is going to write again; all of them for a new run."""
    lines = log.read_text().splitlines() if log.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    log.write_text("".join(line + "\n" for line in kept))


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def as_numbers(value: Any) -> Any:
    """A 0-d tensor as a float; a mapping (scope "group" or "tensor") as a dict, one number per matrix as a list of floats."""
    if isinstance(value, Mapping):
        return {str(key): as_numbers(part) for key, part in value.items()}
    if isinstance(value, torch.Tensor) and value.dim():
        return value.tolist()
    return None if value is None else float(value)


def mean(value: Any) -> float | None:
    """One number to show for what may be one number per group, tensor or matrix."""
    if not isinstance(value, Mapping | list):
        return None if value is None else float(value)
    known = [
        part for one in (value.values() if isinstance(value, Mapping) else value) if (part := mean(one)) is not None
    ]
    return sum(known) / len(known) if known else None
