"""Who speaks for which piece: pure integer arithmetic over the gathered rows, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .manifest import CHECKSUM, GROUP, MEASURE, META, NAME, NUMEL, WHOLE


@dataclass(frozen=True, slots=True)
class Ownership:
    """What the rows of all ranks say together.

    names: [names] int64, sorted hashes of every name that any rank holds; the order of per-tensor metrics.
    numel: [names] int64, elements of each whole tensor; group_numel: [param groups] int64, the same by group.
    name_ids, owned, holders: for each row of `rank` (in its own order), the place of its name in `names`, whether it speaks
    for it, and how many ranks hold it. has_copies: whether any rank holds a piece that another one holds too.
    mismatched, uncovered, drifted: places in `names` where shapes or dtypes differ, pieces do not cover the whole
    exactly once, or copies have different bits. All empty: the plan holds.
    """

    names: Tensor
    numel: Tensor
    group_numel: Tensor
    name_ids: Tensor
    owned: Tensor
    holders: Tensor
    has_copies: bool
    mismatched: list[int]
    uncovered: list[int]
    drifted: list[int]


def resolve(rows: Sequence[Tensor], rank: int, num_groups: int) -> Ownership:
    """Find the owner of every piece (the lowest rank that holds it) and what is wrong. Time and memory grow with the number of rows."""

    def column(number: int) -> Tensor:
        return torch.cat([part[:, number] for part in rows])

    # One column at a time: whole rows in another order would be a second and a third copy of everything.
    names, name_ids = torch.unique(column(NAME), return_inverse=True)
    order = _stable_order(name_ids, column(MEASURE))
    ids, measure, elements = name_ids[order], column(MEASURE)[order], column(NUMEL)[order]
    first = _first_of_run(ids, measure)
    # Ranks come in ascending order and the sort is stable: the first of equal pieces is the lowest rank's.
    speaks = first & (elements > 0)
    numel = _sum_by(ids[speaks], elements[speaks], len(names))
    group_numel = _sum_by(column(GROUP)[order][speaks], elements[speaks], num_groups)
    covered = _sum_by(ids[first], measure[first], len(names))  # pieces of no elements too
    whole = torch.zeros_like(names).scatter_(0, ids, column(WHOLE)[order])
    run = first.cumsum(0) - 1
    checksum = column(CHECKSUM)[order]
    drift = (checksum != checksum[first][run]) & (elements > 0)
    # This rank's own rows, found among the sorted ones and put back into their order.
    begin = sum(len(part) for part in rows[:rank])
    mine = (order >= begin) & (order < begin + len(rows[rank]))
    back = order[mine].argsort()
    mismatched = _disagreeing(name_ids, column(META), len(names))
    return Ownership(
        names,
        numel,
        group_numel,
        ids[mine][back],
        speaks[mine][back],
        run.bincount()[run[mine]][back],
        has_copies=bool((~first & (elements > 0)).any()),
        mismatched=mismatched.nonzero().flatten().tolist(),
        uncovered=((covered != whole) & ~mismatched).nonzero().flatten().tolist(),
        drifted=ids[drift].unique().tolist(),
    )


def _stable_order(major: Tensor, minor: Tensor) -> Tensor:
    order = torch.argsort(minor, stable=True)
    return order[torch.argsort(major[order], stable=True)]


def _first_of_run(ids: Tensor, measure: Tensor) -> Tensor:
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = (ids[1:] != ids[:-1]) | (measure[1:] != measure[:-1])
    return first


def _sum_by(ids: Tensor, values: Tensor, num_names: int) -> Tensor:
    # Wraps around at 2^64, as measures do.
    return torch.zeros(num_names, dtype=torch.int64).index_add_(0, ids, values)


def _disagreeing(ids: Tensor, values: Tensor, num_names: int) -> Tensor:
    zeros = torch.zeros(num_names, dtype=torch.int64)
    low = zeros.scatter_reduce(0, ids, values, "amin", include_self=False)
    high = zeros.scatter_reduce(0, ids, values, "amax", include_self=False)
    return low != high
