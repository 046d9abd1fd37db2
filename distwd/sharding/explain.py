"""The text of a PlanError: which parameters, what each rank holds of them, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .ownership import OwnerTable
from .params import NamedParam
from .pieces import Piece

# Faults of each kind that a text shows. Ranks need not send each other reports of more.
SHOWN = 5

# Some ranks want another plan while others keep the old one: add_param_group or another metric on one rank only.
_CHANGE_FIX = (
    "Change groups (add_param_group), shapes, placements and metrics between the same steps on every rank, with an empty "
    "group where a rank has nothing to add."
)
# Pipeline stages that all count their layers from 0; FSDP1's shards, of different lengths under one name; groups in
# another order.
_MISMATCH_FIX = (
    "give different parameters different names, and build every rank's model and param groups alike; shards in plain tensors need a "
    "layout: layout=Sharded.from_fsdp1(model) for FSDP1, {pattern: Sharded(group)} for others."
)
# A group= of too few ranks, or of several models; a parameter that was left out on one rank; Megatron's distributed
# optimizer, where a rank has no piece at all of some parameters.
_COVER_FIX = (
    "pass the group of exactly the ranks that hold the model (group=), and pass every parameter on every rank that "
    "holds a piece of it. With Sharded(group) every rank of the group has a piece, if need be an empty tensor; where that cannot be "
    "(Megatron's distributed optimizer), leave the layout out and give the pieces names of their own, such as f'{name} on rank {rank}'."
)
# ZeRO partitions have equal lengths, so they look like copies; experts of one shape under one name do too. Real copies
# differ after initialisation from a seed of each rank's own.
_DRIFT_FIX = (
    "if they are shards in plain tensors, say so: layout=Sharded.from_fsdp1(model) for FSDP1, {pattern: Sharded(group)} "
    "for ZeRO partitions, Megatron or experts; if they are different parameters (experts, pipeline stages), give them "
    "different names; if they are copies, they have drifted or were initialised differently: broadcast them. "
    "check_replicas=False turns this comparison off."
)
# Experts and stages that were initialised from one seed; training without DDP, so that gradients are never averaged.
_GRADIENT_FIX = (
    "if they are different parameters that were initialised alike (pipeline stages, experts), give them different names, or "
    "a layout={pattern: Sharded(group)}; if they are copies, average their gradients before the step, or they drift; if "
    "each rank trains a model of its own, pass its group=. check_replicas=False turns this comparison off."
)
_NAMES_FIX = (
    "The parameters have no names and were matched by position; pass model.named_parameters(): then ranks may hold "
    "different parameters and meshes."
)


@dataclass(frozen=True, slots=True)
class PieceReport:
    """What one rank holds of a parameter in question.

    name_id: the place of its name among all names.
    piece: what this rank holds of it.
    named: whether the user has given the name.
    group: the index of its param group.
    note: what tells this copy from others, as text ("bits 00ff...", a gradient norm).
    """

    name_id: int
    piece: Piece
    named: bool
    group: int
    note: str


def explain(found: OwnerTable, reports: Sequence[Sequence[PieceReport]]) -> str:
    """The text for a plan that does not hold, the same on every rank.

    found: what the rows of all ranks say.
    reports: for each rank, what it holds of the parameters in question.
    """
    sections = [
        _section(
            found.mismatched,
            reports,
            "the same name stands for different tensors on different ranks",
            _meaning,
            _MISMATCH_FIX,
        ),
        _section(found.uncovered, reports, "the pieces do not cover the whole tensor exactly once", _cut, _COVER_FIX),
        _section(found.drifted, reports, "copies of one piece have different bits", _copy, _DRIFT_FIX),
    ]
    return "\n".join([section for section in sections if section] + _names_fix(reports))


def explain_gradients(wrong: Sequence[int], reports: Sequence[Sequence[PieceReport]]) -> str:
    """The text for copies of which the gradients differ, the same on every rank.

    wrong: the places of their names. reports: as in `explain`.
    """
    problem = "copies of one piece have the same bits, but different gradients"
    return "\n".join([_section(wrong, reports, problem, _copy, _GRADIENT_FIX), *_names_fix(reports)])


def explain_alike(alike: Sequence[Sequence[str]]) -> str:
    """The text of a warning for names that may be one weight; alike: the names of each such weight."""
    names = "; ".join(" and ".join(names) for names in alike[:SHOWN])
    return (
        f"different ranks hold the same bits, with the same gradients, by different names: {names}{'; ...' * (len(alike) > SHOWN)}. "
        "If that is one weight (an embedding on the first pipeline stage, and the head that is tied to it on the last), it counts "
        "twice in every number: give both one name, [(name_of[p], p) for ...]. check_replicas=False turns this comparison off."
    )


def explain_change(planned: Sequence[NamedParam], now: Sequence[NamedParam], rules: str) -> str:
    """Why this rank needs another plan, for ranks that go on with the old one.

    planned, now: the parameters of the plan, and those that the optimizer has now.
    rules: the numbers that are measured now, as text.
    """
    # By name, whatever the order: a new order alone is no change that a user would look for.
    before, after = ({entry.name: entry for entry in entries} for entries in (planned, now))
    changes = {
        "new": [name for name in after if name not in before],
        "gone": [name for name in before if name not in after],
        "in another group": [name for name in after if name in before and after[name].group != before[name].group],
    }
    lists = [
        f"{change}: {', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)}"
        for change, names in changes.items()
        if names
    ]
    # The same names in the same groups, so it is something that the names do not show.
    what = f"shapes, placements or rules have changed (now {rules})"
    if lists:
        what = f"parameters have changed ({'; '.join(lists)})"
    return f"its {what}, and not on every rank. {_CHANGE_FIX}"


def _section(
    wrong: Sequence[int],
    reports: Sequence[Sequence[PieceReport]],
    problem: str,
    describe: Callable[[PieceReport], str],
    fix: str,
) -> str:
    """One kind of fault, a line `w: rank 0, 1: ... | rank 2: ...` for each name; "" if nothing is wrong."""
    if not wrong:
        return ""
    lines = [f"{problem}:"]
    for name_id in wrong[:SHOWN]:
        ranks: dict[str, list[int]] = {}
        name = "?"
        for rank, of_rank in enumerate(reports):
            for report in of_rank:
                if report.name_id == name_id:
                    name = report.piece.name
                    # Ranks that hold the same are named together: of 1024 ranks usually all but one are alike.
                    ranks.setdefault(describe(report), []).append(rank)
        held = " | ".join(f"rank {', '.join(map(str, who))}: {what}" for what, who in ranks.items())
        lines.append(f"  {name}: {held}")
    if len(wrong) > SHOWN:
        lines.append(f"  ... and {len(wrong) - SHOWN} more")
    return "\n".join([*lines, f"  What to do: {fix}"])


def _names_fix(reports: Sequence[Sequence[PieceReport]]) -> list[str]:
    """Advice to give names, if some have none. What was matched by position may not belong together at all."""
    return [] if all(report.named for of_rank in reports for report in of_rank) else [_NAMES_FIX]


def _meaning(report: PieceReport) -> str:
    piece = report.piece
    mesh = f" on ranks {list(piece.mesh)}" if piece.mesh else ""
    dtype = str(piece.dtype).removeprefix("torch.")
    return f"{list(piece.shape)} {dtype} {piece.placements}{mesh}, in group {report.group}"


def _cut(report: PieceReport) -> str:
    piece = report.piece
    cuts = ", ".join("+".join(f"{start}:{stop}" for start, stop in cut) or "nothing" for cut in piece.cuts)
    return f"[{cuts}] of {list(piece.shape)} ({piece.placements})"


def _copy(report: PieceReport) -> str:
    return f"{_cut(report)}, {report.note}"
