"""Prose for what a plan found wrong: which parameters, which ranks, what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .ownership import Ownership
from .params import NamedParam
from .pieces import Piece

SHOWN = 5  # of each kind of fault; ranks need not tell each other of more


@dataclass(frozen=True, slots=True)
class Clue:
    """What one rank says of a name in question. note: what tells its copy from others."""

    name_id: int
    piece: Piece
    named: bool
    group: int
    note: str


def explain(found: Ownership, clues: Sequence[Sequence[Clue]]) -> str:
    """One text for all ranks; clues: by rank."""
    sections = [
        _section(found.mismatched, clues, "ranks mean different tensors by one name", _meaning, _MISMATCH_FIX),
        _section(found.uncovered, clues, "the pieces do not cover the whole tensor exactly once", _cut, _COVER_FIX),
        _section(found.drifted, clues, "copies of one piece have different bits", _copy, _DRIFT_FIX),
    ]
    named = all(clue.named for rank in clues for clue in rank)
    return "\n".join([section for section in sections if section] + ([] if named else [_NAMES_FIX]))


def explain_gradients(wrong: Sequence[int], clues: Sequence[Sequence[Clue]]) -> str:
    """One text for all ranks; wrong: the names of which copies have different gradients."""
    section = _section(
        wrong, clues, "copies of one piece have the same bits, but different gradients", _copy, _GRADIENT_FIX
    )
    return "\n".join([section] + ([] if all(clue.named for rank in clues for clue in rank) else [_NAMES_FIX]))


def explain_change(planned: Sequence[NamedParam], now: Sequence[NamedParam], rules: str) -> str:
    """Why a plan does not fit any more; rules: what is asked for now."""
    before, after = ({entry.name: entry for entry in entries} for entries in (planned, now))
    changes = {
        "new": [name for name in after if name not in before],
        "gone": [name for name in before if name not in after],
        "in another group": [name for name in after if name in before and after[name].group != before[name].group],
    }
    told = [
        f"{word}: {', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)}"
        for word, names in changes.items()
        if names
    ]
    what = (
        f"parameters have changed ({'; '.join(told)})"
        if told
        else f"shapes, placements or rules have changed (now {rules})"
    )
    return f"its {what}, and not on every rank. {_CHANGE_FIX}"


_CHANGE_FIX = (
    "Change groups (add_param_group), shapes, placements and metrics between the same steps on every rank, with an empty "
    "group where a rank has nothing to add."
)
_MISMATCH_FIX = (
    "give different parameters different names, and build every rank's model and param groups alike; shards in plain tensors need a "
    "layout: layout=Sharded.from_fsdp1(model) for FSDP1, {pattern: Sharded(group)} for others."
)
_COVER_FIX = (
    "pass the group of exactly the ranks that hold the model (group=), and pass every parameter on every rank that "
    "holds a piece of it. With Sharded(group) every rank of the group has a piece, if need be an empty tensor; where that cannot be "
    "(Megatron's distributed optimizer), leave the layout out and give the pieces names of their own, such as f'{name} on rank {rank}'."
)
_DRIFT_FIX = (
    "if they are shards in plain tensors, say so: layout=Sharded.from_fsdp1(model) for FSDP1, {pattern: Sharded(group)} "
    "for ZeRO partitions, Megatron or experts; if they are different parameters (experts, pipeline stages), give them "
    "different names; if they are copies, they have drifted or were initialised differently: broadcast them. "
    "check_replicas=False turns this comparison off."
)
_GRADIENT_FIX = (
    "if they are different parameters that were initialised alike (pipeline stages, experts), give them different names, or "
    "a layout={pattern: Sharded(group)}; if they are copies, average their gradients before the step, or they drift; if "
    "each rank trains a model of its own, pass its group=. check_replicas=False turns this comparison off."
)
_NAMES_FIX = (
    "The parameters have no names and were matched by position; pass model.named_parameters(): then ranks may hold "
    "different parameters and meshes."
)


def _section(
    wrong: Sequence[int], clues: Sequence[Sequence[Clue]], problem: str, publish_error: Callable[[Clue], str], fix: str
) -> str:
    if not wrong:
        return ""
    lines = [f"  {_account(name_id, clues, publish_error)}" for name_id in wrong[:SHOWN]]
    more = [f"  ... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    return "\n".join([f"{problem}:", *lines, *more, f"  What to do: {fix}"])


def _account(name_id: int, clues: Sequence[Sequence[Clue]], publish_error: Callable[[Clue], str]) -> str:
    """`w: rank 0, 1: ... | rank 2: ...`"""
    ranks: dict[str, list[int]] = {}
    name = "?"
    for rank, some in enumerate(clues):
        for clue in some:
            if clue.name_id == name_id:
                name = clue.piece.name
                ranks.setdefault(publish_error(clue), []).append(rank)
    told = " | ".join(f"rank {', '.join(map(str, who))}: {what}" for what, who in ranks.items())
    return f"{name}: {told}"


def _meaning(clue: Clue) -> str:
    piece = clue.piece
    mesh = f" on ranks {list(piece.mesh)}" if piece.mesh else ""
    return (
        f"{list(piece.shape)} {str(piece.dtype).removeprefix('torch.')} {piece.placements}{mesh}, in group {clue.group}"
    )


def _cut(clue: Clue) -> str:
    piece = clue.piece
    cuts = ", ".join("+".join(f"{start}:{stop}" for start, stop in cut) or "nothing" for cut in piece.cuts)
    return f"[{cuts}] of {list(piece.shape)} ({piece.placements})"


def _copy(clue: Clue) -> str:
    return f"{_cut(clue)}, {clue.note}"
