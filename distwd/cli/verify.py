"""`python -m distwd verify`: does a sharded model decay here exactly as one process does?

    made-up whole tensors ─┬─ one process, alone:  five steps of every rule  ── reference
                           └─ each layout on the ranks: the same five steps  ── every local element compared, every step

What is compared is what distwd answers for, and the optimizer: gradients are the same made-up numbers everywhere, since
a forward and backward pass rounds differently on every layout whatever the optimizer does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .._torch import local_tensor
from ..sharding.ownership import checksums_of, stable_hash
from ..sharding.tables import text_table
from .layouts import Layout, Whole, layouts_of, made_up, shapes
from .process import Ranks, join_ranks, pick_device, say, versions
from .rules import WAYS, RuleCase, rules_named
from .wire import Wire

NUM_STEPS, SAVED_AFTER = 5, 3
# These join as a group of their own after the first step, so that a plan has to be built anew. Every pipeline stage has
# one.
LATE = ("embed.weight", "head.weight")
COMPARED = (
    "Compared: every local element after every step, bit for bit, with one process that holds the whole model. Parameters "
    "and gradients are made-up numbers, the same everywhere: forward and backward round differently on each layout, and "
    "are not compared. The optimizer is Adam without fused kernels, whose rounding depends on where a tensor is cut."
)
SHOWN = 4  # faults of one layout
REPORT = "Please report this text, with the command and the number of machines, to the makers of distwd."


@dataclass(frozen=True, slots=True)
class Case:
    """A rule, in a chain or attached."""

    rule: RuleCase
    way: str

    @property
    def name(self) -> str:
        return f"{self.rule.name} ({self.way})"


@dataclass(frozen=True, slots=True)
class Fault:
    """What one rank saw that should not be.

    check: "bits", "collectives", "resume" or "error".
    text: what differs, and where.
    """

    layout: str
    check: str
    case: str
    rank: int
    text: str


@dataclass(slots=True)
class Verdict:
    """What all ranks saw of one layout.

    equal, resumed: cases in which all bits were equal, without and with a checkpoint in between; of `cases`. None: not
        tried.
    collectives: all-reduces of a step by what was promised: {0: [0], 1: [1]} is as it should be.
    seconds: of wall-clock time.
    """

    layout: str
    mesh: str
    cases: int
    equal: int | None = None
    resumed: int | None = None
    collectives: dict[int, list[int]] = field(default_factory=dict)
    seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)


class Run:
    """One case on this rank: a model, an optimizer with the rule, and what is seen after each step.

    whole: the values that its parameters begin with.
    numbers: which elements of the whole are here, see `Layout.element_numbers`.
    """

    def __init__(
        self, case: Case, layout: Layout, whole: Whole, numbers: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self.case, self.numbers = case, numbers
        self.model, self.named = layout.build(whole, device)
        # Ranks of other stages have other names in their groups, and a checkpoint keeps one list of groups for all
        # ranks. Flattened, each setting is saved by parameter, in five times as many pieces.
        self.form = StateDictOptions(flatten_optimizer_state_dict=layout.holds is not None)
        early = [(name, param) for name, param in self.named if name not in LATE]
        self.optimizer, self.stats = case.rule.optimizer(case.way, early)
        self.has_late = False
        self.counts: list[int] = []

    def add_late(self) -> None:
        """Add the parameters that come after the first step, as a group of their own."""
        if not self.has_late:
            late = [(name, param) for name, param in self.named if name in LATE]
            self.optimizer.add_param_group({"params": late})
            self.has_late = True

    def step(self, number: int, grads: Whole) -> None:
        """One step with these whole gradients. Counts its collectives, but for steps that build a plan."""
        if number == 1:
            self.add_late()
        for name, param in self.named:
            param.grad = torch.zeros_like(param)
            local_tensor(param.grad).copy_(grads[name].flatten()[self.numbers[name]])
        with Wire() as wire:
            self.optimizer.step()
        if number > 1:
            self.counts.append(len(wire.calls))

    def metrics(self) -> dict[str, float]:
        """What was measured in the last step, as numbers by name."""
        found: dict[str, float] = {}
        for stats in self.stats().values():
            metric: Any = stats.get("metric", {})
            by_name = metric if isinstance(metric, dict) else {"": metric}
            # Numbers by matrix are vectors, of the matrices that are here: they would tell no more than the parameter does.
            found |= {f"metric {key}".strip(): float(value) for key, value in by_name.items() if value.numel() == 1}
        return found

    def differing(self, whole: Whole, alone: Mapping[str, float]) -> str | None:
        """What differs from the whole model of one process, as text; None if nothing does."""
        worst, num_params, num_differ = "", 0, 0
        largest = -1.0
        for name, param in self.named:
            ours = local_tensor(param).detach()
            differ, gap = difference(ours, whole[name].flatten()[self.numbers[name]])
            num_params += differ > 0
            num_differ += differ
            if differ and not gap <= largest:  # a NaN is the largest of all
                largest, worst = gap, f"{name}: {differ} of {ours.numel()} elements here, largest difference {gap:.3g}"
        if not num_params:
            return None
        others = f", and in {num_params - 1} more parameters" if num_params > 1 else ""
        measured = [
            f"{key} is {value:.9g} here and {alone[key]:.9g} in one process"
            for key, value in self.metrics().items()
            if key in alone and value != alone[key]
        ]
        # The number that a rule measured tells most: of a sum that lacks a rank, or counts a copy twice.
        return "; ".join([f"{worst}{others}", *measured[:2]])

    def state(self) -> dict[str, Any]:
        """What a checkpoint of this run holds."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=self.form),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=self.form)


@dataclass(frozen=True, slots=True)
class Reference:
    """What one process makes of every case: after each step the whole parameters, and what was measured.

    start: the whole parameters before the first step.
    grads: whole gradients by step.
    digest: a hash of all bits.
    """

    start: dict[str, Tensor]
    grads: list[dict[str, Tensor]]
    params: dict[Case, list[dict[str, Tensor]]]
    metrics: dict[Case, list[dict[str, float]]]
    digest: int


def run_alone(device: torch.device, cases: Sequence[Case]) -> Reference:
    """Train every case in this process. To be called before there is a process group: so nothing can be sent."""

    def placed(values: Whole) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in values.items()}

    start = placed(made_up(0, 0.25))
    grads = [placed(made_up(1 + step, 2**-6)) for step in range(NUM_STEPS)]
    numbers = {
        name: torch.arange(torch.Size(shape).numel(), device=device).reshape(shape) for name, shape in shapes().items()
    }
    params: dict[Case, list[dict[str, Tensor]]] = {}
    metrics: dict[Case, list[dict[str, float]]] = {}
    checksums = []
    for case in cases:
        run = Run(case, Layout("one process", "", lambda net: None), start, numbers, device)
        params[case], metrics[case] = [], []
        for step, given in enumerate(grads):
            run.step(step, given)
            params[case].append({name: param.detach().clone() for name, param in run.named})
            metrics[case].append(run.metrics())
        checksums.append(checksums_of([param.detach() for _, param in run.named]))
    return Reference(start, grads, params, metrics, stable_hash(checksums))


def difference(ours: Tensor, theirs: Tensor) -> tuple[int, float]:
    """(elements whose bits differ, largest |a − b|): 0.0 and −0.0 differ, a NaN and the same NaN do not."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    differ = ours.contiguous().view(integers) != theirs.contiguous().view(integers)
    if not differ.any():
        return 0, 0.0
    return int(differ.sum()), float((ours[differ].double() - theirs[differ].double()).abs().max())


# --- one layout -------------------------------------------------------------------------------------------------------


def check_layout(
    layout: Layout, reference: Reference, ranks: Ranks, folder: Path | None
) -> tuple[list[Fault], dict[int, set[int]]]:
    """Train every case on a layout, save after the third step, and go on from the checkpoint with fresh models.

    folder: that every rank can reach; None: nothing is saved.
    Returns what is wrong on this rank, where the first step at which a case differs stands for those after it; and the
    numbers of collectives that steps made, by what was promised.
    """
    counted: dict[int, set[int]] = {}
    faults: dict[tuple[str, Case], Fault] = {}

    def note(check: str, case: Case, text: str | None) -> None:
        if text is not None:
            faults.setdefault((check, case), Fault(layout.name, check, case.name, ranks.rank, text))

    def compare(check: str, run: Run, step: int) -> None:
        text = run.differing(reference.params[run.case][step], reference.metrics[run.case][step])
        note(check, run.case, text and f"step {step + 1} of {NUM_STEPS}: {text}")

    cases = list(reference.params)
    numbers = layout.element_numbers(ranks.device)
    runs = [Run(case, layout, reference.start, numbers, ranks.device) for case in cases]
    for step, grads in enumerate(reference.grads):
        for run in runs:
            run.step(step, grads)
            compare("bits", run, step)
        if step + 1 == SAVED_AFTER and folder is not None:
            state_dict_saver.save({str(n): run.state() for n, run in enumerate(runs)}, checkpoint_id=folder)
    for run in runs:
        promised = run.case.rule.num_collectives if ranks.size > 1 else 0
        counted.setdefault(promised, set()).update(run.counts)
        wrong = sorted({count for count in run.counts if count != promised})
        note(
            "collectives",
            run.case,
            f"a step made {' or '.join(map(str, wrong))} collectives; promised: {promised}" if wrong else None,
        )
    if folder is None:
        return list(faults.values()), counted

    # Models that know nothing of the others: other values, optimizers without a step.
    nothing = {name: torch.zeros_like(value) for name, value in reference.start.items()}
    fresh = [Run(case, layout, nothing, numbers, ranks.device) for case in cases]
    for run in fresh:
        run.add_late()
    state = {str(n): run.state() for n, run in enumerate(fresh)}
    state_dict_loader.load(state, checkpoint_id=folder)
    for number, run in enumerate(fresh):
        run.load(state[str(number)])
        for step in range(SAVED_AFTER, NUM_STEPS):
            run.step(step, reference.grads[step])
            compare("resume", run, step)
    return list(faults.values()), counted


def judge(layout: Layout, reference: Reference, ranks: Ranks, folder: Path | None) -> Verdict:
    """Check a layout on all ranks together. The verdict is the same on every rank."""
    begun = time.monotonic()
    found = ranks.attempt(layout.name, lambda: check_layout(layout, reference, ranks, folder))
    num_cases = len(reference.params)
    verdict = Verdict(layout.name, layout.mesh, num_cases)
    if isinstance(found, str):
        verdict.faults = [Fault(layout.name, "error", "", ranks.rank, f"{found} (alike on every rank)")]
    else:
        of_ranks = ranks.gather(found)
        verdict.faults = [fault for faults, _ in of_ranks for fault in faults]
        for promised in found[1]:
            verdict.collectives[promised] = sorted({one for _, counted in of_ranks for one in counted[promised]})
        failed = {check: {f.case for f in verdict.faults if f.check == check} for check in ("bits", "resume")}
        verdict.equal = num_cases - len(failed["bits"])
        verdict.resumed = None if folder is None else num_cases - len(failed["resume"])
    verdict.seconds = time.monotonic() - begun
    return verdict


# --- the command ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layouts", nargs="+", metavar="NAME", help="only these, as in the table (DDP FSDP2 HSDP TP ...)"
    )
    parser.add_argument("--rules", nargs="+", metavar="WORD", help="only rules with one of these in their names")
    parser.add_argument(
        "--folder", type=Path, help="for a checkpoint: a folder that all machines share, emptied afterwards"
    )
    parser.add_argument("--backend", help="of the process group; left out: nccl on GPUs, gloo on CPUs")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds to wait for a rank that does not come (120)"
    )


def run(options: argparse.Namespace) -> int:
    """Check every layout that the ranks here allow; 0 if all is equal, 1 if not, 2 if there is nothing to check."""
    begun = time.monotonic()
    try:
        rules = rules_named(options.rules)
        device = pick_device()
    except ValueError as error:
        print(f"distwd verify: error: {error}", file=sys.stderr, flush=True)  # on every rank: torchrun ends the others
        return 2
    cases = [Case(rule, way) for rule in rules for way in WAYS]
    say(f"distwd verify: {len(cases)} cases ({len(rules)} rules, in a chain and attached), first in one process")
    reference = run_alone(device, cases)
    with join_ranks(device, options.backend, options.timeout) as ranks:
        layouts, left_out = layouts_of(ranks.size, device.type)
        if options.layouts is not None:
            known = [layout.name for layout in layouts]
            unknown = [name for name in options.layouts if name not in known]
            if unknown:
                say(f"distwd verify: error: --layouts {' '.join(unknown)}: on {ranks.size} ranks there are {known}")
                return 2
            layouts = [layout for layout in layouts if layout.name in options.layouts]
        # Bits are compared with this process's own reference, so the references are compared with one another.
        digests = ranks.gather(reference.digest)
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        alone = Verdict("one process", "each rank alone", len(cases), len(cases), seconds=time.monotonic() - begun)
        if odd:
            alone.equal = 0
            text = "other bits than rank 0 without any communication: other hardware, or another build of torch"
            alone.faults = [Fault(alone.layout, "bits", "all cases", rank, text) for rank in odd]
        verdicts = [alone]
        folder, reason = make_shared_folder(options.folder, ranks)
        for number, layout in enumerate(layouts):
            own = None if folder is None else folder / str(number)
            verdicts.append(judge(layout, reference, ranks, own))
            say(f"  {layout.name} ({layout.mesh}): {verdicts[-1].seconds:.1f} s")
        ranks.gather(None)  # nobody reads a checkpoint any more
        if folder is not None and ranks.rank == 0:
            shutil.rmtree(folder)
        is_equal = not any(verdict.faults for verdict in verdicts)
        result = {
            "command": "verify",
            "ok": is_equal,
            "ranks": ranks.size,
            "machines": len(ranks.hosts),
            "backend": ranks.backend,
            **versions(device),
            "cases": [case.name for case in cases],
            "layouts": [asdict(verdict) for verdict in verdicts],
            "left_out": left_out,
            "resume_left_out": reason,
            "compared": COMPARED,
            "seconds": round(time.monotonic() - begun, 1),
            "processor_seconds": round(time.process_time(), 1),
        }
        if ranks.rank == 0:
            print(json.dumps(result, indent=1) if options.json else report(result, verdicts), flush=True)
    return 0 if is_equal else 1


def make_shared_folder(wanted: Path | None, ranks: Ranks) -> tuple[Path | None, str]:
    """A new, empty folder that every rank can reach, made by rank 0; or None, and why there is none."""
    if wanted is None and len(ranks.hosts) > 1:
        return None, f"{len(ranks.hosts)} machines need a folder that they share: --folder"
    made = tempfile.mkdtemp(prefix="distwd-verify-", dir=wanted) if ranks.rank == 0 else ""
    folder = Path(ranks.gather(made)[0])
    unseen = [rank for rank, sees in enumerate(ranks.gather(folder.is_dir())) if not sees]
    if unseen:
        if ranks.rank == 0:
            folder.rmdir()
        return None, f"--folder {wanted}: rank {', '.join(map(str, unseen))} cannot see what rank 0 writes there"
    return folder, ""


def report(result: Mapping[str, Any], verdicts: list[Verdict]) -> str:
    """The table, what was left out, and every fault once, with the ranks that saw it."""
    num_ranks, num_machines = result["ranks"], result["machines"]
    where = f"{num_ranks} rank{'s' * (num_ranks > 1)} on {num_machines} machine{'s' * (num_machines > 1)}"
    head = (
        f"distwd {result['distwd']}, torch {result['torch']}, python {result['python']}, {where}, {result['backend']}"
    )
    rows = [("layout", "mesh", "bits", "collectives", "resume", "seconds")]
    for verdict in verdicts:
        bad = {fault.check for fault in verdict.faults}
        # Of absolute rules, then of relative ones.
        counts = " and ".join("/".join(map(str, counts)) for _, counts in sorted(verdict.collectives.items())) or "-"
        cells = []
        for check, number in (("bits", verdict.equal), ("resume", verdict.resumed)):
            word = "-" if number is None else f"{number} of {verdict.cases}"
            cells.append(f"FAIL, {word}" if check in bad else "ERROR" if "error" in bad else word)
        counts = f"FAIL, {counts}" if "collectives" in bad else counts
        rows.append((verdict.layout, verdict.mesh, cells[0], counts, cells[1], f"{verdict.seconds:.1f}"))
    lines = [f"{head}, {result['device']}", "", *text_table(rows), ""]
    lines += [f"left out: {name}, {reason}" for name, reason in result["left_out"].items()]
    lines += [f"left out: resume, {result['resume_left_out']}"] if result["resume_left_out"] else []
    lines.append(textwrap.fill(result["compared"], 98))
    for verdict in verdicts:
        alike: dict[tuple[str, str], list[Fault]] = {}
        for fault in verdict.faults:
            alike.setdefault((fault.check, fault.case), []).append(fault)
        shown = list(alike.items())[:SHOWN]
        for (check, case), faults in shown:
            on = f"rank {faults[0].rank}" + (f" and {len(faults) - 1} more" if len(faults) > 1 else "")
            lines.append(f"FAIL {verdict.layout}, {check}{f', {case}' if case else ''}, {on}: {faults[0].text}")
        if len(alike) > len(shown):
            lines.append(f"FAIL {verdict.layout}: {len(alike) - len(shown)} more; all of them: --json")
    num_failed = sum(bool(verdict.faults) for verdict in verdicts)
    if num_failed:
        lines.append(f"FAIL: {num_failed} of {len(verdicts)} rows are not as promised. {REPORT}")
    else:
        # On machines that do other work the two are far apart.
        lines.append(f"OK: {result['seconds']} s, of which the first rank computed {result['processor_seconds']} s")
    return "\n".join(lines)
