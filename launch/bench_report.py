"""What `bench.py` prints and draws."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import distwd
from distwd.cli.process import num_cores as num_cores

Record = dict[str, Any]
MIB = 1 << 20


def machine(device: str) -> Record:
    """Where and with what a run is made: processor, cores, load, versions, command."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join([*_threading(), "python", *sys.argv]),
        "processor": _processor(),
        "cores": num_cores(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "load_before": os.getloadavg(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "distwd": distwd.__version__,
        "torchzero": _version("torchzero"),
    }


def _threading() -> list[str]:
    """What the environment says about threads; it matters as much as the options do."""
    return [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(("OMP_", "GOMP_", "KMP_"))]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def show(console: Console, results: Record) -> None:
    """The whole of it as tables."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    where = results["machine"]
    hardware = where["gpu"] or f"{where['cores']} × {where['processor']}"
    say(f"{hardware}, load {where['load_before'][0]:.1f} before and {results['load_after'][0]:.1f} after")
    versions = [f"{name} {where[name] or 'absent'}" for name in ("python", "torch", "distwd", "torchzero")]
    say(f"{', '.join(versions)}; {where['date']}: {where['command']}")
    for run in results["steps"]:
        console.print(steps_table(run))
        for row in run["cases"]:
            if row["against"] != row["name"] and row["against"] != run["cases"][0]["name"]:
                # What others are slow at is talking to other ranks.
                goal = f" (goal {row['goal']})" if row["goal"].startswith("≤") or run["ranks"] > 1 else ""
                say(f"  {row['name']}: {_times(row['ratio_against'])} × {row['against']}{goal}")
        for name, reason in run["failed"].items():
            say(f"  {name} does not work here: {reason}")
    numel, ratios = results["partial"]["numel"], results["partial"]["ratio"]
    for way, name in {"partial": "float64 partial of mean|x|", "compiled": "the same, compiled"}.items():
        if way in ratios:
            say(f"{name}, {numel:,} elements: {_times(ratios[way])} × x.sum() (goal ≤ 4)")
    console.print(plan_table(results["plan"]))
    for told in results["telling"]:
        say(
            f"plan: a rank describes {told['params']} tensors over {told['ranks']} ranks in {told['seconds'] * 1000:.0f} ms"
        )
    for note in results["notes"]:
        say(note)


def steps_table(run: Record) -> Table:
    """One row a case."""
    ranks = f"{run['ranks']} rank{'s' if run['ranks'] > 1 else ''} of {run['threads']} thread{'s' if run['threads'] > 1 else ''}"
    table = Table(title=f"{run['model']}, {ranks}, {run['rounds']} rounds", title_justify="left", box=box.SIMPLE)
    table.add_column("step", no_wrap=True)
    for title in ("best ms", "median ms", "× AdamW fused", "of best", "goal", "collectives", "extra MiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in run["cases"]:
        seconds, ratio = row["seconds"], row["ratio"]
        table.add_row(
            row["name"],
            f"{seconds['best'] * 1000:.1f}",
            f"{seconds['median'] * 1000:.1f}",
            _times(ratio),
            f"{ratio['of_best']:.2f}",
            row["goal"] if row["against"] == run["cases"][0]["name"] else "",
            str(row["collectives"]),
            f"{row['extra_bytes'] / MIB:.1f}",
        )
    return table


def _times(ratio: Record) -> str:
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})"


def plan_table(plans: list[Record]) -> Table:
    """Time and memory by the size of the job, and by row: a row is what one rank says of one tensor."""
    table = Table(title="plan: owners found", title_justify="left", box=box.SIMPLE)
    for title in ("held", "parameters", "ranks", "rows", "s", "µs per row", "MiB at the peak", "bytes per row"):
        table.add_column(title, justify="left" if title == "held" else "right")
    for plan in plans:
        rows = plan["rows"]
        table.add_row(
            plan["held"],
            str(plan["params"]),
            str(plan["ranks"]),
            str(rows),
            f"{plan['seconds']:.3f}",
            f"{plan['seconds'] / rows * 1e6:.2f}",
            f"{plan['bytes'] / MIB:.0f}",
            f"{plan['bytes'] / rows:.0f}",
        )
    return table


def draw(runs: list[Record], picture: Path) -> None:
    """Step time over the number of parameters, a panel for each number of ranks, a line a case: the best, which others disturb least."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")  # no display is needed, and none may be there
    worlds = sorted({run["ranks"] for run in runs})
    figure, panels = pyplot.subplots(
        1, len(worlds), figsize=(5 * len(worlds), 4), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for panel, ranks in zip(panels[0], worlds, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for run in runs:
            for row in run["cases"] if run["ranks"] == ranks else []:
                lines.setdefault(row["name"], []).append((run["tensors"], row["seconds"]["best"] * 1000))
        for name, points in lines.items():
            panel.loglog([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=name)
        panel.set_title(f"{ranks} rank{'s' if ranks > 1 else ''}")
        panel.set_xlabel("parameters (1024 elements each)")
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("best step, ms")
    panels[0][0].legend(frameon=False, fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
