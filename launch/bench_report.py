"""What `bench.py` prints and draws."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from distwd.cli.timing import MIB, Record, machine, steps_table, times_of, titled

# What is compared with, where it is installed.
OTHERS = ("torchzero", "heavyball", "emerging-optimizers")


def machine_and_others(device: torch.device) -> Record:
    """Where and with what a run is made, the others' versions among it."""
    found = machine(device)
    for package in OTHERS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def show(results: Record) -> None:
    """Print all that was measured, as tables: plain text, as the machines with cards have torch and little else."""
    say, where = print, results["machine"]
    hardware = where["gpu"] or f"{where['cores']} × {where['processor']}"
    say(f"{hardware}, load {where['load_before'][0]:.1f} before and {results['load_after'][0]:.1f} after")
    versions = [f"{name} {where[name] or 'absent'}" for name in ("python", "torch", "distwd", *OTHERS)]
    say(f"{', '.join(versions)}; {where['date']}: {where['command']}")
    for run in results.get("steps", ()):
        say(steps_table(run))
        for row in run["cases"]:
            if row["against"] != row["name"] and row["against"] != run["cases"][0]["name"]:
                # What others are slow at is talking to other ranks.
                is_aimed = row["goal"].startswith("≤") or (row["goal"] and run["ranks"] > 1)
                goal = f" (goal {row['goal']})" if is_aimed else ""
                say(f"  {row['name']}: {times_of(row['ratio_against'])} × {row['against']}{goal}")
        for name, reason in run["failed"].items():
            say(f"  {name} does not work here: {reason}")
    if "partial" in results:
        numel, ratios = results["partial"]["numel"], results["partial"]["ratio"]
        for way, name in {"partial": "float64 partial of mean|x|", "compiled": "the same, compiled"}.items():
            if way in ratios:
                say(f"{name}, {numel:,} elements: {times_of(ratios[way])} × x.sum() (goal ≤ 4)")
    if "plan" in results:
        say(plan_table(results["plan"]))
    for told in results.get("telling", ()):
        say(
            f"plan: a rank describes {told['params']} tensors over {told['ranks']} ranks in {told['seconds'] * 1000:.0f} ms"
        )
    for note in results["notes"]:
        say(note)


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
    return titled("plan: owners found", rows)


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
