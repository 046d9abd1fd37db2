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

import distwd
from distwd.cli.process import num_cores as num_cores
from distwd.sharding.tables import text_table

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


def show(results: Record) -> None:
    """Print all that was measured, as tables: plain text, as the machines with cards have torch and little else."""
    say, where = print, results["machine"]
    hardware = where["gpu"] or f"{where['cores']} × {where['processor']}"
    say(f"{hardware}, load {where['load_before'][0]:.1f} before and {results['load_after'][0]:.1f} after")
    versions = [f"{name} {where[name] or 'absent'}" for name in ("python", "torch", "distwd", "torchzero")]
    say(f"{', '.join(versions)}; {where['date']}: {where['command']}")
    for run in results.get("steps", ()):
        say(steps_table(run))
        for row in run["cases"]:
            if row["against"] != row["name"] and row["against"] != run["cases"][0]["name"]:
                # What others are slow at is talking to other ranks.
                goal = f" (goal {row['goal']})" if row["goal"].startswith("≤") or run["ranks"] > 1 else ""
                say(f"  {row['name']}: {_times(row['ratio_against'])} × {row['against']}{goal}")
        for name, reason in run["failed"].items():
            say(f"  {name} does not work here: {reason}")
    if "partial" in results:
        numel, ratios = results["partial"]["numel"], results["partial"]["ratio"]
        for way, name in {"partial": "float64 partial of mean|x|", "compiled": "the same, compiled"}.items():
            if way in ratios:
                say(f"{name}, {numel:,} elements: {_times(ratios[way])} × x.sum() (goal ≤ 4)")
    if "plan" in results:
        say(plan_table(results["plan"]))
    for told in results.get("telling", ()):
        say(
            f"plan: a rank describes {told['params']} tensors over {told['ranks']} ranks in {told['seconds'] * 1000:.0f} ms"
        )
    for note in results["notes"]:
        say(note)


def steps_table(run: Record) -> str:
    """One row a case, under a line that says of what."""
    ranks = f"{run['ranks']} rank{'s' if run['ranks'] > 1 else ''} of {run['threads']} thread{'s' if run['threads'] > 1 else ''}"
    rows = [["step", "best ms", "median ms", "× AdamW fused", "of best", "goal", "collectives", "extra MiB"]]
    for row in run["cases"]:
        seconds, ratio = row["seconds"], row["ratio"]
        # A step of a card may take a tenth of a millisecond.
        rows.append(
            [
                row["name"],
                f"{seconds['best'] * 1000:.2f}",
                f"{seconds['median'] * 1000:.2f}",
                _times(ratio),
                f"{ratio['of_best']:.2f}",
                row["goal"] if row["against"] == run["cases"][0]["name"] else "",
                str(row["collectives"]),
                f"{row['extra_bytes'] / MIB:.1f}",
            ]
        )
    return _titled(f"{run['model']}, {ranks}, {run['rounds']} rounds", rows)


def _titled(title: str, rows: list[list[str]]) -> str:
    return "\n".join(["", title, *(f"  {line}" for line in text_table(rows)), ""])


def _times(ratio: Record) -> str:
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})"


def plan_table(plans: list[Record]) -> str:
    """Time and memory by the size of the job, and by row: a row is what one rank says of one tensor."""
    rows = [["held", "parameters", "ranks", "rows", "s", "µs per row", "MiB at the peak", "bytes per row"]]
    for plan in plans:
        count = plan["rows"]
        rows.append(
            [
                plan["held"],
                str(plan["params"]),
                str(plan["ranks"]),
                str(count),
                f"{plan['seconds']:.3f}",
                f"{plan['seconds'] / count * 1e6:.2f}",
                f"{plan['bytes'] / MIB:.0f}",
                f"{plan['bytes'] / count:.0f}",
            ]
        )
    return _titled("plan: owners found", rows)


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
