"""Compare finished runs: a short table on the terminal, and a picture of loss, coefficient and ‖params‖.

    python launch/report.py runs/demo/relative runs/demo/none --picture runs/demo/picture.png

It reads nothing but the log.jsonl and summary.json that `train.py` writes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from journal import mean, read_log
from matplotlib import pyplot
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

# A pair that people with any kind of colour vision tell apart; more than two runs go on with matplotlib's own.
COLORS = ("#0b6e99", "#c8553d", "C2", "C3", "C4", "C5")


class Run:
    """One folder that `train.py` wrote: its log, line by line, and its summary."""

    def __init__(self, folder: Path) -> None:
        self.log = read_log(folder)
        self.summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        self.last: dict[str, Any] = self.log[-1]

    @property
    def name(self) -> str:
        options = self.summary["options"]
        if options["decay"] == "none":
            return "without decay"
        return f"{options['decay']} decay, λ = {options['weight_decay']:g}"

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of what the log has under `key`, where it has it."""
        points = [(line["step"], mean(line[key])) for line in self.log]
        known = [(step, value) for step, value in points if value is not None]
        return [step for step, _ in known], [value for _, value in known]


def make_table(runs: list[Run]) -> Table:
    """One column a run. Collectives are those that were counted during the last step that was logged."""
    table = Table(title=f"after {runs[0].last['step']} steps")
    table.add_column()
    for run in runs:
        table.add_column(run.name, justify="right")
    for title, key in (
        ("training loss", "loss"),
        ("validation loss", "val_loss"),
        ("‖params‖", "param_norm"),
        ("metric", "metric"),
        ("coefficient", "coefficient"),
    ):
        table.add_row(title, *(show(mean(run.last[key])) for run in runs))
    table.add_row("collectives per optimizer step", *(str(run.last["collectives"]) for run in runs))
    table.add_row("parameters that differ from\nthe one-process replica", *(show_check(run) for run in runs))
    return table


def show(number: float | None) -> str:
    return "–" if number is None else f"{number:.4g}"


def show_check(run: Run) -> str:
    check = run.summary["check"]
    if check is None:
        return "not checked"
    style = "bold green" if check["parameters_differ"] == 0 else "bold red"
    return f"[{style}]{check['parameters_differ']}[/] of {check['parameters']}"


def draw(runs: list[Run], picture: Path) -> None:
    """Three panels over the steps, a line a run."""
    matplotlib.use("Agg")  # no display is needed, and none may be there
    figure, (loss, coefficient, norm) = pyplot.subplots(3, 1, figsize=(7.5, 8.5), sharex=True, layout="constrained")
    for run, color in zip(runs, COLORS, strict=False):
        loss.plot(*run.curve("loss"), color=color, alpha=0.45, linewidth=1, label=f"{run.name}: training")
        loss.plot(*run.curve("val_loss"), color=color, marker="o", markersize=4, label=f"{run.name}: validation")
        coefficient.plot(*run.curve("coefficient"), color=color, label=run.name)
        norm.plot(*run.curve("param_norm"), color=color, label=run.name)
    finish(loss, "loss (nats per byte)")
    finish(coefficient, "coefficient")
    finish(norm, "‖params‖")
    norm.set_xlabel("step")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


def finish(axes: Axes, title: str) -> None:
    axes.set_ylabel(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="--out of a finished run")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    options = parser.parse_args()
    for folder in options.folders:
        if not (folder / "summary.json").exists():
            parser.error(f"{folder} holds no finished run (no summary.json)")
    runs = [Run(folder) for folder in options.folders]
    Console().print(make_table(runs))
    if options.picture:
        draw(runs, options.picture)
        print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
